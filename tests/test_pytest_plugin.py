"""The plugin of pytest, in a pytest of its own: nothing without its options, an item for every check with them."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import toys
from runs import ROOT, environment
from stand_ins import LLAMA_BENCH, program

from edgeprune.prove.smoke.checks import KEYS

pytest_plugins = ("demo_fixtures",)

LIGHT = """
import sys

def test_own():
    heavy = {"numpy", "torch", "llama_cpp", "edgeprune.stages", "edgeprune.errors", "platformdirs"}
    assert "edgeprune.pytest_plugin" in sys.modules and not heavy & set(sys.modules)
"""
ITEMS = [key for key in KEYS if key != "baseline"]


def run_pytest(folder: Path, *words: str | Path) -> tuple[int, dict[str, str], str]:
    """Exit code, outcome by test name, and output of a real pytest in ``folder`` that loads this plugin alone."""
    plugin = ("-p", "edgeprune.pytest_plugin", "-p", "no:cacheprovider", "--junitxml", "results.xml")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *plugin, *map(str, words)],
        cwd=folder,
        env=environment(PYTEST_DISABLE_PLUGIN_AUTOLOAD="1"),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    outcomes = {}
    if (folder / "results.xml").is_file():
        for case in ElementTree.parse(folder / "results.xml").iter("testcase"):
            marks = [part.tag for part in case if part.tag in ("failure", "error", "skipped")]
            outcomes[case.attrib["name"]] = marks[0] if marks else "passed"
    return done.returncode, outcomes, done.stdout + done.stderr


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Somebody's tests, which have nothing to do with edgeprune."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "test_own.py").write_text("def test_own():\n    assert True\n")
    (folder / "pytest.ini").write_text("[pytest]\naddopts = --strict-markers\nfilterwarnings = error\n")
    return folder


def test_what_the_engine_of_a_device_cannot_check_is_skipped(project: Path, synthetic: toys.Maker) -> None:
    bench = program(project / "llama-bench", LLAMA_BENCH)
    described = f'name = "thing"\ntransport = "local"\nprofile = "cpu-8gb"\n[runner]\nbench = "{bench}"\n'
    (project / "thing.toml").write_text(described)
    words = ("--edgeprune-gguf", synthetic("qwen3moe"), "--edgeprune-device", "thing.toml")
    code, outcomes, said = run_pytest(project, *words, "--edgeprune-context", "128", "-rs")
    assert code == 0 and {outcomes[key] for key in ("loads", "memory", "decode", "context")} == {"passed"}, said
    assert {outcomes[key] for key in ("deterministic", "finite", "plausible", "answers")} == {"skipped"}
    assert "weights and logits are finite: not run, llama-bench does not tell" in said


def test_a_failure_that_nobody_foresaw_does_not_run_the_model_again_for_every_item(
    project: Path, synthetic: toys.Maker
) -> None:
    noted = f"echo >> {project / 'runs'}\n"
    bench = program(project / "real", LLAMA_BENCH)
    wrapper = project / "llama-bench"
    wrapper.write_text(f'#!/bin/sh\n{noted}exec {bench} "$@"\n')
    wrapper.chmod(0o755)
    described = f'name = "thing"\ntransport = "local"\nprofile = "cpu-8gb"\n[runner]\nbench = "{wrapper}"\n'
    (project / "thing.toml").write_text(described)
    words = ("--edgeprune-gguf", synthetic("qwen3moe"), "--edgeprune-device", "thing.toml")
    words = (*words, "--edgeprune-context", "128", "--edgeprune-reports")
    run_pytest(project, *words, "reports")
    once = (project / "runs").read_text()
    (project / "runs").unlink()
    code, outcomes, said = run_pytest(project, *words, "r" * 300)  # no file system takes such a name
    assert code == 1 and {outcomes[key] for key in ITEMS} == {"failure"} and "OSError" in said
    assert (project / "runs").read_text() == once


def test_without_its_options_the_plugin_does_nothing_and_loads_nothing(project: Path) -> None:
    (project / "test_own.py").write_text(LIGHT)
    code, outcomes, said = run_pytest(project)
    assert (code, outcomes) == (0, {"test_own": "passed"}), said
    assert "--edgeprune-gguf=FILE" in run_pytest(project, "--help")[2]


def test_every_check_is_an_item_beside_the_other_tests(project: Path, synthetic: toys.Maker) -> None:
    relative = os.path.relpath(synthetic("qwen3moe"), project)
    words = ("--edgeprune-gguf", relative, "--edgeprune-profile", "cpu-8gb", "--edgeprune-context", "128")
    code, outcomes, said = run_pytest(project, *words, "--edgeprune-reports", "reports", "-v")
    seen = {"test_own": "passed", **dict.fromkeys(ITEMS, "passed"), "vram": "skipped"}  # no graphics card here
    assert (code, outcomes) == (0, seen), said
    assert "edgeprune-smoke[qwen3moe.gguf-local]::memory PASSED" in said
    (saved,) = (project / "reports").iterdir()  # it was run once
    some = (
        "-k",
        "speed or decode or loads or memory or baseline",
        "--edgeprune-min-decode",
        "1e9",
        "--edgeprune-memory",
        "1MiB",
        "--edgeprune-baseline",
        saved,
    )
    code, outcomes, said = run_pytest(project, *words, "--edgeprune-reports", "others", *some)
    assert (code, outcomes) == (
        1,
        {"loads": "passed", "memory": "failure", "decode": "failure", "baseline": "passed"},
    ), said
    assert (
        "promised: at most 1.00 MiB" in said
        and "promised: at least 1,000,000,000" in said
        and "Traceback" not in said
    )


def test_what_was_not_reached_is_skipped_and_what_broke_says_why(project: Path, tmp_path: Path) -> None:
    small = {"experts": 4, "width": 64, "expert_width": 64}
    model = toys.synthetic_gguf(tmp_path / "bad.gguf", extra=[("expert_used_count", "u32", 5)], **small)
    words = ("--edgeprune-gguf", model, "--edgeprune-context", "128", "--edgeprune-reports", "reports")
    code, outcomes, said = run_pytest(project, *words)
    expected = {"loads": "failure", **dict.fromkeys(ITEMS[1:-1], "skipped"), "earlier": "passed"}
    assert (code, outcomes) == (1, {"test_own": "passed", **expected}), said
    assert "GGML_ASSERT" in said


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--edgeprune-gguf", "nowhere.gguf"), 1, "nowhere.gguf"),
        (("--edgeprune-gguf", "x.gguf", "--edgeprune-context", "long"), 4, "--edgeprune-context N: 'long' is no"),
        (("--edgeprune-gguf", "x.gguf", "--edgeprune-memory", "9"), 4, "--edgeprune-memory SIZE: '9' is no"),
        (("--edgeprune-gguf", "x.gguf", "--edgeprune-min-decode", "nan"), 1, "nan is no speed"),
    ],
)
def test_options_that_are_wrong_are_explained(words: tuple[str, ...], code: int, message: str, project: Path) -> None:
    found, outcomes, said = run_pytest(project, *words)
    assert found == code and message in said and "Traceback" not in said
    assert set(outcomes) - {"test_own"} <= set(ITEMS) and "passed" not in {outcomes.get(key) for key in ITEMS}


@pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="the tests run against an installed package")
def test_pytest_finds_the_plugin_by_the_packages_entry_point() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"]["pytest11"] == {"edgeprune": "edgeprune.pytest_plugin"}
