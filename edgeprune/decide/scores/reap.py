"""REAP: router-weighted expert activation pruning (arXiv 2510.13999)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgeprune.measure.statistics import LayerStatistics


def score(statistics: LayerStatistics, layer: int) -> npt.NDArray[np.float64]:
    """Mean over the tokens routed to expert e of g_e(t) * ||f_e(t)||, float64 [E].

    g is the coefficient that really multiplies the output, after renormalisation and scaling. An
    expert that no token was routed to scores 0.
    """
    routed = statistics.total("routed")
    return np.divide(statistics.total("gated_norm_sum"), routed, out=np.zeros_like(routed), where=routed > 0)
