"""Toy models of every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import pytest
from family_checks import changes_of

from edgeprune.model.convert import convert


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, own_home: Path) -> Any:
    """Checkpoint and F32 GGUF of a family's case, made when first asked for. Do not change them."""
    known: dict[tuple[str, str], tuple[Path, Path]] = {}

    def make(name: str, case: str = "") -> tuple[Path, Path]:
        if (name, case) not in known:
            folder = tmp_path_factory.mktemp("families")
            checkpoint = families.make_checkpoint(name, folder / name, changes_of(name, case))
            convert(checkpoint, folder / "model.gguf", "f32")
            known[name, case] = checkpoint, folder / "model.gguf"
        return known[name, case]

    return make
