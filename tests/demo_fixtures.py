"""Fixtures around whole runs: the demo as a GGUF, a tiny checkpoint, and one finished fit of it, made once a session.

A test module asks for them with ``pytest_plugins = ("demo_fixtures",)``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import toys
from runs import Fit, read, run_edgeprune

from edgeprune.model.convert import convert
from edgeprune.prove.report import Report
from edgeprune.stages.source import DEMO

# Of the tiny model, in the tests below it: small enough to need all kinds of types, large enough to be met.
TINY_LIMIT = "500kB"


@pytest.fixture(scope="session", autouse=True)
def one_core() -> Iterator[None]:
    """Run on one core: llama.cpp's threads wait for each other by spinning, which on a busy machine costs ten times
    the work itself. Children inherit it."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    allowed = os.sched_getaffinity(0)
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")  # gw0, gw1, ...
    turn = int(worker.removeprefix("gw")) if worker else os.getpid()
    os.sched_setaffinity(0, {sorted(allowed)[turn % len(allowed)]})
    yield
    os.sched_setaffinity(0, allowed)


@pytest.fixture(scope="session")
def demo_gguf(tmp_path_factory: pytest.TempPathFactory, own_home: Path) -> Path:
    """The demo checkpoint as a GGUF. Do not change it."""
    path = tmp_path_factory.mktemp("demo") / "demo.gguf"
    convert(DEMO, path, name="edgeprune-demo")
    return path


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory, own_home: Path) -> Path:
    """A checkpoint whose widths only the 32-blocks divide, so that few types have to be tried. Do not change it."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny"
    return toys.qwen3_moe(
        folder, dtype="bfloat16", hidden_size=128, moe_intermediate_size=96, head_dim=32, intermediate_size=96
    )


@pytest.fixture(scope="session")
def small_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight short documents; two of them are held out."""
    lines = [line for line in toys.training_lines() if len(line) > 60]
    documents = ["".join(lines[start : start + 2])[:260] for start in range(0, 400, 50)]
    path = tmp_path_factory.mktemp("text") / "small.txt"
    path.write_text("\n%%%%\n".join(documents), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_fit(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, small_text: Path, one_core: None
) -> Fit:
    """The tiny checkpoint fitted to ``TINY_LIMIT`` through the command line. Do not change its folder: copy it."""
    folder = tmp_path_factory.mktemp("fit") / "run"
    # Experts are to be dropped, which much of the report and the card is about.
    arguments = (str(tiny_checkpoint), "--file-size", TINY_LIMIT, "--width", "1", "--text", str(small_text))
    done = run_edgeprune("fit", *arguments, "-o", folder)
    assert done.returncode == 0, done.stderr
    return Fit(arguments, folder, Report.from_json(read(folder / "report.json")))
