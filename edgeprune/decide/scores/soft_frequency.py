"""Soft frequency: how much weight the router gives an expert (SEER-MoE, arXiv 2404.05089)."""

from __future__ import annotations

from edgeprune.decide.evidence import Doubles, Evidence


def score(evidence: Evidence) -> Doubles:
    """Sum over routed tokens of g_e(t), float64 [E]; g is the coefficient that really multiplies the output."""
    return evidence.sums.total("gate_sum")
