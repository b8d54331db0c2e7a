"""What an error costs: exact at the measured points, monotone everywhere, filled in between measured layers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import toys

from edgeprune.errors import BadFile
from edgeprune.measure.cost import LARGE, SMALL, Cost, Response, Together, fit_together, total
from edgeprune.measure.sensitivity import (
    MOST_LAYERS_MEASURED,
    RIPPLES,
    Sensitivity,
    Site,
    all_sites,
    measured_layers,
    responses,
    site_settings,
    sites_to_measure,
)
from edgeprune.measure.shares import Mended
from edgeprune.model.architecture import Architecture, read_architecture
from edgeprune.model.gguf import GgufFile

DEEP = 30


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Architecture:
    path = tmp_path_factory.mktemp("sensitivity") / "deep.gguf"
    return read_architecture(GgufFile(toys.synthetic_gguf(path, layers=DEEP, experts=4, width=32, expert_width=32)))


def tied(architecture: Architecture) -> Architecture:
    """The same model with its embedding as output matrix."""
    return replace(architecture, tensors=tuple(t for t in architecture.tensors if t.role != "output"))


# Cost at the small and the large error: linear, by the root, between, faster than a line, slower than a root.
MEASURED = [(0.001, 0.01), (0.001, 0.001 * 10**0.5), (0.001, 0.006), (0.001, 0.015), (0.001, 0.0011)]


@pytest.mark.parametrize(("small", "large"), MEASURED)
def test_cost_grows_with_the_error_and_misses_both_points_alike(small: float, large: float) -> None:
    unit = Response(small, large).unit
    costs = [(unit * error).nats for error in np.geomspace(1e-6, 2.0, 200)]
    assert all(earlier < later for earlier, later in pairwise(costs))
    assert (unit * 0.0).nats == 0.0
    assert (unit * SMALL).nats / small == pytest.approx(large / (unit * LARGE).nats)


@pytest.mark.parametrize(("small", "large"), MEASURED[:3])
def test_cost_is_exact_at_both_measured_points(small: float, large: float) -> None:
    unit = Response(small, large).unit
    assert (unit * SMALL).nats == pytest.approx(small)
    assert (unit * LARGE).nats == pytest.approx(large)


def test_parts_of_the_cost_are_told_apart() -> None:
    unit = Response(0.7 * SMALL + 0.2 * SMALL**0.5, 0.7 * LARGE + 0.2 * LARGE**0.5).unit
    assert (unit.direct, unit.rerouted) == (pytest.approx(0.7), pytest.approx(0.2**2))
    assert Response(0.001, 0.01).unit == Cost(pytest.approx(0.1), pytest.approx(0.0, abs=1e-12))
    assert Response(0.001, 0.0011).unit.direct == 0.0 and Response(0.001, 0.02).unit.rerouted == 0.0
    # A small point that is all but nothing is noise: the line through the other.
    assert Response(1e-9, 0.01).unit == Response(1e-5, 0.01).unit == Response(0.0, 0.01).unit == Cost(0.01 / LARGE)
    # Behind the last router, tokens are where they are.
    settled = Response(0.001, 0.006, settled=True).unit
    assert settled.rerouted == 0.0 and (settled * SMALL).nats / 0.001 == pytest.approx(0.006 / (settled * LARGE).nats)


@pytest.mark.parametrize(
    ("small", "large", "direct"), [(0.0, 0.0, 0.0), (0.0, 0.1, 1.0), (0.1, 0.0, 10.0), (-1, -1, 0)]
)
def test_response_without_slope_is_taken_as_linear(small: float, large: float, direct: float) -> None:
    assert Response(small, large).unit == Cost(pytest.approx(direct), 0.0)
    assert Response(small, large).exponent is None


def test_direct_costs_add_up_and_the_others_by_their_squares() -> None:
    costs = [Cost(0.1, 0.09), Cost(0.2, 0.16)]
    assert total(costs) == costs[0] + costs[1] == Cost(pytest.approx(0.3), pytest.approx(0.25))
    assert total(costs).nats == pytest.approx(0.3 + 0.5)
    assert total([]) == Cost() and Cost().nats == 0.0


@pytest.mark.parametrize("cost", [Cost(2.0, 0.5), Cost(2.0, 0.0), Cost(0.0, 0.5), Cost(1e-9, 1e-12)])
def test_an_error_is_found_for_its_cost(cost: Cost) -> None:
    for square in np.geomspace(1e-6, 10, 20).tolist():
        assert cost.square_for((cost * square).nats) == pytest.approx(square)
    assert cost.square_for(0.0) == cost.square_for(-1.0) == Cost().square_for(0.1) == 0.0


def test_costs_of_both_uses_of_a_tied_embedding_add_up(deep: Architecture) -> None:
    embedding = deep.tensor("token_embd.weight")
    distortions = {embedding.name: {"Q4_0": [SMALL / 2, SMALL / 4]}}
    known = {
        Site(embedding.name, False).key: Response(0.02, 0.2),
        Site(embedding.name, True).key: Response(0.04, 0.4),
    }
    assert Sensitivity(known, distortions, {}, {}).cost(embedding, "Q4_0").nats == pytest.approx(0.01 + 0.01)
    lookup_only = {Site(embedding.name, True).key: Response(0.04, 0.4)}
    assert Sensitivity(lookup_only, distortions, {}, {}).cost(embedding, "Q4_0").nats == pytest.approx(0.01)


def test_what_was_not_seen_costs_as_much_as_the_most_sensitive_tensor(deep: Architecture) -> None:
    tensor = deep.tensor("blk.0.attn_q.weight")
    known = {"blk.1.attn_q.weight": Response(0.02, 0.2), "blk.2.attn_q.weight": Response(0.05, 0.3)}
    found = Sensitivity(known, {tensor.name: {"Q4_0": [SMALL, 0.5]}}, {}, {}).cost(tensor, "Q4_0")
    assert found.nats == pytest.approx(0.05)


def test_keeping_the_type_costs_nothing_and_needs_no_measurement(deep: Architecture) -> None:
    assert Sensitivity({}, {}, {}, {}).cost(deep.tensors[0], deep.tensors[0].type) == Cost()


def test_sites_are_all_products_and_the_embedding_lookup(deep: Architecture) -> None:
    sites = all_sites(deep)
    quantisable = [tensor.name for tensor in deep.tensors if tensor.quantisable]
    assert [site.weight for site in sites] == quantisable
    assert [site.weight for site in sites if site.lookup] == ["token_embd.weight"]
    assert len({site.key for site in sites}) == len(sites)


def test_tied_embedding_is_two_sites(deep: Architecture) -> None:
    own = [site for site in all_sites(tied(deep)) if site.weight == "token_embd.weight"]
    assert own == [Site("token_embd.weight", True), Site("token_embd.weight", False)]


@pytest.mark.parametrize("layers", [1, 2, 11, 12, 13, 30, 61, 512])
def test_measured_layers_are_spread_with_both_ends(layers: int) -> None:
    chosen = measured_layers(layers)
    assert len(chosen) == min(layers, MOST_LAYERS_MEASURED)
    assert chosen == sorted(set(chosen))
    assert (chosen[0], chosen[-1]) == (0, layers - 1)
    steps = [later - earlier for earlier, later in pairwise(chosen)]
    assert not steps or max(steps) - min(steps) <= 1


def test_each_site_is_measured_with_both_errors(deep: Architecture) -> None:
    sites = sites_to_measure(deep)
    settings = site_settings(sites)
    assert [row["relative_square"] for row in settings] == [SMALL] * len(sites) + [LARGE] * len(sites)
    assert [(row["weight"], row["lookup"]) for row in settings] == [(s.weight, s.lookup) for s in sites] * 2
    outside = [site.weight for site in sites if not site.weight.startswith("blk.")]
    assert sorted(outside) == ["output.weight", "token_embd.weight"]


def measured_costs(architecture: Architecture, sites: list[Site]) -> list[float]:
    """Costs that grow tenfold from the first layer to the last, and with the tensor's place in it."""
    layer_of = {tensor.name: tensor.layer for tensor in architecture.tensors}
    kinds = sorted({site.key.split(".")[-2] for site in sites})
    small = [1e-3 * 10 ** (layer_of[s.weight] / DEEP) * (1 + kinds.index(s.key.split(".")[-2])) for s in sites]
    return small + [8 * cost for cost in small]


