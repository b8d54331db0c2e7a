"""GGUF files: a bounds-checked memory-mapped reader, and headers written byte by byte.

The reader refuses what llama.cpp would refuse (ggml/src/gguf.cpp), before llama.cpp sees the file,
and never believes a count or an offset. Metadata values are kept as the raw bytes of the file, so
that what edgeprune does not change is copied exactly.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeprune.errors import BadFile, Unsupported
from edgeprune.model import ggml
from edgeprune.model.content import content_digest

MAGIC = b"GGUF"
VERSION = 3
DEFAULT_ALIGNMENT = 32
LONGEST_NAME = 63
LONGEST_KEY = 65535  # bytes, by the specification
MOST_DIMENSIONS = 4
LARGEST_COUNT = 1 << 30  # strings and arrays beyond this are refused by llama.cpp too

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_SCALARS = {
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
_SIZES = {kind: struct.calcsize(form) for kind, form in _SCALARS.items()}
TYPE_IDS = {
    "u8": U8, "i8": I8, "u16": U16, "i16": I16, "u32": U32, "i32": I32, "f32": F32,
    "bool": BOOL, "str": STRING, "u64": U64, "i64": I64, "f64": F64,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One metadata value: its type, and for arrays the element type and count; ``raw`` is everything
    after the key as it stands in the file (type, value)."""

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
            return np.frombuffer(body, np.dtype(_SCALARS[self.element]), self.count)
        if self.kind == STRING:
            return self.raw[12:].decode("utf-8", errors="replace")
        return struct.unpack(_SCALARS[self.kind], self.raw[4:])[0]


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as the header describes it.

    Attributes:
        shape: extents in ggml's order: row width first, experts last.
        offset: bytes from the start of the file.
        nbytes: exact size without padding.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int


def _strings(body: bytes, count: int) -> list[str]:
    values, position = [], 0
    for _ in range(count):
        (length,) = struct.unpack_from("<Q", body, position)
        position += 8
        values.append(body[position : position + length].decode("utf-8", errors="replace"))
        position += length
    return values


def _shown(name: str) -> str:
    """``name`` for a one-line message, whatever a hostile file put into it."""
    return name if name.isprintable() and len(name) <= 80 else repr(name)[:80]


