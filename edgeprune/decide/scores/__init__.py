"""Expert scores: one file per published method, each a pure function of the statistics.

A score is float64 [E] for one layer; larger means more worth keeping.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from edgeprune.decide.scores import frequency, random, reap
from edgeprune.measure.statistics import LayerStatistics

Score = Callable[[LayerStatistics, int], npt.NDArray[np.float64]]

SCORES: dict[str, Score] = {
    "reap": reap.score,
    "frequency": frequency.score,
    "random": random.score,
}
