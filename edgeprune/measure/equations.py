"""The normal equations of one expert's down projection: over its channels, or over its tokens where these are fewer.

With H the expert's hidden values on n tokens, F channels each, and R what the layer's output lacks there, the change
V of the transposed matrix that minimises |R - H V|^2 + p |V|^2 is

    V = (H'H + p I)^-1 H'R = H' (HH' + p I)^-1 R.

The first form is of F unknowns a column, the second, V = H'C, of n. In a model of many or wide experts every one of
them sees few tokens: with the second form neither memory nor time grows with the experts' width beyond that.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Flags = npt.NDArray[np.bool_]
Ids = npt.NDArray[np.intp]


class Equations:
    """One expert's side of a layer's fit.

    Attributes:
        tokens: positions of its tokens, int [n + m], the n that are fitted before the m that judge.
    """

    def __init__(self, tokens: Ids, hidden: Floats, judged: Flags) -> None:
        """
        Args:
            tokens: each once, int [n + m].
            hidden: hidden values times the router's coefficients, float32 [n + m, F].
            judged: which of the layer's tokens judge, bool [N].
        """
        order = np.argsort(judged[tokens], kind="stable")
        self.tokens, self._hidden = tokens[order], hidden[order]
        self._fitted = int(len(tokens) - judged[tokens].sum())
        self._few = len(tokens) < hidden.shape[1]
        inputs = self._hidden[: self._fitted]
        self._kernel = self._hidden @ self._hidden.T if self._few else None  # [n + m, n + m]
        self._gram = None if self._few else inputs.T @ inputs  # [F, F]

    def fit_all(self) -> None:
        """The tokens that judged are fitted, too, from now on."""
        if self._gram is not None:
            judges = self._hidden[self._fitted :]
            self._gram = self._gram + judges.T @ judges
        self._fitted = len(self.tokens)

    @property
    def unknowns(self) -> int:
        """Rows of what is solved for: C, or V."""
        return self._fitted if self._few else self._hidden.shape[1]

    def change(self, solution: Floats) -> Floats:
        """V transposed, float32 [D, F], of a ``solution`` [unknowns, D]."""
        return (self._hidden[: self._fitted].T @ solution if self._few else solution).T

    def solver(self, ridge: float) -> tuple[Floats, float] | None:
        """The inverse, float32 [unknowns, unknowns], for p = ``ridge`` times the mean diagonal of H'H, and p; None
        where the expert saw nothing that moved it, or what overflowed."""
        matrix = self._normal
        trace = float(np.trace(matrix, dtype=np.float64))
        if not 0 < trace < math.inf:
            return None
        pull = ridge * trace / self._hidden.shape[1]
        return _inverse(matrix, pull), pull

    @property
    def _normal(self) -> Floats:
        """HH' or H'H."""
        if self._gram is not None:
            return self._gram
        assert self._kernel is not None
        return self._kernel[: self._fitted, : self._fitted]

    def step(self, rest: Floats, solution: Floats, inverse: Floats, pull: float) -> None:
        """Solve for this expert while the others stay as they are.

        Args:
            rest: what the layer's output lacks, float32 [N, columns]; it lacks less afterwards.
            solution: float32 [unknowns, columns], changed.
        """
        inputs, own = self._hidden[: self._fitted], self.tokens[: self._fitted]
        right = rest[own] if self._few else inputs.T @ rest[own]
        right -= np.float32(pull) * solution
        step = inverse @ right
        solution += step
        answers = self._hidden if self._kernel is None else self._kernel[:, : self._fitted]
        rest[self.tokens] -= answers @ step


def _inverse(matrix: Floats, pull: float) -> Floats:
    """(matrix + pull * I)^-1.

    Computed in double precision. Its condition is at most 1 + F / ridge, so single precision changes a step by a
    thousandth at most, which the next one makes good; solving with the factor instead takes five times as long.
    """
    from scipy.linalg import cholesky
    from scipy.linalg.lapack import dpotri

    raised = matrix.astype(np.float64)
    raised.flat[:: len(raised) + 1] += pull
    lower = cholesky(raised, lower=True, overwrite_a=True, check_finite=False)
    half, _ = dpotri(lower, lower=1, overwrite_c=1)  # above the diagonal the zeros of the factor stay
    whole = half + half.T
    whole.flat[:: len(whole) + 1] /= 2
    inverse: Floats = whole.astype(np.float32)
    return inverse
