"""One GGUF file as several that llama.cpp loads as one, for places that limit the size of a file.

The first part carries all metadata; every part says which it is of how many (``split.no``, ``split.count``,
``split.tensors.count``; llama.cpp, src/llama-model-loader.cpp) and holds whole tensors in file order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from edgeprune.errors import EdgepruneError
from edgeprune.files import atomic_writer, require_space
from edgeprune.model.gguf import (
    Entry,
    GgufFile,
    TensorInfo,
    TensorShape,
    align,
    file_bytes,
    header,
    make_entry,
    replaced,
)
from edgeprune.model.parts import part_name
from edgeprune.units import format_bytes

# Parts are numbered with five digits, and llama.cpp keeps the count in 16 bits.
MOST_PARTS = 65535
_PIECE_BYTES = 1 << 24


@dataclass(frozen=True)
class Part:
    """One file: its path, its size and its SHA-256."""

    path: Path
    nbytes: int
    sha256: str


def file_name(stem: str, number: int, count: int) -> str:
    """The name of file ``number``, from 0, of the ``count`` that a model consists of."""
    return f"{stem}.gguf" if count == 1 else part_name(stem, number, count)


def _entries(file: GgufFile, number: int, count: int) -> list[Entry]:
    """Metadata of part ``number``, counted from 0."""
    own = file.entries if number == 0 else {}
    marks = [
        make_entry("split.no", "u16", number),
        make_entry("split.count", "u16", count),
        make_entry("split.tensors.count", "i32", len(file.tensors)),
    ]
    if number and "general.alignment" in file.entries:
        marks.append(file.entries["general.alignment"])
    return replaced(own, marks)


def _shapes(tensors: Sequence[TensorInfo]) -> list[TensorShape]:
    return [TensorShape(tensor.name, tensor.shape, tensor.type) for tensor in tensors]


def _header(file: GgufFile, tensors: Sequence[TensorInfo], number: int, count: int) -> bytes:
    return header(_entries(file, number, count), _shapes(tensors), file.alignment)


def _distributed(file: GgufFile, most_bytes: int) -> list[list[TensorInfo]]:
    """Tensors in file order, part by part, each part with its header at most ``most_bytes``."""
    parts: list[list[TensorInfo]] = [[]]
    top = len(_header(file, [], 0, MOST_PARTS)) + file.alignment  # with descriptions it is padded anew
    for tensor in file.tensors.values():
        described = len(tensor.name) + 24 + 8 * len(tensor.shape)
        data = align(tensor.nbytes, file.alignment)
        if parts[-1] and top + described + data > most_bytes:
            parts.append([])
            top = len(_header(file, [], 1, MOST_PARTS)) + file.alignment
        if top + described + data > most_bytes:
            raise EdgepruneError(
                f"{file.path} cannot be split: {tensor.name} alone exceeds a part",
                rows=[("the tensor", format_bytes(data)), ("largest part", format_bytes(most_bytes))],
                hint="allow larger parts",
            )
        top += described + data
        parts[-1].append(tensor)
    return parts


def _laid_out(file: GgufFile, most_bytes: int) -> list[tuple[bytes, list[TensorInfo], int]]:
    """Header, tensors and exact size of every part."""
    distributed = _distributed(file, most_bytes)
    count = len(distributed)
    if count > MOST_PARTS:
        raise EdgepruneError(
            f"{file.path} would be {count:,} parts; {MOST_PARTS:,} are the most", hint="allow larger parts"
        )
    tops = [_header(file, tensors, number, count) for number, tensors in enumerate(distributed)]
    return [
        (top, tensors, file_bytes(len(top), _shapes(tensors), file.alignment))
        for top, tensors in zip(tops, distributed, strict=True)
    ]


def split_sizes(source: Path, most_bytes: int) -> list[int]:
    """Exact sizes of the files that ``split`` would write.

    Raises:
        BadFile, EdgepruneError: as ``split``.
    """
    return [nbytes for _, _, nbytes in _laid_out(GgufFile(source), most_bytes)]


def split(
    source: Path,
    folder: Path,
    stem: str,
    most_bytes: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[Part]:
    """``source`` in parts of at most ``most_bytes`` in ``folder``, named ``STEM-00001-of-0000N.gguf``; the same bytes
    whenever it is called.

    Args:
        progress: called with bytes written and bytes in all.

    Raises:
        BadFile: ``source`` is no sound GGUF.
        EdgepruneError: a tensor is larger than a part, there would be too many parts, or the disk has no room.
    """
    file = GgufFile(source)
    laid_out = _laid_out(file, most_bytes)
    sizes = [nbytes for _, _, nbytes in laid_out]
    folder.mkdir(parents=True, exist_ok=True)
    require_space(folder, sum(sizes))
    parts, done, total = [], 0, sum(sizes)
    for number, (top, tensors, nbytes) in enumerate(laid_out):
        path = folder / file_name(stem, number, len(laid_out))
        hasher = hashlib.sha256()
        with atomic_writer(path) as stream:
            for piece in chain((top,), _data(file, tensors)):
                stream.write(piece)
                hasher.update(piece)
                done += len(piece)
                if progress is not None:
                    progress(done, total)
        parts.append(Part(path, nbytes, hasher.hexdigest()))
    return parts


def _data(file: GgufFile, tensors: Sequence[TensorInfo]) -> Iterator[bytes]:
    """The data of ``tensors``, padded, in pieces."""
    for tensor in tensors:
        data = file.raw(tensor.name)
        for start in range(0, data.size, _PIECE_BYTES):
            yield data[start : start + _PIECE_BYTES].tobytes()
        yield bytes(align(tensor.nbytes, file.alignment) - tensor.nbytes)
        file.release(tensor.name)
