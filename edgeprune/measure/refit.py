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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from edgeprune.device.probe import cores

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
# Tried in turn; what does best on tokens that were not fitted is taken. From strong to weak, because a strong pull to
# the old weights keeps experts that share tokens from answering for each other: one sweep there goes as far as two.
RIDGES = (3.0, 1.0, 0.3, 0.1, 0.03)


@dataclass(frozen=True)
class Share:
    """What one expert sees of a layer's tokens.

    Attributes:
        tokens: which, each once, int [n].
        hidden: its hidden values times the router's coefficients, float32 [n, F].
    """

    tokens: npt.NDArray[np.intp]
    hidden: Floats

    def of(self, wanted: npt.NDArray[np.bool_]) -> Share:
        """The part of it on the ``wanted`` tokens, bool [N]."""
        own = wanted[self.tokens]
        return Share(self.tokens[own], self.hidden[own])

    def joined(self, other: Share) -> Share:
        """Both parts; the tokens are no longer ascending."""
        return Share(np.concatenate([self.tokens, other.tokens]), np.concatenate([self.hidden, other.hidden]))


def residual(weights: Sequence[Floats], shares: Sequence[Share], target: Floats) -> Floats:
    """``target`` [N, D] minus what experts with the down projections ``weights`` [D, F] answer, float32 [N, D]."""
    rest = target.copy()
    for matrix, share in zip(weights, shares, strict=True):
        rest[share.tokens] -= share.hidden @ matrix.T
    return rest


class _Problem:
    """The normal equations of one set of tokens, and the fit as far as it has gone.

    A fit with another ridge, or with more tokens, goes on where the last one ended: it has little left to do. Rows
    of the matrices know nothing of each other, so every thread has some of them for itself.
    """

    def __init__(
        self, start: Sequence[Floats], shares: Sequence[Share], target: Floats, pool: ThreadPoolExecutor
    ) -> None:
        self.start, self.shares, self._pool = start, shares, pool
        self.weights = [matrix.copy() for matrix in start]
        self._grams = list(pool.map(lambda share: _gram(share.hidden), shares))
        bounds = np.linspace(0, target.shape[1], cores() + 1).astype(int).tolist()
        self._rows = [slice(a, b) for a, b in pairwise(bounds) if b > a]
        self._look(target)

    def _look(self, target: Floats) -> None:
        """Residuals [N, rows] of today's matrices, for each run of rows."""

        self._rests = list(self._pool.map(lambda rows: self._residual(rows, self.shares, target), self._rows))

    def _residual(self, rows: slice, shares: Sequence[Share], target: Floats) -> Floats:
        return residual([matrix[rows] for matrix in self.weights], shares, target[:, rows])

    def error(self, shares: Sequence[Share], target: Floats) -> float:
        """Squared error of today's matrices on other tokens."""

        def own(rows: slice) -> float:
            return float(np.square(self._residual(rows, shares, target), dtype=np.float64).sum())

        return sum(self._pool.map(own, self._rows))

    def more(self, shares: Sequence[Share], target: Floats) -> None:
        """Add tokens that were not there before; ``target`` [N, D] is of all tokens."""
        added = self._pool.map(lambda share: _gram(share.hidden), shares)
        self._grams = [_sum(*pair) for pair in zip(self._grams, added, strict=True)]
        self.shares = [share.joined(more) for share, more in zip(self.shares, shares, strict=True)]
        self._look(target)

    def sweep(self, ridge: float) -> None:
        """Go once over all experts."""
        inverses = list(self._pool.map(lambda gram: _inverse(gram, ridge), self._grams))
        pairs = zip(self._rows, self._rests, strict=True)
        jobs = (partial(self._sweep, rows, rest, inverses) for rows, rest in pairs)
        for job in [self._pool.submit(job) for job in jobs]:
            job.result()

    def _sweep(self, rows: slice, rest: Floats, inverses: Sequence[tuple[Floats, float] | None]) -> None:
        for share, inverse, start, weights in zip(self.shares, inverses, self.start, self.weights, strict=True):
            if inverse is None:
                continue
            inverted, pull = inverse
            right = share.hidden.T @ rest[share.tokens]
            right -= np.float32(pull) * (weights[rows] - start[rows]).T
            step = (inverted @ right).T
            weights[rows] += step
            rest[share.tokens] -= share.hidden @ step.T


def _gram(hidden: Floats) -> Doubles | None:
    """H' H, float64 [F, F], or None where the expert saw nothing that moved it."""
    gram = (hidden.T @ hidden).astype(np.float64)
    return gram if len(hidden) and np.trace(gram) > 0 else None


def _sum(first: Doubles | None, second: Doubles | None) -> Doubles | None:
    if first is None or second is None:
        return second if first is None else first
    return first + second


def _inverse(gram: Doubles | None, ridge: float) -> tuple[Floats, float] | None:
    """(H' H + ridge * d I)^-1, and ridge * d.

    Computed in double precision. Its condition is at most 1 + F / ridge, so single precision changes a step by a
    thousandth at most, which the next one makes good; solving with the factor instead takes five times as long.
    """
    from scipy.linalg import cholesky
    from scipy.linalg.lapack import dpotri

    if gram is None:
        return None
    pull = ridge * float(np.trace(gram)) / len(gram)
    lower = cholesky(gram + pull * np.eye(len(gram)), lower=True, check_finite=False)
    half, _ = dpotri(lower, lower=1, overwrite_c=1)  # above the diagonal the zeros of the factor stay
    whole = half + half.T
    whole.flat[:: len(whole) + 1] /= 2
    return whole.astype(np.float32), pull


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
    with ThreadPoolExecutor(cores()) as pool:
        return _refit(start, shares, target, held_out, pool)


def _refit(
    start: Sequence[Floats],
    shares: Sequence[Share],
    target: Floats,
    held_out: npt.NDArray[np.bool_],
    pool: ThreadPoolExecutor,
) -> Healed:
    judges, places = target[held_out], np.cumsum(held_out) - 1
    judged = [share.of(held_out) for share in shares]
    moved = [Share(places[share.tokens], share.hidden) for share in judged]
    energy = float(np.square(judges, dtype=np.float64).sum()) or 1.0
    problem = _Problem(start, [share.of(~held_out) for share in shares], target, pool)
    before = after = problem.error(moved, judges) / energy
    chosen, fitted = None, list(start)
    for ridge in RIDGES:
        problem.sweep(ridge)
        found = problem.error(moved, judges) / energy
        if found >= after:  # the error is a valley in the ridge
            break
        after, chosen, fitted = found, ridge, [matrix.copy() for matrix in problem.weights]
    if chosen is None:
        return Healed(fitted, None, before, before)
    problem.weights = fitted
    problem.more(judged, target)
    problem.sweep(chosen)
    return Healed(problem.weights, chosen, before, after)
