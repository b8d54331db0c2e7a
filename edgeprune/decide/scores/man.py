"""MAN: mean activation norm, for text that is not the domain of use (arXiv 2606.15716)."""

from __future__ import annotations

from edgeprune.decide.evidence import Doubles, Evidence, ratio


def score(evidence: Evidence) -> Doubles:
    """Mean over routed tokens of ||f_e(t)||, float64 [E]: S(1, 0, 1)."""
    return ratio(evidence.sums.total("norm_sum"), evidence.sums.total("routed"))
