"""CAMERA-P: energy of every neuron's contribution, summed to experts (arXiv 2508.02322)."""

from __future__ import annotations

from edgeprune.decide.evidence import Doubles, Evidence
from edgeprune.measure.statistics import LayerStatistics

_ALPHA = 0.9  # share of the maximum, as in the authors' released run


def score(evidence: Evidence) -> Doubles:
    """Sum over neurons k of ||w_k||^2 * (0.1 * sum_t phi^2 + 0.9 * max_t phi^2), float64 [E].

    phi = g * a is the neuron's activation times the router's coefficient, w_k its column of the down projection.
    """
    scored: Doubles = energies(evidence.sums, evidence.facts.down_square).sum(axis=1)
    return scored


def energies(sums: LayerStatistics, down_square: Doubles) -> Doubles:
    """The terms of that sum, float64 [E, F].

    Args:
        down_square: ||w_k||^2, float64 [E, F].
    """
    energy = (1 - _ALPHA) * sums.total("gated_hidden_square") + _ALPHA * sums.total("gated_hidden_max") ** 2
    found: Doubles = down_square * energy
    return found
