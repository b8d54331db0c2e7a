"""UNCURL: clusters of experts that the router scores alike (arXiv 2409.01483)."""

from __future__ import annotations

import numpy as np

from edgeprune.decide.evidence import Doubles, Evidence, from_removals, ratio
from edgeprune.decide.grouping import removals


def score(evidence: Evidence) -> Doubles:
    """Order of removal, float64 [E]: average-link clusters under 1 - correlation of the router's logits over all
    tokens; of two merging clusters the more frequent representative stays.

    The paper clusters spectrally with a number of neighbours that it does not state.
    """
    sums = evidence.sums
    tokens, total = sums.total("tokens"), sums.total("logit_sum")
    covariance = sums.total("logit_gram") - np.outer(total, total) / max(float(tokens), 1.0)
    scale = np.sqrt(np.maximum(np.diag(covariance), 0))
    distance = 1 - ratio(covariance, np.outer(scale, scale))
    routed = sums.total("routed")
    order = removals(distance, lambda _, a, b: max(a, b, key=lambda e: (routed[e], -e)), linkage="average")
    return from_removals(order, evidence.experts)
