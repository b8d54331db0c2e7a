"""What a score of neurons may look at: one layer's sums, its experts, and its kept tokens."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from edgeprune.device.probe import cores
from edgeprune.errors import Unsupported
from edgeprune.measure.activation import Activation
from edgeprune.measure.replay import Expert, LayerExperts, activation_of
from edgeprune.measure.reservoir import Reservoir
from edgeprune.measure.statistics import LayerStatistics

Doubles = npt.NDArray[np.float64]
R = TypeVar("R")


@dataclass(frozen=True)
class NeuronEvidence:
    """One layer.

    Attributes:
        layer: block index.
        sums: of the calibration pass.
        experts: its weights, decoded one expert at a time.
        tokens: the reservoir, or None where none was kept.
    """

    layer: int
    sums: LayerStatistics
    experts: LayerExperts
    tokens: Reservoir | None = None

    def of_experts(self, compute: Callable[[int, Expert], R]) -> list[R]:
        """``compute`` of every expert's number and weights, in order."""

        def one(expert: int) -> R:
            found = compute(expert, self.experts[expert])
            self.experts.release(expert)
            return found

        with ThreadPoolExecutor(cores()) as pool:
            return list(pool.map(one, range(self.experts.count)))

    @cached_property
    def down_square(self) -> Doubles:
        """Squared Euclidean norm of every column of the down projections, float64 [E, F]."""
        return np.stack(self.of_experts(lambda _, own: np.square(own.down, dtype=np.float64).sum(axis=0)))

    @cached_property
    def replayed(self) -> tuple[Activation, Reservoir]:
        """The experts' activation, and tokens on which they show what they showed.

        Raises:
            Unsupported: no tokens were kept, or the experts do not reproduce their outputs.
        """
        hint = "choose a score that works on sums, such as --narrowing camera"
        if self.tokens is None or not len(self.tokens):
            raise Unsupported(f"no tokens of layer {self.layer} were kept, which this score needs", hint=hint)
        activation = activation_of(self.experts, self.tokens)
        if activation is None:
            raise Unsupported(f"the experts of layer {self.layer} do not reproduce the observed output", hint=hint)
        return activation, self.tokens
