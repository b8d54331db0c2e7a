"""Files of named arrays (safetensors), written piece by piece and read array by array, so that neither needs all
of them in memory at once."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from edgeprune.errors import BadFile
from edgeprune.files import atomic_writer

Array = npt.NDArray[Any]
# Names of the format's types (safetensors README, "Format").
_CODES = {"float64": "F64", "float32": "F32", "float16": "F16", "int64": "I64", "int32": "I32", "int16": "I16"}
_TYPES = {code: name for name, code in _CODES.items()}


@dataclass(frozen=True)
class Shape:
    """An array to be written: its name, numpy dtype and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return int(np.dtype(self.dtype).itemsize) * prod(self.shape)


def write_arrays(path: Path, shapes: Sequence[Shape], pieces: Iterable[Array], metadata: Mapping[str, str]) -> None:
    """Write atomically.

    Args:
        pieces: the arrays of ``shapes``, one after the other, each whole or in consecutive parts.

    Raises:
        ValueError: the pieces are not what ``shapes`` says.
    """
    table: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for shape in shapes:
        table[shape.name] = {
            "dtype": _CODES[shape.dtype],
            "shape": list(shape.shape),
            "data_offsets": [offset, offset + shape.nbytes],
        }
        offset += shape.nbytes
    header = json.dumps(table).encode()
    header += b" " * (-len(header) % 8)
    with atomic_writer(path) as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        parts = iter(pieces)
        for shape in shapes:
            left = shape.nbytes
            while left > 0:
                part = np.ascontiguousarray(next(parts), shape.dtype)
                left -= stream.write(part.data)
            if left < 0:
                raise ValueError(f"{shape.name} is larger than {shape.shape}")


class ArrayFile(Mapping[str, Array]):
    """The arrays of a file by name; each is read when it is asked for.

    They are read and not mapped: pages of a mapped file count as memory of the process that looked at them.

    Raises:
        BadFile: missing, truncated or of another kind; or replaced by another while it was in use.
    """

    def __init__(self, path: Path) -> None:
        import safetensors

        self.path = path
        try:
            opened: Any = safetensors.safe_open
            with opened(path, framework="np"):  # refuses a header whose offsets are not those of the arrays
                pass
            with path.open("rb") as stream:
                self._state = _state(stream)
                length = int.from_bytes(stream.read(8), "little")
                table = json.loads(stream.read(length))
        except (OSError, safetensors.SafetensorError) as error:
            raise BadFile(f"cannot read {path}: {error}") from error
        self.metadata: dict[str, str] = table.pop("__metadata__", None) or {}
        if unknown := sorted({entry["dtype"] for entry in table.values()} - _TYPES.keys()):
            raise BadFile(f"cannot read {path}: it holds arrays of the type {unknown[0]}")
        self._table: dict[str, Any] = table
        self._start = 8 + length

    def __getitem__(self, name: str) -> Array:
        return self.part(name, 0, self.shape(name)[0]) if self.shape(name) else self._read(name, 0, 1).reshape(())

    def part(self, name: str, start: int, stop: int) -> Array:
        """Rows ``start`` to ``stop`` of an array."""
        row = self.shape(name)[1:]
        return self._read(name, start * prod(row), (stop - start) * prod(row)).reshape(stop - start, *row)

    def _read(self, name: str, first: int, count: int) -> Array:
        """``count`` numbers of an array, from number ``first`` on."""
        entry = self._table[name]
        dtype = np.dtype(_TYPES[entry["dtype"]])
        offset = self._start + int(entry["data_offsets"][0]) + first * dtype.itemsize
        with self.path.open("rb") as stream:
            if _state(stream) != self._state:
                raise BadFile(f"{self.path} was replaced while it was in use", hint="run the same command again")
            values: Array = np.fromfile(stream, dtype, count, offset=offset)
        if len(values) != count:
            raise BadFile(f"cannot read {self.path}: it ends within {name}", hint="it is damaged; make it again")
        return values

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._table[name]["shape"])

    def __iter__(self) -> Iterator[str]:
        return iter(self._table)

    def __len__(self) -> int:
        return len(self._table)


def _state(stream: BinaryIO) -> tuple[int, int, int]:
    """What tells a file from one that took its place."""
    found = os.fstat(stream.fileno())
    return found.st_ino, found.st_size, found.st_mtime_ns
