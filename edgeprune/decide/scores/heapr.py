"""HEAPr: second-order cost of every neuron, summed to experts (arXiv 2509.22299)."""

from __future__ import annotations

from edgeprune.decide.evidence import Doubles, Evidence, ratio


def score(evidence: Evidence) -> Doubles:
    """Sum over neurons k of n * E[a_k^2] * (w_k' G w_k), float64 [E], with G = E[gamma gamma'] and gamma = dL/df.

    a is the input of the down projection, w_k its column k, f the expert's output before the coefficient; the means
    are over the n tokens routed to the expert. Since w_k' gamma = dL/da_k, the quadratic form is E[(dL/da_k)^2], and
    no matrix [D, D] is needed. The authors' code leaves n out, so that an expert's frequency has no say; the loss
    that they approximate is a sum over tokens.
    """
    sums = evidence.sums
    neurons = (sums.total("hidden_square") * sums.total("hidden_gradient_square")).sum(axis=1)
    return ratio(neurons, sums.total("routed"))
