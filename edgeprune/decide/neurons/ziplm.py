"""ZipLM: the neuron that is missed least when the others are re-fitted, one after the other (arXiv 2302.04089)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgeprune.decide.neurons.layer import Doubles, NeuronEvidence
from edgeprune.measure.replay import Expert

Floats = npt.NDArray[np.float32]
# Share of the mean diagonal that is added to it, as healing does (``measure.refit``).
_RIDGE = 0.03


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

    With H' H the ``gram`` matrix of hidden values [F, F] and W the down projection, taking out neuron k and
    re-fitting the other columns in closed form costs ||w_k||^2 / ((H' H + r I)^-1)_kk in squares of the output (Optimal
    Brain Surgeon, for whole columns), and moves W by -w_k v', v = row k of the inverse over its diagonal. The cheapest
    goes, and the next is chosen with what is left. Of W only ``products`` = W' W [F, F] matters.
    """
    size = len(gram)
    level = float(np.trace(gram)) / size
    inverse = np.linalg.inv(gram + (_RIDGE * level or 1.0) * np.eye(size))
    products, there = products.copy(), np.arange(size)
    steps = np.empty(size)
    for step in range(size):
        k = int(np.argmin(np.diag(products) / np.diag(inverse)))
        steps[there[k]] = step
        v, w = inverse[k] / inverse[k, k], products[k]
        rest = np.arange(len(there)) != k
        products = (products - np.outer(w, v) - np.outer(v, w) + w[k] * np.outer(v, v))[np.ix_(rest, rest)]
        inverse = (inverse - np.outer(v, inverse[k]))[np.ix_(rest, rest)]
        there = there[rest]
    return steps
