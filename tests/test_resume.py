"""A run that was killed goes on where it was; a finished one does nothing again; two do not meet in one folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toys
from runs import Ear, Fit, Running, gone, read, run_edgeprune

from edgeprune import pipeline
from edgeprune.decide.plan import Plan
from edgeprune.errors import BadFile, Busy, UsageError
from edgeprune.files import file_digest
from edgeprune.measure import calibration
from edgeprune.measure.statistics import Statistics
from edgeprune.measure.text import TextFile, Window
from edgeprune.model.gguf import GgufFile
from edgeprune.pipeline import Settings
from edgeprune.rundir import RunFolder, changed_fields
from edgeprune.stages.trying import place

pytest_plugins = ("demo_fixtures",)

posix = pytest.mark.skipif(sys.platform == "win32", reason="signals")


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*.partial")]


def result(folder: Path) -> tuple[dict[str, Any], str]:
    """The plan without its predictions, which contain this machine's momentary state, and the file's SHA-256."""
    plan = read(folder / "plan.json")
    (built,) = folder.glob("*bpw.gguf")
    return {key: plan[key] for key in ("digest", "keep", "types", "kept", "made_from")}, file_digest(built)


# What a child begins with, and a file that is there when it goes on with what follows.
OBSERVED = "scratch/student.safetensors"
STAGES = [
    "convert:convert_task",
    "calibration:collect",
    "tasks:reference",
    "tasks:disturb",
    "distortion:measure",
    "staged:write_prefix",
    f"staged:write_prefix {OBSERVED}",  # then heal_layers, in the same process
    "builder:build",
    "benchmark:benchmark",
]


@posix
def test_killed_in_every_stage_the_same_command_ends_with_the_same_file(tiny_fit: Fit, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = ("fit", *tiny_fit.arguments, "-o", folder)
    done: dict[str, int] = {}
    for number, stage in enumerate(STAGES):
        run = Running(*words)
        task, *files = stage.split()
        worker = run.wait_for(task)
        assert worker is not None, run.end()
        for name in files:
            run.wait_for_file(folder / name)
        # Once at its beginning, once some way into it.
        time.sleep((0.0, 0.3)[number % 2])
        run.process.send_signal(signal.SIGKILL)
        assert run.end()[0] == -signal.SIGKILL
        assert gone(worker)
        for name, changed in done.items():  # what was finished before was not made again
            assert (folder / name).stat().st_mtime_ns == changed, (stage, name)
        kept = ("source.gguf", "statistics.safetensors", "sensitivity.json", "plan.json")
        done = {name: (folder / name).stat().st_mtime_ns for name in kept if (folder / name).is_file()}
        if "sensitivity.json" in done and "plan.json" not in done:
            del done["sensitivity.json"]  # the costs of dropping experts are still to be added to it
        if (
            not (folder / "tried.json").is_file()
            or list(place(Plan.load(folder / "plan.json"))) != (read(folder / "tried.json")["taken"])
        ):
            done.pop("plan.json", None)  # files are still being tried, of which another may be better
    assert set(done) == {"source.gguf", "statistics.safetensors", "sensitivity.json", "plan.json"}
    (folder / "scratch").mkdir(exist_ok=True)
    for name in ("source.gguf.partial", "scratch/held_out.logprobs.partial"):
        (folder / name).write_bytes(b"left by a kill in the middle of a write")
    final = run_edgeprune(*words)
    assert (final.returncode, final.stderr) == (0, "")
    assert result(folder) == result(tiny_fit.folder)
    assert leftovers(folder) == []
    assert {path.name for path in folder.iterdir()} == {path.name for path in tiny_fit.folder.iterdir()}


@posix
def test_an_interrupt_exits_130_with_one_line(tiny_fit: Fit, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = Running("fit", *tiny_fit.arguments, "-o", folder)
    worker = run.wait_for("calibration:collect")
    assert worker is not None
    time.sleep(0.2)
    os.killpg(run.process.pid, signal.SIGINT)  # as a terminal does: to the command and its child
    code, out, err = run.end()
    assert (code, out) == (130, "")
    # The empty line ends the one with the terminal's ^C.
    assert err == "\nstopped; the same command goes on where it was\n"
    assert gone(worker)
    assert leftovers(folder) == []
    assert GgufFile(folder / "source.gguf").tensors  # what was finished is kept, and is whole


def times(folder: Path) -> dict[str, int]:
    names = ("source.gguf", "statistics.safetensors", "imatrix.gguf", "sensitivity.json", "plan.json")
    paths = [folder / name for name in names] + list(folder.glob("*bpw.gguf"))
    assert len(paths) == len(names) + 1
    return {path.name: path.stat().st_mtime_ns for path in paths}


def test_a_second_run_over_a_finished_folder_makes_nothing_again(tiny_fit: Fit, tmp_path: Path) -> None:
    folder = tiny_fit.copy(tmp_path / "run")
    before = times(folder)
    done = run_edgeprune("fit", *tiny_fit.arguments, "-o", folder, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert times(folder) == before
    assert result(folder) == result(tiny_fit.folder)


def test_another_limit_measures_nothing_again_and_replaces_the_file(tiny_fit: Fit, tmp_path: Path) -> None:
    folder = tiny_fit.copy(tmp_path / "run")
    before = times(folder)
    source, _, _, *rest = tiny_fit.arguments
    done = run_edgeprune("build", source, "--file-size", "600kB", *rest, "-o", folder)
    assert done.returncode == 0
    first, *tried, last = done.stderr.splitlines()
    assert first == "plan changed: file_size: 500000 -> 600000; doing it again"
    assert all(line.startswith(("trying ", "  ")) for line in tried)
    assert "of an earlier plan, is replaced by" in last
    # Reports of the earlier file would be wrong beside this one.
    assert not [name for name in ("report.html", "report.json", "README.md") if (folder / name).exists()]
    after = times(folder)
    unchanged = {name for name in before if after.get(name) == before[name]}
    assert unchanged == {"source.gguf", "statistics.safetensors", "imatrix.gguf", "sensitivity.json"}
    (built,) = folder.glob("*bpw.gguf")
    assert 500_000 < built.stat().st_size <= 600_000


def test_a_changed_text_is_noticed_and_named(tiny_fit: Fit, tmp_path: Path) -> None:
    folder = tiny_fit.copy(tmp_path / "run")
    text = tmp_path / "small.txt"
    text.write_text(Path(tiny_fit.arguments[-1]).read_text(encoding="utf-8") + "one more line\n", encoding="utf-8")
    done = run_edgeprune("calibrate", tiny_fit.arguments[0], "--text", text, "-o", folder)
    assert done.returncode == 0
    (line,) = done.stderr.splitlines()
    assert line.startswith("calibration changed: text: ") and line.endswith("...; doing it again")
    assert times(folder)["statistics.safetensors"] > times(tiny_fit.folder)["statistics.safetensors"]
    assert times(folder)["source.gguf"] == times(tiny_fit.folder)["source.gguf"]


def test_a_checkpoint_that_changed_is_converted_again(tiny_fit: Fit, tmp_path: Path) -> None:
    checkpoint, folder = tmp_path / "tiny", tmp_path / "run"
    shutil.copytree(tiny_fit.arguments[0], checkpoint)
    words = ("calibrate", checkpoint, *tiny_fit.arguments[-2:], "-o", folder)
    assert run_edgeprune(*words).returncode == 0
    toys.change_json(checkpoint / "config.json", rope_theta=20000.0, rope_parameters=...)
    toys.change_json(checkpoint / "tokenizer_config.json", eos_token=...)
    done = run_edgeprune(*words)
    assert done.returncode == 0
    said = done.stderr.splitlines()
    starts = ("the checkpoint changed: content: ", "tokenizer: no token is known", "calibration changed: model: ")
    assert len(said) == len(starts)
    assert all(line.startswith(start) for line, start in zip(said, starts, strict=True))
    assert GgufFile(folder / "source.gguf").get("qwen3moe.rope.freq_base") == 20000.0


def halved(folder: Path, *patterns: str) -> None:
    for pattern in patterns:
        (path,) = folder.glob(pattern)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_damaged_files_of_an_earlier_run_are_made_anew(tiny_fit: Fit, tmp_path: Path) -> None:
    folder = tiny_fit.copy(tmp_path / "run")
    halved(folder, "source.gguf", "statistics.safetensors", "sensitivity.json", "*bpw.gguf")
    done = run_edgeprune("build", *tiny_fit.arguments, "-o", folder)
    assert done.returncode == 0
    assert done.stderr.startswith("the sensitivity is measured anew: cannot read") and done.stderr.count("\n") == 1
    assert result(folder) == result(tiny_fit.folder)


def test_measurements_that_say_nonsense_are_made_anew(tiny_fit: Fit, tmp_path: Path) -> None:
    folder = tiny_fit.copy(tmp_path / "run")
    whole = read(folder / "sensitivity.json")
    toys.change_json(folder / "sensitivity.json", drops={"reap, pooled": {"half": 0.1}})
    done = run_edgeprune("plan", *tiny_fit.arguments, "-o", folder, "--keep", "4")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    again = read(folder / "sensitivity.json")
    assert again["distortions"].keys() == whole["distortions"].keys()
    assert set(again["drops"]["reap, pooled"]) == {"4", "8"}


def test_a_damaged_plan_is_named_and_not_thrown_away(tiny_fit: Fit, tmp_path: Path) -> None:
    folder = tiny_fit.copy(tmp_path / "run")
    halved(folder, "plan.json")
    left = (folder / "plan.json").read_bytes()
    done = run_edgeprune("build", *tiny_fit.arguments, "-o", folder)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: cannot read {folder / 'plan.json'}: ")
    assert (folder / "plan.json").read_bytes() == left


def edited(folder: Path, types: dict[str, str]) -> dict[str, Any]:
    """Change tensor types in the folder's plan as a person would; returns the plan before."""
    path = folder / "plan.json"
    before = read(path)
    path.write_text(json.dumps({**before, "types": {**before["types"], **types}}, indent=2), encoding="utf-8")
    return before


