"""EASY-EP: gated norms, weighted by how far the experts turn the residual stream (arXiv 2504.06792)."""

from __future__ import annotations

from edgeprune.decide.evidence import Doubles, Evidence


def score(evidence: Evidence) -> Doubles:
    """Sum over routed tokens of g ||f|| max(1 - cos(h, h + y), 0), float64 [E].

    h is the residual stream before the block and y the routed experts' combined output; shared experts are left
    out, as in the authors' released setting.
    """
    return evidence.sums.total("turn_sum")
