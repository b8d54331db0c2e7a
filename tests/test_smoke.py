"""Smoke tests on this machine: real runs through the real command, every promise broken once, the runner alone."""

from __future__ import annotations

import ast
import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import toys
from runs import Ear, Fit, gone, read, run_edgeprune

from edgeprune.decide.plan import Plan
from edgeprune.device.machine import user_folder
from edgeprune.device.profile import find_profile
from edgeprune.errors import BadFile, EdgepruneError, UsageError
from edgeprune.files import to_json
from edgeprune.measure.llama import backend_devices
from edgeprune.model.gguf import GgufFile
from edgeprune.model.splitting import split
from edgeprune.prove.report import rate
from edgeprune.prove.smoke.checks import KEYS, Promised, checks
from edgeprune.prove.smoke.conversation import Measured
from edgeprune.prove.smoke.forecast import Forecast
from edgeprune.prove.smoke.history import against_baseline, against_earlier, earlier, save
from edgeprune.prove.smoke.packing import packed_runner
from edgeprune.prove.smoke.questions import Question, plausible, questions
from edgeprune.prove.smoke.report import SmokeReport
from edgeprune.prove.smoke.runner import cards
from edgeprune.prove.smoke.runner.cards import free_on_gpus, taken
from edgeprune.prove.smoke.runner.system import Meanwhile
from edgeprune.stages.deciding import profile_digest
from edgeprune.stages.smoke import Wish, promises_of, smoke

pytest_plugins = ("demo_fixtures",)

posix = pytest.mark.skipif(sys.platform == "win32", reason="signals and shell scripts")
SHORT = ("--context", "256")


def file_of(fit: Fit) -> Path:
    (path,) = fit.folder.glob("*bpw.gguf")
    return path


def verdicts(report: SmokeReport) -> dict[str, str]:
    return {check.key: check.verdict for check in report.checks}


def test_a_file_that_was_fitted_keeps_what_its_plan_promised(tiny_fit: Fit) -> None:
    done = run_edgeprune("smoke", file_of(tiny_fit), "--json")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    found = {check["key"]: check for check in report["checks"]}
    assert list(found) == [key for key in KEYS if key not in ("baseline", "vram")]  # no GPU here
    kept = ("loads", "memory", "deterministic", "finite", "context")
    assert [found[key]["verdict"] for key in kept] == ["kept"] * 5
    assert re.fullmatch(r"[\d,.]+ predicted, at least [\d,.]+", found["decode"]["promised"])
    assert found["decode"]["verdict"] != "information"
    assert report["measured"]["steps"]["memory"]["device_bytes"] is None
    assert "predicted, at most" in found["memory"]["promised"] and "predicted" in found["decode"]["promised"]
    assert found["context"]["measured"] == found["context"]["promised"] == "2,048 tokens"
    assert report["file"]["sha256"] == read(tiny_fit.folder / "build.json")["sha256"]
    saved = sorted((user_folder() / "local").glob(f"*-{report['file']['sha256'][:12]}.json"))
    assert read(saved[-1]) == report
    text = run_edgeprune("smoke", file_of(tiny_fit), *SHORT)
    assert text.returncode == 0, text.stderr
    assert "the file loads" in text.stdout and "256 tokens" in text.stdout


@pytest.mark.parametrize("speed", ["nan", "inf", "-1", "fast"])
def test_a_speed_that_nothing_can_reach_or_miss_is_refused(tiny_fit: Fit, speed: str) -> None:
    done = run_edgeprune("smoke", file_of(tiny_fit), "--min-decode", speed)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--min-decode" in done.stderr


def test_the_memory_that_a_plan_was_made_for_is_a_promise(tiny_fit: Fit, tmp_path: Path) -> None:
    """`fit --memory 9MiB` promised 9 MiB, whatever the device has; so does `smoke --memory 9MiB`."""
    folder = tiny_fit.copy(tmp_path / "run")
    value = read(folder / "plan.json")
    plan = Plan.from_json({**value, "made_from": {**value["made_from"], "file_size": None, "memory": 9 << 20}}, "it")
    file, profile = GgufFile(file_of(tiny_fit)), find_profile("cpu-8gb")
    asked = Wish(file.path)
    promised = promises_of(asked, profile, plan.launch, plan, folder)
    assert promised.ceiling_bytes == 9 << 20
    assert (
        promises_of(replace(asked, most_bytes=8 << 20), profile, plan.launch, plan, folder).ceiling_bytes == 8 << 20
    )
    assert promises_of(asked, profile, plan.launch, None, None).ceiling_bytes == profile.usable_ram_bytes
    assert not promised.for_device  # it was made for this machine
    own = replace(plan, made_from={**plan.made_from, "device": profile_digest(profile)})
    assert promises_of(asked, profile, plan.launch, own, folder).for_device
    done = run_edgeprune("smoke", file_of(tiny_fit), *SHORT, "--memory", "9MiB", "-o", tmp_path / "own")
    assert done.returncode == 3
    assert "peak memory: " in done.stderr and "at most 9.00 MiB" in done.stderr