def test_a_plan_edited_by_hand_is_obeyed_and_priced_anew(tiny_fit: Fit, tmp_path: Path) -> None:
    folder = tiny_fit.copy(tmp_path / "run")
    name = "blk.0.attn_q.weight"
    assert read(folder / "plan.json")["types"][name] != "Q4_0"
    before = edited(folder, {name: "Q4_0"})
    done = run_edgeprune("build", *tiny_fit.arguments, "-o", folder, "--json")
    assert done.returncode == 0
    assert (
        done.stderr.splitlines()[0] == "plan.json was edited by hand; it is obeyed, and its predictions are made anew"
    )
    (built,) = folder.glob("*bpw.gguf")
    types = {info.name: info.type for info in GgufFile(built).tensors.values()}
    assert types[name] == "Q4_0"
    assert {key: types[key] for key in before["types"] if key != name} == {
        key: kind for key, kind in before["types"].items() if key != name
    }
    plan = run_edgeprune("plan", *tiny_fit.arguments, "-o", folder, "--json")
    priced = json.loads(plan.stdout)
    assert priced["predicted"]["file_bytes"] == built.stat().st_size < before["predicted"]["file_bytes"]
    assert priced["predicted"]["nats_quant"] > before["predicted"]["nats_quant"]
    assert priced["predicted"]["nats_drop"] == before["predicted"]["nats_drop"]


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ({"blk.0.attn_q.weight": "Q4_K"}, 1, "whose blocks do not divide 128"),
        ({"token_embd.weight": "BF16", "output.weight": "BF16"}, 3, "more than the budget allows"),
    ],
    ids=["a type that does not fit", "beyond the budget"],
)
def test_an_edit_that_cannot_be_obeyed_is_refused(
    change: dict[str, str], code: int, message: str, tiny_fit: Fit, tmp_path: Path
) -> None:
    folder = tiny_fit.copy(tmp_path / "run")
    edited(folder, change)
    done = run_edgeprune("build", *tiny_fit.arguments, "-o", folder)
    assert done.returncode == code, done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr
    assert len(list(folder.glob("*bpw.gguf"))) == 1


