"""How a router makes coefficients of what it computed, read off the tokens it routed.

llama.cpp's routers differ in gate function, selection bias, renormalisation and scale. What they have in common:
the experts with the largest selection score are chosen, and each one's coefficient is its mass divided by a
denominator, times a constant. Which denominator it is shows in the observed coefficients.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgeprune.measure.reservoir import Reservoir

Floats = npt.NDArray[np.float32]
CONSTANT, CHOSEN, KEPT = "constant", "chosen", "kept"
# Largest relative error of a coefficient for a rule to be the router's; half precision leaves 1e-3.
_TOLERANCE = 5e-3
_SUM_TOLERANCE = 2e-3


@dataclass(frozen=True)
class Rule:
    """A router's rule.

    Attributes:
        denominator: ``constant``: the mass is the coefficient (sigmoid without renormalisation); ``chosen``: the
            sum of masses over the chosen experts (renormalised, or a softmax over the chosen); ``kept``: over all
            experts that there are (softmax without renormalisation).
        scale: what everything is multiplied with.
        mass: of every expert for every token, float32 [R, E], positive.
    """

    denominator: str
    scale: float
    mass: Floats


def rule_of(tokens: Reservoir) -> Rule | None:
    """The rule that reproduces the observed coefficients of ``tokens``, or None."""
    ids = tokens.ids.astype(np.intp)
    probs = tokens.probs
    sums = probs.sum(axis=1, dtype=np.float64)
    softmaxed = bool((probs >= 0).all()) and bool(np.abs(sums - 1).max() < _SUM_TOLERANCE)
    exponential = np.exp(probs - probs.max(axis=1, keepdims=True))
    candidates = [
        (KEPT if softmaxed else CONSTANT, probs),
        (CHOSEN, probs),
        (CHOSEN, exponential),
    ]
    best: tuple[float, Rule | None] = (_TOLERANCE, None)
    for denominator, mass in candidates:
        if (mass < 0).any():
            continue
        raw = np.take_along_axis(mass, ids, axis=1).astype(np.float64)
        whole = raw.sum(axis=1, keepdims=True) if denominator == CHOSEN else np.ones((len(raw), 1))
        predicted = np.divide(raw, whole, out=np.zeros_like(raw), where=whole > 0)
        usable = predicted > 1e-6
        if not usable.any():
            continue
        scale = float(np.median(tokens.gates[usable] / predicted[usable]))
        most = np.abs(tokens.gates).max()
        error = float(np.abs(scale * predicted - tokens.gates).max() / most) if most > 0 else 1.0
        if error < best[0]:
            best = (error, Rule(denominator, scale, np.ascontiguousarray(mass, np.float32)))
    return best[1]


def coefficients(rule: Rule, ids: npt.NDArray[np.intp], kept: npt.NDArray[np.bool_]) -> Floats:
    """What multiplies the outputs of the chosen experts ``ids`` [R, k] when only ``kept`` bool [E] are there, float32
    [R, k]."""
    chosen = np.take_along_axis(rule.mass, ids, axis=1)
    if rule.denominator == CHOSEN:
        divisor = chosen.sum(axis=1, keepdims=True)
    elif rule.denominator == KEPT:
        divisor = (rule.mass @ kept.astype(np.float32))[:, None]
    else:
        divisor = np.ones((len(ids), 1), np.float32)
    found: Floats = np.divide(rule.scale * chosen, divisor, out=np.zeros_like(chosen), where=divisor > 1e-12)
    return found


def preference(selection: Floats, groups: int, groups_used: int, kept: npt.NDArray[np.bool_]) -> Floats:
    """Selection scores float32 [R, E] with -inf for what cannot be chosen.

    Args:
        selection: scores before any grouping.
        groups, groups_used: contiguous routing groups, of which those with the largest sum of their two best
            scores may be chosen from; 1 and 1 where there are none.
        kept: bool [E].
    """
    masked = np.where(kept, selection, -np.inf).astype(np.float32)
    if groups <= 1:
        return masked
    tokens, experts = masked.shape
    grouped = masked.reshape(tokens, groups, experts // groups)
    two = np.sort(grouped, axis=2)[:, :, -2:].sum(axis=2)
    order = np.argsort(-two, axis=1, kind="stable")[:, :groups_used]
    open_groups = np.zeros((tokens, groups), bool)
    np.put_along_axis(open_groups, order, True, axis=1)
    return np.where(open_groups[:, :, None], grouped, -np.inf).reshape(tokens, experts).astype(np.float32)