def test_layers_between_are_interpolated_between_their_measured_neighbours(deep: Architecture) -> None:
    sites = sites_to_measure(deep)
    costs = measured_costs(deep, sites)
    found = responses(deep, sites, costs)
    assert set(found) == {site.key for site in all_sites(deep)}
    for index, site in enumerate(sites):
        last = site.key.startswith(("output", f"blk.{DEEP - 1}.ffn"))
        assert found[site.key] == Response(costs[index], costs[len(sites) + index], settled=last)
    chosen = measured_layers(DEEP)
    for kind in ("attn_q", "ffn_down_exps"):
        by_layer = [found[f"blk.{layer}.{kind}.weight"] for layer in range(DEEP)]
        assert [layer for layer, one in enumerate(by_layer) if not one.interpolated] == chosen
        # The measured costs are exactly exponential in the layer, and so is what lies between.
        assert [one.small / by_layer[0].small for one in by_layer] == pytest.approx(
            [10 ** (layer / DEEP) for layer in range(DEEP)]
        )
        assert all(one.large == pytest.approx(8 * one.small) for one in by_layer)
        for layer, one in enumerate(by_layer):
            below = by_layer[max(known for known in chosen if known <= layer)]
            above = by_layer[min(known for known in chosen if known >= layer)]
            assert below.small * (1 - 1e-9) <= one.small <= above.small * (1 + 1e-9)