class _Cursor:
    """A position in the mapped file that refuses to pass its end."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.position, self.end = data, path, 0, len(data)

    def fail(self, what: str) -> BadFile:
        return BadFile(f"{self.path}: {what} (at byte {self.position:,} of {self.end:,})")

    def take(self, count: int) -> bytes:
        if count < 0 or self.position + count > self.end:
            raise self.fail(f"truncated or corrupt GGUF: {count:,} bytes wanted beyond the end of the file")
        start, self.position = self.position, self.position + count
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
            raise self.fail(f"an empty or overlong {what} {_shown(text)}")
        return text

    def skip_strings(self, count: int) -> None:
        """Advance over ``count`` strings; the loop is the cost of a large vocabulary."""
        unpack, data, position, end = struct.Struct("<Q").unpack_from, self.data, self.position, self.end
        for _ in range(count):
            if position + 8 > end:
                position = end + 1
                break
            position += 8 + unpack(data, position)[0]
        if position > end:
            self.position = end
            raise self.fail("truncated or corrupt GGUF: an array of strings runs beyond the end of the file")
        self.position = position


class GgufFile:
    """A GGUF file mapped read-only.

    Attributes:
        path: the file.
        entries: metadata by key, in file order.
        tensors: tensor descriptions by name, in file order.
        alignment: of tensor data, bytes.
        data_offset: where tensor data begins, bytes.
        size: of the file, bytes.

    Raises:
        BadFile: not a GGUF, truncated, corrupt or hostile; says where.
        Unsupported: GGUF version 1, or one part of a split model.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as stream:
                stream.seek(0, 2)
                if stream.tell() < 24:
                    raise BadFile(f"{path}: {stream.tell()} bytes are too few for a GGUF file")
                self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise BadFile(f"cannot read {path}: {error.strerror or error}") from error
        self.size = len(self._map)
        cursor = _Cursor(self._map, self.path)
        tensor_count, entry_count = self._read_preamble(cursor)
        self.entries = self._read_entries(cursor, entry_count)
        self.alignment = self._read_alignment()
        self.tensors = self._read_tensors(cursor, tensor_count)
        split = self.entries.get("split.count")
        # llama.cpp wants u16 here; one that is an array or a text means nothing.
        if split is not None and split.kind in _SCALARS and split.value() > 1:
            raise Unsupported(
                f"{path} is one part of a split model",
                hint="join the parts first: llama-gguf-split --merge FIRST-PART OUTPUT",
            )

    def _read_preamble(self, cursor: _Cursor) -> tuple[int, int]:
        magic = cursor.take(4)
        if magic != MAGIC:
            raise BadFile(f"{self.path} is not a GGUF file: it begins with {magic!r}")
        version = cursor.number("<I")
        if version not in (2, VERSION):
            raise Unsupported(f"{self.path}: GGUF version {version}; edgeprune reads 2 and 3")
        tensor_count, entry_count = cursor.number("<Q"), cursor.number("<Q")
        # Each tensor takes at least 24 bytes of header and each entry 12.
        if tensor_count * 24 + entry_count * 12 > self.size:
            raise cursor.fail(
                f"truncated or corrupt GGUF: claims {tensor_count:,} tensors and {entry_count:,} metadata entries"
            )
        return tensor_count, entry_count

    def _read_entries(self, cursor: _Cursor, count: int) -> dict[str, Entry]:
        entries: dict[str, Entry] = {}
        for _ in range(count):
            key = cursor.name("metadata key", LONGEST_KEY)
            if key in entries:
                raise cursor.fail(f"the metadata key {_shown(key)} twice")
            entries[key] = self._read_entry(cursor, key)
        return entries

    def _read_entry(self, cursor: _Cursor, key: str) -> Entry:
        start = cursor.position
        kind, element, length = cursor.number("<I"), 0, 1
        if kind == ARRAY:
            element, length = cursor.number("<I"), cursor.number("<Q")
            if length > LARGEST_COUNT or (element not in _SCALARS and element != STRING):
                raise cursor.fail(f"metadata {_shown(key)}: an array of {length:,} elements of type {element}")
            if element == STRING:
                cursor.skip_strings(length)
            else:
                cursor.take(length * _SIZES[element])
        elif kind == STRING:
            cursor.string()
        elif kind in _SCALARS:
            cursor.take(_SIZES[kind])
        else:
            raise cursor.fail(f"metadata {_shown(key)}: unknown value type {kind}")
        return Entry(key, kind, element, length, self._map[start : cursor.position])

    def _read_alignment(self) -> int:
        entry = self.entries.get("general.alignment")
        if entry is None:
            return DEFAULT_ALIGNMENT
        alignment = entry.value() if entry.kind == U32 else 0
        if alignment <= 0 or alignment & (alignment - 1):
            raise BadFile(f"{self.path}: general.alignment is not a power of two")
        return int(alignment)

    def _read_tensors(self, cursor: _Cursor, count: int) -> dict[str, TensorInfo]:
        described: dict[str, tuple[tuple[int, ...], str, int]] = {}
        for _ in range(count):
            name = cursor.name("tensor name", LONGEST_NAME)
            if name in described:
                raise cursor.fail(f"the tensor {_shown(name)} twice")
            described[name] = self._read_shape(cursor, name)
        self.data_offset = align(cursor.position, self.alignment)
        tensors, running = {}, 0
        for name, (shape, kind, offset) in described.items():
            nbytes = ggml.tensor_bytes(kind, shape)
            if offset != running:
                raise BadFile(f"{self.path}: tensor {_shown(name)} at offset {offset:,} where {running:,} is due")
            if self.data_offset + offset + nbytes > self.size:
                raise BadFile(
                    f"{self.path} is truncated: tensor {_shown(name)} ends at byte "
                    f"{self.data_offset + offset + nbytes:,}, the file at {self.size:,}",
                    hint="the download or copy was cut off; get the file again",
                )
            tensors[name] = TensorInfo(name, shape, kind, self.data_offset + offset, nbytes)
            running = align(offset + nbytes, self.alignment)
        return tensors

    def _read_shape(self, cursor: _Cursor, name: str) -> tuple[tuple[int, ...], str, int]:
        dimensions = cursor.number("<I")
        if not 0 < dimensions <= MOST_DIMENSIONS:
            raise cursor.fail(f"tensor {_shown(name)} has {dimensions} dimensions")
        shape = tuple(cursor.number("<Q") for _ in range(dimensions))
        kind = ggml.BY_ID.get(cursor.number("<I"))
        offset = cursor.number("<Q")
        if kind is None:
            raise cursor.fail(f"tensor {_shown(name)} has an unknown type")
        if min(shape) < 1 or shape[0] % kind.block or int(np.prod([float(n) for n in shape])) > 2**50:
            raise cursor.fail(f"tensor {_shown(name)} has the impossible shape {list(shape)} for {kind.name}")
        return shape, kind.name, offset

    def get(self, key: str, default: Any = None) -> Any:
        """The value of metadata ``key``, or ``default``."""
        entry = self.entries.get(key)
        return default if entry is None else entry.value()

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        """The bytes of tensor ``name`` as a read-only view into the map, uint8 [nbytes]."""
        info = self.tensors[name]
        return np.frombuffer(self._map, np.uint8, info.nbytes, info.offset)

    def release(self, name: str, part: int = 0, parts: int = 1) -> None:
        """Tell the system that the pages of tensor ``name`` will not be needed again soon, so that
        reading through a large file does not count as resident memory.

        Args:
            part, parts: only this one of so many equal parts, as the matrix of one expert.
        """
        info = self.tensors[name]
        if hasattr(mmap, "MADV_DONTNEED"):
            size = info.nbytes // parts
            first = info.offset + part * size
            start = first // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, start, first + size - start)

    def fingerprint(self) -> str:
        """SHA-256 of the whole file: any other byte, and it is another model. See ``content`` for what that costs."""
        return content_digest(self.path)


