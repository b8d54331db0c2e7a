"""Fixtures for all tests: a home of their own, and toy models that are made once."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import toys

from edgeprune.model.convert import convert

# Toy matrices are too small to share between cores: threads would only wait for each other. Read when torch loads.
os.environ.setdefault("OMP_NUM_THREADS", "1")


# Files of whole runs, which take minutes: they come first, so that no core is idle at the end.
_LONG = ("test_wheel", "test_family", "test_verify", "test_resume", "test_fit", "test_heal_train")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: number for number, name in enumerate(_LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture(autouse=True, scope="session")
def own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home folder for the session, so that no file of the user is read or written, and no network."""
    home = tmp_path_factory.mktemp("home")
    folders = {"HOME": "", "USERPROFILE": "", "XDG_CONFIG_HOME": "config", "XDG_CACHE_HOME": "cache"}
    folders |= {"XDG_DATA_HOME": "data", "XDG_STATE_HOME": "state", "HF_HOME": "huggingface"}
    folders |= {"APPDATA": "config", "LOCALAPPDATA": "cache"}
    with pytest.MonkeyPatch.context() as patch:
        for name, folder in folders.items():
            patch.setenv(name, str(home / folder))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        patch.setenv("EDGEPRUNE_QUIET", "1")  # how long a stage takes is no matter of these tests
        yield home


@pytest.fixture(autouse=True, scope="session")
def closed_null_files() -> Iterator[None]:
    """llama-cpp-python keeps two files open for good, about which the interpreter would complain when it ends."""
    yield
    holder = sys.modules.get("llama_cpp._utils")
    for name in ("outnull_file", "errnull_file"):
        if hasattr(holder, name):
            getattr(holder, name).close()


@pytest.fixture(scope="session")
def toy_checkpoint(tmp_path_factory: pytest.TempPathFactory, own_home: Path) -> toys.Maker:
    """Checkpoint folder of ``qwen3_moe``, ``mixtral`` or ``olmoe``, made when first asked for. Do not change it."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = toys.CHECKPOINTS[name](tmp_path_factory.mktemp("checkpoints") / name)
        return made[name]

    return make


@pytest.fixture(scope="session")
def toy_gguf(tmp_path_factory: pytest.TempPathFactory, toy_checkpoint: toys.Maker) -> toys.Maker:
    """F32 GGUF of ``qwen3_moe``, ``mixtral`` or ``olmoe``, converted when first asked for. Do not change it."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("ggufs") / f"{name}.gguf"
            convert(toy_checkpoint(name), made[name], "f32")
        return made[name]

    return make


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory: pytest.TempPathFactory, own_home: Path) -> toys.Maker:
    """F32 GGUF of one of ``toys.SYNTHETIC``, written when first asked for. Do not change it."""
    made: dict[str, Path] = {}

    def make(arch: str) -> Path:
        if arch not in made:
            made[arch] = toys.synthetic_gguf(tmp_path_factory.mktemp("synthetic") / f"{arch}.gguf", arch)
        return made[arch]

    return make


@pytest.fixture(autouse=True)
def own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Run every test in a folder of its own, so that a relative default output never lands in the checkout."""
    monkeypatch.chdir(tmp_path)
