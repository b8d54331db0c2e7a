"""Fisher information of a mask over experts, from one backward pass."""

from __future__ import annotations

from edgeprune.decide.evidence import Doubles, Evidence


def score(evidence: Evidence) -> Doubles:
    """Sum over tokens of (g f . dL/dy)^2, float64 [E]: the squared derivative of the loss by a factor on the expert's
    contribution g f to the layer's output y, whose second-order effect on the loss is half of it.

    The same by neuron is the accumulator ``mask_gradient_square``. Unlike HEAPr's it keeps the correlation of
    activation and gradient.
    """
    return evidence.sums.total("expert_gradient_square")
