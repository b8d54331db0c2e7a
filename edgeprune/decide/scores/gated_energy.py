"""Sum of squared gated norms, for calibration text of the domain of use (arXiv 2606.15716)."""

from __future__ import annotations

from edgeprune.decide.evidence import Doubles, Evidence


def score(evidence: Evidence) -> Doubles:
    """Sum over routed tokens of (g_e(t) * ||f_e(t)||)^2, float64 [E]: S(0, 2, 2)."""
    return evidence.sums.total("gated_square")
