"""Finished tensors of a file that is built in stages, one file each, until the whole is put together."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgeprune.files import atomic_writer

Bytes = npt.NDArray[np.uint8]


class Store:
    """A folder with the data of tensors, exactly as the GGUF will have it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.tensor"

    def __contains__(self, name: str) -> bool:
        return self._path(name).is_file()

    def write(self, name: str, pieces: Iterable[Bytes]) -> None:
        """Tensor ``name`` from consecutive pieces; there when the last of them is."""
        self.write_together([name], ([piece] for piece in pieces))

    def write_together(self, names: Sequence[str], pieces: Iterable[Sequence[Bytes]]) -> None:
        """Tensors ``names`` from consecutive pieces of each; there when the last of them are."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            streams = [stack.enter_context(atomic_writer(self._path(name))) for name in names]
            for own in pieces:
                for stream, piece in zip(streams, own, strict=True):
                    stream.write(np.ascontiguousarray(piece).data)

    def read(self, name: str) -> Bytes:
        """The data of ``name``, mapped."""
        with self._path(name).open("rb") as stream:
            return np.frombuffer(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
