"""A source some of whose tensors have other data, of the same type and shape."""

from __future__ import annotations

from pathlib import Path

from edgeprune.build.store import Bytes, Store
from edgeprune.model.gguf import GgufFile


class Overlay(GgufFile):
    """The model at ``path`` with the tensors in ``store`` instead of its own."""

    def __init__(self, path: Path, store: Store) -> None:
        super().__init__(path)
        self._store = store

    def raw(self, name: str) -> Bytes:
        return self._store.read(name) if name in self._store else super().raw(name)


def opened(model: str, merged: str) -> GgufFile:
    """The source at ``model``, with the merged experts in the folder ``merged`` if there are any."""
    return Overlay(Path(model), Store(Path(merged))) if merged else GgufFile(Path(model))
