"""The house: rooms import only from rooms to their left, data folders hold data, and nothing heavy loads early."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import edgeprune

PACKAGE = Path(edgeprune.__file__).parent
ROOMS = ("device", "model", "measure", "decide", "build", "prove", "share")
BESIDE = ("errors", "units", "files", "remembered")
HEAVY = ("numpy", "torch", "scipy", "llama_cpp", "transformers", "tokenizers", "huggingface_hub", "gguf", "jinja2")
MODULES = sorted(PACKAGE.rglob("*.py"))


def own_name(path: Path) -> tuple[str, ...]:
    """The module's dotted name: a package's is that of its ``__init__``."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def imported(path: Path) -> Iterator[tuple[str, ...]]:
    """Names below the package that the module imports, anywhere in it; ``from x import y`` gives x and x.y."""
    package = own_name(path) if path.name == "__init__.py" else own_name(path)[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            start = ".".join(part for part in (base, node.module or "") if part)
            names = [start, *(f"{start}.{alias.name}" for alias in node.names)]
        for name in names:
            parts = tuple(name.split("."))
            if parts[0] == PACKAGE.name and len(parts) > 1:
                yield parts[1:]


def test_imports_are_found_wherever_and_however_they_are_written() -> None:
    """The other tests here are worth as much as this function."""
    module = PACKAGE / "decide" / "scores" / "__init__.py"
    assert ("decide", "evidence", "Evidence") in set(imported(module))
    assert ("decide", "scores", "reap") in set(imported(module))
    assert set(imported(PACKAGE / "errors.py")) == set()


@pytest.mark.parametrize("room", ROOMS)
def test_room_imports_only_from_rooms_to_its_left(room: str) -> None:
    allowed = {*ROOMS[: ROOMS.index(room) + 1], *BESIDE, "__version__"}
    files = [path for path in MODULES if own_name(path)[1:2] == (room,)]
    assert files
    wrong = [(str(path.relative_to(PACKAGE)), name) for path in files for name in imported(path)]
    assert [pair for pair in wrong if pair[1][0] not in allowed] == []


@pytest.mark.parametrize("name", BESIDE)
def test_what_stands_beside_the_rooms_imports_none(name: str) -> None:
    assert {parts[0] for parts in imported(PACKAGE / f"{name}.py")} <= set(BESIDE)


def test_every_folder_of_the_package_is_known() -> None:
    """A new sub-package has to find its place in the order of the rooms, or beside them."""
    folders = {path.parent.relative_to(PACKAGE).parts[0] for path in MODULES if path.parent != PACKAGE}
    assert folders == {*ROOMS, "cli", "demo", "stages"}


@pytest.mark.parametrize("name", ["utils", "helpers", "common", "misc"])
def test_no_module_is_a_drawer_for_odds_and_ends(name: str) -> None:
    assert [path for path in MODULES if path.stem == name] == []


@pytest.mark.parametrize("name", ["profiles", "converters", "devices"])
def test_data_folders_hold_data_and_no_code(name: str) -> None:
    folder = PACKAGE.parent / name
    if not folder.is_dir():  # installed from a wheel
        folder = PACKAGE / "data" / name
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    assert {path.suffix for path in files} <= {".toml", ".json", ".md"}


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """This checkout's package in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    command = [sys.executable, "-W", "error", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_command_line_loads_nothing_heavy() -> None:
    done = run_python("-c", "import sys, edgeprune.cli; print(*sys.modules)")
    assert (done.returncode, done.stderr) == (0, "")
    loaded = set(done.stdout.split())
    assert "edgeprune.cli.commands" in loaded
    assert loaded & set(HEAVY) == set()


@pytest.mark.parametrize("arguments", [("--help",), ("-h",), ("--version",)], ids=lambda value: value[0])
def test_module_answers_as_a_command(arguments: tuple[str, ...]) -> None:
    done = run_python("-m", "edgeprune", *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert "edgeprune" in done.stdout


def test_version_is_that_of_the_package() -> None:
    assert edgeprune.__version__ in run_python("-m", "edgeprune", "--version").stdout
