"""TENP: gated norms, weighted by how far an expert turns its own input (arXiv 2606.09885)."""

from __future__ import annotations

import numpy as np

from edgeprune.decide.evidence import Doubles, Evidence, ratio


def score(evidence: Evidence) -> Doubles:
    """Sum over routed tokens of g ||f|| (1 - cos(x, f)), float64 [E]: by domain, scaled to Euclidean length one over
    the experts, then added, so that a domain counts the same whatever its length.

    The paper goes on to shrink experts by a score of their neurons; this is its score of whole experts.
    """
    by_domain = evidence.sums["angle_sum"]
    length = np.sqrt(np.square(by_domain).sum(axis=1, keepdims=True))
    summed: Doubles = ratio(by_domain, np.broadcast_to(length, by_domain.shape)).sum(axis=0)
    return summed
