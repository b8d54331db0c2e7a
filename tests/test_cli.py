"""The command line as people and scripts meet it: real processes, exit codes, and what goes to which stream."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import toys
from runs import PATIENCE_SECONDS, Fit, edgeprune_command, environment, read, run_edgeprune

from edgeprune import __version__
from edgeprune.cli import show
from edgeprune.cli.commands import COMMANDS
from edgeprune.cli.console import Console
from edgeprune.decide.plan import Plan, Prediction, folded
from edgeprune.device.profile import known_profiles
from edgeprune.measure.launch import Launch
from edgeprune.model.architecture import read_architecture
from edgeprune.model.gguf import GgufFile
from edgeprune.prove.report import MEANWHILE, Baseline, Promise
from edgeprune.settings import within

pytest_plugins = ("demo_fixtures",)


@pytest.mark.parametrize("command", [None, *(str(command.name) for command in COMMANDS)])
def test_help_of_every_command_has_a_sentence_and_its_options(command: str | None) -> None:
    done = run_edgeprune(*([command] if command else []), "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"Usage: python -m edgeprune{f' {command}' if command else ''} [")
    lines = done.stdout.splitlines()
    assert len(lines) > 4 and "--help" in done.stdout
    assert all(len(line) <= 100 for line in lines)
    if command is None:
        assert all(str(each.name) in done.stdout for each in COMMANDS)


def test_version() -> None:
    done = run_edgeprune("--version")
    assert done.stdout == f"edgeprune, version {__version__}\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("fitt", "demo"), ("No such command", "fitt")),
        (("fit", "demo", "--devise", "auto"), ("No such option", "--devise", "--device")),
        (("fit",), ("Missing argument", "SOURCE")),
        (("fit", "demo", "--keep", "0"), ("Invalid value", "--keep", "0 is not in the range")),
    ],
    ids=["unknown command", "unknown option", "missing argument", "out of range"],
)
def test_a_command_line_that_cannot_be_parsed_exits_2(words: tuple[str, ...], said: tuple[str, ...]) -> None:
    done = run_edgeprune(*words)
    assert (done.returncode, done.stdout) == (2, "")
    last = done.stderr.splitlines()[-1]
    assert last.startswith("Error: ") and all(part in last for part in said), last


def one_json_value(done: subprocess.CompletedProcess[str]) -> Any:
    """The value on stdout, which holds nothing else, of a command that succeeded in silence."""
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def test_profiles_are_listed_and_shown() -> None:
    listed = run_edgeprune("profiles")
    assert (listed.returncode, listed.stderr) == (0, "")
    assert [line.split()[0] for line in listed.stdout.splitlines()] == list(known_profiles())
    assert [profile["name"] for profile in one_json_value(run_edgeprune("profiles", "--json"))] == list(
        known_profiles()
    )
    (shown,) = one_json_value(run_edgeprune("profiles", "rpi5-8gb", "--json"))
    assert shown["ram"]["total_bytes"] == 8 * 2**30
    text = run_edgeprune("profiles", "rpi5-8gb").stdout
    assert text.startswith("rpi5-8gb\n") and "usable for a model" in text


def test_this_machine_is_probed_with_reasons() -> None:
    (found,) = one_json_value(run_edgeprune("profiles", "auto", "--json"))
    assert found["name"] == "auto" and found["ram"]["bandwidth_bytes_per_s"] > 1e8
    assert any("bandwidth" in reason for reason in found["why"])


def test_inspect_says_what_the_demo_is() -> None:
    done = run_edgeprune("inspect", "demo")
    assert (done.returncode, done.stderr) == (0, "")
    assert "qwen3_moe" in done.stdout and "routed experts" in done.stdout and "cpu-16gb" in done.stdout


def test_inspect_of_a_gguf_counts_every_byte(demo_gguf: Path) -> None:
    found = one_json_value(run_edgeprune("inspect", demo_gguf, "--json"))
    file = GgufFile(demo_gguf)
    assert sum(found["roles"].values()) == found["nbytes"] == sum(info.nbytes for info in file.tensors.values())
    facts = dict(found["facts"])
    assert facts["experts"] == "8 per layer, 2 per token" and facts["architecture"] == "qwen3moe"
    assert {fit["verdict"] for fit in found["fits"]} == {"as it is"}
    assert [fit["profile"] for fit in found["fits"]] == list(known_profiles())


def test_convert_writes_where_it_was_told(tiny_checkpoint: Path, tmp_path: Path) -> None:
    done = run_edgeprune("convert", tiny_checkpoint, "below/model.gguf", "--type", "f16", cwd=tmp_path)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "below/model.gguf\n")
    file = GgufFile(tmp_path / "below" / "model.gguf")
    assert file.tensors["blk.0.attn_q.weight"].type == "F16"


def test_convert_tells_what_llama_cpp_cuts_otherwise(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "tiny"))
    definition = json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))
    definition["added_tokens"][0]["rstrip"] = True
    toys.change_json(checkpoint / "tokenizer.json", added_tokens=definition["added_tokens"])
    done = run_edgeprune("convert", checkpoint, "model.gguf", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "model.gguf\n")
    assert done.stderr.startswith("tokenizer: the tokenizer drops white space beside ")
    assert len(done.stderr.splitlines()) == 1


def test_convert_replaces_an_earlier_gguf_and_may_write_one_beside_the_weights(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    for kind in ("F16", "F32"):
        done = run_edgeprune("convert", folder, folder / "model.gguf", "--type", kind.lower())
        assert (done.returncode, done.stderr) == (0, "")
        assert GgufFile(folder / "model.gguf").tensors["blk.0.attn_q.weight"].type == kind


@pytest.mark.parametrize(
    ("output", "cause"),
    [
        ("checkpoint/model.safetensors", "that is not a GGUF; it is not replaced"),
        ("checkpoint/config.json", "that is not a GGUF; it is not replaced"),
        ("checkpoint/link.gguf", "that is not a GGUF; it is not replaced"),
        ("checkpoint/model-00001-of-00002.safetensors", "would lie among the files of the checkpoint checkpoint"),
        ("thesis.odt", "is a file of 6 bytes that is not a GGUF"),
    ],
    ids=["the weights", "the configuration", "a link to the weights", "a part of the weights", "anything else"],
)
def test_convert_replaces_nothing_but_a_gguf(output: str, cause: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    if output.endswith("link.gguf"):
        (tmp_path / output).symlink_to(folder / "model.safetensors")
    (tmp_path / "thesis.odt").write_bytes(b"thesis")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    done = run_edgeprune("convert", "checkpoint", output, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {output} ") and cause in done.stderr and "hint: choose" in done.stderr
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_finished_run_answers_plan_and_build_in_silence(tiny_fit: Fit, tmp_path: Path) -> None:
    folder = tiny_fit.copy(tmp_path / "run")
    plan = one_json_value(run_edgeprune("plan", *tiny_fit.arguments, "-o", folder, "--json"))
    assert plan == read(folder / "plan.json") == tiny_fit.report.plan
    build = one_json_value(run_edgeprune("build", *tiny_fit.arguments, "-o", folder, "--json"))
    assert Path(build["path"]).parent == folder
    assert build["sha256"] == tiny_fit.report.build["sha256"]
    assert build["nbytes"] == Path(build["path"]).stat().st_size == plan["predicted"]["file_bytes"]
    text = run_edgeprune("plan", *tiny_fit.arguments, "-o", folder).stdout
    for wanted in ("budget", "candidates", "chosen: ", "llama-server -m FILE", str(folder / "plan.json")):
        assert wanted in text


def test_calibrate_leaves_the_statistics_and_the_imatrix(tiny_fit: Fit, small_text: Path, tmp_path: Path) -> None:
    words = ("calibrate", tiny_fit.arguments[0], "--text", small_text, "--tokens", "256", "-o", tmp_path / "run")
    found = one_json_value(run_edgeprune(*words, "--json"))
    assert found["domains"] == ["small"] and 0 < found["tokens"] <= 256
    assert found["folder"] == str(tmp_path / "run")
    assert {"statistics.safetensors", "imatrix.gguf"} <= {path.name for path in (tmp_path / "run").iterdir()}
    again = run_edgeprune(*words)
    assert again.returncode == 0 and "experts never used" in again.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals")
def test_progress_is_shown_on_a_terminal_and_nowhere_else(tiny_checkpoint: Path, tmp_path: Path) -> None:
    import pty  # there is none on Windows

    terminal, end = pty.openpty()
    process = subprocess.Popen(
        edgeprune_command("convert", tiny_checkpoint, "model.gguf"),
        stdout=subprocess.PIPE,
        stderr=end,
        cwd=tmp_path,
        env=environment(TERM="xterm"),
    )
    os.close(end)
    shown = b""
    while True:
        try:
            part = os.read(terminal, 4096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        shown += part
    os.close(terminal)
    assert process.stdout is not None
    assert process.stdout.read() == b"model.gguf\n"
    process.stdout.close()
    assert process.wait() == 0
    assert b"convert ..." in shown and b"convert: " in shown


@pytest.mark.parametrize("arch", ["qwen3moe", "deepseek2"])
def test_the_summary_of_a_deep_model_fits_one_screen(tiny_fit: Fit, tmp_path: Path, arch: str) -> None:
    """48 layers in many types, which change from layer to layer, as they do in small files."""
    path = toys.synthetic_gguf(tmp_path / "deep.gguf", arch, layers=48, experts=4, width=32, expert_width=32)
    architecture = read_architecture(GgufFile(path))
    kinds = ("Q6_K", "Q5_K", "Q4_K", "IQ4_XS", "IQ3_S", "IQ2_S")
    matrices = [tensor for tensor in architecture.tensors if tensor.quantisable]
    types = {tensor.name: kinds[index * index % 11 % 6] for index, tensor in enumerate(matrices)}
    plan = Plan(arch, 4, 4, {}, types, Launch(), "test", "solver", Prediction(), {})
    lines = folded(plan, architecture)
    assert max(map(len, lines)) > 150 and len(lines) >= 8
    rivals = [Baseline(name, 1000, tiny_fit.report.quality) for name in ("IQ3_S", "Q3_K_S")]
    busy = Promise(MEANWHILE, "", "43 % of the cores", "information")
    promises = [line for line in tiny_fit.report.promises if line.name != MEANWHILE]
    found = replace(tiny_fit.report, folded=lines, baselines=rivals)
    summary = show.report(replace(found, promises=promises), Path("runs/deep"))
    beside = show.report(replace(found, promises=[*promises, busy]), Path("runs/deep"))
    (told,) = set(beside) - set(summary)
    assert told.startswith("decode") and told.endswith("  while other programs used 43 % of the cores")
    assert 24 <= len(summary) == len(beside) <= 40
    assert not [line for line in show.type_lines(lines) if len(line) > 110]
    for line in lines:  # every type is told, with the layers or how many they are
        assert line.split()[0] in "\n".join(summary)


def test_layers_are_counted_where_their_numbers_do_not_fit() -> None:
    numbers = ",".join(map(str, range(9, 90, 2)))
    short, long = "attn_q  Q6_K[0-3,7]  Q5_K[4-6]", f"attn_k  Q6_K[0-3,7]  Q5_K[{numbers}]"
    assert show.type_lines([short, long]) == [short, "attn_k  Q6_K x5  Q5_K x41"]
    many = [short, *(f"kind_{number}  Q8_0" for number in range(15))]
    first, second, *_ = show.type_lines(many)
    assert first == short and second.startswith("Q8_0 for all of kind_0, kind_1, ")
    assert len(show.type_lines(many)) == 3


class Sheet(io.StringIO):
    """Standard error of a console that is no terminal."""

    def lines(self, count: int) -> list[str]:
        """Its lines, as soon as there are ``count``."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while len(found := self.getvalue().splitlines()) < count and time.monotonic() < deadline:
            time.sleep(0.005)
        return found


