"""HEAPr: second-order cost of a neuron, from gradients (arXiv 2509.22299)."""

from __future__ import annotations

from edgeprune.decide.neurons.layer import Doubles, NeuronEvidence
from edgeprune.decide.scores.heapr import importances


def score(evidence: NeuronEvidence) -> Doubles:
    """n * E[a_k^2] * (w_k' G w_k), float64 [E, F]; see ``scores.heapr``."""
    return importances(evidence.sums)
