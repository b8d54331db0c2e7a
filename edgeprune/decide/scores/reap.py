"""REAP: router-weighted expert activation pruning (arXiv 2510.13999)."""

from __future__ import annotations

from edgeprune.decide.evidence import Doubles, Evidence, ratio


def score(evidence: Evidence) -> Doubles:
    """Mean over the tokens routed to expert e of g_e(t) * ||f_e(t)||, float64 [E].

    g is the coefficient that really multiplies the output, after renormalisation and scaling. An
    expert that no token was routed to scores 0.
    """
    return ratio(evidence.sums.total("gated_norm_sum"), evidence.sums.total("routed"))
