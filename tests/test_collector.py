"""What one pass collects, against transformers: every accumulator, every router family, domain by domain."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import toys
from observed import KEPT, LAUNCH, TOKENS, WINDOWS, Family, Toy, collected, statistics, token_windows

from edgeprune.measure import llama
from edgeprune.measure.arena import Arena
from edgeprune.measure.collector import Collector
from edgeprune.measure.reservoir import Reservoir
from edgeprune.measure.routing import preference
from edgeprune.measure.statistics import FORWARD
from edgeprune.model.architecture import read_architecture
from edgeprune.model.gguf import GgufFile

pytest_plugins = ("observed_fixtures",)


def test_every_accumulator_equals_that_of_transformers(family: Family) -> None:
    assert sorted(family.both.layers) == list(range(toys.LAYERS))
    for layer, sums in family.both.layers.items():
        assert set(sums.arrays) == set(FORWARD)
        for window in range(WINDOWS):
            wanted = family.expected.layer(layer, window)
            for name in FORWARD:
                got = sums[name][window]
                assert got.shape == wanted[name].shape, name
                scale = np.abs(wanted[name]).max() or 1.0
                np.testing.assert_allclose(
                    got, wanted[name], rtol=2e-4, atol=2e-5 * scale, err_msg=f"layer {layer}, {name}"
                )


def test_counts_are_exact(family: Family) -> None:
    for layer, sums in family.both.layers.items():
        assert sums["routed"].sum(axis=1).tolist() == [TOKENS * toys.USED] * WINDOWS
        for window in range(WINDOWS):
            wanted = family.expected.layer(layer, window)
            for name in ("routed", "together", "tokens", "turn_tokens"):
                np.testing.assert_array_equal(sums[name][window], wanted[name])


def test_the_reservoir_holds_the_kept_tokens_of_every_layer(family: Family) -> None:
    for layer, tokens in family.both.reservoirs.items():
        assert tokens.domain.tolist() == [0] * len(KEPT) + [1] * len(KEPT)
        for window in range(WINDOWS):
            wanted, rows = family.expected.layer(layer, window), slice(window * len(KEPT), (window + 1) * len(KEPT))
            for name, relative in {"x": 1e-3, "y": 1e-3, "gates": 1e-4, "probs": 1e-4, "residual": 1e-4}.items():
                got, want = getattr(tokens, name)[rows], wanted[name][KEPT]
                np.testing.assert_allclose(got, want, rtol=relative, atol=relative * np.abs(want).max(), err_msg=name)
            np.testing.assert_array_equal(tokens.ids[rows], wanted["ids"][KEPT])
            np.testing.assert_allclose(tokens.turn[rows], wanted["turn"][KEPT], rtol=1e-3, atol=1e-5)
    assert set(family.both.reservoirs) == set(range(toys.LAYERS))


def test_what_the_router_chose_by_leads_to_what_it_chose(family: Family) -> None:
    for tokens in family.both.reservoirs.values():
        order = np.argsort(-tokens.selection, axis=1, kind="stable")[:, : toys.USED]
        np.testing.assert_array_equal(order, tokens.ids)


def test_input_moments_of_experts_equal_those_of_transformers(family: Family) -> None:
    for layer in range(toys.LAYERS):
        wanted = [family.expected.layer(layer, window) for window in range(WINDOWS)]
        total = {name: sum(part[name] for part in wanted) for name in FORWARD}
        kinds = {
            "gate": ("input_square", total["gate_square_sum"].sum(axis=1)),
            "up": ("input_square", total["up_square_sum"].sum(axis=1)),
            "down": ("hidden_square", total["norm_square"]),
        }
        for kind, (source, energy) in kinds.items():
            moment = family.both.moments[f"blk.{layer}.ffn_{kind}_exps.weight"]
            np.testing.assert_array_equal(moment.count, total["routed"])
            np.testing.assert_allclose(moment.square_sum, total[source], rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(moment.output_square, energy, rtol=1e-4)


def test_input_moments_of_dense_weights_equal_those_of_transformers(family: Family) -> None:
    places = {f"blk.{layer}.attn_{gguf}.weight": f"model.layers.{layer}.self_attn.{own}_proj"
              for layer in range(toys.LAYERS)
              for gguf, own in (("q", "q"), ("k", "k"), ("v", "v"), ("output", "o"))}  # fmt: skip
    for name, place in {**places, "output.weight": "lm_head"}.items():
        moment = family.both.moments[name]
        wanted = sum(rows.square().sum(dim=0).numpy() for rows in family.expected.inputs[place])
        energy = sum(float(rows.square().sum()) for rows in family.expected.outputs[place])
        assert moment.count.tolist() == [TOKENS * WINDOWS]
        np.testing.assert_allclose(moment.square_sum[0], wanted, rtol=1e-4, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(moment.output_square, [energy], rtol=1e-4, err_msg=name)


def test_a_pass_over_both_windows_equals_the_merger_of_two_passes(
    toy_gguf: Toy, family: Family, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    name = request.node.callspec.params["family"]
    whole = statistics(collected(toy_gguf(name), token_windows(toys.VOCABULARY), tmp_path), "a", {"model": "toy"})
    for layer, sums in whole.layers.items():
        for key in FORWARD:
            merged = family.both.layers[layer].total(key)
            np.testing.assert_allclose(merged, sums.total(key), rtol=1e-5, atol=1e-6 * np.abs(merged).max())
    for weight, moment in whole.moments.items():
        np.testing.assert_allclose(family.both.moments[weight].square_sum, moment.square_sum, rtol=1e-6)
    for layer, tokens in whole.reservoirs.items():
        np.testing.assert_array_equal(family.both.reservoirs[layer].x, tokens.x)


def test_observing_changes_no_logit(toy_gguf: Toy, tmp_path: Path) -> None:
    model, (tokens,) = toy_gguf("olmoe"), token_windows(toys.VOCABULARY, 1)
    names = frozenset(GgufFile(model).tensors)
    collector = Collector(toys.EXPERTS, Arena(tmp_path), weights=names)
    results = []
    for observer in (collector, None):
        with llama.session(model, LAUNCH, observer) as opened:
            results.append(opened.run(tokens).copy())
    np.testing.assert_array_equal(*results)


GROUPED = {"experts": 16, "used": 3, "groups": 4, "groups_used": 2, "layers": 3}


@pytest.mark.parametrize("router", ["grouped", "qwen2moe", "gpt-oss", "llama4"])
def test_routers_of_other_families_are_seen_whole(router: str, synthetic: Toy, tmp_path: Path) -> None:
    if router == "grouped":  # DeepSeek-V3: sigmoid, groups, a selection bias that the weights do not contain
        model = toys.synthetic_gguf(tmp_path / "grouped.gguf", "deepseek2", **GROUPED)
    else:
        model = synthetic(router)
    architecture = read_architecture(GgufFile(model))
    (tokens,) = token_windows(architecture.vocabulary, 1)
    collector = collected(model, [tokens], tmp_path)
    for layer in architecture.moe_layers:
        sums = collector.layers()[layer]
        unknown = set()
        if router == "gpt-oss":
            unknown = {"gate_slope", "up_slope"}  # its activation is its own
        if router == "llama4":
            unknown = {"angle_sum"}  # every expert has an input of its own
        assert set(FORWARD) - set(sums.arrays) == unknown
        assert sums.total("routed").sum() == TOKENS * architecture.used
        if router == "llama4":  # the coefficient is inside the expert, which cannot be replayed
            assert not collector.reservoirs()
            continue
        kept: Reservoir = collector.reservoirs()[layer]
        everyone = np.ones(architecture.experts, bool)
        scores = preference(kept.selection, architecture.groups, architecture.groups_used, everyone)
        order = np.argsort(-scores, axis=1, kind="stable")[:, : architecture.used]
        np.testing.assert_array_equal(np.sort(order, axis=1), np.sort(kept.ids, axis=1))
        probs = np.take_along_axis(kept.probs, kept.ids.astype(np.intp), axis=1)
        if router == "gpt-oss":
            weights = np.exp(probs - probs.max(axis=1, keepdims=True))
            weights /= weights.sum(axis=1, keepdims=True)
            np.testing.assert_allclose(kept.gates, weights, rtol=1e-4)
        else:  # the coefficients are the probabilities of the chosen but for a factor per token
            ratio = kept.gates / probs
            np.testing.assert_allclose(ratio, ratio[:, :1].repeat(architecture.used, axis=1), rtol=1e-4)
            assert ((kept.probs >= 0) & (kept.probs <= 1)).all()


def test_an_arena_gives_zeroed_arrays_that_do_not_overlap(tmp_path: Path) -> None:
    arena = Arena(tmp_path)
    first = arena.zeros({"a": ((3, 5), "float64"), "b": ((7,), "int16"), "none": ((0, 4), "float32")})
    second = arena.zeros({"c": ((1000, 1000), "float32")})
    arrays = {**first, **second}
    assert [array.shape for array in arrays.values()] == [(3, 5), (7,), (0, 4), (1000, 1000)]
    for number, array in enumerate(arrays.values()):
        assert not array.any()
        array += number + 1
    for number, array in enumerate(arrays.values()):
        assert (array == number + 1).all()
    assert list(tmp_path.iterdir()) == []  # the file has no name