def test_behind_the_last_router_cost_is_direct(deep: Architecture) -> None:
    """A tied embedding's product is, its lookup is not; attention in the last layer is not, what follows is."""
    early = replace(deep, moe_layers=deep.moe_layers[:-1])
    for architecture, last in ((tied(deep), DEEP - 1), (early, DEEP - 2)):
        sites = all_sites(architecture)
        found = responses(architecture, sites, [1e-3] * len(sites) + [5e-3] * len(sites))
        settled = {key for key, response in found.items() if response.settled}
        layer_of = {site.key: architecture.tensor(site.weight).layer for site in sites}
        assert all(".ffn_" in key for key in settled if layer_of[key] == last)
        assert {key for key in found if layer_of[key] > last} <= settled
        assert not any(0 <= layer_of[key] < last for key in settled)
        outer = {"output.weight"} if architecture is early else {"token_embd.weight"}
        assert {key for key in settled if layer_of[key] < 0} == outer
        assert all((response.unit.rerouted == 0) == response.settled for response in found.values())


def test_the_last_layer_says_nothing_of_the_ways_of_others(deep: Architecture) -> None:
    sites = sites_to_measure(deep)
    settled = {key for key, one in responses(deep, sites, measured_costs(deep, sites)).items() if one.settled}
    large = [1e-2 if site.key in settled else 4e-3 for site in sites]
    found = responses(deep, sites, [1e-3] * len(sites) + large)
    assert {round(one.unit.rerouted, 12) for key, one in found.items() if key not in settled} == {
        round(Response(1e-3, 4e-3).unit.rerouted, 12)
    }


