"""Types for all tensors at once: a multiple-choice knapsack, solved to a proven gap with HiGHS."""

from __future__ import annotations

import ctypes
import importlib
import itertools
import math
import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from edgeprune.errors import EdgepruneError

_TIME_LIMIT_SECONDS = 20.0
_RELATIVE_GAP = 1e-4
_TIMED_GAP = 1e-3  # proving two limits at once to the last takes minutes for a large model, and seconds are estimates
_TINY_SHARE = 1e-2
# Prices of a second that are tried at most, and how near to each other they end.
_PRICES, _NEAR_PRICES = 40, 1.02


@dataclass(frozen=True)
class Choice:
    """One way to store an item: its type, exact bytes, predicted cost in nats, and seconds to encode it."""

    type: str
    nbytes: int
    nats: float
    seconds: float = 0.0


@dataclass(frozen=True)
class Solution:
    """The chosen index for every item, what they sum to, and the proven relative gap of the cost."""

    picks: tuple[int, ...]
    nbytes: int
    nats: float
    gap: float
    seconds: float = 0.0


def prepare() -> None:
    """Begin to load the solver, which takes a third of a second, while llama.cpp is waited for."""
    threading.Thread(target=importlib.import_module, args=("scipy.optimize",)).start()


def undominated(choices: Sequence[Choice]) -> list[Choice]:
    """The choices that no other is at least as good as in bytes, cost and seconds, smallest first."""
    kept: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.nbytes, c.nats, c.seconds)):
        if not any(other.nats <= choice.nats and other.seconds <= choice.seconds for other in kept):
            kept.append(choice)
    return kept


def smallest_bytes(items: Sequence[Sequence[Choice]]) -> int:
    """Bytes when every item takes its smallest choice."""
    return sum(min(choice.nbytes for choice in choices) for choices in items)


def solve(
    items: Sequence[Sequence[Choice]],
    limit_bytes: int,
    limit_seconds: float = math.inf,
    *,
    hopeless: float = math.inf,
) -> Solution | None:
    """The choices of least total cost within ``limit_bytes`` and ``limit_seconds``, or None when there are none.

    minimise sum nats(item, choice) subject to sum bytes <= limit, sum seconds <= limit, one choice per item
    (MC-MoE, arXiv 2410.06270, section 3.2, over tensors and GGML types instead of experts and bits). The bytes are
    held to the last one; the seconds, an estimate, to a thousandth.

    Args:
        hopeless: nats; where no solution can cost less, a good one will do, with a larger gap.

    Raises:
        EdgepruneError: the solver failed.
    """
    if smallest_bytes(items) > limit_bytes:
        return None
    richest = tuple(_richest(choices) for choices in items)
    best = _summed(items, richest)
    if best.nbytes <= limit_bytes and best.seconds <= limit_seconds:
        return best
    worth = [list(range(len(choices))) for choices in items]
    loose = relaxed(items, limit_bytes, limit_seconds)
    if loose is not None:
        rounded, bound = loose.rounded, loose.bound
        if bound >= hopeless or rounded.gap <= _enough(limit_seconds):
            return rounded
        worth = _worthwhile(loose.items, loose.price, rounded.nats - bound)
    few = [[choices[pick] for pick in picks] for choices, picks in zip(items, worth, strict=True)]
    found = _proven(few, limit_bytes, limit_seconds)
    return found and replace(found, picks=tuple(picks[pick] for picks, pick in zip(worth, found.picks, strict=True)))


def _enough(limit_seconds: float) -> float:
    """The relative gap at which the search ends."""
    return _RELATIVE_GAP if limit_seconds == math.inf else _TIMED_GAP


def _proven(items: Sequence[Sequence[Choice]], limit_bytes: int, limit_seconds: float) -> Solution | None:
    """``solve`` by branch and bound."""
    # Not below zero, though a cost may be: a measured divergence of nearly nothing has either sign.
    dearest = max(abs(choice.nats) for choices in items for choice in choices) or 1.0
    solution = _milp(items, limit_bytes, limit_seconds, dearest)
    if solution is None:
        return None
    # HiGHS also stops at an absolute gap of 1e-6, which SciPy does not let one set: when the optimum is
    # tiny beside the dearest choice, it has to be the unit of cost.
    if solution.gap > _enough(limit_seconds) and 0 < solution.nats < _TINY_SHARE * dearest:
        again = _milp(items, limit_bytes, limit_seconds, solution.nats) or solution
        solution = min(solution, again, key=lambda found: (found.nats, found.gap))
    return solution


