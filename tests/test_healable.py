"""Choosing experts by what healing can reproduce, and numbers of experts by building."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import toys
from observed import Toy, text_statistics
from runs import Ear, few, read

from edgeprune.decide import healable
from edgeprune.decide.healable import choose
from edgeprune.decide.plan import Plan, Prediction
from edgeprune.measure.launch import Launch
from edgeprune.measure.routing import CHOSEN, CONSTANT, KEPT, Rule, coefficients
from edgeprune.measure.text import CHOOSING, HELD_OUT
from edgeprune.model.gguf import GgufFile
from edgeprune.pipeline import Run, fit, opened
from edgeprune.stages import trying
from edgeprune.stages.trying import TryStages, least, place

pytest_plugins = ("demo_fixtures", "observed_fixtures")


@pytest.mark.parametrize(
    ("denominator", "expected"),
    [(CONSTANT, [[0.6, 0.2]]), (CHOSEN, [[1.5, 0.5]]), (KEPT, [[2.0, 2 / 3]])],
)
def test_coefficients_follow_the_rule(denominator: str, expected: list[list[float]]) -> None:
    """Masses 0.3, 0.2, 0.1 and 0.4 twice over; expert 1 and 3 are gone where that matters."""
    rule = Rule(denominator, 2.0, np.array([[0.3, 0.2, 0.1, 0.4]], np.float32))
    kept = np.array([True, False, False, False]) if denominator == KEPT else np.array([True, False, True, False])
    found = coefficients(rule, np.array([[0, 2]]), kept)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.fixture
def twins(toy_gguf: Toy, tmp_path: Path) -> tuple[Path, Path]:
    """A toy whose experts 6 and 7 of layer 0 have the router's rows and the inner weights of 0 and 1, and its
    statistics: what they answer can be made up for by 0 and 1's down projections."""
    source = toy_gguf("qwen3_moe")
    model = tmp_path / "twins.gguf"
    content = bytearray(source.read_bytes())
    file = GgufFile(source)
    for name in ("ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps"):
        info = file.tensors[f"blk.0.{name}.weight"]
        size = info.nbytes // toys.EXPERTS
        for twin, original in ((6, 0), (7, 1)):
            start = info.offset + original * size
            content[info.offset + twin * size : info.offset + (twin + 1) * size] = content[start : start + size]
    model.write_bytes(content)
    return model, text_statistics(model, tmp_path, 2_048, lines=120)


def test_the_set_that_heals_best_is_taken(twins: tuple[Path, Path]) -> None:
    """Dropping the twins loses little that 0 and 1 cannot learn; dropping two others loses what nobody sees."""
    model, statistics = twins
    others = [0, 1, 6, 7, 2, 3, 4, 5]
    without_twins = [0, 1, 2, 3, 4, 5, 6, 7]
    orders = {"others": {"0": others, "1": others}, "twins": {"0": without_twins, "1": without_twins}}
    found = choose(str(model), str(statistics), orders, [6])
    assert found["reasons"] == {}
    errors = found["errors"]["0"]
    for before, after in (errors["twins"][0], errors["others"][0]):
        assert after <= before
    assert found["methods"]["0"] == min(errors, key=lambda name: errors[name][0][1])
    share = {name: own[0][1] / own[0][0] for name, own in errors.items()}
    assert share["twins"] < 0.7 * share["others"]


def test_one_set_under_two_names_is_the_same(twins: tuple[Path, Path]) -> None:
    model, statistics = twins
    first, second = [0, 1, 2, 3, 4, 5, 6, 7], [5, 4, 3, 2, 1, 0, 7, 6]
    orders = {"a": {"0": first, "1": first}, "b": {"0": second, "1": second}}
    errors = choose(str(model), str(statistics), orders, [6])["errors"]["0"]
    assert errors["a"] == errors["b"]


