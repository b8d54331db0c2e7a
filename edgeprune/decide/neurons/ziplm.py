"""ZipLM: the neuron that is missed least when the others are re-fitted, one after the other (arXiv 2302.04089)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgeprune.decide.neurons.layer import Doubles, NeuronEvidence
from edgeprune.measure.replay import Expert

Floats = npt.NDArray[np.float32]
# Share of the mean diagonal that is added to it, as healing does (``measure.refit``).
_RIDGE = 0.03
_BLOCK = 64


def score(evidence: NeuronEvidence) -> Doubles:
    """The step of its removal, float64 [E, F]; see ``removals``."""
    activation, tokens = evidence.replayed

    def one(expert: int, own: Expert) -> Doubles:
        rows, slot = np.nonzero(tokens.ids == expert)
        hidden = tokens.gates[rows, slot][:, None] * own.hidden(tokens.x[rows], activation)
        return removals((hidden.T @ hidden).astype(np.float64), (own.down.T @ own.down).astype(np.float64))

    return np.stack(evidence.of_experts(one))


def removals(gram: Doubles, products: Doubles) -> Doubles:
    """The step in which every neuron is removed, float64 [F].

    With H' H the ``gram`` matrix of hidden values [F, F], W the down projection and P = (H' H + r I)^-1, taking out
    neuron k and re-fitting the other columns in closed form costs ||w_k||^2 / P_kk in squares of the output and moves
    W by -w_k v', v = row k of P over P_kk (Optimal Brain Surgeon, for whole columns). The cheapest goes, and the next
    one is chosen with what is left. Of W only ``products`` = W' W [F, F] matters.

    Both matrices change by a term of rank one or two in every step; only their diagonals and the row of k are needed
    at once, so that the terms are subtracted in blocks, as matrix products.
    """
    size, level = len(gram), float(np.trace(gram)) / len(gram)
    inverse, products = np.linalg.inv(gram + (_RIDGE * level or 1.0) * np.eye(size)), products.copy()
    free, energy = np.diag(inverse).copy(), np.diag(products).copy()
    steps, there = np.empty(size), np.ones(size, bool)
    for start in range(0, size, _BLOCK):
        count = min(_BLOCK, size - start)
        u, a, v = np.zeros((3, count, size))
        for turn in range(count):
            k = int(np.argmin(np.where(there, energy / np.where(there, free, 1), np.inf)))
            steps[k], there[k] = start + turn, False
            row = inverse[k] - u[:turn, k] @ u[:turn]
            others = products[k] - a[:turn, k] @ v[:turn] - v[:turn, k] @ a[:turn]
            u[turn], v[turn] = row / np.sqrt(row[k]), row / row[k]
            a[turn] = others - others[k] / 2 * v[turn]
            free, energy = free - u[turn] ** 2, energy - 2 * a[turn] * v[turn]
        inverse -= u.T @ u
        products -= a.T @ v + v.T @ a
    return steps