def _richest(choices: Sequence[Choice]) -> int:
    return min(range(len(choices)), key=lambda pick: (choices[pick].nats, choices[pick].nbytes))


def _summed(items: Sequence[Sequence[Choice]], picks: tuple[int, ...], least_nats: float | None = None) -> Solution:
    """The solution with ``picks``; its gap is that to the proven lower bound ``least_nats``, if one is given."""
    chosen = [choices[pick] for choices, pick in zip(items, picks, strict=True)]
    nats = sum(choice.nats for choice in chosen)
    gap = 0.0 if least_nats is None or nats <= 0 else max(0.0, (nats - least_nats) / nats)
    seconds = sum(choice.seconds for choice in chosen)
    return Solution(picks, sum(choice.nbytes for choice in chosen), nats, gap, seconds)


def _hull(choices: Sequence[Choice]) -> list[int]:
    """Indices of the lower convex hull of the cost over the bytes, from the smallest choice to the richest."""
    hull: list[int] = []
    for pick in sorted(range(len(choices)), key=lambda index: (choices[index].nbytes, choices[index].nats)):
        if hull and choices[pick].nats >= choices[hull[-1]].nats:
            continue
        while len(hull) > 1 and _slope(choices, hull[-2], hull[-1]) >= _slope(choices, hull[-1], pick):
            hull.pop()
        hull.append(pick)
    return hull


def _slope(choices: Sequence[Choice], small: int, large: int) -> float:
    """Nats for each byte more, below zero."""
    return (choices[large].nats - choices[small].nats) / (choices[large].nbytes - choices[small].nbytes)


@dataclass(frozen=True)
class Relaxed:
    """The linear relaxation: its solution ``rounded`` to whole choices, its cost, which no solution goes below, its
    price of a byte, and the items with the price of a second in their costs."""

    rounded: Solution
    bound: float
    price: float
    items: Sequence[Sequence[Choice]]


def relaxed(items: Sequence[Sequence[Choice]], limit_bytes: int, limit_seconds: float) -> Relaxed | None:
    """The relaxation within both limits, or None where no rounded solution is found that keeps to them.

    A second is given a price, as a byte is, which is searched for on a logarithmic scale. At every price the cost
    with it, less what the limit costs at it, is a bound (Lagrange), and what keeps to the limit is a solution.
    """
    rate, low, high = 0.0, 0.0, math.inf
    best: Solution | None = None
    bound, price, priced = -math.inf, 0.0, items
    start = _RELATIVE_GAP * max(abs(choice.nats) for choices in items for choice in choices)
    for _ in range(_PRICES):
        own = [[replace(c, nats=c.nats + rate * c.seconds) for c in choices] for choices in items] if rate else items
        found, least, own_price = _rounded(own, limit_bytes)
        found = _summed(items, found.picks)
        own_bound = least - rate * limit_seconds if rate else least
        if own_bound > bound:
            bound, price, priced = own_bound, own_price, own
        if found.seconds <= limit_seconds:
            best, high = min(found, best or found, key=lambda solution: solution.nats), rate
        else:
            low = rate
        if not high or high < _NEAR_PRICES * low:
            break
        rate = math.sqrt(low * high) if low > 0 and high < math.inf else (4 * rate or start / limit_seconds)
        if high < math.inf and not low:
            rate = high / 4
    if best is None:
        return None
    gap = (best.nats - bound) / best.nats if best.nats > 0 else math.inf
    return Relaxed(replace(best, gap=max(0.0, gap)), bound, price, priced)


def _worthwhile(items: Sequence[Sequence[Choice]], price: float, slack: float) -> list[list[int]]:
    """Indices of the choices that a better solution than the rounded one can hold.

    A solution with another choice costs at least the relaxation and what that choice is dearer than the item's best
    one, both with their bytes at the relaxation's ``price`` (its reduced cost); ``slack``: what the rounded solution
    costs more than the relaxation.
    """
    worth, slack = [], slack * (1 + 1e-9)  # for rounding errors
    for choices in items:
        costs = [choice.nats + price * choice.nbytes for choice in choices]
        worth.append([pick for pick, cost in enumerate(costs) if cost - min(costs) <= slack])
    return worth