def test_less_memory_gives_fewer_tokens_and_nearly_the_same(
    twins: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, statistics = twins
    orders = {"a": {"0": list(range(8)), "1": list(range(8))}}
    whole = choose(str(model), str(statistics), orders, [4])["errors"]["0"]["a"][0]
    monkeypatch.setattr(healable, "_MOST_BYTES", 2_000_000)
    part = choose(str(model), str(statistics), orders, [4])["errors"]["0"]["a"][0]
    assert part != whole
    np.testing.assert_allclose(part, whole, rtol=0.5)


@pytest.mark.parametrize(("tokens", "most", "looked_at"), [(100, 512, 100), (1_000, 512, 512), (1_000, 600, 576)])
def test_fewer_tokens_are_from_the_whole_text(tokens: int, most: int, looked_at: int) -> None:
    """Kinds of text follow each other: the first tokens would be of one kind."""
    found = healable.spread(tokens, most)
    assert len(found) == pytest.approx(looked_at, abs=64) and len(np.unique(found)) == len(found)
    assert found[0] == 0 and found[-1] == tokens - 1


def test_what_dropping_costs_is_of_the_numbers_that_sets_were_judged_at(
    tiny_checkpoint: Path, small_text: Path, tmp_path: Path
) -> None:
    """Another number judged, other sets: what those before cost says nothing of them."""
    settings = few(tiny_checkpoint, small_text, tmp_path / "run", method="healable")
    known = []
    for keep in (6, 4):
        with opened(replace(settings, keep=keep), Ear()) as run:
            run.drop_nats([4])
            known.append(set(run.sensitivity.drops))
    assert len(known[0]) == 1 and len(known[1]) == 2


# Numbers of experts.


class _Measured(TryStages):
    """Stages whose files have the nats they are given, by number of experts, or by width as a negative number."""

    nats: dict[int, float]

    def __init__(self, nats: dict[int, float]) -> None:
        self.nats = nats

    def tried(self, plan: Plan) -> float:
        return self.nats[-plan.width or plan.kept]


@pytest.mark.parametrize(
    ("nats", "start", "tried"),
    [
        ({8: 3, 6: 2, 4: 1, 2: 4}, 6, [6, 4, 2, 8]),
        ({8: 1, 6: 2, 4: 3, 2: 4}, 6, [6, 4, 8]),
        ({8: 3, 6: 1, 4: 2, 2: 4}, 6, [6, 4, 8]),
        ({8: 1, 6: 2, 4: 3, 2: 4}, 8, [8, 6]),
        ({16: 9, 12: 5, 8: 4, 6: 3, 4: 2, 2: 1}, 12, [12, 8, 6, 4]),
        ({8: 3, 16: 4, -192: 2, -128: 1}, 16, [16, -192, -128, 8]),
        ({8: 3, 16: 4, -192: 1, -128: 2}, -192, [-192, -128, 16, 8]),
        ({8: 1, 12: 2, 16: 4, -192: 3}, 12, [12, 8, 16, -192]),
    ],
)
def test_numbers_of_experts_and_widths_are_tried_while_it_gets_better(
    nats: dict[int, float], start: int, tried: list[int]
) -> None:
    plan = Plan("toy", 16, 16, {}, {}, Launch(), "test", "solver", Prediction(), {}, heal=True)
    line = []
    for number in nats:
        narrow = replace(plan, width=-number, narrowing="camera") if number < 0 else plan
        fewer = replace(plan, kept=number, keep={0: tuple(range(number))}) if 0 < number < 16 else narrow
        better = Prediction(nats=0.5 if number in (8, -192) else 1.0)
        line.append(replace(fewer, predicted=better))
    line.sort(key=place)
    numbers = [-own.width or own.kept for own in line]
    found = _Measured(nats)._walk(line, numbers.index(start))
    assert [numbers[index] for index in found] == tried


def test_what_is_predicted_to_be_far_worse_is_not_built_and_what_is_good_beyond_it_is() -> None:
    """Rows of 160 and 128 weights are of the same types, those of 192 and 224 of dearer ones."""
    predicted = {12: 3.2, 16: 1.3, -224: 6.2, -192: 6.2, -160: 1.2, -128: 1.8}
    plan = Plan("toy", 16, 16, {}, {}, Launch(), "test", "solver", Prediction(), {}, heal=True)
    line = []
    for number, nats in predicted.items():
        narrow = replace(plan, width=-number, narrowing="camera") if number < 0 else plan
        fewer = replace(plan, kept=number, keep={0: tuple(range(number))}) if 0 < number < 16 else narrow
        line.append(replace(fewer, predicted=Prediction(nats=nats)))
    found = _Measured({16: 1.1, -160: 1.2, -128: 1.9})._walk(line, 4)
    assert [-line[index].width or line[index].kept for index in found] == [-160, -128, 16]
    assert line[least(found)].kept == 16 and not line[least(found)].width


def test_a_file_that_computes_no_numbers_is_not_the_best() -> None:
    assert least({12: float("nan"), 8: 1.0, 16: 2.0}) == 8
    assert least({"training": 0.3, "closed form": 0.2}) == "closed form"


def test_the_best_of_the_files_that_were_tried_is_shipped(
    tiny_checkpoint: Path, small_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trying, "_NEAR", 1e9)  # however far its prediction is, one with fewer experts is tried
    settings = few(tiny_checkpoint, small_text, tmp_path / "run", healing_tokens=1_024, baselines=False)
    ear = Ear()
    report, folder = fit(settings, ear)
    tried = read(folder / "tried.json")["tried"]
    assert len(tried) >= 2
    best = min(tried, key=lambda own: float(own["nats"]))
    assert (report.plan["kept"], report.plan["width"]) == (best["kept"], best["width"])
    measured = {(row["kept"], row.get("width", 0)): row["measured"] for row in report.curve if "measured" in row}
    assert measured == {(own["kept"], own["width"]): own["nats"] for own in tried}
    assert not (folder / "scratch").exists()
    with opened(settings, ear) as run:
        shipped = folder / str(report.build["path"])
        assert run.nats_to_choose(shipped, "again") == pytest.approx(best["nats"], rel=1e-6)
        # What was chosen with is not what the report is about: together both are the held-out text.
        chosen, held_out = (run.divergence(shipped, part)[0]["all"]["tokens"] for part in (CHOOSING, HELD_OUT))
    assert 0 < report.quality["tokens"] == held_out - chosen
    assert report.quality["kl_mean"] != pytest.approx(best["nats"], rel=1e-6)
    assert [path.name for path in folder.glob("*.gguf") if path.name not in ("source.gguf", "imatrix.gguf")] == [
        report.build["path"]
    ]
    again = Ear()
    with opened(settings, again) as run:
        assert run.best_plan().kept == best["kept"]
    assert not any("trying" in line for line in again.said)
    # Killed after the decision and before the plan was saved, it comes to the same without another file.
    with opened(settings, again) as run:
        shipped_plan = run.best_plan()
        next(own.plan for own in run.candidates() if place(own.plan) != place(shipped_plan)).save(
            folder / "plan.json"
        )
    with opened(settings, again) as run:
        assert run.best_plan().digest == shipped_plan.digest  # the memory that is free differs
    assert not any("trying" in line for line in again.said)


def test_a_plan_of_a_number_that_is_not_proposed_today_is_kept(
    tiny_checkpoint: Path, small_text: Path, tmp_path: Path
) -> None:
    """A folder of an earlier version, which proposed other numbers of experts: nothing is tried beside its plan."""
    settings = few(tiny_checkpoint, small_text, tmp_path / "run", healing_tokens=1_024, baselines=False)
    ear = Ear()
    with opened(settings, ear) as run:
        best = run.plan()
        usual = run.architecture.allowed_counts()
        odd = next(n for n in range(run.architecture.experts) if run.architecture.count_allowed(n) and n not in usual)
        asked = Run(replace(run.settings, keep=odd), ear)
        other = replace(asked.candidates()[0].plan, made_from=best.made_from)
        other.save(run.folder.plan)
    with opened(settings, ear) as run:
        assert run.best_plan().digest == other.digest
    assert not any("trying" in line for line in ear.said)
