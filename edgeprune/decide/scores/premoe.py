"""PreMoe: task-conditioned expected selection score, TCESS (arXiv 2505.17639)."""

from __future__ import annotations

from edgeprune.decide.evidence import Doubles, Evidence, ratio


def score(evidence: Evidence) -> Doubles:
    """(1/T) sum over tokens of z_e(t) where expert e has the token's largest logit, float64 [E].

    z are the raw router logits; only the first choice counts (K_a = 1) and no confidence filter is set, as in the
    authors' code. An expert that was never the first choice scores 0, which is above one whose winning logits are
    negative.
    """
    sums = evidence.sums
    return ratio(sums.total("top_logit_sum"), sums.total("tokens"))