def test_blocks_that_text_does_not_go_through_are_no_part_of_what_was_measured(deep: Architecture) -> None:
    sites = sites_to_measure(replace(deep, layers=DEEP - 1, moe_layers=deep.moe_layers[:-1]))
    own = replace(deep, layers=DEEP - 1, moe_layers=deep.moe_layers[:-1])
    sites = [site for site in sites if not site.weight.startswith(f"blk.{DEEP - 1}.")]
    found = responses(own, sites, measured_costs(deep, sites))
    unseen = {key for key, one in found.items() if one.unseen}
    assert unseen and all(key.startswith(f"blk.{DEEP - 1}.") for key in unseen)
    known = Sensitivity(found, {}, {}, {})
    seen = Sensitivity({key: one for key, one in found.items() if key not in unseen}, {}, {}, {})
    together = ripples(seen, Together(1e-4, 0.9, 1.1))
    assert replace(known, together=together).at_once == replace(seen, together=together).at_once
    assert replace(known, together=together).additivity == replace(seen, together=together).additivity


def test_middle_of_two_measured_layers_is_their_geometric_mean(deep: Architecture) -> None:
    sites = [Site("blk.0.attn_q.weight", False), Site("blk.2.attn_q.weight", False)]
    found = responses(deep, sites, [1e-3, 4e-3, 1e-2, 9e-2])
    between = found["blk.1.attn_q.weight"]
    assert between.interpolated
    assert (between.small, between.large) == (pytest.approx(2e-3), pytest.approx(math.sqrt(1e-2 * 9e-2)))
    # Beyond the last measured layer the cost stays what it was there.
    beyond = found["blk.9.attn_q.weight"]
    assert (beyond.small, beyond.large) == (pytest.approx(4e-3), pytest.approx(9e-2))
    assert "blk.1.attn_k.weight" not in found


def test_layer_next_to_one_without_measurable_cost_takes_the_other(deep: Architecture) -> None:
    sites = [Site("blk.0.attn_q.weight", False), Site("blk.2.attn_q.weight", False)]
    assert responses(deep, sites, [0.0, 4e-3, 0.0, 9e-2])["blk.1.attn_q.weight"].small == 4e-3


def whole(architecture: Architecture) -> Sensitivity:
    """Made-up measurements of every tensor."""
    sites = sites_to_measure(architecture)
    quantisable = [tensor.name for tensor in architecture.tensors if tensor.quantisable]
    return Sensitivity(
        responses(architecture, sites, measured_costs(architecture, sites)),
        {name: {"Q4_K": [0.01, 0.02], "Q8_0": [1e-5, 2e-5]} for name in quantisable},
        {"reap": {4: 0.25, 2: 1.5}, "random": {4: 3.0}},
        {"model": "abc", "tokens": 2048},
        together={str(error): error for error in RIPPLES},
        speeds={"tokens": 1e3, "products": 1e9},
        mended={0: {"Q4_K": Mended(225.0, 900.0, 0.5, 0.4, 1.0)}, 2: {}},
    )


def test_sensitivity_survives_json(deep: Architecture) -> None:
    original = whole(deep)
    assert Sensitivity.from_json(json.loads(json.dumps(original.to_json()))) == original
    earlier = {key: own for key, own in original.to_json().items() if key != "mended"}
    assert Sensitivity.from_json(earlier) == replace(original, mended={})
    unfinished = replace(original, distortions={})
    assert Sensitivity.from_json(json.loads(json.dumps(unfinished.to_json()))) == unfinished


def test_rounding_adds_to_the_error_and_sums_to_the_measured_floor(deep: Architecture) -> None:
    """Any error brings unrest, which is a part of the floor and no part of what rounding one product adds."""
    known, floor = whole(deep), {"32": 4e-3, "256": 2e-2}
    known = replace(known, together=ripples(known, Together(1e-3, 0.9, 1.1)))
    assert 5e-4 < known.unrest < 2e-3
    tensors = [tensor for tensor in deep.tensors if Site(tensor.name, False).key in known.responses]
    scaled = known.to_floor({tensor.name: {"32": 1e-5, "256": 2e-5} for tensor in tensors}, floor)
    rounding = replace(known, rounding=scaled)
    for name, block in (("Q8_0", "32"), ("Q4_K", "256")):
        exact = replace(known, distortions={t.name: {name: [0.0, 0.0]} for t in tensors}, rounding=scaled)
        summed = total(exact.cost(tensor, name) for tensor in tensors)
        assert exact.nats(summed) == pytest.approx(floor[block], rel=1e-6)
        assert all(rounding.cost(tensor, name).nats > known.cost(tensor, name).nats for tensor in tensors)
    assert rounding.cost(tensors[0], tensors[0].type) == Cost()
    assert known.to_floor({tensors[1].name: {"32": 0.0}}, floor) == {tensors[1].name: {32: 0.0}}


