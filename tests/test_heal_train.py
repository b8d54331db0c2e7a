"""``--heal train`` at the command line: killed and run again, the better way is shipped, and what is refused."""

from __future__ import annotations

import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from runs import Fit, Running, read, run_edgeprune

from edgeprune.cli.commands import plan as plan_command
from edgeprune.decide.plan import Plan
from edgeprune.files import to_json, write_text
from edgeprune.model.gguf import GgufFile
from edgeprune.stages.choosing import WAYS

pytest_plugins = ("demo_fixtures",)


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_killed_while_it_trains_the_same_command_goes_on_and_ships_the_better_way(
    tiny_fit: Fit, tmp_path: Path
) -> None:
    folder = tiny_fit.copy(tmp_path / "run")
    source, _, _, *rest = tiny_fit.arguments
    target = ("--file-size", "600kB", "--keep", "4", "--heal", "train", "--time-limit", "1s", "--heal-stages", "1")
    words = ("fit", source, *target, *rest, "-o", folder)
    run = Running(*words)
    assert run.wait_for("distillation:train") is not None, run.end()
    saved = folder / "scratch"
    deadline = time.monotonic() + 60
    while not (found := list(saved.glob("training-*/saved/record.json"))):
        assert run.process.poll() is None and time.monotonic() < deadline, run.end()
        time.sleep(0.02)
    run.process.send_signal(signal.SIGKILL)
    assert run.end()[0] == -signal.SIGKILL
    assert read(folder / "plan.json")["train"] is True
    # What another training would not come to.
    write_text(found[0], to_json({**read(found[0]), "before": 123.0}))
    done = run_edgeprune(*words)
    assert done.returncode == 0, done.stderr
    learnt, ways, plan = (read(folder / name) for name in ("training.json", "ways.json", "plan.json"))
    assert learnt["before"] == 123.0 and learnt["step"] > 0
    assert ways["nats"].keys() == WAYS.keys()
    assert ways["taken"] == min(ways["nats"], key=ways["nats"].get)
    assert (plan["heal"], plan.get("train", False)) == WAYS[ways["taken"]]
    report = read(folder / "report.json")
    assert f"taken: {ways['taken']}" in report["conditions"]["training"]
    (built,) = folder.glob("*bpw.gguf")
    file = GgufFile(built)
    assert tuple(bool(file.get(f"edgeprune.{name}")) for name in ("healed", "trained")) == WAYS[ways["taken"]]
    assert built.stat().st_size == Plan.load(folder / "plan.json").predicted.file_bytes
    assert not (folder / "scratch").exists()
    before = built.stat().st_mtime_ns
    again = run_edgeprune("build", *words[1:])
    assert (again.returncode, again.stderr, built.stat().st_mtime_ns) == (0, "", before)


def test_what_cannot_be_trained_is_refused_in_one_line(tiny_fit: Fit, tmp_path: Path) -> None:
    shutil.copy(tiny_fit.folder / "source.gguf", tmp_path / "source.gguf")
    for words, cause in (
        ((tmp_path / "source.gguf", "--heal", "train"), "is a GGUF, and --heal train runs a Hugging Face checkpoint"),
        ((tiny_fit.arguments[0], "--heal", "train", "--no-heal"), "--heal train trains experts, and --no-heal"),
    ):
        done = run_edgeprune("fit", *words, "--file-size", "400kB", "--keep", "4", "-o", tmp_path / "run")
        assert done.returncode == 2 and cause in done.stderr
        assert len([line for line in done.stderr.splitlines() if line.startswith("error")]) == 1, done.stderr


@pytest.mark.parametrize("words", [("--heal", "--json"), ("--json", "--heal"), ("--heal", "closed-form")])
def test_a_bare_heal_is_the_closed_form(words: tuple[str, ...]) -> None:
    parsed = plan_command.make_context("plan", ["demo", *words])
    assert parsed.params["heal"] == "closed-form"
    refused = CliRunner().invoke(plan_command, ["demo", "--heal", "slowly"])
    assert refused.exit_code == 2 and "'closed-form', 'train'" in refused.output
