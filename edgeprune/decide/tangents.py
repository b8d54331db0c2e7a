"""Types for all tensors at once where a part of the cost is the root of a sum: tokens that go to other experts.

The root of a sum lies below each of its tangents: choices that are better by the tangent at the last ones are better
by the root, and choosing by a tangent is a knapsack like any other. It lies above a chord between the ends of that,
and below it beyond them: what is cheapest by the chord bounds the cost of all choices whose sums lie between its
ends; the least of the bounds of chords that cover all sums bounds the cost of all choices.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from edgeprune.decide.solver import Choice, Solution, relaxed, smallest_bytes, solve, undominated
from edgeprune.measure.cost import Cost, total

# Tangents are tried until the whole gets better by less than this share, or so many times.
_ENOUGH_BETTER, _MOST_TANGENTS = 1e-4, 5
# Ends of the first chords, beside the least and the largest sum: shares of the sum of what was chosen.
_ENDS = (0.25, 0.8, 1.25, 4.0)
# How many chords are looked at closer at most, and how long, until it is proven that no choice costs less by this
# share. Where the time to encode is limited, too, the solver itself proves no more than a thousandth.
_MOST_CLOSER, _MOST_SECONDS, _ENOUGH_PROVEN, _ENOUGH_TIMED = 24, 20.0, 1e-3, 1e-2
# A chord that leaves more than this share of what is not proven is halved; else branch and bound goes by it.
_LEFT_BY_CHORD = 0.3


@dataclass(frozen=True)
class Way:
    """One way to store a tensor: its type, exact bytes, what it adds to the cost of errors, seconds to encode it."""

    type: str
    nbytes: int
    cost: Cost
    seconds: float = 0.0

    def at(self, slope: float) -> Choice:
        """With what it costs in nats per token, where ``slope`` (1 / nats) is that of the root of ``Cost.rerouted``
        by the sum under it."""
        return Choice(self.type, self.nbytes, self.cost.direct + slope * self.cost.rerouted, self.seconds)


@dataclass(frozen=True)
class _Knapsack:
    """Items, limits, and the cost of what is not chosen here."""

    ways: Sequence[Sequence[Way]]
    limit_bytes: int
    limit_seconds: float
    base: Cost

    def items(self, slope: float) -> list[list[Choice]]:
        """Those of each tensor's ways that no other is at least as good as, at ``slope``, smallest first."""
        return [undominated([way.at(slope) for way in own]) for own in self.ways]

    def whole(self, items: Sequence[Sequence[Choice]], found: Solution) -> tuple[Solution, Cost]:
        """``found``, among ``items``, as picks among the ways, and what everything costs with it."""
        names = [choices[pick].type for choices, pick in zip(items, found.picks, strict=True)]
        picks = tuple(
            next(number for number, way in enumerate(own) if way.type == name)
            for own, name in zip(self.ways, names, strict=True)
        )
        cost = self.base + total(own[pick].cost for own, pick in zip(self.ways, picks, strict=True))
        return replace(found, picks=picks, nats=cost.nats), cost

    def chord(self, low: float, high: float, *, proven: bool) -> tuple[float, Solution] | None:
        """A bound on the cost of all choices whose sum lies between ``low`` and ``high``, and a choice; None where
        none is found that keeps to the seconds.

        Args:
            proven: by branch and bound, which takes longer, not by the relaxation alone.
        """
        slope = 1 / (math.sqrt(low) + math.sqrt(high))
        items = self.items(slope)
        fixed = self.base.direct + math.sqrt(low) + slope * (self.base.rerouted - low)
        if proven:
            solution = solve(items, self.limit_bytes, self.limit_seconds)
            found = None if solution is None else (solution, solution.nats * (1 - solution.gap))
        else:
            loose = relaxed(items, self.limit_bytes, self.limit_seconds)
            found = None if loose is None else (loose.rounded, loose.bound)
        return None if found is None else (found[1] + fixed, self.whole(items, found[0])[0])


