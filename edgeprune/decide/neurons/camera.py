"""CAMERA-P: the energy of a neuron's contribution (arXiv 2508.02322)."""

from __future__ import annotations

from edgeprune.decide.neurons.layer import Doubles, NeuronEvidence
from edgeprune.decide.scores.camera import energies


def score(evidence: NeuronEvidence) -> Doubles:
    """||w_k||^2 * (0.1 * sum_t phi^2 + 0.9 * max_t phi^2), float64 [E, F]; see ``scores.camera``.

    The authors rank the neurons of all experts of a layer together and only zero them; here every expert loses the
    same number, as the file needs it.
    """
    return energies(evidence.sums, evidence.down_square)