@pytest.fixture(scope="module")
def good(tiny_fit: Fit, tmp_path_factory: pytest.TempPathFactory) -> tuple[SmokeReport, Path]:
    """A report of a run with a short context, and the folder it is in. Do not change it."""
    folder = tmp_path_factory.mktemp("reports")
    report, path = smoke(Wish(file_of(tiny_fit), context=256, output=folder), Ear())
    assert path.parent == folder and SmokeReport.load(path) == report
    return report, folder


def test_a_speed_that_is_not_reached_exits_3_with_one_line(tiny_fit: Fit, tmp_path: Path) -> None:
    done = run_edgeprune("smoke", file_of(tiny_fit), *SHORT, "--min-decode", "1e7", "--json", "-o", tmp_path / "own")
    assert done.returncode == 3
    first, line, *_ = done.stderr.splitlines()
    assert first == "error: a promise was broken on local"
    assert line.startswith("  broken   decode (tokens per second): ") and "at least 10,000,000" in line
    (saved,) = (tmp_path / "own").iterdir()
    assert json.loads(done.stdout) == read(saved)


def test_memory_above_the_profiles_is_a_broken_promise(tiny_fit: Fit, tmp_path: Path) -> None:
    profile = tmp_path / "watch.toml"
    profile.write_text(
        'name = "watch"\nsummary = "a watch"\nbackend = "cpu"\nthreads = 1\n'
        '[pools.ram]\ntotal = "20 MiB"\nreserve = "4 MiB"\nbandwidth = "2 GB/s"\n'
        '[defaults]\ncontext = 256\nkv_type = "f16"\n[types]\navoid = []\n'
    )
    done = run_edgeprune("smoke", file_of(tiny_fit), "--profile", profile, *SHORT, "-o", tmp_path / "own")
    assert done.returncode == 3
    assert "peak memory: " in done.stderr and "at most 16.0 MiB" in done.stderr
    assert "(watch)" in done.stdout


def changed(report: SmokeReport, **fields: Any) -> SmokeReport:
    """``report`` as one of a quiet machine, with other figures: ``step__key`` reaches into what was measured."""
    value = json.loads(to_json(report.to_json()))
    value.pop("format")
    value["measured"]["steps"]["speed"]["others"] = value["measured"]["steps"]["machine"]["load"] = 0.0
    for name, figure in fields.items():
        step, _, key = name.partition("__")
        if key:
            value["measured"]["steps"][step][key] = figure
        else:
            value[name] = figure
    return SmokeReport(**{**value, "checks": report.checks})


def test_what_got_worse_since_earlier_runs_is_named(
    tiny_fit: Fit, good: tuple[SmokeReport, Path], tmp_path: Path
) -> None:
    report, _ = good
    decode, peak = report.step("speed")["decode_per_s"], report.step("memory")["peak_bytes"]
    better = changed(
        report, speed__decode_per_s=1000 * decode, memory__peak_bytes=peak // 2, right=["capital", *report.right]
    )
    save(better, tmp_path)
    save(changed(better, launch={"context": 64}), tmp_path)  # of other settings: it does not count
    (tmp_path / f"20200101-{report.file['sha256'][:12]}.json").write_text("{}")
    done = run_edgeprune("smoke", file_of(tiny_fit), *SHORT, "-o", tmp_path)
    assert done.returncode == 3
    assert "an earlier report is left out" in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "against earlier runs" in line]
    assert "decode " in line and "peak memory " in line and "lost: capital" in line and "the run before" in line
    again = run_edgeprune("smoke", file_of(tiny_fit), *SHORT, "-o", tmp_path / "new")
    assert again.returncode == 0 and "this is the first run" in again.stdout


def test_the_median_of_the_latest_runs_counts_and_few_runs_prove_little(
    good: tuple[SmokeReport, Path], tmp_path: Path
) -> None:
    report, _ = good
    for number, speed in enumerate((1, 1, 1, 110, 120, 100, 4000, 130)):
        save(changed(report, speed__decode_per_s=speed, when=f"2020-01-0{number + 1}T00:00:00Z"), tmp_path)
    before = earlier(report, tmp_path, print)
    assert [old.when[:10] for old in before] == [f"2020-01-0{day}" for day in range(4, 9)]

    def verdict(speed: float, runs: list[SmokeReport]) -> str:
        return against_earlier(changed(report, speed__decode_per_s=speed), runs).verdict

    assert (verdict(85, before), verdict(83, before)) == ("kept", "broken")  # 120 is the median
    assert (verdict(51, before[2:3]), verdict(49, before[2:3])) == ("kept", "broken")
    assert verdict(1, []) == "information"


