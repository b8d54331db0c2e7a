"""CAMERA-P: energy of every neuron's contribution, summed to experts (arXiv 2508.02322)."""

from __future__ import annotations

from edgeprune.decide.evidence import Doubles, Evidence

_ALPHA = 0.9  # share of the maximum, as in the authors' released run


def score(evidence: Evidence) -> Doubles:
    """Sum over neurons k of ||w_k||^2 * (0.1 * sum_t phi^2 + 0.9 * max_t phi^2), float64 [E].

    phi = g * a is the neuron's activation times the router's coefficient, w_k its column of the down projection.
    """
    sums = evidence.sums
    energy = (1 - _ALPHA) * sums.total("gated_hidden_square") + _ALPHA * sums.total("gated_hidden_max") ** 2
    scored: Doubles = (evidence.facts.down_square * energy).sum(axis=1)
    return scored
