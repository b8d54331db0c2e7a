"""What `verify` measures on request, through the command line, on the file of a finished fit."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import Ear, Fit, read, run_edgeprune, settings

from edgeprune import pipeline
from edgeprune.build.builder import digest_of
from edgeprune.errors import BadFile, UsageError
from edgeprune.files import to_json
from edgeprune.measure.kld_base import BaseFile
from edgeprune.model.gguf import GgufFile
from edgeprune.pipeline import Wishes
from edgeprune.prove.report import Report
from edgeprune.stages.deepening import short_name

pytest_plugins = ("demo_fixtures",)


@pytest.fixture
def folder(tiny_fit: Fit, tmp_path: Path) -> Path:
    """A copy of the finished fit."""
    return tiny_fit.copy(tmp_path / "run")


def verify(fit: Fit, folder: Path, *words: str | Path) -> dict[str, Any]:
    """The report of the command as JSON."""
    done = run_edgeprune("verify", *fit.arguments, "-o", folder, "--json", *words)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def test_what_is_asked_for_is_measured_and_stays_in_the_report_of_the_same_file(
    tiny_fit: Fit, folder: Path, tmp_path: Path
) -> None:
    task = tmp_path / "sums.jsonl"
    record = {"question": "What is the sum?", "choices": ["3", "4", "5"], "answer": 1}
    task.write_text("".join(json.dumps(record) + "\n" for _ in range(3)), encoding="utf-8")
    base = tmp_path / "base.kld"
    wished: tuple[str | Path, ...] = ("--loops", "1", "--depths", "0,300", "--task", task, "--questions", "2")
    wished += ("--write-kld-base", base, "--slices")
    measured = verify(tiny_fit, folder, *wished)
    deeper, commands = measured["deeper"], measured["provenance"]["commands"]
    assert [command.split()[:2] for command in commands] == [["edgeprune", "fit"], ["edgeprune", "verify"]]
    (asked,) = deeper["tasks"]
    assert (asked["name"], asked["form"], asked["total"], sum(asked["right"].values())) == (
        "sums.jsonl",
        "mmlu",
        3,
        2,
    )
    assert [probe["mode"] for probe in deeper["loops"]] == ["greedy", "sampled"]
    assert [speed["depth"] for speed in deeper["speeds"]] == [0, 300]
    assert {one["name"] for one in deeper["slices"]} == {"code", "languages", "structured", "json", "tool calls"}
    assert all(one["quality"]["kl_mean"] > 0 for one in deeper["slices"])
    assert sum(deeper["objects"].values()) == 12
    assert read(folder / "report.json")["deeper"] == deeper

    ear = Ear()
    report, _ = pipeline.verify(settings(tiny_fit, folder), ear, Wishes(depths=(64,), base=base))
    assert [speed.depth for speed in report.deeper.speeds] == [64]
    (against,) = report.deeper.bases
    assert against.name == "base.kld"
    assert 0.3 < against.quality["kl_mean"] / report.quality["kl_mean"] < 3  # the same text, in other windows
    assert json.loads(json.dumps(report.to_json()["deeper"]["loops"])) == deeper["loops"]
    assert not [stage for stage in ear.stages if stage.startswith("loops")]

    (tmp_path / "other").mkdir()
    other = Path(shutil.copy(base, tmp_path / "other"))
    for path, names in ((other, ["base.kld", "other/base.kld"]), (base, ["other/base.kld", "base.kld"])):
        report, _ = pipeline.verify(settings(tiny_fit, folder), Ear(), Wishes(depths=(), base=path))
        assert [one.name for one in report.deeper.bases] == names

    again = Report.from_json({**read(folder / "report.json"), "made_from": {"build": "another file"}})
    (folder / "report.json").write_text(json.dumps(again.to_json()), encoding="utf-8")
    report, _ = pipeline.verify(settings(tiny_fit, folder), Ear(), Wishes(depths=()))
    assert report.deeper.loops == () == report.deeper.speeds


def test_a_fit_measures_none_of_it(tiny_fit: Fit) -> None:
    assert not any(tiny_fit.report.to_json()["deeper"].values())


def base_file(path: Path, context: int, vocabulary: int) -> Path:
    """A file of log-probabilities, with a hole in place of them."""
    file = BaseFile(path, context, vocabulary, 1)
    with path.open("wb") as stream:
        stream.write(file.head(np.zeros((1, context), np.int32)))
        stream.truncate(file.nbytes)
    return path


def test_wishes_that_cannot_be_met_are_refused_before_anything_is_measured(
    tiny_fit: Fit, folder: Path, tmp_path: Path
) -> None:
    before = (folder / "report.json").read_bytes()
    for wishes, message in (
        (Wishes(depths=(1 << 20,)), "more than the context"),
        (Wishes(loops=1000), "questions to ask"),
        (Wishes(tasks=("nowhere.jsonl",)), "no task file"),
        (Wishes(write_base=folder / "report.json"), "exists already"),
        (Wishes(write_base=folder / "nowhere" / "base"), "there is no folder"),
        (Wishes(base=base_file(tmp_path / "other.kld", 16, 320 + 8)), "is of another model than tiny"),
        (Wishes(base=base_file(tmp_path / "long.kld", 1 << 15, 320)), "is of another model than tiny"),
    ):
        ear = Ear()
        with pytest.raises((UsageError, BadFile), match=message):
            pipeline.verify(settings(tiny_fit, folder), ear, wishes)
        assert "quality of what is shipped" not in ear.stages
    assert (folder / "report.json").read_bytes() == before
    done = run_edgeprune("verify", *tiny_fit.arguments, "-o", folder, "--depths", "deep")
    assert done.returncode == 2 and "0,2048,8192" in done.stderr


def test_what_is_there_is_verified_though_it_was_built_with_other_settings(tiny_fit: Fit, folder: Path) -> None:
    """A newer default is no reason to build another file in place of the one whose proof is asked for."""
    built = {path.name: path.read_bytes() for path in folder.glob("*bpw.gguf")}
    plan = (folder / "plan.json").read_bytes()
    ear = Ear()
    other = replace(settings(tiny_fit, folder), method="frequency", heal=False)
    report, _ = pipeline.verify(other, ear, Wishes(depths=()))
    assert {path.name: path.read_bytes() for path in folder.glob("*bpw.gguf")} == built
    assert (folder / "plan.json").read_bytes() == plan
    assert report.build["path"] in built
    assert any("built with other settings" in line and "method" in line for line in ear.said)


def spoil(folder: Path, tensor: str, nbytes: int) -> None:
    """Make the first ``nbytes`` of a tensor of the built file NaN, and have its record say that it was built so."""
    record = read(folder / "build.json")
    built = folder / record["path"]
    offset, content = GgufFile(built).tensors[tensor].offset, bytearray(built.read_bytes())
    content[offset : offset + nbytes] = b"\xff" * nbytes  # in F32 and F16, scales of blocks, too
    built.write_bytes(content)
    (folder / "build.json").write_text(to_json({**record, "sha256": digest_of([built])}), encoding="utf-8")


def test_a_built_file_that_computes_no_numbers_is_a_broken_promise(
    tiny_fit: Fit, folder: Path, tmp_path: Path
) -> None:
    tensors = GgufFile(folder / read(folder / "build.json")["path"]).tensors
    head = tensors.get("output.weight", tensors["token_embd.weight"])
    spoil(folder, head.name, head.nbytes // head.shape[1])
    task = tmp_path / "task.jsonl"
    task.write_text('{"question": "What is the sum?", "choices": ["3", "4"], "answer": 1}\n', encoding="utf-8")
    for words, said in (
        ((), "2 promise(s) broken"),
        (("--task", task), "computes values that are not finite"),
        (("--loops", "1"), "computes values that are not finite"),
        (("--slices",), "computes values that are not finite on code, "),
    ):
        done = run_edgeprune("verify", *tiny_fit.arguments, "-o", folder, "--depths", "none", *words)
        assert done.returncode == 3 and said in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_a_tensor_that_holds_nan_is_named(tiny_fit: Fit, folder: Path) -> None:
    """Products with quantised weights round a row that holds NaN to eight bits, so that logits need not show it."""
    spoil(folder, "blk.1.attn_norm.weight", 4)
    done = run_edgeprune("verify", *tiny_fit.arguments, "-o", folder, "--depths", "none")
    assert done.returncode == 3, done.stdout
    assert "measured no: tensor blk.1.attn_norm.weight" in done.stderr


def test_files_of_questions_of_one_name_are_told_apart(tiny_fit: Fit, folder: Path, tmp_path: Path) -> None:
    record = {"question": "What is the sum?", "choices": ["3", "4", "5"], "answer": 1}
    record |= {"activity_label": "Sums", "ctx_a": "The sum", "ctx_b": "is", "endings": ["3", "4", "5"], "label": 1}

    def names(*files: str) -> list[str]:
        words: list[str | Path] = ["--depths", "none", "--questions", "1"]
        for file in files:
            path = tmp_path / file.partition(":")[0]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(record) + "\n", encoding="utf-8")
            words += ["--task", str(tmp_path / file)]
        found = verify(tiny_fit, folder, *words)["deeper"]["tasks"]
        return [f"{task['name']} {task['form']}" for task in found]

    first = ["x/a/t.jsonl mmlu", "y/a/t.jsonl mmlu", "u.jsonl mmlu"]
    assert names("x/a/t.jsonl:mmlu", "y/a/t.jsonl:mmlu", "u.jsonl:mmlu", "u.jsonl:mmlu") == first
    # Later ones stand beside them, and the same ones in their place.
    later = ["u.jsonl hellaswag", "sub/u.jsonl mmlu"]
    assert names("u.jsonl:hellaswag") == [*first, later[0]]
    assert names("sub/u.jsonl:mmlu") == [*first, *later]
    assert names("u.jsonl:hellaswag") == [*first, later[1], later[0]]
    assert str(tmp_path) not in json.dumps(read(folder / "report.json")["deeper"])


@pytest.mark.parametrize(
    ("paths", "taken", "name"),
    [
        (["/q/hs.jsonl", "/q/sub/hs.jsonl"], [], "q/hs.jsonl"),
        (["/q/hs.jsonl", "/q/other.jsonl"], [], "hs.jsonl"),
        (["/q/hs.jsonl"], ["hs.jsonl"], "q/hs.jsonl"),
        (["/q/hs.jsonl"], ["hs.jsonl", "q/hs.jsonl"], "/q/hs.jsonl"),
        (["/x/a/t.jsonl", "/y/a/t.jsonl"], [], "x/a/t.jsonl"),
    ],
)
def test_a_name_is_the_end_of_the_path_that_no_other_has(paths: list[str], taken: list[str], name: str) -> None:
    known = [Path(path) for path in paths]
    assert short_name(known[0], known, taken) == name
