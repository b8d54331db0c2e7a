"""Expert scores against their definitions: by hand, and token by token on real routers of every family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import toys
from observed import KEPT, TOKENS, WINDOWS, Family

from edgeprune.decide.evidence import Evidence
from edgeprune.decide.grouping import clusters, distances, removals
from edgeprune.decide.keep import rankings
from edgeprune.decide.scores import SCORES
from edgeprune.errors import Unsupported
from edgeprune.measure.reservoir import Reservoir
from edgeprune.measure.statistics import LayerStatistics
from edgeprune.measure.weights import LayerWeights

pytest_plugins = ("observed_fixtures",)
Doubles = npt.NDArray[np.float64]

EXPERTS = 4

# By domain: (expert, coefficient, output vector) of every routed token. Norms are 5, 10, 13 and 1.
ROUTED: list[list[tuple[int, float, list[float]]]] = [
    [(0, 0.5, [3.0, 4.0]), (1, 0.5, [6.0, 8.0]), (0, 0.25, [6.0, 8.0])],
    [(1, 1.0, [5.0, 12.0]), (2, 0.125, [1.0, 0.0]), (0, 0.75, [0.0, 0.0])],
]


def summed(tokens: list[list[tuple[int, float, list[float]]]]) -> LayerStatistics:
    """The accumulators that can be made of these tokens, from their definition."""
    statistics = LayerStatistics.zeros(len(tokens), EXPERTS, width=2)
    arrays = statistics.arrays
    for domain, rows in enumerate(tokens):
        for expert, gate, output in rows:
            vector = np.array(output)
            norm = float(np.linalg.norm(vector))
            values = {
                "routed": 1,
                "gate_sum": gate,
                "factor_sum": gate,
                "prob_sum": gate / 2,
                "share_sum": gate,
                "norm_sum": norm,
            }
            values |= {"norm_square": norm**2, "gated_norm_sum": gate * norm, "gated_square": (gate * norm) ** 2}
            for name, value in values.items():
                arrays[name][domain, expert] += value
            arrays["tokens"][domain] += 1
            arrays["output_sum"][domain, expert] += vector
            arrays["output_square"][domain, expert] += vector**2
    return statistics


def score(method: str, tokens: list[list[tuple[int, float, list[float]]]]) -> list[float]:
    return SCORES[method].score(Evidence(0, summed(tokens))).tolist()


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("reap", [(2.5 + 2.5) / 3, (5 + 13) / 2, 0.125, 0]),
        ("frequency", [3, 2, 1, 0]),
        ("soft-frequency", [1.5, 1.5, 0.125, 0]),
        ("ean", [15, 23, 1, 0]),
        ("man", [5, 11.5, 1, 0]),
        ("msan", [(25 + 100) / 3, (100 + 169) / 2, 1, 0]),
        ("gated-norm", [5, 18, 0.125, 0]),
        ("gated-energy", [12.5, 194, 1 / 64, 0]),
        ("dern", [1.5 / 6, 1.5 / 6, 0.125 / 6, 0]),
        ("mc-moe", [0.5 * (0.75 / 1.5625) ** 1.5, (0.75 / 1.5625) ** 1.5 / 3, (0.0625 / 1.5625) ** 1.5 / 6, 0]),
        # Expert 0: outputs (3, 4), (6, 8), (0, 0) have variances 6 and 32 / 3; expert 1: (6, 8), (5, 12): 1/4 and 4.
        ("mone", [(6 + 32 / 3) ** 0.5 * 0.5, 4.25**0.5 * 0.75, 0, 0]),
    ],
)
def test_scores_worked_out_by_hand(method: str, expected: list[float]) -> None:
    assert score(method, ROUTED) == pytest.approx(expected)


def test_tenp_scales_every_domain_to_length_one() -> None:
    sums = LayerStatistics.zeros(3, EXPERTS)  # the third domain reached none of the experts
    sums.arrays["angle_sum"][:2] = [[30.0, 40.0, 0.0, 0.0], [0.0, 0.5, 0.0, 1.2]]
    assert SCORES["tenp"].score(Evidence(0, sums)).tolist() == pytest.approx([0.6, 0.8 + 5 / 13, 0, 12 / 13])


@pytest.mark.parametrize("method", ["reap", "man", "msan"])
def test_means_do_not_depend_on_how_often_the_same_token_is_seen(method: str) -> None:
    assert score(method, ROUTED * 3) == pytest.approx(score(method, ROUTED))


def test_random_scores_are_the_same_at_every_call_and_differ_between_layers_and_seeds() -> None:
    def drawn(layer: int, seed: int) -> list[float]:
        return SCORES["random"].score(Evidence(layer, summed(ROUTED), seed=seed)).tolist()

    assert drawn(3, 0) == drawn(3, 0)
    assert drawn(3, 0) != drawn(4, 0) and drawn(3, 0) != drawn(3, 1)
    assert len(set(drawn(3, 0))) == EXPERTS


# The same scores token by token, from what transformers computes.


def tokens_of(family: Family, layer: int) -> dict[str, Doubles]:
    """Everything token by token, both windows after one another."""
    parts = [family.expected.layer(layer, window) for window in range(WINDOWS)]
    return {name: np.concatenate([part[name] for part in parts]) for name in ("ids", "gates", "probs", "f", "a", "z",
                                                                              "turn", "x")}  # fmt: skip


def each(tokens: dict[str, Any], value: Callable[[int, int], float]) -> Doubles:
    """Sum of ``value`` (token, slot) by expert."""
    sums = np.zeros(toys.EXPERTS)
    for token, slot in np.ndindex(tokens["ids"].shape):
        sums[tokens["ids"][token, slot]] += value(token, slot)
    return sums


def norm(tokens: dict[str, Any], t: int, s: int) -> float:
    return float(np.linalg.norm(tokens["f"][t, s]))


def mean_of(tokens: dict[str, Any], value: Callable[[int, int], float]) -> Doubles:
    return each(tokens, value) / np.maximum(each(tokens, lambda t, s: 1), 1)


def mone(tokens: dict[str, Any]) -> Doubles:
    scores = np.zeros(toys.EXPERTS)
    for expert in range(toys.EXPERTS):
        chosen = tokens["ids"] == expert
        if chosen.any():
            scores[expert] = np.sqrt(tokens["f"][chosen].var(axis=0).sum()) * tokens["gates"][chosen].mean()
    return scores


def camera(tokens: dict[str, Any], down: Doubles) -> Doubles:
    scores = np.zeros(toys.EXPERTS)
    for expert in range(toys.EXPERTS):
        chosen = tokens["ids"] == expert
        phi = (tokens["gates"][chosen][:, None] * tokens["a"][chosen]) ** 2
        if len(phi):
            energy = 0.1 * phi.sum(axis=0) + 0.9 * phi.max(axis=0)
            scores[expert] = float((np.square(down[expert]).sum(axis=0) * energy).sum())
    return scores


DEFINITIONS: dict[str, Callable[[dict[str, Any]], Doubles]] = {
    "frequency": lambda k: each(k, lambda t, s: 1),
    "soft-frequency": lambda k: each(k, lambda t, s: k["gates"][t, s]),
    "ean": lambda k: each(k, lambda t, s: norm(k, t, s)),
    "man": lambda k: mean_of(k, lambda t, s: norm(k, t, s)),
    "msan": lambda k: mean_of(k, lambda t, s: norm(k, t, s) ** 2),
    "reap": lambda k: mean_of(k, lambda t, s: k["gates"][t, s] * norm(k, t, s)),
    "gated-norm": lambda k: each(k, lambda t, s: k["gates"][t, s] * norm(k, t, s)),
    "gated-energy": lambda k: each(k, lambda t, s: (k["gates"][t, s] * norm(k, t, s)) ** 2),
    "easy-ep": lambda k: each(k, lambda t, s: k["gates"][t, s] * norm(k, t, s) * k["turn"][t]),
    "premoe": lambda k: np.bincount(k["z"].argmax(axis=1), k["z"].max(axis=1), toys.EXPERTS) / len(k["z"]),
    "dern": lambda k: each(k, lambda t, s: k["gates"][t, s] / k["gates"][t].sum()) / len(k["z"]),
    "mone": mone,
}


def evidence(family: Family, layer: int, weights: LayerWeights | None = None) -> Evidence:
    return Evidence(layer, family.both.layers[layer], family.both.reservoirs[layer], weights)


@pytest.mark.parametrize("method", sorted(DEFINITIONS))
def test_scores_equal_their_definition_on_real_routers(method: str, family: Family) -> None:
    for layer in range(toys.LAYERS):
        expected = DEFINITIONS[method](tokens_of(family, layer))
        found = SCORES[method].score(evidence(family, layer))
        np.testing.assert_allclose(found, expected, rtol=5e-4, atol=1e-4 * np.abs(expected).max())


def test_mc_moe_takes_probabilities_before_they_are_renormalised(family: Family) -> None:
    for layer in range(toys.LAYERS):
        k = tokens_of(family, layer)
        counts = each(k, lambda t, s: 1)
        weight = each(k, lambda t, s: k["probs"][t, k["ids"][t, s]])  # noqa: B023 - used at once
        expected = counts / counts.sum() * (weight / weight.sum()) ** 1.5
        np.testing.assert_allclose(SCORES["mc-moe"].score(evidence(family, layer)), expected, rtol=1e-3)


def weights_of(family: Family, layer: int) -> LayerWeights:
    """From the transformers model."""
    block = family.expected.model.model.layers[layer].mlp
    gate_up, down = (getattr(block.experts, n).detach().double().numpy() for n in ("gate_up_proj", "down_proj"))
    return LayerWeights(
        absolute=np.abs(gate_up).sum(axis=(1, 2)) + np.abs(down).sum(axis=(1, 2)),
        square=np.square(gate_up).sum(axis=(1, 2)) + np.square(down).sum(axis=(1, 2)),
        count=np.full(toys.EXPERTS, float(gate_up[0].size + down[0].size)),
        down_square=np.square(down).sum(axis=1),
        router=block.gate.weight.detach().double().numpy(),
    )


def test_camera_sums_the_energy_of_neurons(family: Family) -> None:
    for layer in range(toys.LAYERS):
        down = family.expected.model.model.layers[layer].mlp.experts.down_proj.detach().double().numpy()
        expected = camera(tokens_of(family, layer), down)
        found = SCORES["camera"].score(evidence(family, layer, weights_of(family, layer)))
        np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_aimer_removes_the_flattest_weights_first() -> None:
    flat, spiky = np.ones(100), np.zeros(100)
    spiky[0] = 10.0
    facts = LayerWeights(
        absolute=np.array([np.abs(flat).sum(), np.abs(spiky).sum()]),
        square=np.array([np.square(flat).sum(), np.square(spiky).sum()]),
        count=np.array([100.0, 100.0]),
        down_square=np.zeros((2, 1)),
        router=np.zeros((2, 1)),
    )
    assert SCORES["aimer"].score(Evidence(0, LayerStatistics.zeros(1, 2), weights=facts)).tolist() == [-1.0, -0.1]


def coalitions(rows: list[list[int]], experts: int) -> Reservoir:
    """A reservoir with nothing but its routing."""
    count = len(rows)
    wide = np.zeros((count, 1), np.float32)
    return Reservoir(
        domain=np.zeros(count, np.int16),
        x=wide, y=wide, ids=np.array(rows, np.int16), gates=np.ones((count, len(rows[0])), np.float32),
        selection=np.zeros((count, experts), np.float32), probs=np.zeros((count, experts), np.float32),
        residual=wide[:, 0], turn=wide[:, 0], stream=None,
    )  # fmt: skip


def test_shape_counts_coalitions() -> None:
    # Coalitions {0, 1}: 3, {0, 2}: 1, {1, 2}: 2. N({1}) = 5, N({2}) = 3, N({0}) = 4.
    tokens = coalitions([[0, 1], [1, 0], [0, 1], [2, 0], [1, 2], [2, 1]], 4)
    found = SCORES["shape"].score(Evidence(0, LayerStatistics.zeros(1, 4), tokens))
    alpha = [min(3 / 5, 1 / 3), min(3 / 4, 2 / 3), min(1 / 4, 2 / 5)]
    expected = [
        (3 - alpha[0] * 5) + (1 - alpha[0] * 3),
        (3 - alpha[1] * 4) + (2 - alpha[1] * 3),
        (1 - alpha[2] * 4) + (2 - alpha[2] * 5),
        0.0,
    ]
    assert found.tolist() == pytest.approx(expected)


# Clusters.


def test_a_merger_removes_one_of_two_representatives() -> None:
    points = np.array([0.0, 0.1, 5.0, 5.3, 20.0])
    distance = np.abs(points[:, None] - points[None])
    assert removals(distance, lambda _, a, b: min(a, b), linkage="average") == [1, 3, 2, 4]
    assert removals(distance, lambda _, a, b: max(a, b), linkage="complete") == [0, 2, 1, 3]
    assert removals(np.zeros((1, 1)), min, linkage="average") == []


def test_mergers_can_be_stopped_at_any_number_of_clusters() -> None:
    points = np.array([5.0, 0.1, 0.0, 20.0, 5.3])
    distance = np.abs(points[:, None] - points[None])
    assert sorted(clusters(distance, 3, linkage="average")) == [[0, 4], [1, 2], [3]]
    assert clusters(distance, 5, linkage="complete") == [[0], [1], [2], [3], [4]]
    assert clusters(distance, 1, linkage="complete") == [[0, 1, 2, 3, 4]]


def test_distances_between_rows() -> None:
    found = distances(np.array([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0], [3.0, 4.0]]))
    np.testing.assert_allclose(found, [[0, 5, 10, 5], [5, 0, 5, 0], [10, 5, 0, 5], [5, 0, 5, 0]], atol=1e-6)


def test_stun_keeps_one_of_two_experts_with_the_same_router_row() -> None:
    router = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.01], [-1.0, 0.0]])
    facts = LayerWeights(np.ones(4), np.ones(4), np.ones(4), np.ones((4, 1)), router)
    order = np.argsort(-SCORES["stun"].score(Evidence(0, LayerStatistics.zeros(1, 4), weights=facts)))
    assert order[-1] in (0, 2) and {1, 3} < set(order[:3].tolist())


def test_hc_smoe_keeps_the_more_frequent_of_two_experts_that_answer_alike() -> None:
    sums = LayerStatistics.zeros(1, 4, width=2)
    means = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1], [-3.0, 0.0]])
    routed = np.array([2.0, 5.0, 9.0, 1.0])
    sums.arrays["routed"][0], sums.arrays["output_sum"][0] = routed, means * routed[:, None]
    assert np.argmin(SCORES["hc-smoe"].score(Evidence(0, sums))) == 0  # 0 and 2 merge first, and 2 is used more


def test_uncurl_merges_experts_that_the_router_scores_alike() -> None:
    random = np.random.default_rng(1)
    logits = random.standard_normal((200, 4))
    logits[:, 3] = 2 * logits[:, 1] + 7  # the same profile at another level
    sums = LayerStatistics.zeros(1, 4)
    sums.arrays["tokens"][0] = 200
    sums.arrays["logit_gram"][0], sums.arrays["logit_sum"][0] = logits.T @ logits, logits.sum(axis=0)
    sums.arrays["routed"][0] = [10, 3, 10, 4]
    assert np.argmin(SCORES["uncurl"].score(Evidence(0, sums))) == 1


# What holds for all.


@pytest.mark.parametrize("method", sorted(name for name, own in SCORES.items() if not own.differentiates))
def test_every_score_is_one_finite_number_per_expert_of_what_it_asks_for(method: str, family: Family) -> None:
    own = SCORES[method]
    tokens = family.both.reservoirs[1] if own.samples else None
    weights = weights_of(family, 1) if own.weighs else None
    found = own.score(Evidence(1, family.both.layers[1], tokens, weights))
    assert (found.shape, found.dtype) == ((toys.EXPERTS,), np.float64)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("method", [name for name, own in SCORES.items() if not own.draws and not own.weighs])
def test_a_layer_that_no_token_reached_is_scored_without_complaint(method: str) -> None:
    nothing = Evidence(0, LayerStatistics.zeros(2, EXPERTS), coalitions([[0, 1]], EXPERTS))
    assert np.isfinite(SCORES[method].score(nothing)).all()


def test_what_was_not_measured_is_asked_for_by_name() -> None:
    bare = Evidence(4, LayerStatistics.zeros(1, EXPERTS))
    with pytest.raises(Unsupported, match="layer 4 has no reservoir"):
        SCORES["shape"].score(bare)
    with pytest.raises(Unsupported, match="weights of layer 4"):
        SCORES["aimer"].score(bare)


# Several domains.

LOUD = [(0, 1.0, [100.0, 0.0]), (1, 1.0, [90.0, 0.0]), (2, 1.0, [1.0, 0.0])]
QUIET = [(3, 1.0, [0.5, 0.0]), (2, 1.0, [0.4, 0.0]), (0, 1.0, [0.1, 0.0])]


def test_mixtures_of_domains() -> None:
    own = [Evidence(0, summed([LOUD, QUIET]))]
    orders = {mix: rankings(own, "ean", 2, mix)[0].tolist() for mix in ("pooled", "balanced", "coverage")}
    assert orders["pooled"] == [0, 1, 2, 3]  # the loud domain alone decides
    # Shares: 0: 100/191 + 0.1, 1: 90/191, 2: 1/191 + 0.4, 3: 0.5.
    assert orders["balanced"] == [0, 3, 1, 2]
    assert orders["coverage"] == [0, 3, 1, 2]  # first of the loud, first of the quiet, second of the loud ...


def test_a_domain_can_be_looked_at_alone(family: Family) -> None:
    whole = evidence(family, 0)
    parts = [whole.of_domain(domain) for domain in range(WINDOWS)]
    for part in parts:
        assert part.sums.total("tokens") == TOKENS and len(part.reservoir) == len(KEPT)
    both = sum(SCORES["gated-norm"].score(part) for part in parts)
    np.testing.assert_allclose(both, SCORES["gated-norm"].score(whole))


def test_one_expert_per_token_forms_no_coalitions() -> None:
    alone = coalitions([[0], [1], [1]], EXPERTS)
    with pytest.raises(Unsupported, match="one expert per token"):
        SCORES["shape"].score(Evidence(0, LayerStatistics.zeros(1, EXPERTS), alone))
