"""Re-fitting the down projections of a layer's experts in closed form, so that the layer answers as the original did.

With x the layer's input as the already built prefix of the model gives it, h_e = g_e * act(gate_e x) * (up_e x) the
hidden values of expert e times its coefficient, and y the original layer's routed output at the same token, the
matrices W_e minimise

    sum_t |y_t - sum_e W_e h_e,t|^2 + sum_e ridge * d_e * |W_e - W_e0|^2,

where the inner sum is over the experts that the token is routed to, W_e0 are the old matrices and d_e is the mean
diagonal of H_e' H_e, so that an expert that few tokens reach stays as it is. Solved by block Gauss-Seidel: one expert
at a time, in turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
# Tried in turn; what does best on tokens that were not fitted is taken.
RIDGES = (0.03, 0.1, 0.3, 1.0)
SWEEPS = 4
# To tell one ridge from another it takes fewer.
_SEARCH_SWEEPS = 2


@dataclass(frozen=True)
class Share:
    """What one expert sees of a layer's tokens.

    Attributes:
        tokens: which, ascending, int [n].
        hidden: its hidden values times the router's coefficients, float32 [n, F].
    """

    tokens: npt.NDArray[np.intp]
    hidden: Floats

    def of(self, wanted: npt.NDArray[np.bool_]) -> Share:
        """The part of it on the ``wanted`` tokens, bool [N]."""
        own = wanted[self.tokens]
        return Share(self.tokens[own], self.hidden[own])


def residual(weights: Sequence[Floats], shares: Sequence[Share], target: Floats) -> Floats:
    """``target`` [N, D] minus what experts with the down projections ``weights`` [D, F] answer, float32 [N, D]."""
    rest = target.copy()
    for matrix, share in zip(weights, shares, strict=True):
        rest[share.tokens] -= share.hidden @ matrix.T
    return rest


class _Problem:
    """The normal equations of one set of tokens."""

    def __init__(self, shares: Sequence[Share]) -> None:
        self.shares = shares
        self._grams = [_gram(share.hidden) for share in shares]

    def solve(self, start: Sequence[Floats], target: Floats, ridge: float, sweeps: int) -> list[Floats]:
        """Fitted down projections, float32 [D, F] each."""
        from scipy.linalg import cho_solve

        weights = [matrix.copy() for matrix in start]
        rest = residual(weights, self.shares, target)
        factors = [_factor(gram, ridge) for gram in self._grams]
        for _ in range(sweeps):
            for index, (share, factor) in enumerate(zip(self.shares, factors, strict=True)):
                if factor is None:
                    continue
                lower, pull = factor
                right = (share.hidden.T @ rest[share.tokens]).astype(np.float64)
                right -= pull * (weights[index] - start[index]).T
                step = cho_solve((lower, True), right, check_finite=False).T.astype(np.float32)
                weights[index] += step
                rest[share.tokens] -= share.hidden @ step.T
        return weights


def _gram(hidden: Floats) -> Doubles | None:
    """H' H, float64 [F, F], or None where the expert saw nothing that moved it."""
    gram = (hidden.T @ hidden).astype(np.float64)
    return gram if len(hidden) and np.trace(gram) > 0 else None


def _factor(gram: Doubles | None, ridge: float) -> tuple[Doubles, float] | None:
    """Cholesky factor of H' H + ridge * d I, and ridge * d."""
    from scipy.linalg import cholesky

    if gram is None:
        return None
    pull = ridge * float(np.trace(gram)) / len(gram)
    lower = cholesky(gram + pull * np.eye(len(gram)), lower=True, check_finite=False)
    return lower, pull


@dataclass(frozen=True)
class Healed:
    """The outcome of a fit.

    Attributes:
        weights: down projections, float32 [D, F] each; the old ones if no fit helped.
        ridge: of the fit, or None if none helped.
        before, after: squared error of the output on the tokens that were not fitted, relative to its energy.
    """

    weights: list[Floats]
    ridge: float | None
    before: float
    after: float


def refit(
    start: Sequence[Floats], shares: Sequence[Share], target: Floats, held_out: npt.NDArray[np.bool_]
) -> Healed:
    """Fit the down projections of a layer.

    Args:
        start: the old ones, float32 [D, F] by expert.
        shares: what each expert sees.
        target: routed output of the original layer, float32 [N, D].
        held_out: tokens that judge the fit, bool [N]; the fit that is returned has seen them too.
    """
    judged = [share.of(held_out) for share in shares]
    energy = float(np.square(target[held_out], dtype=np.float64).sum()) or 1.0

    def error(weights: Sequence[Floats]) -> float:
        rest = residual(weights, judged, target)[held_out]
        return float(np.square(rest, dtype=np.float64).sum()) / energy

    before = error(start)
    best: tuple[float, float | None] = (before, None)
    problem = _Problem([share.of(~held_out) for share in shares])
    for ridge in RIDGES:
        found = error(problem.solve(start, target, ridge, _SEARCH_SWEEPS))
        if found < best[0]:
            best = (found, ridge)
        elif best[1] is not None:  # the error is a valley in the ridge
            break
    after, chosen = best
    if chosen is None:
        return Healed(list(start), None, before, before)
    return Healed(_Problem(shares).solve(start, target, chosen, SWEEPS), chosen, before, after)
