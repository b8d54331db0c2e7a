"""MoNE: experts whose output hardly varies could be replaced by a constant (code of arXiv 2507.00390)."""

from __future__ import annotations

import numpy as np

from edgeprune.decide.evidence import Doubles, Evidence, ratio


def score(evidence: Evidence) -> Doubles:
    """||std of f_e over routed tokens|| * mean g_e, float64 [E] (the metric "fusion" of the released scripts).

    The variance is that of all routed tokens at once; the authors' running update leaves out each expert's first
    batch. g is what f is multiplied with: 1 where the router's coefficient went into the expert's input.
    """
    sums = evidence.sums
    routed = sums.total("routed")
    mean = ratio(sums.total("output_sum"), routed[:, None])
    variance = np.maximum(ratio(sums.total("output_square"), routed[:, None]) - mean**2, 0)
    spread: Doubles = np.sqrt(variance.sum(axis=1))
    return spread * ratio(sums.total("factor_sum"), routed)
