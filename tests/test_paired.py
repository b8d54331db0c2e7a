"""Shares, paired differences and sample sizes, against figures from elsewhere and against simulation."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
from scipy import stats

from edgeprune.errors import BadFile
from edgeprune.prove.paired import Paired, exact_interval, mean_of


@pytest.mark.parametrize(("hits", "count"), [(0, 10), (3, 10), (81, 263), (263, 263), (1, 1)])
def test_interval_of_a_share_is_that_of_scipy(hits: int, count: int) -> None:
    expected = stats.binomtest(hits, count).proportion_ci(method="exact")
    assert exact_interval(hits, count) == pytest.approx((expected.low, expected.high), abs=1e-9)


@pytest.mark.parametrize("count", [*range(1, 13), 50])
def test_interval_of_a_share_holds_it_as_often_as_it_says_whatever_it_is(count: int) -> None:
    """Probability that the interval holds the share, exactly, at the shares where it is least: beside the ends."""
    ends = np.array([exact_interval(hits, count) for hits in range(count + 1)])
    shares = np.unique(np.clip(np.concatenate([ends - 1e-9, ends + 1e-9]), 0, 1))
    held = (ends[:, :1] <= shares) & (shares <= ends[:, 1:])
    probability = stats.binom.pmf(np.arange(count + 1)[:, None], count, shares)
    assert (held * probability).sum(axis=0).min() >= 0.95


def test_nothing_asked_is_nothing_known() -> None:
    assert exact_interval(0, 0) == (0.0, 1.0)
    assert Paired(0, 0, 0, 0).difference == (0.0, -1.0, 1.0)
    assert Paired(0, 0, 0, 0).p_value == 1.0


def test_items_are_counted_in_pairs() -> None:
    found = Paired.of([True, True, False, False, True], [True, False, True, False, True])
    assert found == Paired(both=2, original_only=1, candidate_only=1, neither=1)
    assert (found.count, found.original, found.candidate) == (5, 3, 3)
    with pytest.raises(ValueError):
        Paired.of([True], [])


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (1, 5), (12, 3), (40, 41), (30, 5)])
def test_p_value_is_that_of_an_exact_sign_test(lost: int, won: int) -> None:
    expected = stats.binomtest(won, lost + won).pvalue if lost + won else 1.0
    assert Paired(100, lost, won, 50).p_value == pytest.approx(expected)


@pytest.mark.parametrize(("count", "least"), [(2, 0.97), (8, 0.95), (200, 0.94)])
def test_interval_of_the_difference_holds_what_it_should_as_often_as_it_should(count: int, least: float) -> None:
    """Also of two items, of which mostly none differs."""
    random, shares = np.random.default_rng(0), (0.55, 0.12, 0.06, 0.27)
    tables, times = np.unique(random.multinomial(count, shares, 1000), axis=0, return_counts=True)
    held = 0
    for counts, often in zip(tables, times, strict=True):
        _, low, high = Paired(*map(int, counts)).difference
        held += often * (low <= shares[2] - shares[1] <= high)
    assert held / 1000 > least
    assert count < 200 or held / 1000 < 0.985


@pytest.mark.parametrize(("lost", "count"), [(0, 2), (2, 2), (0, 20), (3, 20), (1, 1)])
def test_interval_of_a_difference_in_one_direction_is_clopper_and_pearsons(lost: int, count: int) -> None:
    """Two items of two that say the same are next to no knowledge."""
    expected = stats.binomtest(lost, count).proportion_ci(method="exact")
    change, low, _ = Paired(0, lost, 0, count - lost).difference
    assert change == -lost / count
    assert low == pytest.approx(-expected.high, abs=0.01)
    assert mean_of([1.0] * lost + [0.0] * (count - lost))[2] == pytest.approx(expected.high, abs=0.01)


def test_interval_of_a_mean_never_shrinks_to_a_point_and_narrows_with_more() -> None:
    assert mean_of([]) == (0.0, -1.0, 1.0)
    lengths = []
    for count in (1, 2, 20, 200):
        mean, low, high = mean_of([0.1] * count)
        assert mean == pytest.approx(0.1) and -1 <= low < 0.1 < high <= 1
        lengths.append(high - low)
    assert lengths == sorted(lengths, reverse=True) and lengths[1] > 1.5 and lengths[3] < 0.04
    assert mean_of([0.1, 0.1, 0.4]) == pytest.approx(mean_of([0.1, 0.4], [2, 1]), abs=0.02)


def test_so_many_items_as_are_needed_see_the_drop_four_times_out_of_five() -> None:
    """With 4 % of items differing; the exact test is a little more careful than the formula's."""
    needed = Paired(900, 22, 18, 60).needed(0.01)
    changed = 42 / 1002
    assert 3000 < needed < 3600
    shares = (0.9, (changed + 0.01) / 2, (changed - 0.01) / 2, 0.1 - changed)
    tables = np.random.default_rng(1).multinomial(needed, shares, 600)
    seen = sum(Paired(*map(int, counts)).p_value < 0.05 for counts in tables)
    assert 0.74 < seen / 600 < 0.84


def test_fewer_differences_need_fewer_items() -> None:
    assert Paired(990, 1, 1, 8).needed() < Paired(900, 20, 20, 60).needed() < Paired(700, 100, 100, 100).needed()


def test_counts_survive_json_and_others_are_refused() -> None:
    found = Paired(4, 3, 2, 1)
    assert Paired.from_json(asdict(found)) == found
    for value in ({**asdict(found), "both": -1}, {**asdict(found), "both": "4"}, {"both": 4}):
        with pytest.raises(BadFile):
            Paired.from_json(value)
