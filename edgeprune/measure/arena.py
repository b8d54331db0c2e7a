"""Memory for sums that may be larger than the machine's."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import numpy as np

from edgeprune.measure.tensorfile import Array

# Every mapping costs an open file, so arrays share large ones; small models need little.
_SMALLEST_SLAB, _LARGEST_SLAB = 1 << 16, 1 << 24
_ALIGNMENT = 64


class Arena:
    """Zeroed arrays in unnamed files: the system moves them to the disk when memory is short."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._slab: mmap.mmap | None = None
        self._used = 0
        self._next = _SMALLEST_SLAB

    def zeros(self, shapes: Mapping[str, tuple[tuple[int, ...], str]]) -> dict[str, Array]:
        """Arrays by name, of the given shapes and numpy dtypes.

        Raises:
            OSError: the disk has no room for them.
        """
        return {name: self._array(shape, kind) for name, (shape, kind) in shapes.items()}

    def _array(self, shape: tuple[int, ...], kind: str) -> Array:
        count = int(np.prod(shape))
        size = -(-count * np.dtype(kind).itemsize // _ALIGNMENT) * _ALIGNMENT
        if self._slab is None or self._used + size > len(self._slab):
            self._slab, self._used = _mapped(self._folder, max(size, self._next)), 0
            self._next = min(2 * self._next, _LARGEST_SLAB)
        array: Array = np.frombuffer(self._slab, kind, count, self._used).reshape(shape)
        self._used += size
        return array


def _mapped(folder: Path, size: int) -> mmap.mmap:
    with tempfile.TemporaryFile(dir=folder) as file:
        _reserve(file, size)
        return mmap.mmap(file.fileno(), size)


def _reserve(file: IO[bytes], size: int) -> None:
    """Room on the disk now: a hole that cannot be filled later would kill the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
        return
    for start in range(0, size, 1 << 20):
        file.write(bytes(min(1 << 20, size - start)))
    file.flush()