def test_a_second_run_at_the_same_time_fails_at_once_and_harms_nothing(tiny_fit: Fit, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = ("calibrate", tiny_fit.arguments[0], *tiny_fit.arguments[-2:], "-o", folder)
    first = Running(*words)
    assert first.wait_for("convert:convert_task") is not None
    first.process.send_signal(signal.SIGSTOP)  # on a busy machine it would be finished before the second begins
    second = run_edgeprune(*words)
    first.process.send_signal(signal.SIGCONT)
    assert second.returncode == 1
    assert second.stderr.splitlines() == [
        f"error: another edgeprune is working in {folder}",
        "hint: wait for it, or use another folder",
    ]
    code, _, err = first.end()
    assert (code, err) == (0, "")
    for name in ("source.gguf", "statistics.safetensors", "imatrix.gguf"):
        assert file_digest(folder / name) == file_digest(tiny_fit.folder / name)


# The run folder itself.


def test_a_folder_is_locked_once(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with folder.locked("model"), pytest.raises(Busy), RunFolder(tmp_path / "run").locked("model"):
        raise AssertionError("two in one folder")
    with folder.locked("model"):
        pass


def test_leftovers_go_when_the_folder_is_opened_and_when_it_is_closed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with folder.locked("model"):
        folder.scratch.mkdir()
        (folder.scratch / "kept.logprobs").touch()
        (folder.path / "kept.json").touch()
    old = [folder.path / "a.gguf.partial", folder.scratch / "b.logprobs.partial"]
    for path in old:
        path.touch()
    with folder.locked("model"):
        assert not any(path.exists() for path in old)
        for path in old:
            path.touch()
    assert not any(path.exists() for path in old)
    assert (folder.path / "kept.json").exists() and (folder.scratch / "kept.logprobs").exists()


def test_a_kill_while_a_folder_is_claimed_does_not_close_it(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    (folder.path / ".edgeprune.partial").write_bytes(b"mo")
    with folder.locked("model"):
        assert [path.name for path in folder.path.glob("*.partial")] == []
    assert not folder.path.exists()


def test_a_folder_of_somebody_else_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "mine")
    folder.path.mkdir()
    (folder.path / "movie.partial").touch()
    with pytest.raises(UsageError, match="holds files that are not edgeprune's"), folder.locked("model"):
        raise AssertionError("taken")
    assert [path.name for path in folder.path.iterdir()] == ["movie.partial"]


def test_a_folder_in_which_nothing_was_made_is_removed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(ZeroDivisionError), folder.locked("model"):
        raise ZeroDivisionError
    assert not folder.path.exists()
    with folder.locked("model"):
        (folder.path / "statistics.safetensors").touch()
    assert folder.statistics.exists()
    with pytest.raises(UsageError, match="is the run directory of model"), folder.locked("another"):
        raise AssertionError("two models in one folder")


def test_changed_fields_name_the_field_and_both_values() -> None:
    old = {"tokens": 512, "text": "a" * 64, "window": 64}
    new = {"tokens": 1024, "text": "b" * 64, "window": 64, "method": "reap"}
    assert changed_fields(old, new) == [
        "method: none -> reap",
        "text: aaaaaaaaaaaa... -> bbbbbbbbbbbb...",
        "tokens: 512 -> 1024",
    ]
    assert changed_fields(old, old) == []


class _Killed(BaseException):
    """As SIGKILL: nothing is tidied up."""


def test_a_killed_calibration_of_the_usual_length_goes_on_within_a_domain(tmp_path: Path, own_home: Path) -> None:
    model = toys.synthetic_gguf(tmp_path / "model.gguf", width=64, expert_width=32)
    text = tmp_path / "own.txt"
    text.write_text("".join(f"Sentence {n} of one long document. " for n in range(1_200)), encoding="utf-8")
    usual = Settings("none")
    arguments: dict[str, Any] = {
        "model": str(model),
        "scratch": str(tmp_path / "scratch"),
        "texts": [TextFile("own", str(text), "calibration").to_json()],
        "window": usual.window,
        "most_tokens": usual.calibration_tokens,
        "weights": ["output.weight"],
        "experts": toys.EXPERTS,
        "arch": "qwen3moe",
        "made_from": {"model": "toy"},
        "reservoir_tokens": 300,
    }
    seen: list[int] = []

    def progress(done: int, total: int) -> None:
        seen.append(done)
        if len(seen) == 20:
            raise _Killed

    with pytest.raises(_Killed):
        calibration.collect(output=str(tmp_path / "a"), progress=progress, **arguments)
    assert seen == list(range(1, 21))
    seen.clear()
    calibration.collect(output=str(tmp_path / "a"), progress=lambda done, total: seen.append(done), **arguments)
    assert seen[0] == 17 and seen[-1] == 48  # 16 windows, 8,192 tokens, were kept
    assert list((tmp_path / "scratch").glob("*.safetensors")) == []
    calibration.collect(output=str(tmp_path / "b"), **arguments)
    again, whole = Statistics.load(tmp_path / "a"), Statistics.load(tmp_path / "b")
    assert again.tokens == whole.tokens == usual.calibration_tokens
    for layer, sums in whole.layers.items():
        np.testing.assert_array_equal(again.layers[layer]["gated_norm_sum"], sums["gated_norm_sum"])
        np.testing.assert_array_equal(again.reservoirs[layer].x, whole.reservoirs[layer].x)
        assert len(whole.reservoirs[layer]) == 300


def test_long_texts_have_no_more_shards() -> None:
    parts = [Window(domain, (0,) * 512) for domain in "ab" for _ in range(1_000)]
    shards = calibration._shards(parts)
    assert len(shards) <= 18
    assert [part for shard in shards for part in shard] == parts
    assert all(len({part.domain for part in shard}) == 1 for shard in shards)


def test_statistics_over_other_texts_are_merged_and_used(tiny_fit: Fit, tmp_path: Path, own_home: Path) -> None:
    source = tiny_fit.folder / "source.gguf"
    files = []
    for name, content in {"first": "one two three four. " * 60, "second": "un deux trois quatre. " * 60}.items():
        (tmp_path / f"{name}.txt").write_text(content, encoding="utf-8")
        done = run_edgeprune("calibrate", source, "--text", tmp_path / f"{name}.txt", "-o", tmp_path / name)
        assert done.returncode == 0, done.stderr
        files.append(tmp_path / name / "statistics.safetensors")
    words = ["calibrate", source, *(word for file in files for word in ("--merge", file)), "-o", tmp_path / "both"]
    done = run_edgeprune(*words)
    assert done.returncode == 0, done.stderr
    both = Statistics.load(tmp_path / "both" / "statistics.safetensors")
    parts = [Statistics.load(file) for file in files]
    assert both.domains == ["first", "second"]
    assert both.tokens == sum(part.tokens for part in parts)
    assert (tmp_path / "both" / "imatrix.gguf").is_file()
    again = run_edgeprune("calibrate", source, "-o", tmp_path / "both")
    assert again.returncode == 0 and "merged from 2 files" in again.stderr
    with pipeline.opened(Settings(str(source), output=str(tmp_path / "refused")), Ear()) as run:
        for twice in ([files[0], files[0]], [tmp_path / "both" / "statistics.safetensors", files[1]]):
            with pytest.raises(UsageError, match="would count twice"):
                run.merge(twice)
        parts[0].made_from["tools"] = "format 1, llama-cpp-python 0.1"
        parts[0].save(tmp_path / "old.safetensors")
        with pytest.raises(BadFile, match="was measured with other tools") as error:
            run.merge([tmp_path / "old.safetensors", files[1]])
        assert dict(error.value.rows)["its tools"] == "format 1, llama-cpp-python 0.1"
    more = run_edgeprune("calibrate", source, "--merge", files[0], "--self", "2", "-o", tmp_path / "more")
    assert more.returncode == 2 and "--self says what to measure" in more.stderr
    other = run_edgeprune("calibrate", "demo", "--merge", files[0], "-o", tmp_path / "other")
    assert other.returncode == 1 and "was measured with another model" in other.stderr
    missing = run_edgeprune("calibrate", source, "--merge", tmp_path / "none", "-o", tmp_path / "missing")
    assert missing.returncode == 2 and "no statistics" in missing.stderr