def test_without_a_terminal_a_stage_is_told_in_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEPRUNE_QUIET", "")
    monkeypatch.setattr(sys, "stderr", sheet := Sheet())
    with Console(0.01, 1000).progress("calibrate"):
        assert sheet.lines(1) == ["calibrate ..."]
    with Console(1000, 0.01).progress("a short one"):
        pass
    assert sheet.lines(1) == ["calibrate ..."]
    with Console(0.01, 0.01).progress("without steps"):
        assert re.fullmatch(r"without steps: [\d.]+ m?s so far", sheet.lines(3)[2])
    monkeypatch.setattr(sys, "stderr", sheet := Sheet())
    with Console(0.01, 0.01).progress("solve") as progress:
        progress(1, 4)
        assert re.fullmatch(r"solve  25 %, [\d.]+ m?s left", sheet.lines(2)[1])
    monkeypatch.setenv("EDGEPRUNE_QUIET", "1")
    monkeypatch.setattr(sys, "stderr", sheet := Sheet())
    with Console(0.01, 0.01).progress("not a word"):
        time.sleep(0.1)
    assert sheet.getvalue() == ""


def test_parts_of_a_stage_add_up_to_the_whole() -> None:
    seen: list[float] = []
    whole = lambda done, total: seen.append(done / total)  # noqa: E731
    first, second = within(whole, 0, 1, 4), within(whole, 1, 3, 4)
    for part, done, total in ((first, 1, 2), (first, 2, 2), (second, 0, 0), (second, 1, 3), (second, 5, 3)):
        part(done, total)
    assert seen == [0.125, 0.25, 0.25, 0.5, 1.0]


def test_a_stage_that_fails_leaves_nobody_talking(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEPRUNE_QUIET", "")
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError), Console(0.01, 0.01).progress("divide"):
        raise ZeroDivisionError
    assert threading.active_count() == before
    capsys.readouterr()
    time.sleep(0.05)
    assert capsys.readouterr().err == ""


def test_a_reader_that_leaves_early_is_no_error() -> None:
    process = subprocess.Popen(
        edgeprune_command("profiles", "--json"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    process.wait()


def test_debugging_shows_the_traceback_of_an_explained_error() -> None:
    quiet = run_edgeprune("inspect", "nowhere.gguf")
    loud = run_edgeprune("inspect", "nowhere.gguf", env=environment(EDGEPRUNE_DEBUG="1"))
    assert quiet.returncode == 2 and quiet.stderr.startswith("error: no model at nowhere.gguf\nhint: ")
    assert "Traceback" in loud.stderr and "UsageError: no model at nowhere.gguf" in loud.stderr
