"""Frequency: how often the router chooses an expert (DeepSpeed-MoE, arXiv 2109.10465; many baselines)."""

from __future__ import annotations

from edgeprune.decide.evidence import Doubles, Evidence


def score(evidence: Evidence) -> Doubles:
    """n_e, the number of tokens routed to each expert, float64 [E]."""
    return evidence.sums.total("routed")
