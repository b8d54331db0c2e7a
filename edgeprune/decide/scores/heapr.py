"""HEAPr: second-order cost of every neuron, summed to experts (arXiv 2509.22299)."""

from __future__ import annotations

import numpy as np

from edgeprune.decide.evidence import Doubles, Evidence, ratio
from edgeprune.measure.statistics import LayerStatistics


def score(evidence: Evidence) -> Doubles:
    """Sum over neurons k of n * E[a_k^2] * (w_k' G w_k), float64 [E], with G = E[gamma gamma'] and gamma = dL/df.

    a is the input of the down projection, w_k its column k, f the expert's output before the coefficient; the means
    are over the n tokens routed to the expert. Since w_k' gamma = dL/da_k, the quadratic form is E[(dL/da_k)^2], and
    no matrix [D, D] is needed. The authors' code leaves n out, so that an expert's frequency has no say; the loss
    that they approximate is a sum over tokens.
    """
    scored: Doubles = importances(evidence.sums).sum(axis=1)
    return scored


def importances(sums: LayerStatistics) -> Doubles:
    """The terms of that sum, float64 [E, F]."""
    product = sums.total("hidden_square") * sums.total("hidden_gradient_square")
    return ratio(product, np.broadcast_to(sums.total("routed")[:, None], product.shape))
