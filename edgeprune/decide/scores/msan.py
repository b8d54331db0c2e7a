"""MSAN: mean squared activation norm (arXiv 2606.15716)."""

from __future__ import annotations

from edgeprune.decide.evidence import Doubles, Evidence, ratio


def score(evidence: Evidence) -> Doubles:
    """Mean over routed tokens of ||f_e(t)||^2, float64 [E]: S(1, 0, 2)."""
    return ratio(evidence.sums.total("norm_square"), evidence.sums.total("routed"))