def align(position: int, alignment: int) -> int:
    """The next multiple of ``alignment`` at or after ``position``."""
    return (position + alignment - 1) // alignment * alignment


def make_entry(key: str, kind: str, value: Any) -> Entry:
    """A metadata entry of type ``kind`` (``"u32"``, ``"str"``, ``"[f32]"``, ...) with ``value``."""
    if kind.startswith("["):
        element = TYPE_IDS[kind[1:-1]]
        if element == STRING:
            body = b"".join(_packed_string(item) for item in value)
        else:
            body = np.asarray(value).astype(np.dtype(_SCALARS[element])).tobytes()
        raw = struct.pack("<IIQ", ARRAY, element, len(value)) + body
        return Entry(key, ARRAY, element, len(value), raw)
    number = TYPE_IDS[kind]
    packed = _packed_string(value) if number == STRING else struct.pack(_SCALARS[number], value)
    return Entry(key, number, 0, 1, struct.pack("<I", number) + packed)


def _packed_string(value: str | bytes) -> bytes:
    encoded = value if isinstance(value, bytes) else value.encode("utf-8", errors="surrogateescape")
    return struct.pack("<Q", len(encoded)) + encoded


@dataclass(frozen=True)
class TensorShape:
    """A tensor to be written: name, shape in ggml's order, type."""

    name: str
    shape: tuple[int, ...]
    type: str

    @property
    def nbytes(self) -> int:
        return ggml.tensor_bytes(self.type, self.shape)


def header(entries: Iterable[Entry], tensors: Iterable[TensorShape], alignment: int) -> bytes:
    """The bytes of a GGUF file up to its tensor data, padded to ``alignment``."""
    entries, tensors = list(entries), list(tensors)
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(entries))]
    parts += [_packed_string(entry.key) + entry.raw for entry in entries]
    offset = 0
    for tensor in tensors:
        parts.append(_packed_string(tensor.name))
        parts.append(struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape))
        parts.append(struct.pack("<IQ", ggml.BY_NAME[tensor.type].id, offset))
        offset = align(offset + tensor.nbytes, alignment)
    joined = b"".join(parts)
    return joined + bytes(align(len(joined), alignment) - len(joined))


def file_bytes(header_bytes: int, tensors: Iterable[TensorShape], alignment: int) -> int:
    """Exact size of the file: header, and every tensor padded to ``alignment``."""
    return header_bytes + sum(align(tensor.nbytes, alignment) for tensor in tensors)


def replaced(entries: Mapping[str, Entry], changes: Iterable[Entry]) -> list[Entry]:
    """``entries`` with those of the same key replaced in place and new ones appended."""
    merged = dict(entries)
    for change in changes:
        merged[change.key] = change
    return list(merged.values())
