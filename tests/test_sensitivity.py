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
from edgeprune.measure.sensitivity import (
    LARGE,
    MOST_LAYERS_MEASURED,
    RIPPLES,
    SMALL,
    Response,
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


# Cost at the small and the large error: linear, slower, faster, and beyond both bounds of the exponent.
MEASURED = [(0.001, 0.01), (0.001, 0.006), (0.001, 0.02), (0.001, 0.0011), (0.001, 0.5)]


@pytest.mark.parametrize(("small", "large"), MEASURED)
def test_cost_grows_with_the_error_without_a_jump(small: float, large: float) -> None:
    response = Response(small, large)
    errors = np.geomspace(1e-6, 2.0, 200)
    costs = [response.nats(error) for error in errors]
    assert all(earlier < later for earlier, later in pairwise(costs))
    assert response.nats(0.0) == 0.0
    assert response.nats(SMALL) == pytest.approx(small)
    assert response.nats(SMALL * (1 + 1e-9)) == pytest.approx(small)


@pytest.mark.parametrize(("small", "large"), MEASURED[:3])
def test_cost_is_exact_at_both_measured_points(small: float, large: float) -> None:
    assert Response(small, large).nats(SMALL) == pytest.approx(small)
    assert Response(small, large).nats(LARGE) == pytest.approx(large)


def test_cost_is_linear_in_the_squared_error_below_the_small_point() -> None:
    assert Response(0.004, 0.1).nats(SMALL / 4) == pytest.approx(0.001)
    assert Response(0.001, 0.01).nats(0.05) == pytest.approx(0.005)


@pytest.mark.parametrize(("small", "large"), [(0.0, 0.0), (0.0, 0.1), (0.1, 0.0)])
def test_response_without_slope_is_taken_as_linear(small: float, large: float) -> None:
    assert Response(small, large).exponent == 1.0


def test_costs_of_both_uses_of_a_tied_embedding_add_up(deep: Architecture) -> None:
    embedding = deep.tensor("token_embd.weight")
    distortions = {embedding.name: {"Q4_0": [SMALL / 2, SMALL / 4]}}
    known = {
        Site(embedding.name, False).key: Response(0.02, 0.2),
        Site(embedding.name, True).key: Response(0.04, 0.4),
    }
    assert Sensitivity(known, distortions, {}, {}).nats(embedding, "Q4_0") == pytest.approx(0.01 + 0.01)
    lookup_only = {Site(embedding.name, True).key: Response(0.04, 0.4)}
    assert Sensitivity(lookup_only, distortions, {}, {}).nats(embedding, "Q4_0") == pytest.approx(0.01)


def test_keeping_the_type_costs_nothing_and_needs_no_measurement(deep: Architecture) -> None:
    assert Sensitivity({}, {}, {}, {}).nats(deep.tensors[0], deep.tensors[0].type) == 0.0


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
        assert found[site.key] == Response(costs[index], costs[len(sites) + index])
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
    known, floor = whole(deep), {"32": 1e-4, "256": 4e-4}
    tensors = [tensor for tensor in deep.tensors if Site(tensor.name, False).key in known.responses]
    scaled = known.to_floor({tensor.name: {"32": 1e-5, "256": 2e-5} for tensor in tensors}, floor)
    rounding = replace(known, rounding=scaled)
    for name, block in (("Q8_0", "32"), ("Q4_K", "256")):
        # One exponent for all tensors, so that costs of sums are sums of costs only near zero.
        linear = replace(known, distortions={t.name: {name: [0.0, 0.0]} for t in tensors}, rounding=scaled)
        assert sum(linear.nats(tensor, name) for tensor in tensors) == pytest.approx(floor[block], rel=1e-6)
        assert all(rounding.nats(tensor, name) > known.nats(tensor, name) for tensor in tensors)
    assert rounding.nats(tensors[0], tensors[0].type) == 0.0
    assert known.to_floor({tensors[1].name: {"32": 0.0}}, floor) == {tensors[1].name: {32: 0.0}}


def test_linearity_is_the_usual_power_of_what_was_measured(deep: Architecture) -> None:
    known = whole(deep)
    pairs = ((1e-3, 1e-2), (1e-3, 5e-3), (1e-3, 1e-3), (1e-3, 9e-2))
    slopes = {str(number): Response(*pair, interpolated=number == 3) for number, pair in enumerate(pairs)}
    # Linear, half of that, and no growth, which is taken for the least there can be; the interpolated one is none.
    assert replace(known, responses=slopes).linearity == pytest.approx(math.log10(5))
    assert replace(known, responses={}).linearity is None


def test_errors_at_once_cost_the_share_that_was_measured(deep: Architecture) -> None:
    known = whole(deep)
    parts = [sum(response.nats(error) for response in known.responses.values()) for error in RIPPLES]
    together = {str(RIPPLES[0]): parts[0] + 3e-4, str(RIPPLES[1]): 0.8 * parts[1] + 3e-4}
    restless = replace(known, together=together)
    for error, nats in together.items():
        assert restless.at_once(parts[RIPPLES.index(float(error))]) == pytest.approx(nats)
    assert restless.at_once(2 * parts[1]) == pytest.approx(1.6 * parts[1] + 3e-4)
    middle = parts[1] * (RIPPLES[0] / RIPPLES[1]) ** 0.5  # half of the way, on a logarithmic scale
    assert restless.at_once(middle) == pytest.approx(0.9 * middle + 3e-4)
    grown = [restless.at_once(summed) for summed in np.geomspace(1e-9, 10.0, 200)]
    assert all(a < b for a, b in pairwise(grown))
    for summed in np.geomspace(1e-6, 10.0, 20).tolist():
        assert restless.one_by_one(restless.at_once(summed)) == pytest.approx(summed, rel=1e-5)
    assert (restless.one_by_one(1e-4), restless.one_by_one(np.inf), restless.one_by_one(-np.inf)) == (0, np.inf, 0)
    assert (restless.at_once(0.0), replace(known, together={}).at_once(0.2)) == (pytest.approx(3e-4), 0.2)
    absurd = replace(known, together={str(RIPPLES[0]): 0.0, str(RIPPLES[1]): 9 * parts[1]})
    assert absurd.at_once(parts[1]) == pytest.approx(1.5 * parts[1])


def test_unrest_is_what_a_ripple_costs_beyond_its_parts_and_is_no_part_of_the_floor(deep: Architecture) -> None:
    known = whole(deep)
    parts = [sum(response.nats(error) for response in known.responses.values()) for error in RIPPLES]
    restless = replace(known, together={str(RIPPLES[0]): parts[0] + 3e-4, str(RIPPLES[1]): 0.8 * parts[1]})
    assert restless.unrest == pytest.approx(3e-4)
    assert restless.additivity == pytest.approx(0.8)
    assert replace(known, together={str(RIPPLES[0]): 0.9 * parts[0]}).unrest == 0.0
    unmeasured = replace(known, together={})
    assert (unmeasured.unrest, unmeasured.additivity) == (0.0, None)
    name = next(tensor.name for tensor in deep.tensors if Site(tensor.name, False).key in known.responses)
    scaled = [
        one.to_floor({name: {"32": 1e-5}}, {"32": nats}) for one, nats in ((restless, 4e-4), (unmeasured, 1e-4))
    ]
    assert scaled[0][name] == pytest.approx(scaled[1][name])


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
