"""Replay elimination against brute force, for every way in which a router makes coefficients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import toys
from observed import Family, Toy, collected, statistics, token_windows

from edgeprune.decide import replaying
from edgeprune.decide.elimination import Layer, Replay, eliminate, error_of
from edgeprune.decide.replaying import rank, sample
from edgeprune.measure import child
from edgeprune.measure.activation import GATED
from edgeprune.measure.replay import LayerExperts, outputs
from edgeprune.measure.reservoir import Reservoir, pack
from edgeprune.measure.routing import CHOSEN, CONSTANT, KEPT, preference, rule_of
from edgeprune.measure.statistics import Statistics
from edgeprune.measure.token_weights import token_weights
from edgeprune.model.architecture import read_architecture
from edgeprune.model.gguf import GgufFile

pytest_plugins = ("observed_fixtures",)
Doubles = npt.NDArray[np.float64]

TOKENS, EXPERTS, USED, DIMENSIONS, SCALE = 60, 7, 2, 3, 1.7
EVERYONE = np.ones(EXPERTS, bool)


class Case:
    """A random layer, and its output for any set of experts, written out."""

    def __init__(self, denominator: str, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.denominator = denominator
        self.mass = random.random((TOKENS, EXPERTS)).astype(np.float32) + 0.05
        if denominator == KEPT:
            self.mass /= self.mass.sum(axis=1, keepdims=True)
        self.selection = self.mass + random.normal(0, 0.05, self.mass.shape)  # a bias that the weights do not contain
        self.outputs = random.standard_normal((TOKENS, EXPERTS, DIMENSIONS)).astype(np.float32)
        self.weight = random.random(TOKENS).astype(np.float32)
        lists = np.argsort(-self.selection, axis=1)
        rows = np.arange(TOKENS)[:, None]
        self.replay = Replay(
            lists, self.mass[rows, lists], self.outputs[rows, lists], USED, denominator, SCALE, self.mass,
            self.weight, np.zeros(TOKENS, bool),
        )  # fmt: skip

    def output(self, kept: list[int]) -> Doubles:
        result = np.zeros((TOKENS, DIMENSIONS))
        for token in range(TOKENS):
            chosen = sorted(kept, key=lambda e: -self.selection[token, e])[:USED]
            mass = self.mass[token].astype(np.float64)
            divisor = {CONSTANT: 1.0, CHOSEN: mass[chosen].sum(), KEPT: mass[kept].sum()}[self.denominator]
            for expert in chosen:
                result[token] += SCALE * mass[expert] / divisor * self.outputs[token, expert]
        return result

    def error(self, kept: list[int]) -> float:
        squared = np.square(self.output(kept) - self.output(list(range(EXPERTS)))).sum(axis=1)
        return float((self.weight * squared).sum())


@pytest.fixture(params=[CONSTANT, CHOSEN, KEPT])
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def kept_by(layer: Layer) -> list[int]:
    return np.flatnonzero(layer.kept).tolist()


def test_the_cost_of_every_removal_is_exact_at_every_step(case: Case) -> None:
    layer = Layer(case.replay, EVERYONE)
    assert layer.error == pytest.approx(0, abs=1e-9)
    for gone in (3, 0, 5):
        kept = kept_by(layer)
        costs = layer.removal_costs()
        for expert in range(EXPERTS):
            if expert in kept:
                without = case.error([e for e in kept if e != expert])
                assert layer.error + costs[expert] == pytest.approx(without, rel=1e-4, abs=1e-6)
            else:
                assert costs[expert] == np.inf
        layer.remove(gone)
        assert layer.error == pytest.approx(case.error(kept_by(layer)), rel=1e-4)


def test_an_expert_that_comes_back_leaves_no_trace(case: Case) -> None:
    layer = Layer(case.replay, EVERYONE)
    layer.remove(2)
    before, costs = layer.error, layer.removal_costs()
    layer.remove(4)
    layer.add(4)
    assert layer.error == pytest.approx(before, rel=1e-6)
    np.testing.assert_allclose(layer.removal_costs(), costs, rtol=1e-5, atol=1e-7)


def test_elimination_takes_the_cheapest_each_time(case: Case) -> None:
    removed = eliminate(Layer(case.replay, EVERYONE), [EXPERTS - 1, EXPERTS - 2, EXPERTS - 3])
    kept = list(range(EXPERTS))
    for expert in removed[:1]:  # the first is greedy for certain: there is nothing to swap it with
        assert expert == min(kept, key=lambda e: case.error([k for k in kept if k != e]))
    assert len(set(removed)) == 3


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("denominator", [CONSTANT, CHOSEN, KEPT])
def test_swaps_come_near_the_best_subset(denominator: str, seed: int) -> None:
    case = Case(denominator, seed)
    layer = Layer(case.replay, EVERYONE)
    eliminate(layer, [4])
    best = min(case.error(list(kept)) for kept in combinations(range(EXPERTS), 4))
    every = np.mean([case.error(list(kept)) for kept in combinations(range(EXPERTS), 4)])
    assert layer.error == pytest.approx(case.error(kept_by(layer)), rel=1e-4)
    assert best * (1 - 1e-6) <= layer.error <= best + 0.15 * (every - best)


def test_no_single_swap_improves_what_is_left(case: Case) -> None:
    layer = Layer(case.replay, EVERYONE)
    removed = eliminate(layer, [4])
    kept = kept_by(layer)
    for back in removed:
        for out in kept:
            swapped = sorted({*kept, back} - {out})
            assert case.error(swapped) >= layer.error * (1 - 1e-4)


def test_protected_experts_stay_and_groups_lose_equal_numbers(case: Case) -> None:
    layer = Layer(case.replay, EVERYONE)
    eliminate(layer, [3], protected=[1, 6])
    assert {1, 6} <= set(kept_by(layer)) and layer.kept.sum() == 3
    lists = np.argsort(-case.selection[:, :6], axis=1)
    rows = np.arange(TOKENS)[:, None]
    replay = Replay(
        lists, case.mass[rows, lists], case.outputs[rows, lists], USED, case.denominator, SCALE, case.mass[:, :6],
        case.weight, case.replay.cut,
    )  # fmt: skip
    grouped = Layer(replay, np.ones(6, bool))
    eliminate(grouped, [4, 2], groups=2)
    assert grouped.kept.reshape(2, 3).sum(axis=1).tolist() == [1, 1]


def test_the_error_of_a_set_from_scratch_is_that_of_its_removals(case: Case) -> None:
    layer = Layer(case.replay, EVERYONE)
    for expert in (6, 1):
        layer.remove(expert)
    assert error_of(case.replay, layer.kept, layer.target) == pytest.approx(layer.error, rel=1e-6)


def test_an_elimination_ends_when_the_lists_of_the_tokens_are_used_up(case: Case) -> None:
    lists = case.replay.lists[:, : USED + 1]
    cut = {"lists": lists, "mass": case.replay.mass[:, : USED + 1], "outputs": case.replay.outputs[:, : USED + 1]}
    layer = Layer(replace(case.replay, **cut, cut=np.ones(TOKENS, bool)))
    assert layer.short == 0
    assert len(eliminate(layer, [3])) == 1  # some token had the first among its three best
    assert layer.short == pytest.approx(np.isin(lists, kept_by(layer), invert=True).any(axis=1).mean())
    whole = Layer(case.replay)
    eliminate(whole, [3])
    assert whole.short == 0 and whole.kept.sum() == 3


# The router's rule, read off its coefficients.


def routed(mass: Doubles, ids: npt.NDArray[np.intp], gates: Doubles) -> Reservoir:
    count = len(mass)
    wide = np.zeros((count, 1), np.float32)
    probs = mass.astype(np.float32)
    return Reservoir(
        np.zeros(count, np.int16), wide, wide, ids.astype(np.int16), gates.astype(np.float32), probs, probs,
        wide[:, 0], wide[:, 0], None,
    )  # fmt: skip


def _softmax(values: Doubles) -> Doubles:
    spread: Doubles = np.exp(values - values.max(axis=1, keepdims=True))
    return spread / spread.sum(axis=1, keepdims=True)


def _sigmoid(values: Doubles) -> Doubles:
    result: Doubles = 1 / (1 + np.exp(-values))
    return result


RULES: dict[str, tuple[Callable[[Doubles], Doubles], Callable[[Doubles], Doubles], str]] = {
    "softmax, renormalised": (_softmax, lambda m: m / m.sum(axis=1, keepdims=True), CHOSEN),
    "softmax": (_softmax, lambda m: m, KEPT),
    "softmax, scaled": (_softmax, lambda m: 16 * m, KEPT),
    "sigmoid, renormalised and scaled": (_sigmoid, lambda m: 2.5 * m / m.sum(axis=1, keepdims=True), CHOSEN),
    "sigmoid": (_sigmoid, lambda m: m, CONSTANT),
    "softmax over the chosen": (lambda z: z, _softmax, CHOSEN),
}


@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_recognised_by_its_coefficients(name: str) -> None:
    make_mass, make_gates, denominator = RULES[name]
    logits = np.random.default_rng(3).standard_normal((50, 8)) * 2
    mass = make_mass(logits)
    ids = np.argsort(-mass, axis=1)[:, :3]
    gates = make_gates(np.take_along_axis(mass, ids, axis=1))
    rule = rule_of(routed(mass, ids, gates))
    assert rule is not None and rule.denominator == denominator
    raw = np.take_along_axis(rule.mass, ids, axis=1)
    divisor = raw.sum(axis=1, keepdims=True) if denominator == CHOSEN else 1.0
    np.testing.assert_allclose(rule.scale * raw / divisor, gates, rtol=1e-4)


def test_coefficients_of_no_rule_are_not_forced_into_one() -> None:
    random = np.random.default_rng(0)
    mass = random.random((50, 8))
    ids = np.argsort(-mass, axis=1)[:, :3]
    assert rule_of(routed(mass, ids, random.random((50, 3)))) is None


def test_groups_are_chosen_by_their_two_best_experts() -> None:
    selection = np.array([[0.9, 0.1, 0.6, 0.5, 0.2, 0.95]], np.float32)  # sums of pairs: 1.0, 1.1, 1.15
    scores = preference(selection, 3, 2, np.ones(6, bool))
    assert np.isfinite(scores[0]).tolist() == [False, False, True, True, True, True]
    without = preference(selection, 3, 2, np.array([True, True, True, True, True, False]))
    assert np.isfinite(without[0]).tolist() == [True, True, True, True, False, False]


def test_packed_rows_keep_eleven_bits() -> None:
    rows = np.random.default_rng(0).standard_normal((20, 64)).astype(np.float32) * np.logspace(-8, 8, 20)[:, None]
    packed, scale = pack(rows.astype(np.float32))
    error = np.abs(packed.astype(np.float32) * scale[:, None] - rows).max(axis=1)
    assert (error <= 2**-11 * np.abs(rows).max(axis=1)).all()
    assert pack(np.zeros((2, 3), np.float32))[1].tolist() == [1.0, 1.0]


# Whole layers of real models.


def squared(family: Family, layer: int, kept: list[int], renormalised: bool) -> float:
    """Relative squared error of the layer's output with the kept experts, on the tokens of the reservoir, as much as
    each of them counts."""
    import torch

    block = family.expected.model.model.layers[layer].mlp
    gate_up, down = (getattr(block.experts, n).detach().double() for n in ("gate_up_proj", "down_proj"))
    x = torch.tensor(family.both.reservoirs[layer].x).double()

    def output(experts: list[int]) -> torch.Tensor:
        logits = x @ block.gate.weight.detach().double().T
        logits[:, [e for e in range(toys.EXPERTS) if e not in experts]] = -torch.inf
        weights, ids = torch.softmax(logits, dim=-1).topk(toys.USED, dim=-1)
        if renormalised:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        gate, up = torch.einsum("tkfd,td->tkf", gate_up[ids], x).chunk(2, dim=-1)
        hidden = torch.nn.functional.silu(gate) * up
        return torch.einsum("tk,tkdf,tkf->td", weights, down[ids], hidden)

    whole = output(list(range(toys.EXPERTS)))
    weight = torch.tensor(token_weights(family.both.reservoirs[layer])).double()
    return float((weight @ (output(kept) - whole).square()).sum() / (weight @ whole.square()).sum())


@pytest.mark.parametrize("method", ["replay", "naee"])
def test_the_errors_of_real_layers_are_those_that_transformers_gives(
    method: str, family: Family, toy_gguf: Toy, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    name = request.node.callspec.params["family"]
    family.both.save(tmp_path / "statistics.safetensors")
    stops = [6, 4]
    arguments = {"model": str(toy_gguf(name)), "statistics": str(tmp_path / "statistics.safetensors")}
    found = child.call(
        "edgeprune.decide.replaying:rank", {**arguments, "method": method, "stops": stops, "protected": {}}
    )
    assert found["reasons"] == {}
    for layer in range(toys.LAYERS):
        order, errors = found["orders"][str(layer)], found["errors"][str(layer)]
        assert sorted(order) == list(range(toys.EXPERTS))
        for stop, error in zip(stops, errors, strict=True):
            assert error == pytest.approx(squared(family, layer, order[:stop], name != "olmoe"), rel=0.35)
        if method == "naee":  # among subsets of the six
            best = min(squared(family, layer, list(kept), name != "olmoe") for kept in combinations(order[:6], 4))
            assert squared(family, layer, order[:4], name != "olmoe") <= 1.35 * best


MANY = 40  # experts, more than every token's list holds


def random_layer(
    folder: Path, experts: int, mass: Doubles, domains: npt.NDArray[np.int16] | None = None
) -> tuple[Path, Path]:
    """A layer, and statistics with a reservoir of random tokens and what the layer makes of them.

    Args:
        mass: the router's probabilities [R, E].
        domains: of the tokens [R], instead of one.
    """
    model = toys.synthetic_gguf(folder / "layer.gguf", layers=1, experts=experts, used=2, width=64, expert_width=32)
    count = len(mass)
    ids = np.argsort(-mass, axis=1)[:, :2]
    gates = np.take_along_axis(mass, ids, axis=1)
    gates /= gates.sum(axis=1, keepdims=True)
    x = np.random.default_rng(4).standard_normal((count, 64)).astype(np.float32)
    y, own = np.zeros_like(x), layer_experts(model)
    for expert in range(experts):
        token, slot = np.nonzero(ids == expert)
        y[token] += gates[token, slot, None] * (own[expert].hidden(x[token], GATED["silu"]) @ own[expert].down.T)
    tokens = replace(routed(mass, ids, gates), x=x, y=y, residual=np.full(count, 9, np.float32))
    if domains is not None:
        tokens = replace(tokens, domain=domains)
    Statistics(["text"], count, 64, {}, {}, {}, {0: tokens}).save(folder / "statistics.safetensors")
    return model, folder / "statistics.safetensors"


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory, own_home: Path) -> tuple[Path, Path]:
    """A layer of many experts."""
    random = np.random.default_rng(4)
    mass = _softmax(random.standard_normal(MANY) + 2 * random.standard_normal((300, MANY)))
    return random_layer(tmp_path_factory.mktemp("many"), MANY, mass)


# Tokens of the first domain, and experts of a layer of which each domain uses a half.
FIRST, SECOND, FEW = 1_200, 400, 6


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory, own_home: Path) -> tuple[Path, Path]:
    """A layer whose first three experts serve one domain, and the others another, which comes after it."""
    domains = np.repeat([0, 1], [FIRST, SECOND]).astype(np.int16)
    own = np.repeat([0, 1], FEW // 2)[None] == domains[:, None]
    mass = _softmax(3.0 * own + np.random.default_rng(5).standard_normal((FIRST + SECOND, FEW)))
    return random_layer(tmp_path_factory.mktemp("halves"), FEW, mass, domains)


@pytest.mark.parametrize("mixture", ["pooled", "balanced"])
def test_subsets_are_judged_on_the_tokens_of_all_domains(mixture: str, halves: tuple[Path, Path]) -> None:
    found = rank(*map(str, halves), "naee", [4], {}, mixture)
    file = GgufFile(halves[0])
    tokens = Statistics.load(halves[1]).reservoirs[0]
    ranker = replaying._Ranker(file, read_architecture(file), 0, tokens, mixture)

    def error(kept: tuple[int, ...]) -> float:
        flags = np.isin(np.arange(FEW), kept)
        return error_of(ranker.first, flags, ranker.whole.target) / ranker._energy()

    best = min(error(kept) for kept in combinations(range(FEW), 4))
    assert found["errors"]["0"][0] <= 1.1 * best
    assert found["greedy"] == {}


def test_every_domain_keeps_its_best_where_they_take_turns(halves: tuple[Path, Path]) -> None:
    model, statistics = map(str, halves)
    by_mixture = {mix: rank(model, statistics, "replay", [4, 2], {}, mix) for mix in ("pooled", "coverage")}
    order = by_mixture["coverage"]["orders"]["0"]
    assert sorted(order) == list(range(FEW))
    for stop in (2, 4):  # as many of either half
        assert sum(expert < FEW // 2 for expert in order[:stop]) == stop // 2
    assert sum(expert < FEW // 2 for expert in by_mixture["pooled"]["orders"]["0"][:2]) == 2  # three times the text
    assert by_mixture["coverage"]["errors"]["0"][1] >= by_mixture["pooled"]["errors"]["0"][1]


def test_an_enumeration_says_where_it_was_greedy(halves: tuple[Path, Path], many: tuple[Path, Path]) -> None:
    assert rank(*map(str, many), "naee", [37, 20], {})["greedy"] == {"0": [20, 37]}  # 9,880 subsets for the first
    assert rank(*map(str, halves), "naee", [4], {})["greedy"] == {}


def test_a_sample_has_tokens_of_every_domain_in_proportion() -> None:
    domain = np.repeat([2, 0, 1], [3_000, 1_000, 3])
    rows, stands_for = sample(domain, 400)
    assert np.bincount(domain[rows]).tolist() == [99, 1, 299]
    np.testing.assert_allclose(np.bincount(domain[rows], stands_for), [1_000, 3, 3_000])
    assert (np.diff(rows) > 0).all() and rows[-1] > 3_900
    rows, stands_for = sample(domain[:50], 400)
    assert rows.tolist() == list(range(50)) and set(stands_for) == {1.0}


def layer_experts(model: Path) -> LayerExperts:
    file = GgufFile(model)
    return LayerExperts(file, read_architecture(file), 0)


def test_short_lists_lead_to_the_same_experts_as_whole_ones(
    many: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, statistics = map(str, many)
    found = rank(model, statistics, "replay", [30, 20, 8], {})
    monkeypatch.setattr(replaying, "_FEW_EXPERTS", MANY)
    whole = rank(model, statistics, "replay", [30, 20, 8], {})
    assert found["reasons"] == whole["reasons"] == {}
    assert found["errors"]["0"] == pytest.approx(whole["errors"]["0"], rel=0.05)
    for stop in (30, 20, 8):
        both = set(found["orders"]["0"][:stop]) & set(whole["orders"]["0"][:stop])
        assert len(both) >= 0.9 * stop - 1


def test_outputs_that_are_known_are_not_computed_again(many: tuple[Path, Path]) -> None:
    experts = layer_experts(many[0])
    random = np.random.default_rng(0)
    x = random.standard_normal((20, 64)).astype(np.float32)
    wanted = np.argsort(random.random((20, MANY)), axis=1)[:, :6]
    wanted[3, 4:] = -1
    fresh = outputs(experts, GATED["silu"], x, wanted)
    assert (fresh[3, 4:] == 0).all()
    known = wanted[:, [5, 1]]
    found = outputs(experts, GATED["silu"], x, wanted, (known, fresh[:, [5, 1]] + 1))
    expected = fresh.copy()
    expected[:, [5, 1]] += 1
    expected[3, 5] = 0
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("router", ["grouped", "qwen2moe", "gpt-oss"])
def test_layers_of_every_router_can_be_replayed(router: str, synthetic: Toy, tmp_path: Path) -> None:
    if router == "grouped":
        options = {"experts": 16, "used": 3, "groups": 4, "groups_used": 2, "layers": 3}
        model = toys.synthetic_gguf(tmp_path / "grouped.gguf", "deepseek2", **options)
    else:
        model = synthetic(router)
    architecture = read_architecture(GgufFile(model))
    windows = token_windows(architecture.vocabulary)
    statistics(collected(model, windows, tmp_path), "a", {"model": "x"}).save(tmp_path / "s.safetensors")
    protected = {str(layer): [1] for layer in architecture.moe_layers}
    found = rank(str(model), str(tmp_path / "s.safetensors"), "replay", [architecture.experts // 2], protected)
    assert found["reasons"] == {}
    for order in found["orders"].values():
        kept = order[: architecture.experts // 2]
        assert 1 in kept
        if router == "grouped":
            assert np.bincount(np.array(kept) // 4, minlength=4).tolist() == [2, 2, 2, 2]


def test_a_layer_whose_tokens_do_not_fit_its_weights_is_not_replayed(
    family: Family, toy_gguf: Toy, tmp_path: Path
) -> None:
    tokens = family.both.reservoirs[0]
    broken = {**family.both.reservoirs, 0: Reservoir(**{**tokens.unpacked(), "x": tokens.x[::-1].copy()})}
    made = family.both
    made = type(made)(made.domains, made.tokens, made.window, made.layers, made.moments, made.made_from, broken)
    made.save(tmp_path / "s.safetensors")
    found = rank(str(toy_gguf("qwen3_moe")), str(tmp_path / "s.safetensors"), "replay", [4], {})
    assert "do not reproduce" in found["reasons"]["0"]


def test_tokens_count_relative_to_their_stream_and_domains_alike() -> None:
    count = 6
    tokens = routed(np.full((count, 4), 0.25), np.zeros((count, 1), np.intp), np.ones((count, 1)))
    output = np.array([1, 1, 1, 1, 1, 10], np.float32)[:, None]
    streams = np.array([10, 10, 10, 20, 20, 100], np.float32)
    tokens = Reservoir(**{**tokens.unpacked(), "y": output, "residual": streams})
    weight = token_weights(tokens)
    assert weight.mean() == pytest.approx(1)
    assert weight[0] == weight[2] > weight[3] > weight[5] > 0  # the longer the stream, the less an error matters
    parted = Reservoir(**{**tokens.unpacked(), "domain": np.array([0, 0, 0, 0, 1, 1], np.int16)})
    balanced = token_weights(parted, balanced=True)
    assert balanced[4] / balanced[3] == pytest.approx(2)  # half as many tokens of that domain
    nothing = Reservoir(**{**tokens.unpacked(), "y": 0 * output, "residual": 0 * streams})
    assert np.isfinite(token_weights(nothing)).all()
