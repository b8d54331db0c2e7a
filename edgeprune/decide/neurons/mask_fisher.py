"""Fisher information of a mask over neurons, from one backward pass."""

from __future__ import annotations

from edgeprune.decide.neurons.layer import Doubles, NeuronEvidence


def score(evidence: NeuronEvidence) -> Doubles:
    """Sum over tokens of (a_k dL/da_k)^2, float64 [E, F]: HEAPr's (arXiv 2509.22299) with the correlation of
    activation and gradient."""
    return evidence.sums.total("mask_gradient_square")
