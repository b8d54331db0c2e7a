"""Smoke tests with llama-bench: it measures the speed, alone or beside an engine that answers.

A stand-in that prints what the real one does is run everywhere; a real ``llama-bench`` too, where one is on the path
or named by ``LLAMA_BENCH``.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import toys
from runs import Ear, environment, run_edgeprune
from stand_ins import ADB, LLAMA_BENCH, LLAMA_SERVER, program

from edgeprune.device.machine import load_machine
from edgeprune.errors import BadFile, EdgepruneError
from edgeprune.measure.launch import Launch
from edgeprune.prove.smoke.commands import bench_words
from edgeprune.prove.smoke.report import SmokeReport
from edgeprune.stages.smoke import Wish, smoke

REAL = os.environ.get("LLAMA_BENCH") or shutil.which("llama-bench")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="scripts as programs")
bench_kinds = pytest.mark.parametrize(
    "real", [False, pytest.param(True, marks=pytest.mark.skipif(REAL is None, reason="no llama-bench is installed"))]
)
ALONE = ("loads", "memory", "context")
UNTOLD = ("deterministic", "finite", "plausible", "answers")


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    return program(tmp_path / "bin" / "llama-bench", LLAMA_BENCH)


@pytest.fixture
def adb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path / "tools" / "adb", ADB)
    monkeypatch.setenv("PATH", f"{tmp_path / 'tools'}{os.pathsep}{os.environ['PATH']}")


def device(folder: Path, transport: str, **runner: str | Path) -> Path:
    path = folder / "thing.toml"
    own = f'folder = "{folder / "far"}"\n' if transport == "adb" else ""
    rows = "".join(f'{key} = "{value}"\n' for key, value in runner.items())
    path.write_text(f'name = "thing"\ntransport = "{transport}"\nprofile = "cpu-8gb"\n{own}[runner]\n{rows}')
    return path


def verdicts(report: SmokeReport) -> dict[str, str]:
    return {check.key: check.verdict for check in report.checks}


def tried(model: Path, described: Path, **wishes: Any) -> SmokeReport:
    wish = Wish(model, str(described), output=described.parent / "own", **{"context": 128, **wishes})
    return smoke(wish, Ear())[0]


@bench_kinds
@pytest.mark.parametrize("transport", ["local", "adb"])
def test_alone_it_tells_load_memory_speed_and_context(
    transport: str, real: bool, synthetic: toys.Maker, bench: Path, adb: None, tmp_path: Path
) -> None:
    report = tried(synthetic("qwen3moe"), device(tmp_path, transport, bench=str(REAL) if real else bench))
    found, speed = verdicts(report), report.step("speed")
    assert [found[key] for key in ALONE if key != "memory"] == ["kept", "kept"] and not report.broken
    assert [found[key] for key in UNTOLD] == ["not run"] * 4
    assert report.engine.startswith("llama-bench ") and report.step("context")["filled_tokens"] == 128
    if transport == "local":  # a run of milliseconds may end before the memory on a phone is looked at
        assert found["memory"] == "kept" and report.step("memory")["peak_bytes"] > 1e6
    assert (speed["prompt_tokens"], speed["generated_tokens"]) == (64, 32)
    assert min(speed["prefill_per_s"], speed["decode_per_s"]) > 0
    if not real:
        assert report.engine == "llama-bench 7 (stand-in)"
        assert (speed["prefill_per_s"], speed["decode_per_s"], speed["best_decode_per_s"]) == (2000, 20, 30)


@bench_kinds
@pytest.mark.parametrize("engine", ["library", "server"])
def test_beside_an_engine_that_answers_it_measures_the_speed(
    engine: str, real: bool, synthetic: toys.Maker, bench: Path, tmp_path: Path
) -> None:
    other = {"server": program(tmp_path / "bin" / "llama-server", LLAMA_SERVER)} if engine == "server" else {}
    other |= {"python": sys.executable}
    described = device(tmp_path, "local", bench=str(REAL) if real else bench, **other)
    report = tried(synthetic("qwen3moe"), described)
    assert not report.broken and "not run" not in verdicts(report).values()
    assert report.engine.startswith("llama-server" if engine == "server" else "llama-cpp-python")
    assert ", speed by llama-bench " in report.engine
    assert (report.step("speed")["decode_per_s"] == 20) is not real
    described = device(tmp_path, "local", **other)  # without it, speeds of another kind: not compared
    again = tried(synthetic("qwen3moe"), described)
    assert "first run" in next(check.measured for check in again.checks if check.key == "earlier")


@pytest.mark.parametrize(
    ("mood", "broken", "said"),
    [
        ("dies", "loads", "no: llama-bench ended: exit code 1"),
        ("dies at the end", "context", "llama-bench ended: llama.cpp aborted on a failed check"),
        ("silent", "decode", "llama-bench printed no result"),
        ("aborts", "decode", "llama-bench ended: llama.cpp aborted on a failed check"),
    ],
)
@pytest.mark.parametrize("transport", ["local", "adb"])
def test_what_goes_wrong_in_it_is_found(
    transport: str,
    mood: str,
    broken: str,
    said: str,
    synthetic: toys.Maker,
    bench: Path,
    adb: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("STAND_IN_MOOD", mood)
    report = tried(synthetic("qwen3moe"), device(tmp_path, transport, bench=bench))
    assert report.broken[0].key == broken and report.broken[0].measured == said
    assert verdicts(report)["answers"] == "not reached"
    log = {"dies": "failed to load model", "silent": "", "aborts": "out of luck", "dies at the end": "out of luck"}[
        mood
    ]
    assert any(log in line for line in report.measured["log"]) or not log


def test_it_hangs_and_is_ended(
    synthetic: toys.Maker, bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_MOOD", "hangs")
    monkeypatch.setattr("edgeprune.stages.smoke._SILENT_SECONDS", 0.5)
    report = tried(synthetic("qwen3moe"), device(tmp_path, "local", bench=bench))
    assert "said nothing for 0 s and was ended" in report.broken[0].measured


def test_it_fails_after_the_rest_went_well(
    synthetic: toys.Maker, bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_MOOD", "dies")
    report = tried(synthetic("qwen3moe"), device(tmp_path, "local", python=sys.executable, bench=bench))
    found = verdicts(report)
    assert {check.key for check in report.broken} == {"decode", "prefill"} and found["context"] == "kept"


def test_what_cannot_be_run_is_explained(
    synthetic: toys.Maker, bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = synthetic("qwen3moe")
    with pytest.raises(EdgepruneError, match="llama-bench cannot be started: No such file"):
        tried(model, device(tmp_path, "local", bench=tmp_path / "nowhere" / "llama-bench"))
    with pytest.raises(EdgepruneError, match="llama-bench alone, which gives no answers"):
        tried(model, device(tmp_path, "local", bench=bench), baseline=tmp_path / "earlier.json")
    monkeypatch.setenv("STAND_IN_MOOD", "old")
    with pytest.raises(EdgepruneError, match="llama-bench is too old: it lacks --repack"):
        tried(model, device(tmp_path, "local", bench=bench))
    with pytest.raises(BadFile, match="has no Python"):
        load_machine(device(tmp_path, "adb", bench=bench, python="python3"))
    with pytest.raises(BadFile, match="server"):
        load_machine(device(tmp_path, "adb"))


def test_the_command_says_what_was_not_run(synthetic: toys.Maker, bench: Path, tmp_path: Path) -> None:
    described = device(tmp_path, "local", bench=bench)
    arguments = ("--context", "128", "-o", tmp_path / "own")
    done = run_edgeprune("smoke", synthetic("qwen3moe"), "--device", described, *arguments, env=environment())
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("weights and logits are finite"))
    assert line.endswith("llama-bench does not tell  not run")
    shown = run_edgeprune("devices", described)
    assert f"{bench} alone: load, memory, speed and context" in shown.stdout


def test_its_arguments_are_those_of_the_plan() -> None:
    launch = Launch(4096, "Q8_0", gpu_layers=-1, cpu_experts=3, batch=256)
    speed = {"prompt_tokens": 256, "generated_tokens": 48, "repeats": 3}
    runs = bench_words(launch, "model.gguf", speed, alone=False)
    assert list(runs) == ["prefill", "decode"]
    said = " ".join(runs["decode"])
    for words in ("-ub 256", "-ngl 999", "-ctk q8_0 -ctv q8_0 -fa 1", "--n-cpu-moe 3", "-sm none", "--repack 0"):
        assert words in said
    assert said.endswith("-p 0 -n 48 -d 256 -r 3")