def test_linearity_is_the_usual_power_of_what_was_measured(deep: Architecture) -> None:
    known = whole(deep)
    pairs = ((1e-3, 1e-2), (1e-3, 5e-3), (1e-3, 1e-3), (1e-3, 9e-2), (0.0, 1e-2))
    slopes = {str(number): Response(*pair, interpolated=number == 3) for number, pair in enumerate(pairs)}
    # Linear, half of that, and no growth; the interpolated one is none, nor is one that was not seen.
    assert replace(known, responses=slopes).linearity == pytest.approx(math.log10(5))
    assert replace(known, responses={}).linearity is None


def ripples(known: Sensitivity, together: Together) -> dict[str, float]:
    """What all errors at once cost if that is their law."""
    unit = together.of(total(response.unit for response in known.responses.values()))
    return {str(error): together.unrest + (unit * error).nats for error in RIPPLES}


@pytest.mark.parametrize("law", [Together(), Together(3e-5, 0.8, 1.25), Together(1e-6, 1.1, 0.7)])
def test_what_errors_cost_at_once_is_found_from_what_was_measured(law: Together, deep: Architecture) -> None:
    known = whole(deep)
    seen = replace(known, together=ripples(known, law))
    found = seen.at_once
    unit = total(response.unit for response in known.responses.values())
    for error in (*RIPPLES, 3e-4, 3e-3):  # nearly: shares near 1 are likelier
        expected = law.unrest + (law.of(unit) * error).nats
        assert found.unrest + (found.of(unit) * error).nats == pytest.approx(expected, rel=0.02)
    assert abs(found.direct - law.direct) < 0.05
    assert abs(seen.unrest - law.unrest) < 0.3 * ripples(known, law)[str(RIPPLES[0])]
    tensor = deep.tensor("blk.0.attn_q.weight")
    alone = replace(known, together={}).cost(tensor, "Q4_K")
    assert seen.cost(tensor, "Q4_K").direct == pytest.approx(found.of(alone).direct)
    assert seen.cost(tensor, "Q4_K").rerouted == pytest.approx(found.of(alone).rerouted)
    assert seen.nats(seen.cost(tensor, "Q4_K")) == pytest.approx(found.unrest + found.of(alone).nats)
    assert seen.nats(Cost()) == 0.0


def test_shares_of_errors_at_once_are_bounded_and_noise_in_them_is_weighed(deep: Architecture) -> None:
    known = whole(deep)
    unit = total(response.unit for response in known.responses.values())
    law = Together(2e-5, 0.9, 1.2)
    absurd = {float(error): 9 * nats for error, nats in ripples(known, law).items()}
    found = fit_together(unit, absurd)
    assert found.direct <= 2 and found.rerouted <= 2 and 0 <= found.unrest <= min(absurd.values())
    # What noise made nothing, or less, stands beside the others and makes no error free.
    for lost in ({1e-5: 0.0}, {1e-5: -1e-6, 1e-4: 1e-9}, {1e-5: 1e-9, 1e-4: 1e-9, 1e-3: 1e-9}):
        found = fit_together(unit, {float(e): nats for e, nats in ripples(known, law).items()} | lost)
        assert found.direct >= 0.25 and found.rerouted >= 0.25
        assert 0 <= found.unrest <= max(0.0, min(lost.values()))
    noisy = {float(e): nats * (1.05 if n % 2 else 0.95) for n, (e, nats) in enumerate(ripples(known, law).items())}
    found = fit_together(unit, noisy)
    for error, nats in noisy.items():
        assert found.unrest + (found.of(unit) * error).nats == pytest.approx(nats, rel=0.1)
    assert fit_together(unit, {}) == fit_together(Cost(), absurd) == Together()
    assert fit_together(unit, {1e-5: 0.0, 1e-4: -1e-6}) == Together()


