"""Random: the score that every other one has to beat."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgeprune.measure.statistics import LayerStatistics


def score(statistics: LayerStatistics, layer: int) -> npt.NDArray[np.float64]:
    """Uniform numbers float64 [E], the same at every call for the same layer."""
    return np.random.default_rng(layer).random((statistics.routed.shape[1],))
