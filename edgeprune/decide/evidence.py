"""What a method may look at to judge the experts of one layer."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from edgeprune.errors import Unsupported
from edgeprune.measure.reservoir import Reservoir
from edgeprune.measure.statistics import LayerStatistics
from edgeprune.measure.weights import LayerWeights

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Evidence:
    """One layer.

    Attributes:
        layer: block index.
        sums: of the calibration pass.
        tokens: the reservoir, or None when no method asked for it or none was kept.
        weights: what the weights alone say, or None when no method asked for it.
        seed: of methods that draw at random.
    """

    layer: int
    sums: LayerStatistics
    tokens: Reservoir | None = None
    weights: LayerWeights | None = None
    seed: int = 0

    @property
    def experts(self) -> int:
        return self.sums.experts

    @property
    def reservoir(self) -> Reservoir:
        """The kept tokens.

        Raises:
            Unsupported: there are none.
        """
        if self.tokens is None or not len(self.tokens):
            raise Unsupported(
                f"layer {self.layer} has no reservoir of tokens, which this method needs",
                hint="choose a method that works on sums, such as --method reap",
            )
        return self.tokens

    @property
    def facts(self) -> LayerWeights:
        """What the weights alone say.

        Raises:
            Unsupported: they were not measured.
        """
        if self.weights is None:
            raise Unsupported(f"the weights of layer {self.layer} were not measured, which this method needs")
        return self.weights

    def of_domain(self, index: int) -> Evidence:
        """The same layer as one domain shows it."""
        tokens = self.tokens
        if tokens is not None:
            tokens = tokens.rows(np.flatnonzero(tokens.domain == index))
        return replace(self, sums=self.sums.of_domain(index), tokens=tokens)


def ratio(numerator: Doubles, denominator: Doubles) -> Doubles:
    """Element by element, 0 where the denominator is 0: experts that no token reached score nothing."""
    divided: Doubles = np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)
    return divided


def from_removals(removed: list[int], experts: int) -> Doubles:
    """A score float64 [E] that ranks experts by the order of their removal, those that stayed first."""
    score = np.full(experts, float(experts))
    for step, expert in enumerate(removed):
        score[expert] = step
    return score