def test_an_error_in_some_sites_is_as_large_as_it_costs(deep: Architecture) -> None:
    known = whole(deep)
    restless = replace(known, together=ripples(known, Together(1e-5, 0.8, 1.2)))
    outputs = [tensor.name for tensor in deep.tensors if tensor.role == "expert_down"]
    found = restless.error_of(outputs, 0.02)
    assert restless.nats(found) == pytest.approx(0.02)
    unit = restless.at_once.of(total(known.responses[name].unit for name in outputs))
    assert found.direct / found.rerouted == pytest.approx(unit.direct / unit.rerouted)
    assert restless.error_of(outputs, -1.0) == restless.error_of(outputs, 0.5e-5) == Cost()
    assert restless.error_of(["no such"], 0.02) == Cost(pytest.approx(0.02 - restless.unrest))


def test_additivity_is_the_share_of_the_largest_ripple(deep: Architecture) -> None:
    known = whole(deep)
    alone = sum((response.unit * RIPPLES[-1]).nats for response in known.responses.values())
    assert replace(known, together={str(RIPPLES[-1]): 0.8 * alone}).additivity == pytest.approx(0.8)
    unmeasured = replace(known, together={})
    assert (unmeasured.unrest, unmeasured.additivity) == (0.0, None)


Edit = Callable[[dict[str, Any]], object]
DAMAGED: dict[str, Edit] = {
    "a key is missing": lambda v: v.pop("drops"),
    "responses are null": lambda v: v.update(responses=None),
    "a response is a number": lambda v: v["responses"].update(x=1),
    "a response lacks a size": lambda v: v["responses"]["output.weight"].pop("large"),
    "a response is a text": lambda v: v["responses"]["output.weight"].update(small="1"),
    "a count of experts in words": lambda v: v["drops"]["reap"].update(four=0.1),
    "a cost of dropping is a list": lambda v: v["drops"]["reap"].update({"4": [0.1]}),
    "drops of a score are a list": lambda v: v["drops"].update(reap=[0.1]),
    "distortions are a list": lambda v: v.update(distortions=[1]),
    "distortions of a tensor are a list": lambda v: v["distortions"].update({"output.weight": [0.1, 0.2]}),
    "a distortion is a number": lambda v: v["distortions"]["output.weight"].update(Q4_K=0.1),
    "a distortion is one number of two": lambda v: v["distortions"]["output.weight"].update(Q4_K=[0.1]),
    "a distortion is not finite": lambda v: v["distortions"]["output.weight"].update(Q4_K=[0.1, math.nan]),
    "an unknown type": lambda v: v["distortions"]["output.weight"].update(Q9_Z=[0.1, 0.1]),
    "a tensor is missing": lambda v: v["distortions"].pop("blk.3.attn_q.weight"),
    "the embedding is missing": lambda v: v["distortions"].pop("token_embd.weight"),
    "an error of no size": lambda v: v["together"].update(x=0.1),
    "an error of less than nothing": lambda v: v["together"].update({"-1": 0.1}),
    "an error of infinite size": lambda v: v["together"].update(inf=0.1),
    "made from a text": lambda v: v.update(made_from="abc"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_measurements_are_refused(case: str, deep: Architecture) -> None:
    value = json.loads(json.dumps(whole(deep).to_json()))
    DAMAGED[case](value)
    with pytest.raises(BadFile) as refusal:
        Sensitivity.from_json(value)
    assert "\n" not in refusal.value.cause


@pytest.mark.parametrize("value", [None, [], "x", 1])
def test_what_is_no_table_is_refused(value: Any) -> None:
    with pytest.raises(BadFile, match="is not a table"):
        Sensitivity.from_json(value)
