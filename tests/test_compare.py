"""Methods side by side: what is measured, how sure it is, and what is saved of it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toys
from runs import Ear, Fit, read, run_edgeprune

from edgeprune import pipeline
from edgeprune.decide.scores import METHODS, SCORES
from edgeprune.errors import BadFile, Unsupported, UsageError
from edgeprune.measure.statistics import Statistics
from edgeprune.model.architecture import read_architecture
from edgeprune.model.gguf import GgufFile
from edgeprune.pipeline import Settings
from edgeprune.prove.comparison import Comparison, interval, row
from edgeprune.prove.lines import method_lines
from edgeprune.stages.comparing import counts_of, rounded

pytest_plugins = ("demo_fixtures",)


@pytest.fixture(scope="module")
def compared(tiny_fit: Fit, small_text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder of a comparison of a small model, and the words that make it again."""
    folder = tmp_path_factory.mktemp("compare") / "run"
    source = tiny_fit.folder / "source.gguf"
    words = ["compare", str(source), "--keep", "0.75,0.5", "--methods", "replay,reap,aimer,random", "--seeds", "2"]
    words += ["--text", str(small_text), "-o", str(folder)]
    done = run_edgeprune(*words, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == read(folder / "compare.json")
    return folder, words


def test_every_method_is_measured_at_every_number(compared: tuple[Path, list[str]]) -> None:
    found = Comparison.from_json(read(compared[0] / "compare.json"))
    assert found.experts == toys.EXPERTS
    assert {(r.method, r.kept) for r in found.rows} == {
        (method, kept) for method in ("replay", "reap", "aimer", "random") for kept in (6, 4)
    }
    for own in found.rows:
        assert own.seeds == (2 if own.method == "random" else 1)
        assert 0 <= own.low <= own.quality["kl_mean"] <= own.high
        assert set(own.domains) == {"small"}
        assert own.domains["small"]["kl_mean"] == pytest.approx(own.quality["kl_mean"])
    kept = [r.kept for r in found.rows]
    assert kept == sorted(kept, reverse=True)
    for count in (6, 4):
        values = [r.quality["kl_mean"] for r in found.rows if r.kept == count]
        assert values == sorted(values)


def test_dropping_more_experts_costs_more(compared: tuple[Path, list[str]]) -> None:
    found = Comparison.from_json(read(compared[0] / "compare.json"))
    kl = {(r.method, r.kept): r.quality["kl_mean"] for r in found.rows}
    for method in ("replay", "reap", "random"):
        assert kl[method, 6] < kl[method, 4]


def test_a_second_comparison_measures_only_what_is_new(compared: tuple[Path, list[str]]) -> None:
    folder, words = compared
    before = read(folder / "compare.json")
    stamp = (folder / "compare-cache.json").stat().st_mtime_ns
    again = run_edgeprune(*words)
    assert again.returncode == 0
    assert read(folder / "compare.json") == before
    assert (folder / "compare-cache.json").stat().st_mtime_ns == stamp
    for wanted in ("K=6 of 8", "K=4 of 8", "random (mean of 2)", "95 % interval", "compare.html"):
        assert wanted in again.stdout
    assert [path.name for path in folder.glob("*.gguf")] == ["imatrix.gguf"]  # no model is written


def test_gradients_are_measured_once_for_all_methods_that_need_them(
    tiny_checkpoint: Path, small_text: Path, tmp_path: Path
) -> None:
    words = ("compare", tiny_checkpoint, "--keep", "0.5", "--text", small_text, "-o", tmp_path / "run", "--methods")
    first = run_edgeprune(*words, "heapr")
    assert first.returncode == 0, first.stderr
    stamp = (tmp_path / "run" / "gradients.safetensors").stat().st_mtime_ns
    second = run_edgeprune(*words, "heapr,mask-fisher,gemq", "--json")
    assert second.returncode == 0, second.stderr
    assert (tmp_path / "run" / "gradients.safetensors").stat().st_mtime_ns == stamp
    rows = json.loads(second.stdout)["rows"]
    assert {own["method"] for own in rows} == {"heapr", "mask-fisher", "gemq"}
    assert len({own["quality"]["kl_mean"] for own in rows}) > 1


def test_a_gguf_has_no_gradients(tiny_fit: Fit, small_text: Path, tmp_path: Path) -> None:
    words = ("--keep", "0.5", "--methods", "heapr", "--text", small_text, "-o", tmp_path / "run")
    done = run_edgeprune("compare", tiny_fit.folder / "source.gguf", *words)
    assert done.returncode == 1
    assert "is a GGUF: gradients are measured with a Hugging Face checkpoint" in done.stderr
    assert "hint: give the checkpoint's folder" in done.stderr


def test_the_torch_engine_measures_what_llama_cpp_does(tiny_fit: Fit, small_text: Path, tmp_path: Path) -> None:
    """Within what llama.cpp rounds: activations before BF16 products, keys and values."""
    words = ("calibrate", tiny_fit.arguments[0], "--engine", "torch", "--text", small_text, "-o", tmp_path / "run")
    done = run_edgeprune(*words)
    assert done.returncode == 0, done.stderr
    found, other = (
        Statistics.load(folder / "statistics.safetensors") for folder in (tmp_path / "run", tiny_fit.folder)
    )
    assert (found.tokens, found.domains) == (other.tokens, other.domains)
    for layer, sums in other.layers.items():
        for name in ("routed", "gated_norm_sum", "hidden_square", "logit_sum"):
            got, want = found.layers[layer].total(name), sums.total(name)
            assert np.abs(got - want).sum() < 0.02 * np.abs(want).sum()
    changed = run_edgeprune(*words[:2], "--text", small_text, "-o", tmp_path / "run")
    assert "calibration changed: tools: format" in changed.stderr
    assert (tmp_path / "run" / "imatrix.gguf").is_file()


def test_merged_experts_are_compared_as_files_that_are_deleted(
    tiny_fit: Fit, small_text: Path, tmp_path: Path
) -> None:
    words = ("compare", tiny_fit.folder / "source.gguf", "--keep", "0.75", "--text", small_text, "--json")
    ways = ("merge:ream", "merge:dern")
    done = run_edgeprune(*words, "--methods", ",".join(("reap", *ways)), "-o", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    found = {own["method"]: own["quality"]["kl_mean"] for own in json.loads(done.stdout)["rows"]}
    assert set(found) == {"reap", *ways}
    assert all(nats > 0 for nats in found.values()) and len(set(found.values())) == 3
    assert not list((tmp_path / "run").rglob("merged*"))
    again = run_edgeprune(*words, "--methods", "merge:ream", "-o", tmp_path / "run")
    assert "merging experts" not in again.stderr
    assert {own["method"]: own["quality"]["kl_mean"] for own in json.loads(again.stdout)["rows"]} == found
    refused = run_edgeprune(*words, "--methods", "merge:reap", "-o", tmp_path / "run")
    assert refused.returncode == 2 and "known: merge:dern, merge:ream, merge:hc-smoe, merge:m-smoe" in refused.stderr


class Texts(HTMLParser):
    """Texts by tag."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tag, self.texts = "", {}
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tag = tag

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self.tag, []).append(data.strip())


def test_the_page_has_a_line_and_a_row_for_every_method(compared: tuple[Path, list[str]]) -> None:
    content = (compared[0] / "compare.html").read_text(encoding="utf-8")
    texts = Texts(content).texts
    assert "6 of 8 experts kept" in texts["h2"] and "4 of 8 experts kept" in texts["h2"]
    for method in ("replay", "reap", "aimer", "random"):
        assert method in texts["text"]  # the legend
        assert sum(cell.startswith(method) for cell in texts["th"]) == 2
        assert sum(tip.startswith(f"{method}, ") for tip in texts["title"]) == 2 * 2  # points, drawn twice
    assert "<script" not in content and "http" not in content.replace("http-equiv", "")


def test_methods_that_a_model_does_not_show_enough_for_are_left_out(
    synthetic: toys.Maker, small_text: Path, tmp_path: Path
) -> None:
    found, ears = {}, {arch: Ear() for arch in ("qwen3moe", "llama4")}
    for arch, ear in ears.items():
        wishes = Settings(str(synthetic(arch)), texts=(str(small_text),), output=str(tmp_path / arch), window=64)
        with pipeline.opened(wishes, ear) as run:
            found[arch] = set(run.comparable())
    gradients = {name for name, method in SCORES.items() if method.differentiates}
    assert set(METHODS) - found["qwen3moe"] == gradients == {"heapr", "mask-fisher", "gemq"}
    # Experts with inputs of their own have no angle to the layer's, and cannot be replayed.
    assert found["qwen3moe"] - found["llama4"] == {"tenp", "shape"}
    assert [line.partition(" is left out: ")[0] for line in ears["llama4"].said if "left out" in line] == [
        "tenp",
        "shape",
    ]
    assert not any("left out" in line for line in ears["qwen3moe"].said)


def test_a_method_that_a_domain_has_no_tokens_for_is_left_out(synthetic: toys.Maker, tmp_path: Path) -> None:
    """And the comparison of the others goes on."""
    texts = []
    for name, count in (("long", 400), ("short", 2)):
        (tmp_path / f"{name}.txt").write_text("Some words and some more. " * count, encoding="utf-8")
        texts.append(str(tmp_path / f"{name}.txt"))
    source = str(synthetic("qwen3moe"))
    for mixture in ("pooled", "balanced", "coverage"):
        wishes = Settings(source, texts=tuple(texts), output=str(tmp_path / "run"), mixture=mixture, window=64)
        wishes = replace(wishes, reservoir_tokens=4, calibration_tokens=1_024)
        ear = Ear()
        with pipeline.opened(wishes, ear) as run:
            assert set(run.statistics.reservoirs[0].domain.tolist()) == {0}
            assert ("shape" in run.comparable()) == (mixture == "pooled")
        assert any(line.startswith("shape is left out: ") for line in ear.said) == (mixture != "pooled")


def test_what_calibration_leaves_out_is_said(synthetic: toys.Maker, tmp_path: Path) -> None:
    """Too short documents, too little text for the experts, and none to judge by."""
    rows = [json.dumps({"text": text}) for text in ("too short", "long enough to be a window")]
    (tmp_path / "talk.jsonl").write_text("\n".join(rows), encoding="utf-8")
    words = ("calibrate", synthetic("qwen3moe"), "--text", tmp_path / "talk.jsonl", "-o", tmp_path / "run")
    done = run_edgeprune(*words)
    assert done.returncode == 0, done.stderr
    assert "1 of 2 documents of talk are shorter than 16 tokens and left out (9 tokens)" in done.stderr
    assert "leaves none to judge by" in done.stderr
    assert "26 tokens in 1 domain: talk" in done.stdout
    assert "little text: 6 tokens per expert on average, where 200 are the least" in done.stdout
    assert "800 tokens in all give that" in done.stdout


def test_gradients_are_not_mixed_with_statistics_of_other_texts(
    synthetic: toys.Maker, small_text: Path, tmp_path: Path
) -> None:
    wishes = Settings(str(synthetic("qwen3moe")), texts=(str(small_text),), output=str(tmp_path / "one"), window=64)
    with pipeline.opened(wishes, Ear()) as run:
        path = Path(run.statistics_file)
    with pipeline.opened(replace(wishes, texts=(), output=str(tmp_path / "two")), Ear()) as run:
        run.merge([path])
    with pipeline.opened(replace(wishes, output=str(tmp_path / "two")), Ear()) as run:
        with pytest.raises(Unsupported, match="merged from 1 files, and gradients would be of another text"):
            run.ranked("mask-fisher")
        assert set(run.ranked("reap")) == {0, 1}


def test_the_report_of_the_same_model_and_text_shows_it(tiny_fit: Fit, tmp_path: Path) -> None:
    folder = tiny_fit.copy(tmp_path / "run")
    bare = (folder / "report.html").read_text(encoding="utf-8")
    assert "They were not compared" in bare and "edgeprune compare" in bare
    source, *target, option, text = tiny_fit.arguments
    words = ["compare", source, "--keep", "0.75,0.5", "--methods", "reap,frequency", option, text, "-o", folder]
    done = run_edgeprune(*words)
    assert done.returncode == 0, done.stderr
    assert "report.html shows it too" in done.stderr
    after_compare = (folder / "report.html").read_text(encoding="utf-8")
    verified = run_edgeprune("verify", source, *target, option, text, "-o", folder)
    assert verified.returncode == 0, verified.stderr
    for content in (after_compare, (folder / "report.html").read_text(encoding="utf-8")):
        texts = Texts(content).texts
        assert "They were not compared" not in content
        assert {"reap", "frequency"} <= set(texts["text"]) and {"reap", "frequency"} <= set(texts["th"])
        assert sum(tip.startswith(("reap, ", "frequency, ")) for tip in texts["title"]) == 2 * 4  # wide and narrow
        assert "6 kept" in texts["th"] and "4 kept" in texts["th"]
    assert read(folder / "report.json")["comparison"] == read(folder / "compare.json")


@pytest.mark.parametrize("key", ["source", "text"])
def test_a_report_leaves_out_the_comparison_of_another_model_or_text(
    key: str, tiny_fit: Fit, compared: tuple[Path, list[str]]
) -> None:
    found = Comparison.from_json(read(compared[0] / "compare.json"))
    report = tiny_fit.report
    same = {"source": report.plan["made_from"]["source"], "text": report.made_from["text"]}
    assert report.beside(replace(found, made_from=same)).comparison is not None
    assert report.beside(replace(found, made_from={**same, key: "other"})).comparison is None
    assert report.beside(replace(found, made_from={})).comparison is None
    assert report.beside(None).comparison is None


@pytest.mark.parametrize(
    "damage",
    [
        {"rows": []},
        {"rows": 3},
        {"rows": [{"method": "reap"}]},
        {"experts": "many"},
        {"text": {}},
        {"made_from": None},
        {"more": 1},
    ],
    ids=str,
)
def test_a_damaged_comparison_is_told_from_a_whole_one(
    damage: dict[str, Any], compared: tuple[Path, list[str]]
) -> None:
    value = read(compared[0] / "compare.json")
    assert Comparison.from_json(value).to_json() == value
    with pytest.raises(BadFile, match="comparison"):
        Comparison.from_json({**value, **damage})
    value["rows"][0]["quality"]["kl_mean"] = None
    with pytest.raises(BadFile, match="not a finite number"):
        Comparison.from_json(value)


def test_an_unknown_method_is_refused_before_anything_is_measured(tiny_fit: Fit, tmp_path: Path) -> None:
    source = tiny_fit.folder / "source.gguf"
    done = run_edgeprune("compare", source, "--methods", "reap,reep", "-o", tmp_path / "run")
    assert done.returncode == 2 and "unknown method 'reep'" in done.stderr and "did you mean reap" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("keep", ["1.5", "0", "half", "0.5,1"])
def test_what_is_no_fraction_is_refused(keep: str, tiny_fit: Fit, tmp_path: Path) -> None:
    done = run_edgeprune("compare", tiny_fit.folder / "source.gguf", "--keep", keep, "-o", tmp_path / "run")
    assert done.returncode == 2
    assert not (tmp_path / "run").exists()


def test_fractions_become_numbers_that_the_router_allows(tmp_path: Path) -> None:
    plain = toys.synthetic_gguf(tmp_path / "a.gguf", experts=16, width=64, expert_width=64)
    assert counts_of([0.5, 0.9, 0.51], read_architecture(GgufFile(plain))) == [14, 8]
    grouped = toys.synthetic_gguf(
        tmp_path / "b.gguf", experts=16, width=64, expert_width=64, groups=4, groups_used=2, used=3
    )
    assert counts_of([0.7, 0.1], read_architecture(GgufFile(grouped))) == [12, 8]
    blocked = toys.synthetic_gguf(tmp_path / "c.gguf", extra=[("expert_used_count", "[u32]", [2, 2])])
    with pytest.raises(UsageError, match="cannot be dropped"):
        counts_of([0.5], read_architecture(GgufFile(blocked)))


def test_remarks_name_fractions_that_are_rounded_far_or_alike(tmp_path: Path) -> None:
    model = toys.synthetic_gguf(tmp_path / "a.gguf", width=64, expert_width=64)  # 2 of 8 experts
    architecture = read_architecture(GgufFile(model))
    assert rounded([0.75, 0.5, 0.45], architecture) == ["0.5 and 0.45 are the same number of experts, K=4"]
    assert rounded([0.1, 0.9, 0.88], architecture) == [
        "0.1 of 8 experts is not possible: the nearest is K=2",
        "0.9 and 0.88 are the same number of experts, K=7",
    ]


def test_an_interval_holds_the_mean_and_shrinks_with_the_text() -> None:
    random = np.random.default_rng(0)
    sums = random.gamma(2.0, 50.0, 400)
    few, many = ([[100, value] for value in sums[:count]] for count in (20, 400))
    for windows in (few, many):
        low, high = interval([windows])
        assert low < sum(value for _, value in windows) / (100 * len(windows)) < high
    assert np.diff(interval([many])) < 0.4 * np.diff(interval([few]))
    assert interval([[[10, 5.0]]]) == (0.5, 0.5)


def test_an_interval_over_draws_holds_the_mean_over_all_possible_draws() -> None:
    """Draws that differ by much, over windows that hardly do: the text says nothing of other draws."""
    random = np.random.default_rng(1)
    missed = 0
    for _ in range(200):
        levels = np.maximum(random.normal(1.0, 0.2, 3), 0)
        draws = [[[100, 100 * level * random.uniform(0.98, 1.02)] for _ in range(40)] for level in levels]
        low, high = interval(draws)
        missed += not low <= 1.0 <= high
    assert missed <= 20  # 10 on average, and all but a few of 200 if windows of all draws are pooled
    same = [[[100, value] for value in random.gamma(2.0, 50.0, 30)]] * 3
    assert interval(same) == pytest.approx(interval(same[:1]))  # the same windows three times are no more text


def test_a_random_method_is_the_mean_of_its_draws() -> None:
    quality = {"kl_mean": 0.0, "tokens": 10}
    measured = [
        {"all": {**quality, "kl_mean": value}, "domains": {"a": {"kl_mean": value}}, "windows": [[10, 10 * value]]}
        for value in (0.1, 0.3)
    ]
    made = row("random", 4, measured)
    assert made.quality["kl_mean"] == pytest.approx(0.2) and made.seeds == 2
    assert made.domains["a"]["kl_mean"] == pytest.approx(0.2)
    assert made.low == 0 and made.high == pytest.approx(0.2 + 12.706 * 0.1, rel=1e-3)  # t with one degree of freedom


def test_later_comparisons_of_the_same_model_and_text_are_added(
    compared: tuple[Path, list[str]], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(compared[0], folder)
    before = Comparison.from_json(read(folder / "compare.json"))
    _, source, _, _, _, _, _, _, option, text, *_ = compared[1]
    done = run_edgeprune(
        "compare", source, "--keep", "0.5,0.48", "--methods", "frequency,reap", option, text, "-o", folder
    )
    assert done.returncode == 0, done.stderr
    after = Comparison.from_json(read(folder / "compare.json"))
    assert {(r.method, r.kept) for r in after.rows} == {(r.method, r.kept) for r in before.rows} | {("frequency", 4)}
    assert "with 7 rows of earlier comparisons" in done.stderr
    assert "0.5 and 0.48 are the same number of experts, K=4" in done.stderr


def test_no_method_is_not_all_of_them(tiny_fit: Fit, tmp_path: Path) -> None:
    for methods in ("", " , "):
        done = run_edgeprune("compare", tiny_fit.folder / "source.gguf", "--methods", methods, "-o", tmp_path / "run")
        assert done.returncode == 2 and "--methods names none" in done.stderr


def test_a_picture_of_one_number_of_experts_is_drawn_too() -> None:
    quality = {"kl_mean": 0.1}
    only = row("reap", 4, [{"all": quality, "domains": {"a": quality}, "windows": [[10, 1.0]]}])
    assert "reap, 4 of 8 kept" in method_lines([only], 8)
