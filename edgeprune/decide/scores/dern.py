"""DERN: which experts are kept before the neurons of the others are rehomed (arXiv 2509.10377)."""

from __future__ import annotations

from edgeprune.decide.evidence import Doubles, Evidence, ratio


def score(evidence: Evidence) -> Doubles:
    """(1/T) sum over routed tokens of the router weight, renormalised over the chosen experts, float64 [E]."""
    return ratio(evidence.sums.total("share_sum"), evidence.sums.total("tokens"))
