"""GGUF files: a bounds-checked memory-mapped reader, and headers written byte by byte.

Metadata values are kept as the raw bytes of the file, so that what edgeprune does not change is copied exactly.
"""

from __future__ import annotations

import hashlib
import mmap
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeprune.errors import BadFile
from edgeprune.model import ggml
from edgeprune.model.content import content_digest
from edgeprune.model.headers import (
    ARRAY,
    BOOL,
    DEFAULT_ALIGNMENT,
    F32,
    F64,
    I8,
    I16,
    I32,
    I64,
    MAGIC,
    SCALARS,
    SMALLEST_FILE,
    STRING,
    U8,
    U16,
    U32,
    U64,
    VERSION,
    Entry,
    Header,
    TensorInfo,
    align,
    read_header,
)
from edgeprune.model.parts import first_part, joined, names_of_parts

__all__ = [
    "DEFAULT_ALIGNMENT",
    "MAGIC",
    "Entry",
    "GgufFile",
    "TensorInfo",
    "TensorShape",
    "align",
    "file_bytes",
    "header",
    "make_entry",
    "replaced",
]

TYPE_IDS = {
    "u8": U8, "i8": I8, "u16": U16, "i16": I16, "u32": U32, "i32": I32, "f32": F32,
    "bool": BOOL, "str": STRING, "u64": U64, "i64": I64, "f64": F64,
}  # fmt: skip


class GgufFile(Header):
    """A model in one GGUF file, or in the parts that it is split into, mapped read-only.

    Attributes:
        path: the file that llama.cpp is given: the only one, or the first part.
        paths: all of them.
        tensors: of all parts; ``offset`` counts within the tensor's own part.
        size: of all parts together, bytes.

    Raises:
        BadFile: not a GGUF, truncated, corrupt or hostile, or a part is missing or of another model; says where.
        Unsupported: GGUF version 1.
    """

    def __init__(self, path: Path) -> None:
        path = first_part(Path(path))
        first = _mapped(path)
        header = read_header(first, path)
        names = names_of_parts(path.name, header)
        self.paths = tuple(path.with_name(name) for name in names)
        missing = [other.name for other in self.paths if not other.is_file()]
        if missing:
            raise BadFile(
                f"{path.with_name(missing[0])} is missing: {len(missing)} of the model's {len(names)} parts "
                f"{'is' if len(missing) == 1 else 'are'} not there",
                hint="all parts have to lie in one folder",
            )
        others = [_mapped(other) for other in self.paths[1:]]
        self._maps = (first, *others)
        headers = [header]
        headers += [read_header(data, other) for other, data in zip(self.paths[1:], others, strict=True)]
        whole = joined(headers)
        super().__init__(path, whole.entries, whole.tensors, whole.alignment, whole.data_offset, whole.size)

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        """The bytes of tensor ``name`` as a read-only view into the map, uint8 [nbytes]."""
        info = self.tensors[name]
        return np.frombuffer(self._maps[info.part], np.uint8, info.nbytes, info.offset)

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
            self._maps[info.part].madvise(mmap.MADV_DONTNEED, start, first + size - start)

    def fingerprint(self, progress: Callable[[int, int], None] | None = None) -> str:
        """SHA-256 of the whole file, or of those of the parts: any other byte, and it is another model. See
        ``content`` for what that costs; ``progress`` is called with steps done and steps in all."""
        digests = []
        for number, path in enumerate(self.paths):

            def told(done: int, total: int, number: int = number) -> None:
                if progress is not None:  # parts are about equally long
                    progress(number * total + done, len(self.paths) * total)

            digests.append(content_digest(path, told))
        return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _mapped(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as stream:
            stream.seek(0, 2)
            if stream.tell() < SMALLEST_FILE:
                raise BadFile(f"{path}: {stream.tell()} bytes are too few for a GGUF file")
            return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise BadFile(f"cannot read {path}: {error.strerror or error}") from error


def make_entry(key: str, kind: str, value: Any) -> Entry:
    """A metadata entry of type ``kind`` (``"u32"``, ``"str"``, ``"[f32]"``, ...) with ``value``."""
    if kind.startswith("["):
        element = TYPE_IDS[kind[1:-1]]
        if element == STRING:
            body = b"".join(_packed_string(item) for item in value)
        else:
            body = np.asarray(value).astype(np.dtype(SCALARS[element])).tobytes()
        raw = struct.pack("<IIQ", ARRAY, element, len(value)) + body
        return Entry(key, ARRAY, element, len(value), raw)
    number = TYPE_IDS[kind]
    packed = _packed_string(value) if number == STRING else struct.pack(SCALARS[number], value)
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
