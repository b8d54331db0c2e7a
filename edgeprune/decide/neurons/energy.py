"""The summed energy of a neuron's contributions: HEAPr's score (arXiv 2509.22299) with the identity for its matrix
of gradients, and CAMERA's (arXiv 2508.02322) without the maximum."""

from __future__ import annotations

from edgeprune.decide.neurons.layer import Doubles, NeuronEvidence


def score(evidence: NeuronEvidence) -> Doubles:
    """||w_k||^2 * sum_t (g a_k)^2, float64 [E, F], over the tokens routed to the expert: what its output loses in
    squares without neuron k, were neurons uncorrelated."""
    scored: Doubles = evidence.down_square * evidence.sums.total("gated_hidden_square")
    return scored