def test_more_memory_of_a_graphics_card_than_before_is_told(good: tuple[SmokeReport, Path]) -> None:
    report, _ = good
    line = against_earlier(
        changed(report, memory__device_bytes=2 << 30), [changed(report, memory__device_bytes=1 << 30)]
    )
    assert line.verdict == "broken" and "memory of the GPU 2.00 GiB, was 1.00 GiB or less" in line.measured
    assert against_earlier(changed(report, memory__device_bytes=2 << 30), [report]).verdict == "kept"  # it had none


def test_a_fall_in_speed_does_not_become_the_measure_of_the_next_run(
    good: tuple[SmokeReport, Path], tmp_path: Path
) -> None:
    report, _ = good
    save(changed(report, speed__decode_per_s=200), tmp_path)
    for _ in range(2):
        slow = changed(report, speed__decode_per_s=50)
        line = against_earlier(slow, earlier(slow, tmp_path, print))
        assert line.verdict == "broken"
        save(dataclasses.replace(slow, checks=[*slow.checks, line]), tmp_path)


def test_on_a_busy_machine_a_fall_in_speed_is_not_judged_and_no_measure(
    good: tuple[SmokeReport, Path], tmp_path: Path
) -> None:
    report, _ = good
    save(changed(report, speed__decode_per_s=200, speed__others=0.0), tmp_path)
    slow = changed(report, speed__decode_per_s=50, speed__others=0.66)
    before = earlier(slow, tmp_path, print)
    line = against_earlier(slow, before)
    assert line.verdict == "not judged"
    assert line.measured == "decode 50 tokens per second, was 200, while other programs used 66 % of the cores"
    save(dataclasses.replace(slow, checks=[*slow.checks, line]), tmp_path)
    assert len(earlier(slow, tmp_path, print)) == len(before) == 1
    # What has nothing to do with speed is judged all the same.
    large = changed(slow, memory__peak_bytes=10 * report.step("memory")["peak_bytes"])
    assert against_earlier(large, before).verdict == "broken"
    quiet = changed(report, speed__decode_per_s=50, speed__others=0.05)
    assert against_earlier(quiet, before).verdict == "broken"


def test_a_file_that_was_damaged_since_it_was_built_is_refused(tiny_fit: Fit, tmp_path: Path) -> None:
    folder = tiny_fit.copy(tmp_path / "run")
    model = folder / file_of(tiny_fit).name
    content = bytearray(model.read_bytes())
    content[-1] ^= 1
    model.write_bytes(content)
    with pytest.raises(BadFile, match="is not the file that was built"):
        smoke(Wish(model, context=128, output=tmp_path / "own"), Ear())


def test_a_baseline_of_another_file_is_held_against_the_answers(
    tiny_fit: Fit, good: tuple[SmokeReport, Path], tmp_path: Path
) -> None:
    report, _ = good
    source = changed(
        report, right=["capital", "week"], file={**report.file, "sha256": "0" * 64, "name": "source.gguf"}
    )
    path = save(source, tmp_path)
    done = run_edgeprune("smoke", file_of(tiny_fit), *SHORT, "--baseline", path, "-o", tmp_path / "own")
    assert done.returncode == 3
    (line,) = [line for line in done.stderr.splitlines() if "against the baseline" in line]
    assert "lost: capital, week" in line and "2 right answers of source.gguf" in line
    assert against_baseline(report, changed(source, right=[])).verdict == "kept"


def test_a_value_that_is_not_finite_is_found(toy_gguf: toys.Maker, tmp_path: Path) -> None:
    source = toy_gguf("qwen3_moe")
    offset, data = GgufFile(source).tensors["output_norm.weight"].offset, bytearray(source.read_bytes())
    data[offset : offset + 4] = b"\x00\x00\xc0\x7f"
    bad = tmp_path / "nan.gguf"
    bad.write_bytes(data)
    report, _ = smoke(Wish(bad, context=128, output=tmp_path / "own"), Ear())
    assert verdicts(report)["finite"] == "broken" and verdicts(report)["loads"] == "kept"
    (line,) = [check.measured for check in report.checks if check.key == "finite"]
    assert line == (
        "no: speed, context, answers to capital, sum, product, week and 8 more, tensor output_norm.weight of the file"
    )


def test_a_tensor_that_holds_nan_is_named_whatever_the_logits_are(tiny_fit: Fit, tmp_path: Path) -> None:
    built = file_of(tiny_fit)
    offset, data = GgufFile(built).tensors["blk.1.attn_norm.weight"].offset, bytearray(built.read_bytes())
    data[offset : offset + 4] = b"\x00\x00\xc0\x7f"
    bad = tmp_path / "nan.gguf"
    bad.write_bytes(data)
    report, _ = smoke(Wish(bad, context=128, output=tmp_path / "own"), Ear())
    (line,) = [check for check in report.broken if check.key == "finite"]
    assert line.measured.endswith("tensor blk.1.attn_norm.weight of the file")