def _rounded(items: Sequence[Sequence[Choice]], limit_bytes: int) -> tuple[Solution, float, float]:
    """The linear relaxation, rounded to whole choices; its cost, which no solution goes below; and its price of a
    byte, nats.

    Steps along the hulls are taken from the steepest down; the relaxation takes a part of the first that has no room
    (Sinha and Zoltners, "The multiple-choice knapsack problem", 1979), the rounding leaves that item where it is.
    """
    hulls = [_hull(choices) for choices in items]
    chosen = [hull[0] for hull in hulls]
    room = limit_bytes - sum(choices[pick].nbytes for choices, pick in zip(items, chosen, strict=True))
    steps = sorted(
        (_slope(items[index], small, large), index, small, large)
        for index, hull in enumerate(hulls)
        for small, large in itertools.pairwise(hull)
    )
    bound, price = math.nan, 0.0
    for slope, index, small, large in steps:
        more = items[index][large].nbytes - items[index][small].nbytes
        if chosen[index] != small:  # the step before it had no room
            continue
        if more <= room:
            chosen[index], room = large, room - more
        elif math.isnan(bound):
            bound, price = _summed(items, tuple(chosen)).nats + slope * room, -slope
    solution = _summed(items, tuple(chosen))
    return solution, solution.nats if math.isnan(bound) else bound, price


class _Quiet:
    """Standard output closed to native code: HiGHS 1.12 prints debugging lines there even when told not to.

    They wait in the C library's buffer, which is therefore emptied before and after. The descriptor is the whole
    process's, so that of several threads the first one closes it and the last one opens it again.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._kept = threading.Lock(), 0, -1

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside > 1:
                return
            _flush()
            self._kept = os.dup(1)
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), 1)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside:
                return
            _flush()
            os.dup2(self._kept, 1)
            os.close(self._kept)


def _flush() -> None:
    """Empty the buffers of the C library."""
    c_library = ctypes.cdll.ucrtbase if sys.platform == "win32" else ctypes.CDLL(None)
    c_library.fflush(None)


_QUIET = _Quiet()


def _milp(
    items: Sequence[Sequence[Choice]], limit_bytes: int, limit_seconds: float, unit_nats: float
) -> Solution | None:
    from scipy.optimize import Bounds, LinearConstraint, milp  # takes long to import and is not always needed
    from scipy.sparse import csr_array

    sizes = [len(choices) for choices in items]
    costs = np.array([choice.nats for choices in items for choice in choices])
    nbytes = np.array([choice.nbytes for choices in items for choice in choices], float)
    item_of = np.repeat(np.arange(len(items)), sizes)
    one_each = csr_array((np.ones(len(costs)), (item_of, np.arange(len(costs)))))
    constraints = [
        LinearConstraint(one_each, 1, 1),
        # The tolerance of 1e-6 that HiGHS allows itself becomes 1e-9 of the limit.
        LinearConstraint((nbytes / limit_bytes * 1e3)[None, :], -np.inf, 1e3),
    ]
    if limit_seconds < math.inf:
        seconds = np.array([choice.seconds for choices in items for choice in choices])
        constraints.append(LinearConstraint((seconds / limit_seconds)[None, :], -np.inf, 1))
    with _QUIET:
        result = milp(
            costs / unit_nats,
            constraints=constraints,
            integrality=np.ones(len(costs), np.int8),
            bounds=Bounds(0, 1),
            options={"time_limit": _TIME_LIMIT_SECONDS, "mip_rel_gap": _enough(limit_seconds)},
        )
    if result.x is None and limit_seconds < math.inf:  # bytes alone always leave a solution, see `solve`
        return None
    if result.x is None:
        raise EdgepruneError(f"the solver failed: {result.message}")
    starts = np.concatenate([[0], np.cumsum(sizes)])
    picks = tuple(int(np.argmax(result.x[a:b])) for a, b in itertools.pairwise(starts))
    return _summed(items, _within(items, picks, limit_bytes), float(result.mip_dual_bound) * unit_nats)


def _within(items: Sequence[Sequence[Choice]], picks: tuple[int, ...], limit_bytes: int) -> tuple[int, ...]:
    """``picks``, made smaller at the least cost per byte until they are within the limit.

    HiGHS holds constraints to a tolerance; the file size is held to the byte. Only a few small steps
    are ever needed, and there is always one, because the smallest choices are within the limit.
    """
    chosen = list(picks)
    excess = _summed(items, picks).nbytes - limit_bytes
    while excess > 0:
        steps = []
        for index, choices in enumerate(items):
            now = choices[chosen[index]]
            for pick, choice in enumerate(choices):
                if choice.nbytes < now.nbytes:
                    saved = min(now.nbytes - choice.nbytes, excess)
                    steps.append(((choice.nats - now.nats) / saved, choice.nbytes - now.nbytes, index, pick))
        _, change, index, pick = min(steps)
        chosen[index] = pick
        excess += change
    return tuple(chosen)
