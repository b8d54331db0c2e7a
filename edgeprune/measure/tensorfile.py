"""Files of named arrays (safetensors), written piece by piece and read array by array, so that neither needs all
of them in memory at once."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeprune.errors import BadFile
from edgeprune.files import atomic_writer

Array = npt.NDArray[Any]
# Names of the format's types (safetensors README, "Format").
_CODES = {"float64": "F64", "float32": "F32", "float16": "F16", "int64": "I64", "int32": "I32", "int16": "I16"}


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

    Raises:
        BadFile: missing, truncated or of another kind.
    """

    def __init__(self, path: Path) -> None:
        import safetensors

        self.path = path
        try:
            opened: Any = safetensors.safe_open
            self._file = opened(path, framework="np")
            self.metadata: dict[str, str] = dict(self._file.metadata() or {})
            self._names = dict.fromkeys(self._file.keys())
        except (OSError, safetensors.SafetensorError) as error:
            raise BadFile(f"cannot read {path}: {error}", hint="delete the file") from error

    def __getitem__(self, name: str) -> Array:
        if name not in self._names:
            raise KeyError(name)
        value: Array = self._file.get_tensor(name)
        return value

    def part(self, name: str, start: int, stop: int) -> Array:
        """Rows ``start`` to ``stop`` of an array."""
        value: Array = self._file.get_slice(name)[start:stop]
        return value

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(name).get_shape())

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
