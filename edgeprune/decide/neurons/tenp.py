"""TENP: how far a neuron reaches along its expert's output (arXiv 2606.09885)."""

from __future__ import annotations

from edgeprune.decide.neurons.layer import Doubles, NeuronEvidence
from edgeprune.measure.projections import neuron_projections


def score(evidence: NeuronEvidence) -> Doubles:
    """Mean over routed tokens of <a_k w_k, f> / ||f||, float64 [E, F], but for the factor 1 / n of each expert.

    The authors also let experts have different widths; with one for all, this is their ENP.
    """
    activation, tokens = evidence.replayed
    return neuron_projections(evidence.experts, activation, tokens)
