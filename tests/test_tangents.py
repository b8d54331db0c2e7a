"""Choices of least cost where a part of it is a root: held against all combinations, and the bound against them."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from edgeprune.decide.tangents import Way, least
from edgeprune.measure.cost import Cost, total

SEEDS = range(12)


def instance(seed: int, items: int = 6) -> tuple[list[list[Way]], Cost]:
    """Up to four ways for every item, the more bytes the less error; which part of it is dear differs by item."""
    random = np.random.default_rng(seed)
    ways = []
    for _ in range(items):
        unit = Cost(float(10 ** random.uniform(-3, 0)), float(10 ** random.uniform(-4, 0)))
        sizes = sorted(random.choice(np.arange(1, 40), random.integers(2, 5), replace=False).tolist())
        errors = 4.0 ** -np.sort(random.uniform(0, 5, len(sizes)))
        pairs = enumerate(zip(sizes, errors.tolist(), strict=True))
        ways.append([Way(f"T{n}", 32 * size, unit * error, float(n + 1)) for n, (size, error) in pairs])
    return ways, Cost(float(random.uniform(0, 0.1)), float(random.uniform(0, 0.05)) * (seed % 2))


def everything(ways: list[list[Way]], limit: int, seconds: float, base: Cost) -> float:
    """The least cost of all combinations within both limits."""
    fitting = (
        own
        for own in itertools.product(*ways)
        if sum(way.nbytes for way in own) <= limit and sum(way.seconds for way in own) <= seconds
    )
    return min(((base + total(way.cost for way in own)).nats for own in fitting), default=math.inf)


def limits(ways: list[list[Way]], count: int = 9) -> list[int]:
    smallest, largest = (sum(pick(way.nbytes for way in own) for own in ways) for pick in (min, max))
    return np.linspace(smallest, largest, count).astype(int).tolist()


@pytest.mark.parametrize("seed", SEEDS)
def test_the_least_of_all_combinations_is_found_and_the_gap_is_proven(seed: int) -> None:
    ways, base = instance(seed)
    for limit in limits(ways):
        found = least(ways, limit, base=base)
        assert found is not None
        chosen = [own[pick] for own, pick in zip(ways, found.picks, strict=True)]
        assert sum(way.nbytes for way in chosen) == found.nbytes <= limit
        assert found.nats == pytest.approx((base + total(way.cost for way in chosen)).nats)
        best = everything(ways, limit, math.inf, base)
        assert found.nats * (1 - found.gap) <= best * (1 + 1e-9)
        assert found.nats <= best * 1.02  # few items, whose bytes do not fill the limit, have wide gaps


@pytest.mark.parametrize("seed", SEEDS[:4])
def test_both_limits_are_kept(seed: int) -> None:
    ways, base = instance(seed)
    for limit, seconds in itertools.product(limits(ways, 4), (6.0, 9.0, 12.0)):
        found, best = least(ways, limit, seconds, base=base), everything(ways, limit, seconds, base)
        if found is None:
            assert best == math.inf
            continue
        assert found.nbytes <= limit and found.seconds <= seconds
        assert best * (1 - 1e-9) <= found.nats <= best * 1.05
        assert found.nats * (1 - found.gap) <= best * (1 + 1e-9)


@pytest.mark.parametrize("seed", SEEDS[:4])
def test_more_bytes_cost_no_more(seed: int) -> None:
    ways, base = instance(seed, items=60)
    found = [least(ways, limit, base=base) for limit in limits(ways, 40)]
    nats = [one.nats for one in found if one is not None]
    assert len(nats) == 40
    assert all(later <= earlier * (1 + 1e-3) for earlier, later in itertools.pairwise(nats))
    assert max(one.gap for one in found if one is not None) < 0.005


def test_what_shares_its_cost_is_coarse_together() -> None:
    """Two tensors whose errors send tokens elsewhere, one whose errors do not: it is cheaper to have both of the
    former coarse than one of them and the latter, though each alone costs more."""
    coarse = {"a": Cost(0.0, 0.04), "b": Cost(0.0, 0.04), "c": Cost(0.15, 0.0)}
    ways = [[Way("small", 100, cost), Way("large", 200, Cost())] for cost in coarse.values()]
    found = least(ways, 400, base=Cost())
    assert found is not None
    assert found.picks == (0, 0, 1)
    assert found.nats == pytest.approx(math.sqrt(0.08)) and found.nats < 0.2 + 0.15


def test_without_shared_cost_it_is_the_sum() -> None:
    ways = [[Way("small", 100, Cost(0.3)), Way("large", 200, Cost(0.1))] for _ in range(3)]
    found = least(ways, 500, base=Cost(1.0))
    assert found is not None and found.nats == pytest.approx(1.5)
    assert least(ways, 299, base=Cost()) is None


def test_where_all_is_hopeless_a_good_choice_does_and_claims_no_more() -> None:
    ways, base = instance(3, items=60)
    limit = limits(ways)[4]
    best, rough = least(ways, limit, base=base), least(ways, limit, base=base, hopeless=-math.inf)
    assert best is not None and rough is not None
    assert best.nats <= rough.nats <= 1.05 * best.nats
    assert rough.nats * (1 - rough.gap) <= best.nats
    # By the tangents, nothing is called hopeless that is not.
    near = least(ways, limit, base=base, hopeless=1.001 * best.nats)
    assert near is not None and near.nats == pytest.approx(best.nats, rel=1e-3)


@pytest.mark.parametrize("share", [0.3, 0.9, 1.001, 1.5])
@pytest.mark.parametrize("seed", SEEDS[:6])
def test_a_choice_that_is_hopeless_is_good_and_one_that_is_not_the_best(seed: int, share: float) -> None:
    ways, base = instance(seed)
    for limit in limits(ways, 5):
        best = everything(ways, limit, math.inf, base)
        found = least(ways, limit, base=base, hopeless=share * best)
        assert found is not None
        assert found.nats * (1 - found.gap) <= best * (1 + 1e-9)
        assert best * (1 - 1e-9) <= found.nats <= best * (1.02 if share > 1 else 1.5)


def test_the_root_has_more_than_one_dale() -> None:
    """Ten tensors fine, or none; by the tangent where they are coarse it is better to have one other fine."""
    ways = [[Way("small", 1, Cost(0.0, 0.1)), Way("large", 2, Cost())] for _ in range(10)]
    ways.append([Way("small", 1, Cost(0.6)), Way("large", 11, Cost())])
    nats = []
    for limit in (20, 21, 22):
        found = least(ways, limit, base=Cost())
        assert found is not None
        assert found.nats == pytest.approx(everything(ways, limit, math.inf, Cost()))
        nats.append(found.nats)
    assert nats[0] > nats[1] == nats[2] == pytest.approx(0.6)
