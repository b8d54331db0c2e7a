"""EAN: expert activation norm, the sum of output norms."""

from __future__ import annotations

from edgeprune.decide.evidence import Doubles, Evidence


def score(evidence: Evidence) -> Doubles:
    """Sum over routed tokens of ||f_e(t)||, float64 [E]: S(b=0, alpha=0, beta=1) of arXiv 2606.15716."""
    return evidence.sums.total("norm_sum")
