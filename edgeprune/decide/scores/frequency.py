"""Frequency: how often the router chooses an expert (the pruning of DeepSpeed-MoE and others)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgeprune.measure.statistics import LayerStatistics


def score(statistics: LayerStatistics, layer: int) -> npt.NDArray[np.float64]:
    """Number of tokens routed to each expert, float64 [E]."""
    return statistics.total("routed")
