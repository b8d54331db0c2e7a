"""Activations between layers, on disk: what a sweep over the layers carries from one to the next."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from edgeprune.files import PARTIAL_SUFFIX

Floats = npt.NDArray[np.float32]


class Carried:
    """One array [tokens, D] per layer boundary and kind, a file each, float32.

    Args:
        folder: where the files lie.
        lengths: tokens of each window.
        width: of the residual stream (D).
    """

    def __init__(self, folder: Path, lengths: Sequence[int], width: int) -> None:
        self._folder, self._width = folder, width
        bounds: list[int] = [0, *np.cumsum(lengths).tolist()]
        self._rows = [slice(start, end) for start, end in pairwise(bounds)]
        self._tokens = bounds[-1]

    def _path(self, kind: str, boundary: int) -> Path:
        return self._folder / f"{kind}-{boundary}.f32"

    @property
    def nbytes(self) -> int:
        """Of one array."""
        return 4 * self._tokens * self._width

    def has(self, kind: str, boundary: int) -> bool:
        """Whether the array is there, whole."""
        path = self._path(kind, boundary)
        return path.is_file() and path.stat().st_size == self.nbytes

    def read(self, kind: str, boundary: int) -> Iterator[torch.Tensor]:
        """The windows in turn, [1, T, D] each."""
        array: Floats = np.memmap(self._path(kind, boundary), np.float32, "r", shape=(self._tokens, self._width))
        for rows in self._rows:
            yield torch.from_numpy(np.array(array[rows]))[None]

    def window(self, kind: str, boundary: int, index: int) -> torch.Tensor:
        """One window, [1, T, D]."""
        array: Floats = np.memmap(self._path(kind, boundary), np.float32, "r", shape=(self._tokens, self._width))
        return torch.from_numpy(np.array(array[self._rows[index]]))[None]

    def write(self, kind: str, boundary: int, windows: Iterator[torch.Tensor]) -> None:
        """All windows in turn; the array is there when the last of them is."""
        path = self._path(kind, boundary)
        partial = path.with_name(path.name + PARTIAL_SUFFIX)
        with partial.open("wb") as stream:
            for window in windows:
                stream.write(np.ascontiguousarray(window.detach().cpu().numpy(), np.float32).tobytes())
        partial.replace(path)

    def forget(self, kind: str, boundary: int) -> None:
        """Give the room back."""
        with contextlib.suppress(FileNotFoundError):
            self._path(kind, boundary).unlink()
