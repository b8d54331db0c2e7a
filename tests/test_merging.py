"""Merged experts, against weights worked out by hand, and in files that llama.cpp runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import families
import numpy as np
import numpy.typing as npt
import pytest
import toys
from observed import LAUNCH, Toy, text_statistics, token_windows

from edgeprune.build.averages import Neurons, average, by_answers, by_weights
from edgeprune.build.builder import build
from edgeprune.build.merging import merge_layers
from edgeprune.build.recombined import receivers, recombined
from edgeprune.decide.evidence import Evidence
from edgeprune.decide.groups import GROUPINGS, Group, grouped, weights
from edgeprune.decide.plan import REDUCTIONS, Plan, Prediction
from edgeprune.errors import BadFile, UsageError
from edgeprune.measure import llama
from edgeprune.measure.activation import GATED
from edgeprune.measure.replay import Expert, LayerExperts
from edgeprune.measure.statistics import LayerStatistics
from edgeprune.model.architecture import read_architecture
from edgeprune.model.convert import convert
from edgeprune.model.gguf import GgufFile

pytest_plugins = ("observed_fixtures",)

Floats = npt.NDArray[np.float32]
MERGING = [name for name in REDUCTIONS if name != "drop"]


def drawn(seed: int, neurons: int = 12, width: int = 10) -> Expert:
    random = np.random.default_rng(seed)

    def some(*shape: int) -> Floats:
        values: Floats = random.standard_normal(shape, np.float32)
        return values

    down_bias = some(width)
    return Expert(
        some(neurons, width), some(neurons, width), some(width, neurons), some(neurons), some(neurons), down_bias
    )


def shuffled(expert: Expert, seed: int) -> tuple[Expert, npt.NDArray[np.intp]]:
    """The same expert with its neurons in another order, and the order that undoes it."""
    order = np.random.default_rng(seed).permutation(len(expert.up))
    other = Neurons.of(expert).pick(order).expert(expert.down_bias)
    return other, np.argsort(order)


def answer(expert: Expert, x: Floats) -> Floats:
    given: Floats = expert.hidden(x, GATED["silu"]) @ expert.down.T + expert.down_bias
    return given


def inputs(width: int = 10) -> Floats:
    x: Floats = np.random.default_rng(5).standard_normal((64, width), np.float32)
    return x


def test_an_average_is_the_weighted_mean_of_neurons_that_stand_against_each_other() -> None:
    one = Expert(np.eye(2, dtype=np.float32), np.eye(2, dtype=np.float32), np.eye(2, dtype=np.float32), 0.0, 0.0, 0.0)
    gate, up = np.array([[0, 4], [8, 0]], np.float32), np.array([[0, 2], [6, 0]], np.float32)
    other = Expert(gate, up, np.array([[4, 0], [0, 8]], np.float32), 0.0, np.array([1, 3], np.float32), 4.0)
    made = average([one, other], [0.75, 0.25], [np.array([0, 1]), np.array([1, 0])])
    assert made.gate is not None
    np.testing.assert_array_equal(made.gate, [[2.75, 0], [0, 1.75]])
    np.testing.assert_array_equal(made.up, [[2.25, 0], [0, 1.25]])
    np.testing.assert_array_equal(made.up_bias, [0.75, 0.25])
    np.testing.assert_array_equal(made.down, [[0.75, 1], [2, 0.75]])
    assert made.down_bias == 1.0


def test_neurons_of_a_shuffled_expert_are_found_again() -> None:
    expert, x = drawn(1), inputs()
    other, back = shuffled(expert, 2)
    np.testing.assert_array_equal(by_weights(expert, other), back)
    np.testing.assert_array_equal(by_answers(expert, other, x, GATED["silu"]), back)
    np.testing.assert_array_equal(by_answers(expert, other, x, None), back)
    unordered = average([expert, other], [0.3, 0.7], [np.arange(12), np.arange(12)])
    made = average([expert, other], [0.3, 0.7], [np.arange(12), back])
    np.testing.assert_allclose(answer(made, x), answer(expert, x), rtol=1e-3, atol=1e-4)
    assert np.abs(answer(unordered, x) - answer(expert, x)).max() > 1


def test_dern_gives_every_neuron_to_the_expert_that_has_one_like_it() -> None:
    parts = {expert: Neurons.of(drawn(expert)) for expert in range(3)}
    mixed = [parts[0].pick(np.array([3, 1])), parts[2].pick(np.array([0])), Neurons.of(drawn(9)).pick(np.arange(2))]
    parts[1] = Neurons(
        np.concatenate([own.gate for own in mixed if own.gate is not None]),
        np.concatenate([own.up for own in mixed]),
        np.concatenate([own.down for own in mixed]),
    )
    found = receivers(parts.__getitem__, [1], [0, 2])
    assert {into: {e: which.tolist() for e, which in own.items()} for into, own in found.items()} == {
        0: {1: [0, 1]},
        2: {1: [2]},
    }


def test_dern_recombines_equal_neurons_into_themselves() -> None:
    expert = Neurons.of(drawn(1))
    smaller = expert.pick(np.random.default_rng(2).permutation(12))
    smaller = Neurons(*(np.float32(0.1) * part for part in (smaller.gate, smaller.up, smaller.down)))
    # The larger ones begin as centres; what goes their way is shorter: (0.4 * 1 + 0.1 * 0.1) / 0.5 of their length.
    made = recombined(expert, [smaller], [0.4, 0.1])
    order = np.argsort(made.rows()[:, 0] / np.abs(made.rows()).max())
    expected = expert.rows()[np.argsort(expert.rows()[:, 0] / np.abs(expert.rows()).max())]
    np.testing.assert_allclose(made.rows()[order], np.float32(0.82) * expected, rtol=1e-4, atol=1e-5)
    same = recombined(expert, [], [1.0])
    np.testing.assert_array_equal(same.rows(), expert.rows())


def test_a_centre_has_the_mean_direction_and_the_mean_length_of_its_neurons() -> None:
    def rows(*values: tuple[float, float]) -> Neurons:
        up = np.array([[a, 0] for a, _ in values], np.float32)
        return Neurons(None, up, np.array([[b] for _, b in values], np.float32))

    # Directions (1, 0) and (0, 1) twice; 3 and 1 begin, as they have the largest weights of up.
    made = recombined(rows((3, 0), (1, 4)), [rows((0, 2))], [3.0, 1.0])
    alike = np.array([1, 4]) / np.sqrt(17) * 3 + np.array([0, 1.0])
    expected = alike / np.linalg.norm(alike) * (3 * np.sqrt(17) + 2) / 4
    np.testing.assert_allclose(made.up[:, 0], [3, expected[0]], rtol=1e-5)
    np.testing.assert_allclose(made.down[:, 0], [0, expected[1]], rtol=1e-5, atol=1e-6)


@pytest.fixture
def six() -> Evidence:
    """Six experts, used 6, 5, 4, 3, 2 and 1 times; the odd ones are chosen alike, and so are the even ones."""
    sums = LayerStatistics.zeros(1, 6, width=2)
    logits = np.array([[1.0, 0, 2, 0, 3, 0], [0, 1.0, 0, 2, 0, 3]])
    sums.arrays["routed"][0] = [6, 5, 4, 3, 2, 1]
    sums.arrays["gated_norm_sum"][0] = [6, 5, 4, 3, 2, 1]
    sums.arrays["logit_gram"][0] = logits.T @ logits
    return Evidence(0, sums)


def test_m_smoe_joins_what_is_chosen_alike_to_what_is_used_most(six: Evidence) -> None:
    assert GROUPINGS["m-smoe"](six, 2, None) == (Group(0, (0, 2, 4)), Group(1, (1, 3, 5)))
    assert weights("m-smoe", six, [0, 2, 4]) == pytest.approx([0.5, 1 / 3, 1 / 6])
    assert weights("ream", six, [0, 5]) == [0.5, 0.5]  # of equal norms


@pytest.mark.parametrize("method", sorted(GROUPINGS))
def test_super_experts_stay_alone_and_routing_groups_equal(method: str, six: Evidence) -> None:
    found = grouped(method, six, 4, alone=[4], routing=2)
    assert Group(4, (4,)) in found
    assert len(found) == 4 and [group.centre < 3 for group in found].count(True) == 2
    for group in found:
        assert len({member // 3 for member in group.members}) == 1
    assert sorted(member for group in found for member in group.members) == list(range(6))
    with pytest.raises(UsageError, match="layer 0 has 1 super experts"):
        grouped(method, six, 2, alone=[4], routing=2)


def plan_of(model: Path, reduce: str) -> Plan:
    """Experts 4 to 7 are merged into 0 to 3, two of them into one."""
    architecture = read_architecture(GgufFile(model))
    layers = architecture.moe_layers
    merge = {} if reduce in ("drop", "dern") else {layer: {4: 0, 5: 0, 6: 2} for layer in layers}
    keep = dict.fromkeys(layers, (0, 1, 2, 3))
    origin = {"source": "toy", "statistics": "toy"}
    return Plan(
        architecture.arch, architecture.experts, 4, keep, {}, LAUNCH, reduce, "user", Prediction(), origin,
        reduce=reduce, merge=merge,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reduce": "glue"}, "reduces experts by 'glue'"),
        ({"merge": {0: {4: 5}}}, "merges expert 4 into 5 in layer 0"),
        ({"merge": {0: {1: 0}}}, "merges expert 1 into 0"),
        ({"merge": {0: {9: 0}}}, "merges expert 9 into 0"),
        ({"reduce": "drop"}, "which 'drop' does not"),
        ({"kept": 8, "keep": {}, "merge": {}}, "all of them are kept"),
    ],
)
def test_impossible_merges_are_refused(change: dict[str, object], message: str, toy_gguf: Toy) -> None:
    with pytest.raises(BadFile, match=message):
        replace(plan_of(toy_gguf("qwen3_moe"), "ream"), **change)  # type: ignore[arg-type]


def test_a_plan_that_merges_can_be_read_again_and_is_another(toy_gguf: Toy) -> None:
    plans = [plan_of(toy_gguf("qwen3_moe"), reduce) for reduce in REDUCTIONS]
    assert all(Plan.from_json(plan.to_json(), "plan") == plan for plan in plans)
    assert len({plan.digest for plan in plans}) == len(plans)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "gemma4"])
def test_merged_files_run_and_hold_the_average(family: str, tmp_path: Path) -> None:
    """Also with biases and MXFP4, and with gate and up in one tensor and scales of experts."""
    model = tmp_path / "model.gguf"
    convert(families.make_checkpoint(family, tmp_path / "checkpoint"), model, "f32")
    statistics = text_statistics(model, tmp_path, 1_024, lines=60)
    source = GgufFile(model)
    for reduce in MERGING:
        plan, store = plan_of(model, reduce), tmp_path / reduce
        merge_layers(str(model), plan.to_json(), str(store), str(statistics))
        made = build(str(model), plan.to_json(), str(tmp_path / "merged.gguf"), merged=str(store))
        merged = GgufFile(Path(made["path"]))
        with llama.session(Path(made["path"]), LAUNCH) as opened:
            assert np.isfinite(opened.run(token_windows(toys.VOCABULARY)[0])).all()
        first, now = (LayerExperts(file, read_architecture(file), 0) for file in (source, merged))
        if reduce == "hc-smoe":
            used = np.array(weights(reduce, Evidence(0, _layer(statistics)), [0, 4, 5]))
            expected = sum(used[n] * first[e].down for n, e in enumerate((0, 4, 5)))
            coarse = 0.2 if family == "gpt_oss" else 1e-2
            np.testing.assert_allclose(now[0].down, expected, atol=coarse * float(np.abs(expected).max()))
        if reduce != "dern":
            np.testing.assert_array_equal(now[1].up, first[1].up)  # nothing went into it
            assert not np.array_equal(now[2].up, first[2].up)


def _layer(statistics: Path) -> LayerStatistics:
    from edgeprune.measure.statistics import Statistics

    return Statistics.load(statistics).layers[0]


@pytest.mark.parametrize("reduce", ["ream", "m-smoe", "dern"])
def test_shuffled_twins_merge_without_loss(reduce: str, toy_gguf: Toy, tmp_path: Path) -> None:
    """Experts 4, 5 and 6 are 0, 0 and 2 with their neurons in another order: merged, they are what those were; and
    layers that are finished are not made again."""
    source, model = toy_gguf("qwen3_moe"), tmp_path / "twins.gguf"
    content, file = bytearray(source.read_bytes()), GgufFile(source)
    for name, info in file.tensors.items():
        if "exps.weight" not in name:
            continue
        size = info.nbytes // toys.EXPERTS
        rows = file.raw(name).reshape(toys.EXPERTS, info.shape[1], info.shape[0], -1)
        for twin, original in ((4, 0), (5, 0), (6, 2)):
            order = np.random.default_rng(twin).permutation(info.shape[0] if "down" in name else info.shape[1])
            own = rows[original][:, order] if "down" in name else rows[original][order]
            content[info.offset + twin * size : info.offset + (twin + 1) * size] = own.tobytes()
    model.write_bytes(content)
    statistics, store = text_statistics(model, tmp_path, 1_024, lines=60), tmp_path / "store"
    plan = plan_of(model, reduce)
    found = merge_layers(str(model), plan.to_json(), str(store), str(statistics))
    assert set(found) == {"0", "1"}
    made = GgufFile(Path(build(str(model), plan.to_json(), str(tmp_path / "made.gguf"), merged=str(store))["path"]))
    first, now = (LayerExperts(own, read_architecture(own), 1) for own in (GgufFile(model), made))
    x = np.random.default_rng(3).standard_normal((64, first[0].up.shape[1])).astype(np.float32)
    if reduce != "dern":
        for expert in (0, 2):
            wanted = answer(first[expert], x)
            np.testing.assert_allclose(answer(now[expert], x), wanted, atol=2e-2 * float(np.abs(wanted).max()))
    (store / "blk.1.ffn_up_exps.weight.tensor").unlink()
    assert set(merge_layers(str(model), plan.to_json(), str(store), str(statistics))) == {"1"}