def test_any_part_of_a_split_file_stands_for_all_of_it(synthetic: toys.Maker, tmp_path: Path) -> None:
    whole = synthetic("qwen3moe")
    parts = split(whole, tmp_path, "toy", whole.stat().st_size * 2 // 3)
    assert len(parts) > 1
    report, _ = smoke(Wish(parts[1].path, context=128, output=tmp_path / "own"), Ear())
    assert report.file["name"] == "toy-00001-of-00002.gguf"
    assert report.file["nbytes"] == sum(part.nbytes for part in parts)
    assert {verdicts(report)[key] for key in ("loads", "finite", "context")} == {"kept"}


@posix
def test_a_crash_on_the_device_is_a_line_of_the_report(tmp_path: Path) -> None:
    small = {"experts": 4, "width": 64, "expert_width": 64}
    model = toys.synthetic_gguf(tmp_path / "bad.gguf", extra=[("expert_used_count", "u32", 5)], **small)
    done = run_edgeprune("smoke", model, "--context", "128", "--json", "-o", tmp_path / "own")
    assert done.returncode == 3
    assert "llama.cpp aborted on a failed check" in done.stderr and "GGML_ASSERT" in done.stderr
    found = {check["key"]: check["verdict"] for check in json.loads(done.stdout)["checks"]}
    assert (found.pop("loads"), found.pop("earlier")) == ("broken", "information")
    assert set(found.values()) == {"not reached"}


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("nowhere.gguf",), 2, "no file nowhere.gguf"),
        (("text.gguf",), 1, "text.gguf"),
        (("good.gguf", "--device", "locl"), 2, "did you mean local?"),
        (("good.gguf", "--profile", "watch"), 2, "no device profile 'watch'"),
        (("good.gguf", "--context", "4096"), 2, "longer than the model's 2048"),
        (("good.gguf", "--plan", "plan.json"), 2, "no plan plan.json"),
        (("good.gguf", "--plan", "other/plan.json"), 2, "is the plan of another file"),
        (("good.gguf", "--plan", "x", "--run", "y"), 2, "--plan and --run"),
        (("good.gguf", "--baseline", "text.gguf"), 1, "cannot read text.gguf"),
        (("good.gguf", "--baseline", "other/plan.json"), 1, "the report"),
    ],
)
def test_what_cannot_be_tested_is_explained(
    words: tuple[str, ...], code: int, said: str, synthetic: toys.Maker, tiny_fit: Fit, tmp_path: Path
) -> None:
    shutil.copyfile(synthetic("qwen3moe"), tmp_path / "good.gguf")
    (tmp_path / "text.gguf").write_text("no model")
    (tmp_path / "other").mkdir()
    shutil.copyfile(tiny_fit.folder / "plan.json", tmp_path / "other" / "plan.json")
    done = run_edgeprune("smoke", *words, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr and done.stderr.startswith("error: ")


def test_a_plan_beside_the_file_that_is_of_another_is_left_out(
    synthetic: toys.Maker, tiny_fit: Fit, tmp_path: Path
) -> None:
    model = Path(shutil.copyfile(synthetic("qwen3moe"), tmp_path / "good.gguf"))
    shutil.copyfile(tiny_fit.folder / "plan.json", tmp_path / "plan.json")
    ear = Ear()
    report, _ = smoke(Wish(model, context=128, output=tmp_path / "own"), ear)
    assert ear.said == [f"{tmp_path / 'plan.json'} is not the plan of good.gguf and is left out"]
    assert "predicted" not in report.checks[1].promised
    assert {"send to local", "smoke test on local"} <= set(ear.stages)


def test_a_python_without_llama_cpp_is_named_with_a_way_out(
    synthetic: toys.Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = tmp_path / "bare.toml"
    device.write_text(
        'name = "bare"\ntransport = "local"\nprofile = "cpu-8gb"\n[runner]\npython = "nowhere/python"\n'
    )
    wish = Wish(synthetic("qwen3moe"), device=str(device), context=128, output=tmp_path / "own")
    with pytest.raises(EdgepruneError, match="bare: nowhere/python cannot be started"):
        smoke(wish, Ear())
    device.write_text(device.read_text().replace("nowhere/python", sys.executable))
    (tmp_path / "llama_cpp").mkdir()
    (tmp_path / "llama_cpp" / "__init__.py").write_text("raise FileNotFoundError('libllama.so:\\n not found')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(EdgepruneError) as caught:
        smoke(wish, Ear())
    assert caught.value.cause == f"llama-cpp-python cannot be loaded by {sys.executable}: libllama.so: not found"
    assert "[runner]" in caught.value.hint
    assert not (tmp_path / "own").exists()


def job(model: Path, **changes: Any) -> dict[str, Any]:
    """A small job for the runner."""
    launch = {"context": 128, "batch": 32, "threads": 1, "kv_type": "F16", "kv_type_id": 1, "gpu_layers": 0}
    launch |= {"cpu_experts": 1, "mmap": False, "repack": False}
    speed = {"prompt_tokens": 16, "generated_tokens": 4, "repeats": 1}
    prompts = [{"text": question.plain, "special": False} for question in questions()]
    wanted = {"engine": "library", "model": str(model), "launch": launch, "speed": speed, "prompts": prompts}
    return {**wanted, "most_tokens": 8, "repeated": 2, "silent_seconds": 60, **changes}


@contextmanager
def runner(wanted: dict[str, Any]) -> Iterator[subprocess.Popen[bytes]]:
    """The runner as a device starts it: alone, in a folder where no edgeprune is."""
    with packed_runner() as path:
        command = [sys.executable, "-P", str(path)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/")
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(wanted).encode() + b"\n")
        process.stdin.flush()
        with process.stdin, process.stdout:
            yield process
        process.wait(20)


def worker_of(process: subprocess.Popen[bytes]) -> psutil.Process:
    """The child that llama.cpp runs in, once it is there."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if found := psutil.Process(process.pid).children():
            return found[0]
        time.sleep(0.01)
    raise AssertionError("no child was started")


def test_the_runner_is_one_small_file_that_old_python_reads_and_needs_no_package_but_llama_cpp() -> None:
    with packed_runner() as first, packed_runner() as second:
        assert first.read_bytes() == second.read_bytes() and first.stat().st_size < 50_000
        with zipfile.ZipFile(first) as archive:
            modules = [ast.parse(archive.read(name), name, feature_version=(3, 9)) for name in archive.namelist()]
    assert not first.exists()
    named: set[str] = set()
    for node in (node for module in modules for node in ast.walk(module)):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            named.add(str(node.module))
    tops = {name.split(".")[0] for name in named}
    assert tops - sys.stdlib_module_names == {"edgeprune_runner", "llama_cpp"}  # itself, and what it tries


def test_the_runner_needs_no_edgeprune(synthetic: toys.Maker) -> None:
    with runner(job(synthetic("qwen3moe"))) as process:
        assert process.stdout is not None
        said = [json.loads(line) for line in process.stdout]
    steps = {message["result"]["step"]: message["result"]["value"] for message in said if "result" in message}
    assert list(steps) == ["machine", "load", "speed", "answers", "repeated", "context", "memory"]
    assert said[-1] == {"end": True}
    assert steps["repeated"] == steps["answers"][:2] and len(steps["answers"]) == len(questions())
    assert steps["context"] == {"filled_tokens": 128, "context": 128, "finite": True}
    assert 1e6 < steps["memory"]["peak_bytes"] < 1e9
    assert steps["machine"]["cores"] == os.cpu_count()


@posix
@pytest.mark.parametrize(
    ("wound", "silent", "cause"),
    [
        ("kill", 60, "it was killed, most likely for using too much memory"),
        ("suspend", 1, "it said nothing for 1 s and was ended"),
    ],
)
def test_a_worker_that_dies_or_hangs_is_reported(
    wound: str, silent: float, cause: str, synthetic: toys.Maker
) -> None:
    endless = {"prompt_tokens": 16, "generated_tokens": 64, "repeats": 10**6}
    with runner(job(synthetic("qwen3moe"), speed=endless, silent_seconds=silent)) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if json.loads(line).get("step") == "speed":
                break
        getattr(worker_of(process), wound)()
        said = [json.loads(line) for line in process.stdout]
    assert [message["failed"]["cause"] for message in said if "failed" in message] == [cause]
    assert [message["failed"]["step"] for message in said if "failed" in message] == ["speed"]
    assert said[-1] == {"end": True}


def test_everything_ends_when_the_connection_is_gone(synthetic: toys.Maker) -> None:
    endless = {"prompt_tokens": 16, "generated_tokens": 64, "repeats": 10**6}
    with runner(job(synthetic("qwen3moe"), speed=endless)) as process:
        worker = worker_of(process)
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(20) == 1
        assert gone(worker)


@pytest.mark.parametrize(
    ("name", "text", "right"),
    [
        ("capital", " Paris, of course", True),
        ("capital", "PARIS", True),
        ("capital", "comparison", False),
        ("sum", "= 12.", True),
        ("sum", "112", False),
        ("sum", "It is twelve", True),
        ("alphabet", " E, F, G", True),
        ("alphabet", "the letter e", False),
        ("water", "H₂O", True),
        ("echo", "", False),
    ],
)
def test_an_answer_counts_as_a_word_of_its_own(name: str, text: str, right: bool) -> None:
    (question,) = [question for question in questions() if question.name == name]
    assert question.answered(text) is right


def test_there_are_a_dozen_questions_whose_own_words_do_not_answer_them() -> None:
    asked = questions()
    assert len({question.name for question in asked}) == len(asked) == 12
    own = [question.name for question in asked if question.answered(question.plain)]
    assert own == ["echo"]


def test_a_loop_of_one_or_two_tokens_is_no_answer() -> None:
    assert not plausible([], "") and not plausible([5], " \n")
    assert not plausible([], "ha " * 8) and plausible([], "these are some words that differ from each other")
    assert not plausible([5] * 8, "ha" * 8) and not plausible([5, 6] * 8, "ab" * 8)
    assert plausible([5], "Paris") and plausible([1, 2, 3, 1, 2, 3, 1, 2], "some words")


ASKED = [Question(name, "", "", (name,)) for name in ("one", "two", "three", "four")]


TINY = {"prefill_per_s": 1, "decode_per_s": 1e-308}


def test_what_is_left_is_told_by_the_speed_once_that_is_known() -> None:
    """A slow start says nothing of what follows, and a long context takes longer than a dozen answers."""
    now = [0.0]
    asked = {"prompts": [{"text": "x" * 400}] * 4, "most_tokens": 50, "repeated": 2, "engine": "library"}
    forecast = Forecast({**asked, "launch": {"context": 10_000}}, clock=lambda: now[0])

    def left(step: str, done: int, total: int) -> float:
        """Seconds, as a console would tell them."""
        share = (lambda pair: pair[0] / pair[1])(forecast.share({"step": step, "done": done, "total": total}))
        return now[0] * (1 - share) / share if share else math.inf

    now[0] = 30.0
    assert left("load", 0, 1) == left("speed", 1, 3) == math.inf
    forecast.learn("speed", {"prefill_per_s": 100.0, "decode_per_s": 10.0})
    # An answer takes 1 s to read 100 tokens and 5 to write 50: 24 for all, 12 again, and 100 for the context.
    assert left("answers", 0, 4) == pytest.approx(136, abs=0.1)
    now[0] = 42.0
    assert left("answers", 2, 4) == pytest.approx(124, abs=0.1)
    assert left("context", 3, 4) == pytest.approx(25, abs=0.1)
    assert left("what is that", 1, 1) == math.inf
    for nonsense in (
        {},
        None,
        {"prefill_per_s": "fast", "decode_per_s": 1},
        {"prefill_per_s": 1, "decode_per_s": 0},
        TINY,
    ):
        forecast.learn("speed", nonsense)
        assert left("context", 3, 4) == math.inf
    forecast.learn("speed", {"prefill_per_s": math.nan, "decode_per_s": -math.inf})
    assert left("context", math.nan, -1) == math.inf


def test_shares_are_fixed_where_the_speed_is_measured_last() -> None:
    forecast = Forecast({"engine": "library", "bench": {"prefill": []}})
    assert forecast.share({"step": "answers", "done": 1, "total": 2}) == (3000, 12000)
    assert forecast.share({"step": "speed", "done": 1, "total": 2}) == (11000, 12000)


def answer(text: str, *tokens: int, finite: bool = True) -> dict[str, Any]:
    return {"tokens": list(tokens) or [1, 2, 3], "text": text, "finite": finite}


def found(key: str, steps: dict[str, Any], **fields: Any) -> tuple[str, str]:
    lines = checks(Promised(**fields.pop("promised", {})), ASKED, Measured(steps, **fields))
    (line,) = [line for line in lines if line.key == key]
    return line.verdict, line.measured


def test_answers_that_differ_the_second_time_are_named() -> None:
    rows = [answer("one", 1), answer("one and two", 2), answer("", 7), answer("four")]
    steps = {"answers": rows, "repeated": [answer("one", 1), answer("two", 3), answer("", 7)]}
    assert found("deterministic", steps) == ("broken", "no: two")
    untold = [{**row, "tokens": []} for row in rows]
    assert found("deterministic", {"answers": untold, "repeated": untold[:3]}) == ("kept", "yes")
    other = [untold[0], {**untold[1], "text": "two"}, untold[2]]
    assert found("deterministic", {"answers": untold, "repeated": other}) == ("broken", "no: two")
    assert found("answers", steps) == ("information", "3 of 4")
    assert found("plausible", steps) == ("kept", "3 of 4, not: three")
    rows[0] = answer("looping", *[9] * 20)
    assert found("plausible", steps) == ("broken", "2 of 4, not: one, three")


def test_answers_that_did_not_come_are_no_answers() -> None:
    steps: dict[str, Any] = {"answers": [], "repeated": []}
    assert found("plausible", steps) == ("broken", "0 of 4 came")
    assert found("deterministic", steps) == ("broken", "no: 0 of 4 answers came, 0 of 3 again")
    assert found("answers", steps) == ("information", "0 of 4")
    rows = [answer(name) for name in ("one", "two", "three", "four")]
    assert found("deterministic", {"answers": rows, "repeated": rows[:1]})[0] == "broken"
    assert found("plausible", {"answers": [*rows, *rows]})[0] == "broken"
    context = {"finite": True, "filled_tokens": 8, "context": 8}
    assert found("finite", {**steps, "context": context}) == ("not run", "the engine does not tell")


def test_one_logit_that_is_no_number_is_enough_but_none_is_no_proof() -> None:
    rows = [answer("one"), answer("two", finite=False)]
    assert found("finite", {"answers": rows}) == ("broken", "no: answers to two")
    assert found("finite", {"answers": rows[:1]}, failed="context") == ("not reached", "")
    sound = {"answers": rows[:1], "context": {"finite": True, "filled_tokens": 8, "context": 8}}
    assert found("finite", sound) == ("kept", "yes")
    unseen = {**sound, "file": {"not_finite": None}}
    assert found("finite", unseen) == ("not run", "the logits are; nobody could look at the weights")
    named = {**sound, "file": {"not_finite": "x.weight"}}
    assert found("finite", named) == ("broken", "no: tensor x.weight of the file")


@pytest.mark.parametrize(
    ("promised", "peak", "verdict"),
    [
        ({"ceiling_bytes": 100 << 20}, 100 << 20, "kept"),
        ({"ceiling_bytes": 100 << 20}, (100 << 20) + 1, "broken"),
        ({"ceiling_bytes": 1 << 40, "peak_bytes": 1000 << 20}, 1070 << 20, "kept"),
        ({"ceiling_bytes": 1 << 40, "peak_bytes": 1000 << 20}, 1080 << 20, "broken"),
        ({"ceiling_bytes": 100 << 20}, None, "information"),
        ({}, 1 << 40, "information"),
    ],
)
def test_memory_is_held_against_the_device_and_the_plan(
    promised: dict[str, Any], peak: int | None, verdict: str
) -> None:
    assert found("memory", {"memory": {"peak_bytes": peak}}, promised=promised)[0] == verdict


@pytest.mark.parametrize(
    ("promised", "held", "verdict"),
    [
        ({"vram_ceiling_bytes": 8 << 30}, 8 << 30, "kept"),
        ({"vram_ceiling_bytes": 8 << 30}, (8 << 30) + 1, "broken"),
        ({"vram_ceiling_bytes": 8 << 30, "vram_bytes": 4 << 30}, 5 << 30, "broken"),
        ({"vram_ceiling_bytes": 8 << 30}, None, "information"),
        ({}, 1 << 30, "information"),
    ],
)
def test_memory_of_a_graphics_card_is_held_against_the_device_and_the_plan(
    promised: dict[str, Any], held: int | None, verdict: str
) -> None:
    steps = {"memory": {"peak_bytes": 1, "device_bytes": held}}
    assert found("vram", steps, promised=promised)[0] == verdict
    assert not any(line.key == "vram" for line in checks(Promised(), ASKED, Measured({"memory": {"peak_bytes": 1}})))


def test_what_a_model_takes_of_graphics_cards_is_what_is_no_longer_free() -> None:
    before = {"CUDA0": 8 << 30, "CUDA1": 4 << 30, "CUDA2": 1 << 30}
    assert taken(before, {"CUDA0": 5 << 30, "CUDA1": 4 << 30, "CUDA2": 2 << 30}) == 3 << 30  # another one's end
    assert taken(before, {}) == 0  # a card that went away says nothing
    assert taken({}, {"CUDA0": 1}) is None


def test_free_memory_of_devices_is_what_llama_cpp_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no graphics card here; the processor stands for one."""
    from llama_cpp import llama_cpp

    llama_cpp.llama_backend_init()
    seen = [one for one in backend_devices() if one["kind"] == "gpu"]
    assert set(free_on_gpus(llama_cpp._lib)) == {one["name"] for one in seen}
    monkeypatch.setattr(cards, "_GPU", 0)
    (found,) = free_on_gpus(llama_cpp._lib).values()
    assert 0 < found <= psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("promised", "speed", "verdict"),
    [
        ({"decode_per_s": 10.0, "for_device": True}, {"decode_per_s": 5.0}, "kept"),
        ({"decode_per_s": 10000.0, "for_device": True}, {"decode_per_s": 193.0}, "kept"),  # 5 ms are not products
        ({"decode_per_s": 10000.0, "for_device": True}, {"decode_per_s": 192.0}, "broken"),
        ({"decode_per_s": 10.0, "for_device": True}, {"decode_per_s": 4.8}, "broken"),
        ({"decode_per_s": 10.0, "for_device": True}, {"decode_per_s": 4.0, "best_decode_per_s": 6.0}, "kept"),
        ({"decode_per_s": 10.0}, {"decode_per_s": 0.1}, "information"),
        ({"decode_per_s": 10.0, "for_device": True, "least_decode_per_s": 0.0}, {"decode_per_s": 0.1}, "information"),
        ({"decode_per_s": 1.0, "least_decode_per_s": 9.0}, {"decode_per_s": 8, "best_decode_per_s": 10}, "broken"),
        ({"for_device": True}, {"decode_per_s": 0.1}, "information"),
    ],
)
def test_half_of_the_predicted_speed_is_the_least_where_the_device_is_the_plans(
    promised: dict[str, Any], speed: dict[str, Any], verdict: str
) -> None:
    steps = {"speed": {**speed, "prefill_per_s": 1.0, "finite": True}}
    (line,) = (line for line in checks(Promised(**promised), ASKED, Measured(steps)) if line.key == "decode")
    assert line.verdict == verdict
    assert ("for another device" in line.promised) is (promised == {"decode_per_s": 10.0})


@pytest.mark.parametrize(
    ("machine", "said"),
    [
        ({"load": 3.96, "cores": 2}, "1, on a busy machine (load 4.0 on 2 cores)"),
        ({"load": 0.9, "cores": 2}, "1"),
        ({"load": None, "cores": 2}, "1"),
        ({}, "1"),
    ],
)
def test_a_speed_that_is_missed_on_a_busy_machine_says_so(machine: dict[str, Any], said: str) -> None:
    steps = {"machine": machine, "speed": {"decode_per_s": 1.0, "prefill_per_s": 1.0, "finite": True}}
    assert found("decode", steps, promised={"least_decode_per_s": 9.0}) == ("broken", rate(1.0) + said[1:])
    assert found("decode", steps, promised={"least_decode_per_s": 0.5}) == ("kept", rate(1.0))
    # What nobody asked for is judged where the machine was quiet.
    own = found("decode", steps, promised={"decode_per_s": 18.0, "for_device": True})
    assert own == ("not judged" if machine.get("load") == 3.96 else "broken", rate(1.0) + said[1:])


def test_programs_that_ran_while_the_speed_was_measured_count_too() -> None:
    speed = {"decode_per_s": 1.0, "prefill_per_s": 1.0, "finite": True}
    promised = {"decode_per_s": 18.0, "for_device": True}
    for share, verdict, said in (
        (0.5, "not judged", "1, while other programs used 50 % of the cores"),
        (0.05, "broken", "1"),
        (None, "broken", "1"),
    ):
        steps = {"machine": {"load": 0.1, "cores": 2}, "speed": {**speed, "others": share}}
        assert found("decode", steps, promised=promised) == (verdict, said)


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="the system does not tell")
def test_what_others_use_is_told_and_what_the_model_uses_is_not() -> None:
    deadline = time.monotonic() + 0.4
    own, none = Meanwhile("self"), Meanwhile("")
    child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        other = Meanwhile(str(child.pid))
        while time.monotonic() < deadline:
            pass
        shares = [meanwhile.others() for meanwhile in (own, other, none)]
    finally:
        child.kill()
        child.wait()
    assert shares[2] is None and all(share is not None and 0 < share <= 1 for share in shares[:2])


def test_a_context_that_ends_early_is_a_broken_promise() -> None:
    assert found("context", {"context": {"filled_tokens": 90, "context": 128, "finite": True}})[0] == "broken"
    assert found("context", {}, failed="context", cause="it was killed") == ("broken", "it was killed")
    assert found("context", {}, failed="speed", cause="it was killed") == ("not reached", "")


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value.pop("right"),
        lambda value: value.update(format=99),
        lambda value: value.update(checks=[{"key": "x"}]),
        lambda value: value.update(right=[1]),
        lambda value: value.update(file={}),
        lambda value: value["measured"].update(steps=[]),
        lambda value: value["measured"]["steps"]["speed"].update(decode_per_s="fast"),
    ],
    ids=["missing", "other form", "checks", "right", "file", "steps", "figure"],
)
def test_a_damaged_report_is_refused(
    change: Callable[[dict[str, Any]], Any], good: tuple[SmokeReport, Path], tmp_path: Path
) -> None:
    value = json.loads(to_json(good[0].to_json()))
    change(value)
    path = tmp_path / "report.json"
    path.write_text(json.dumps(value))
    with pytest.raises(BadFile):
        SmokeReport.load(path)


def test_parts_are_not_sent_one_by_one(synthetic: toys.Maker, tmp_path: Path) -> None:
    size = synthetic("qwen3moe").stat().st_size
    parts = split(synthetic("qwen3moe"), tmp_path, "good", size // 2)
    device = tmp_path / "far.toml"
    device.write_text(
        'name = "far"\ntransport = "ssh"\nprofile = "cpu-16gb"\nfolder = "edgeprune"\n[ssh]\nhost = "far.invalid"\n'
    )
    with pytest.raises(UsageError, match=f"is one of {len(parts)} parts"):
        smoke(Wish(tmp_path / f"good-00001-of-0000{len(parts)}.gguf", device=str(device)), Ear())
