"""The header of a GGUF file, read with every bound checked, wherever the file lies.

The reader refuses what llama.cpp would refuse (ggml/src/gguf.cpp), before llama.cpp sees the file, and never
believes a count or an offset. What it reads from is a mapped file, or one on a server of which only the header
is fetched (``remote``).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from edgeprune.errors import BadFile, Unsupported
from edgeprune.model import ggml

MAGIC = b"GGUF"
VERSION = 3
DEFAULT_ALIGNMENT = 32
LONGEST_NAME = 63
LONGEST_KEY = 65535  # bytes, by the specification
MOST_DIMENSIONS = 4
LARGEST_COUNT = 1 << 30  # strings and arrays beyond this are refused by llama.cpp too
SMALLEST_FILE = 24  # bytes: magic, version and two counts

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
SCALARS = {
    U8: "<B",
    I8: "<b",
    U16: "<H",
    I16: "<h",
    U32: "<I",
    I32: "<i",
    F32: "<f",
    BOOL: "<?",
    U64: "<Q",
    I64: "<q",
    F64: "<d",
}
_SIZES = {kind: struct.calcsize(form) for kind, form in SCALARS.items()}
# What llama-gguf-split appends, and what says how tensors are aligned.
_LATE = ("split.no", "split.count", "split.tensors.count", "general.alignment")
# Arrays of more elements count tokens, not layers.
_KEPT = 1024
# Strings of an array are walked over in pieces of so many bytes.
_PIECE = 1 << 12


class Readable(Protocol):
    """Bytes of a known number that are read in slices."""

    def __len__(self) -> int: ...

    def __getitem__(self, key: slice, /) -> bytes: ...


@dataclass(frozen=True)
class Holed:
    """A header with a hole behind it instead of weights.

    Attributes:
        top: the bytes in front of the hole.
        nbytes: with the hole.
    """

    top: bytes
    nbytes: int

    def __len__(self) -> int:
        return self.nbytes

    def __getitem__(self, key: slice, /) -> bytes:
        start, stop, _ = key.indices(self.nbytes)
        return self.top[start:stop].ljust(max(stop - start, 0), b"\0")


# Of (bytes, start of an array of texts, how many, number of tensors): where the first tensor is described, or None.
Locate = Callable[[Readable, int, int, int], int | None]


@dataclass(frozen=True)
class Entry:
    """One metadata value: its type, and for arrays the element type and count; ``raw`` is everything
    after the key as it stands in the file (type, value), or nothing of an array that was only skipped."""

    key: str
    kind: int
    element: int
    count: int
    raw: bytes

    def value(self) -> Any:
        """The value as Python objects; number arrays as numpy arrays."""
        if self.kind == ARRAY:
            body = self.raw[16:]
            if self.element == STRING:
                return _strings(body, self.count)
            return np.frombuffer(body, np.dtype(SCALARS[self.element]), self.count)
        if self.kind == STRING:
            return self.raw[12:].decode("utf-8", errors="replace")
        return struct.unpack(SCALARS[self.kind], self.raw[4:])[0]


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as the header describes it.

    Attributes:
        shape: extents in ggml's order: row width first, experts last.
        offset: bytes from the start of the file that holds it.
        nbytes: exact size without padding.
        part: number of that file, from 0, where a model is split.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int
    part: int = 0


@dataclass(eq=False)
class Header:
    """What stands before the data of a GGUF file.

    Attributes:
        path: of the file, or what it is called in messages.
        entries: metadata by key, in file order.
        tensors: tensor descriptions by name, in file order.
        alignment: of tensor data, bytes.
        data_offset: where tensor data begins, bytes.
        size: of the file, bytes.
    """

    path: Path
    entries: dict[str, Entry]
    tensors: dict[str, TensorInfo]
    alignment: int
    data_offset: int
    size: int

    def get(self, key: str, default: Any = None) -> Any:
        """The value of metadata ``key``, or ``default``."""
        entry = self.entries.get(key)
        return default if entry is None else entry.value()


def _strings(body: bytes, count: int) -> list[str]:
    values, position = [], 0
    for _ in range(count):
        (length,) = struct.unpack_from("<Q", body, position)
        position += 8
        values.append(body[position : position + length].decode("utf-8", errors="replace"))
        position += length
    return values


def shown(name: str) -> str:
    """``name`` for a one-line message, whatever a hostile file put into it."""
    return name if name.isprintable() and len(name) <= 80 else repr(name)[:80]


def align(position: int, alignment: int) -> int:
    """The next multiple of ``alignment`` at or after ``position``."""
    return (position + alignment - 1) // alignment * alignment


class _Cursor:
    """A position in the file that refuses to pass its end."""

    def __init__(self, data: Readable, path: Path) -> None:
        self.data, self.path, self.position, self.end = data, path, 0, len(data)

    def fail(self, what: str) -> BadFile:
        return BadFile(f"{self.path}: {what} (at byte {self.position:,} of {self.end:,})")

    def skip(self, count: int) -> None:
        if count < 0 or self.position + count > self.end:
            raise self.fail(f"truncated or corrupt GGUF: {count:,} bytes wanted beyond the end of the file")
        self.position += count

    def take(self, count: int) -> bytes:
        start = self.position
        self.skip(count)
        return self.data[start : self.position]

    def number(self, form: str) -> int:
        return int(struct.unpack(form, self.take(struct.calcsize(form)))[0])

    def string(self) -> bytes:
        length = self.number("<Q")
        if length > LARGEST_COUNT:
            raise self.fail(f"a string of {length:,} bytes")
        return self.take(length)

    def name(self, what: str, longest: int) -> str:
        """A key or a tensor name, which must survive being written again."""
        raw = self.string()
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.fail(f"a {what} that is not UTF-8") from None
        if not raw or len(raw) > longest:
            raise self.fail(f"an empty or overlong {what} {shown(text)}")
        return text

    def skip_strings(self, count: int) -> None:
        """Advance over ``count`` strings; the loop is the cost of a large vocabulary."""
        unpack, position, end = struct.Struct("<Q").unpack_from, self.position, self.end
        piece, start = b"", position
        for _ in range(count):
            if position + 8 > start + len(piece):
                piece, start = self.data[position : position + _PIECE], position
                if len(piece) < 8:
                    position = end + 1
                    break
            position += 8 + unpack(piece, position - start)[0]
        if position > end:
            self.position = end
            raise self.fail("truncated or corrupt GGUF: an array of strings runs beyond the end of the file")
        self.position = position


class _Reader:
    """One pass over a header."""

    def __init__(self, data: Readable, path: Path, locate: Locate | None) -> None:
        self.data, self.path, self.locate, self.skim = data, path, locate, locate is not None
        self.cursor = _Cursor(data, path)

    def read(self) -> Header:
        tensor_count, entry_count = self._preamble()
        entries: dict[str, Entry] = {}
        for _ in range(entry_count):
            key = self.cursor.name("metadata key", LONGEST_KEY)
            if key in entries:
                raise self.cursor.fail(f"the metadata key {shown(key)} twice")
            if self.locate is not None and (found := self._leap(entries, tensor_count)) is not None:
                return found
            entries[key] = self._entry(key)
        return self._rest(entries, tensor_count)

    def _rest(self, entries: dict[str, Entry], tensor_count: int) -> Header:
        alignment = self._alignment(entries)
        described = self._described(tensor_count)
        data_offset = align(self.cursor.position, alignment)
        tensors = self._placed(described, alignment, data_offset)
        return Header(self.path, entries, tensors, alignment, data_offset, len(self.data))

    def _leap(self, entries: dict[str, Entry], tensor_count: int) -> Header | None:
        """The header without what follows from here to the table of tensors, if a vocabulary begins here and the
        table is found behind it and accounts for every byte of the file."""
        here, start = self.cursor.position, self.data[self.cursor.position : self.cursor.position + 16]
        kind, element, count = struct.unpack("<IIQ", start) if len(start) == 16 else (0, 0, 0)
        locate = self.locate
        if (kind, element) != (ARRAY, STRING) or not _KEPT < count < LARGEST_COUNT or locate is None:
            return None
        self.locate = None  # it is tried once
        try:
            table = locate(self.data, here + 16, count, tensor_count)
            if table is not None:
                self.cursor.position = table
                found = self._rest({**entries, **self._late(table)}, tensor_count)
                if _adds_up(found):
                    return found
        except BadFile:
            pass
        self.cursor.position = here
        return None

    def _late(self, table: int) -> dict[str, Entry]:
        """Entries that matter here and that tools append behind all others, in front of the ``table``."""
        begin = max(table - _PIECE, 0)
        body, found = self.data[begin:table], {}
        for key in _LATE:
            at = body.rfind(struct.pack("<Q", len(key)) + key.encode())
            if at >= 0:
                self.cursor.position = begin + at + 8 + len(key)
                found[key] = self._entry(key)
        self.cursor.position = table
        return found

    def _preamble(self) -> tuple[int, int]:
        """Numbers of tensors and of metadata entries."""
        if len(self.data) < SMALLEST_FILE:
            raise BadFile(f"{self.path}: {len(self.data)} bytes are too few for a GGUF file")
        cursor = self.cursor
        magic = cursor.take(4)
        if magic != MAGIC:
            raise BadFile(
                f"{self.path} is not a GGUF file: it begins with {magic!r}",
                hint="give a GGUF, the folder of a Hugging Face checkpoint, or ORG/NAME on the Hub",
            )
        version = cursor.number("<I")
        if version not in (2, VERSION):
            raise Unsupported(f"{self.path}: GGUF version {version}; edgeprune reads 2 and 3")
        tensor_count, entry_count = cursor.number("<Q"), cursor.number("<Q")
        # Each tensor takes at least 24 bytes of header and each entry 12.
        if tensor_count * 24 + entry_count * 12 > len(self.data):
            raise cursor.fail(
                f"truncated or corrupt GGUF: claims {tensor_count:,} tensors and {entry_count:,} metadata entries"
            )
        return tensor_count, entry_count

    def _entry(self, key: str) -> Entry:
        cursor = self.cursor
        start = cursor.position
        kind, element, length = cursor.number("<I"), 0, 1
        if kind == ARRAY:
            element, length = cursor.number("<I"), cursor.number("<Q")
            if length > LARGEST_COUNT or (element not in SCALARS and element != STRING):
                raise cursor.fail(f"metadata {shown(key)}: an array of {length:,} elements of type {element}")
            if element == STRING:
                cursor.skip_strings(length)
            else:
                cursor.skip(length * _SIZES[element])
            if self.skim and length > _KEPT:
                return Entry(key, kind, element, length, b"")
        elif kind == STRING:
            cursor.string()
        elif kind in SCALARS:
            cursor.skip(_SIZES[kind])
        else:
            raise cursor.fail(f"metadata {shown(key)}: unknown value type {kind}")
        return Entry(key, kind, element, length, self.data[start : cursor.position])

    def _alignment(self, entries: dict[str, Entry]) -> int:
        entry = entries.get("general.alignment")
        if entry is None:
            return DEFAULT_ALIGNMENT
        alignment = entry.value() if entry.kind == U32 else 0
        if alignment <= 0 or alignment & (alignment - 1):
            raise BadFile(f"{self.path}: general.alignment is not a power of two")
        return int(alignment)

    def _described(self, count: int) -> dict[str, tuple[tuple[int, ...], str, int]]:
        """Shape, type and offset of every tensor by name."""
        described: dict[str, tuple[tuple[int, ...], str, int]] = {}
        for _ in range(count):
            name = self.cursor.name("tensor name", LONGEST_NAME)
            if name in described:
                raise self.cursor.fail(f"the tensor {shown(name)} twice")
            described[name] = self._shape(name)
        return described

    def _shape(self, name: str) -> tuple[tuple[int, ...], str, int]:
        cursor = self.cursor
        dimensions = cursor.number("<I")
        if not 0 < dimensions <= MOST_DIMENSIONS:
            raise cursor.fail(f"tensor {shown(name)} has {dimensions} dimensions")
        shape = tuple(cursor.number("<Q") for _ in range(dimensions))
        kind = ggml.BY_ID.get(cursor.number("<I"))
        offset = cursor.number("<Q")
        if kind is None:
            raise cursor.fail(f"tensor {shown(name)} has an unknown type")
        if min(shape) < 1 or shape[0] % kind.block or int(np.prod([float(n) for n in shape])) > 2**50:
            raise cursor.fail(f"tensor {shown(name)} has the impossible shape {list(shape)} for {kind.name}")
        return shape, kind.name, offset

    def _placed(
        self, described: dict[str, tuple[tuple[int, ...], str, int]], alignment: int, data_offset: int
    ) -> dict[str, TensorInfo]:
        """The tensors, after checking that each stands where it is due and within the file."""
        tensors, running, size = {}, 0, len(self.data)
        for name, (shape, kind, offset) in described.items():
            nbytes = ggml.tensor_bytes(kind, shape)
            if offset != running:
                raise BadFile(f"{self.path}: tensor {shown(name)} at offset {offset:,} where {running:,} is due")
            if data_offset + offset + nbytes > size:
                raise BadFile(
                    f"{self.path} is truncated: tensor {shown(name)} ends at byte "
                    f"{data_offset + offset + nbytes:,}, the file at {size:,}",
                    hint="the download or copy was cut off; get the file again",
                )
            tensors[name] = TensorInfo(name, shape, kind, data_offset + offset, nbytes)
            running = align(offset + nbytes, alignment)
        return tensors


def _adds_up(header: Header) -> bool:
    """Whether the tensors end where the file does, and the metadata that were read are those that they need."""
    arch = header.get("general.architecture")
    experts = any("_exps." in name for name in header.tensors)
    needed = [f"{arch}.block_count", *([f"{arch}.expert_count"] if experts else [])]
    end = max((info.offset + info.nbytes for info in header.tensors.values()), default=0)
    return all(key in header.entries for key in needed) and 0 <= header.size - end < header.alignment


def read_header(data: Readable, path: Path, locate: Locate | None = None) -> Header:
    """The header of the GGUF file ``data``.

    Args:
        path: what the file is called in messages.
        locate: finds the table of tensors behind a vocabulary, for a file that is far away: arrays with more
            elements than a model can have layers are not kept then, nor is what follows a vocabulary.

    Raises:
        BadFile: not a GGUF, truncated, corrupt or hostile; says where.
        Unsupported: GGUF version 1.
    """
    return _Reader(data, path, locate).read()
