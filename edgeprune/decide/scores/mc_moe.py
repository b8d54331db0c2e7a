"""MC-MoE: significance of an expert in the bit allocation of PMQ (arXiv 2410.06270)."""

from __future__ import annotations

from edgeprune.decide.evidence import Doubles, Evidence, ratio

_ALPHA, _BETA = 1.0, 1.5  # defaults of the authors' command line


def score(evidence: Evidence) -> Doubles:
    """phi_e^1 * w_e^1.5, float64 [E].

    phi is the share of routed pairs of token and expert, w the share of the router's probability over chosen
    experts before renormalisation. Their third factor, the error of quantising the expert, plays no part in
    dropping it.
    """
    routed, weight = evidence.sums.total("routed"), evidence.sums.total("prob_sum")
    significance: Doubles = ratio(routed, routed.sum()) ** _ALPHA * ratio(weight, weight.sum()) ** _BETA
    return significance
