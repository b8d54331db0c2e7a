"""Expert scores against values worked out by hand."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from edgeprune.decide.scores import SCORES
from edgeprune.measure.statistics import PER_EXPERT, LayerStatistics

EXPERTS = 4

# By domain: (expert, coefficient, output vector) of every routed token. Norms are 5, 10, 13 and 1.
ROUTED: list[list[tuple[int, float, list[float]]]] = [
    [(0, 0.5, [3.0, 4.0]), (1, 0.5, [6.0, 8.0]), (0, 0.25, [6.0, 8.0])],
    [(1, 1.0, [5.0, 12.0]), (2, 0.125, [1.0, 0.0]), (0, 0.75, [0.0, 0.0])],
]


def summed(tokens: list[list[tuple[int, float, list[float]]]]) -> LayerStatistics:
    """The accumulators that ``LayerStatistics`` describes, from their definition."""
    statistics = LayerStatistics.zeros(len(tokens), EXPERTS)
    for domain, rows in enumerate(tokens):
        for expert, gate, output in rows:
            norm = float(np.linalg.norm(output))
            statistics.routed[domain, expert] += 1
            statistics.gate_sum[domain, expert] += gate
            statistics.gate_square[domain, expert] += gate**2
            statistics.norm_sum[domain, expert] += norm
            statistics.gated_norm_sum[domain, expert] += gate * norm
            statistics.gated_square[domain, expert] += (gate * norm) ** 2
    return statistics


def permuted(statistics: LayerStatistics, order: npt.NDArray[np.intp]) -> LayerStatistics:
    return LayerStatistics(*(getattr(statistics, name)[:, order] for name in PER_EXPERT))


def test_reap_is_the_mean_gated_norm_over_routed_tokens() -> None:
    # Expert 0: (0.5 * 5 + 0.25 * 10 + 0.75 * 0) / 3; expert 1: (0.5 * 10 + 1 * 13) / 2; expert 2: 0.125 * 1.
    assert SCORES["reap"](summed(ROUTED), 0).tolist() == pytest.approx([5 / 3, 9.0, 0.125, 0.0])


def test_frequency_is_the_number_of_routed_tokens() -> None:
    assert SCORES["frequency"](summed(ROUTED), 0).tolist() == [3.0, 2.0, 1.0, 0.0]


@pytest.mark.parametrize("method", ["reap", "frequency"])
def test_experts_that_no_token_reached_score_nothing(method: str) -> None:
    nothing = LayerStatistics.zeros(2, EXPERTS)
    assert SCORES[method](nothing, 0).tolist() == [0.0] * EXPERTS


def test_reap_does_not_depend_on_how_often_the_same_token_is_seen() -> None:
    assert SCORES["reap"](summed(ROUTED * 3), 0).tolist() == pytest.approx(SCORES["reap"](summed(ROUTED), 0).tolist())


@pytest.mark.parametrize("method", ["reap", "frequency"])
def test_renaming_experts_renames_their_scores(method: str) -> None:
    order = np.array([2, 0, 3, 1])
    statistics = summed(ROUTED)
    expected = SCORES[method](statistics, 0)[order]
    assert SCORES[method](permuted(statistics, order), 0).tolist() == expected.tolist()


def test_random_scores_are_the_same_at_every_call_and_differ_between_layers() -> None:
    statistics = summed(ROUTED)
    first = SCORES["random"](statistics, 3)
    assert first.tolist() == SCORES["random"](summed([[], []]), 3).tolist()
    assert first.tolist() != SCORES["random"](statistics, 4).tolist()
    assert len(set(first.tolist())) == EXPERTS


@pytest.mark.parametrize("method", sorted(SCORES))
def test_every_score_is_one_finite_number_per_expert(method: str) -> None:
    score = SCORES[method](summed(ROUTED), 1)
    assert (score.shape, score.dtype) == ((EXPERTS,), np.float64)
    assert np.isfinite(score).all()
