"""Types for all tensors at once: a multiple-choice knapsack, solved to a proven gap with HiGHS."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgeprune.errors import EdgepruneError

_TIME_LIMIT_SECONDS = 20.0
_RELATIVE_GAP = 1e-4


@dataclass(frozen=True)
class Choice:
    """One way to store an item: its type, exact bytes and predicted cost in nats."""

    type: str
    nbytes: int
    nats: float


@dataclass(frozen=True)
class Solution:
    """The chosen index for every item, what they sum to, and the proven relative gap of the cost."""

    picks: tuple[int, ...]
    nbytes: int
    nats: float
    gap: float


def undominated(choices: Sequence[Choice]) -> list[Choice]:
    """The choices that no other beats in both bytes and cost, smallest first."""
    kept: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.nbytes, c.nats)):
        if not kept or choice.nats < kept[-1].nats:
            kept.append(choice)
    return kept


def smallest_bytes(items: Sequence[Sequence[Choice]]) -> int:
    """Bytes when every item takes its smallest choice."""
    return sum(min(choice.nbytes for choice in choices) for choices in items)


def solve(items: Sequence[Sequence[Choice]], limit_bytes: int) -> Solution | None:
    """The choices of least total cost within ``limit_bytes``, or None when even the smallest exceed it.

    minimise sum nats(item, choice) subject to sum bytes <= limit, one choice per item (MC-MoE,
    arXiv 2410.06270, section 3.2, over tensors and GGML types instead of experts and bits).

    Raises:
        EdgepruneError: the solver failed.
    """
    if smallest_bytes(items) > limit_bytes:
        return None
    richest = tuple(int(np.argmin([choice.nats for choice in choices])) for choices in items)
    if (best := _summed(items, richest, 0.0)).nbytes <= limit_bytes:
        return best
    target = limit_bytes
    for _ in range(8):
        solution = _milp(items, target)
        if solution.nbytes <= limit_bytes:
            return solution
        # HiGHS holds constraints to a tolerance; the file size is held to the byte.
        target -= max(solution.nbytes - limit_bytes, limit_bytes // 10**6, 1)
    raise EdgepruneError(f"the solver did not find a choice of types within {limit_bytes:,} bytes")


def _summed(items: Sequence[Sequence[Choice]], picks: tuple[int, ...], gap: float) -> Solution:
    chosen = [choices[pick] for choices, pick in zip(items, picks, strict=True)]
    return Solution(picks, sum(c.nbytes for c in chosen), sum(c.nats for c in chosen), gap)


def _milp(items: Sequence[Sequence[Choice]], limit_bytes: int) -> Solution:
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    sizes = [len(choices) for choices in items]
    costs = np.array([choice.nats for choices in items for choice in choices])
    nbytes = np.array([choice.nbytes for choices in items for choice in choices], float)
    item_of = np.repeat(np.arange(len(items)), sizes)
    one_each = csr_array((np.ones(len(costs)), (item_of, np.arange(len(costs)))))
    scale = 1.0 / max(float(costs.max()), 1e-12)
    result = milp(
        costs * scale,
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint((nbytes / limit_bytes)[None, :], -np.inf, 1.0),
        ],
        integrality=np.ones(len(costs), np.int8),
        bounds=Bounds(0, 1),
        options={"time_limit": _TIME_LIMIT_SECONDS, "mip_rel_gap": _RELATIVE_GAP},
    )
    if result.x is None:
        raise EdgepruneError(f"the solver failed: {result.message}")
    starts = np.concatenate([[0], np.cumsum(sizes)])
    picks = tuple(int(np.argmax(result.x[a:b])) for a, b in itertools.pairwise(starts))
    return _summed(items, picks, float(result.mip_gap or 0.0))