def least(
    ways: Sequence[Sequence[Way]],
    limit_bytes: int,
    limit_seconds: float = math.inf,
    *,
    base: Cost,
    hopeless: float = math.inf,
) -> Solution | None:
    """The ways of least cost together with ``base`` within both limits, or None when there are none.

    Args:
        base: of what is not chosen here.
        hopeless: nats; where a good choice costs more, it will do.

    Returns:
        Indices of the ways; nats with ``base``; ``gap``: of these to a bound that no choice goes below, relative.

    Raises:
        EdgepruneError: the solver failed.
    """
    if smallest_bytes([[way.at(0.0) for way in own] for own in ways]) > limit_bytes:
        return None
    knapsack = _Knapsack(ways, limit_bytes, limit_seconds, base)
    found = _descended(knapsack, hopeless)
    if found is None:
        return None
    best, cost = found
    if hopeless == -math.inf:  # a first guess; what is not chosen here is a bound, too
        return replace(best, gap=_gap(best.nats, base.nats))
    return _proven(knapsack, best, cost, 0 if best.nats >= hopeless else _MOST_CLOSER)


def _gap(nats: float, bound: float) -> float:
    """Share of ``nats`` by which ``bound`` lies below."""
    return max(0.0, 1 - bound / nats) if nats > 0 else 0.0


def _deviation(low: float, high: float) -> float:
    """How far the root lies above the chord between ``low`` and ``high`` at most."""
    ends = math.sqrt(low), math.sqrt(high)
    return (ends[1] - ends[0]) ** 2 / (4 * (ends[0] + ends[1]))


def _most(ways: Sequence[Sequence[Way]], base: Cost) -> float:
    """The largest sum of ``Cost.rerouted``, square nats per token, that choices can have."""
    return base.rerouted + sum(max(way.cost.rerouted for way in own) for own in ways)


def _descended(knapsack: _Knapsack, hopeless: float) -> tuple[Solution, Cost] | None:
    """What is best by the tangent at itself, or good where it costs more than ``hopeless`` by a tangent."""
    base, rerouted = knapsack.base, _most(knapsack.ways, knapsack.base)
    best: tuple[Solution, Cost] | None = None
    for _ in range(_MOST_TANGENTS):
        slope = 0.5 / math.sqrt(rerouted) if rerouted > 0 else 0.0
        items = knapsack.items(slope)
        enough = hopeless - base.direct - slope * (base.rerouted + rerouted)
        solution = solve(items, knapsack.limit_bytes, knapsack.limit_seconds, hopeless=enough)
        if solution is None:
            break
        found = knapsack.whole(items, solution)
        if best is not None and not found[0].nats < (1 - _ENOUGH_BETTER) * best[0].nats:
            break
        best, rerouted = found, found[1].rerouted
        if rerouted <= 0:  # no tangent touches the root there
            break
    return best


def _proven(knapsack: _Knapsack, best: Solution, cost: Cost, closer: int) -> Solution:
    """``best``, or what is better, with its proven gap.

    Args:
        closer: how many chords are looked at closer at most.
    """
    enough = _ENOUGH_PROVEN if knapsack.limit_seconds == math.inf else _ENOUGH_TIMED
    base, ways, started = knapsack.base, knapsack.ways, time.monotonic()
    smallest = base.rerouted + sum(min(way.cost.rerouted for way in own) for own in ways)
    largest = _most(ways, base)
    if largest <= 0:  # a sum like any other, whose gap the solver knows
        return best
    inner = [share * cost.rerouted for share in _ENDS]
    ends = [smallest, *(end for end in inner if smallest < end < largest), largest]
    chords: list[tuple[float, float, float, bool]] = []

    def look(low: float, high: float, known: float = base.direct, *, proven: bool = False) -> None:
        nonlocal best
        found = knapsack.chord(low, high, proven=proven)
        bound = known if found is None else max(known, found[0])
        if found is not None:
            best = min(best, found[1], key=lambda solution: solution.nats)
        heapq.heappush(chords, (bound, low, high, proven))

    for low, high in itertools.pairwise(ends):
        look(low, high)
    for _ in range(closer):
        bound, low, high, proven = chords[0]
        if bound >= (1 - enough) * best.nats or time.monotonic() > started + _MOST_SECONDS:
            break
        heapq.heappop(chords)
        if not proven and _deviation(low, high) < _LEFT_BY_CHORD * (best.nats - bound):
            look(low, high, bound, proven=True)
            continue
        middle = math.sqrt(max(low, high / 16) * high)
        look(low, middle, bound)
        look(middle, high, bound)
    return replace(best, gap=_gap(best.nats, chords[0][0]))
