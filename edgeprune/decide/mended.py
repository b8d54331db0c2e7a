"""What healing leaves of the errors of dropped experts and of coarser types."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from edgeprune.measure.refit import FITTED
from edgeprune.measure.shares import Mended, Sampled
from edgeprune.model import ggml
from edgeprune.model.architecture import Architecture, Tensor

# What healing leaves of the nats that dropping experts costs: 0.08 to 0.11 on a model of 41 M weights, whatever the
# number that is kept (tests/benchmarks/healing.py). Other models will differ, so neighbours are built and measured.
HEALED_SHARE = 0.15
# The same of narrowing them, on the same model: beside types of 3.6 bits per weight, which have errors of their own,
# 0.09 at seven eighths of the width and 0.17 at three quarters; 0.25 there where types stay
# (tests/benchmarks/narrowing.py). A trial of single layers does not tell these shares: it found a half of the errors
# left on this model where a tenth of the divergence was, and as much as the divergence on the demo.
NARROW_HEALED_SHARE = 0.17
# What is left of errors inside the experts is sampled (``measure.shares``), as a share of the squared error at the
# layer's output. What a fit, or feedback, could not take back costs more than an error at random of its size. On a
# model of 41 M weights, with an eighth of the text, half and all of it, 0.48, 0.39 and 0.37 of the error of gate and
# up was left, and 0.70, 0.57 and 0.50 of the divergence; on the demo, with an eighth, 0.51 and 0.69. Of the error of
# down projections in 32-blocks feedback left 0.48, and 0.78 of the divergence; on the demo 0.61 and 0.64.
LEFT_COST = 1.4
# What is mended of the errors of types of ``FINE_BITS`` or more, in what the trial of one layer promises: in a whole
# model they drown in what rounds activations and sends tokens to other experts, which no fit foresees. A file of 5.75
# bits per weight came to 0.93 to 1.05 of what it is unhealed.
FINE_MENDED = 0.35
# What is left of what errors of attention and other dense tensors of a block cost, which is healed in part by the
# experts behind them: with an eighth of the text 0.89 and 0.95 for two types on the model of 41 M weights, 0.62 on
# the demo, and with half of it 0.8 on the former.
OUTER_SHARE = 0.75
# What error feedback leaves of the cost of a type whose blocks are shorter than the rows, where none was tried.
FEEDBACK_SHARE = 0.75
# Share of the healing text that is used where all experts stay: the error of their types is smaller and more even
# than that of dropping some. The fewer bits, the more there is to win, and the slower is encoding anyway. A file of
# 4.5 bits per weight was 0.00094 nats away with half of the text, 0.00101 with a third and 0.00105 with a quarter;
# healing took 5.2, 4.1 and 2.9 times as long as encoding alone. Files of many bits are encoded in no time.
SHARE_OF_COARSE, SHARE_OF_WHOLE, SHARE_OF_FINE = 0.5, 0.25, 0.125
# Experts of fewer bits per weight on average are coarse, those of as many are fine.
COARSE_BITS, FINE_BITS = 4.0, 5.0


@dataclass(frozen=True)
class HealingText:
    """How much text there is to heal on.

    Attributes:
        asked: tokens that are used where experts are dropped.
        most: tokens that the disk is to hold.
    """

    asked: int
    most: int

    def wanted(self, bits: float, *, fewer: bool) -> int:
        """Tokens that a plan is to be healed on whose experts have so many ``bits`` per weight on average.

        Args:
            fewer: whether it has fewer experts than the source, or narrower ones.
        """
        if fewer:
            return self.asked
        share = SHARE_OF_COARSE if bits < COARSE_BITS else SHARE_OF_WHOLE if bits < FINE_BITS else SHARE_OF_FINE
        return int(share * self.asked)

    def tokens(self, bits: float, *, fewer: bool) -> int:
        """As many of those as the disk is to hold."""
        return min(self.wanted(bits, fewer=fewer), self.most)


@dataclass(frozen=True)
class Mending:
    """What healing leaves of the errors of types, with so many experts of a width.

    Attributes:
        sampled: what a trial found.
        text: that healing uses.
        share: of the experts' channels that are kept, of fewer experts or of narrower ones: there are as many more
            tokens for each.
    """

    sampled: Sampled
    text: HealingText
    share: float = 1.0

    def left(self, tensor: Tensor, name: str, width: int) -> float:
        """Share of the cost of ``tensor`` as the type ``name``, in rows of ``width``, that healing leaves."""
        if tensor.layer < 0:
            return 1.0
        kind = ggml.BY_NAME[name]
        # The other experts' types are not known yet; they will be much like this one.
        tokens = FITTED * self.text.tokens(kind.bits_per_weight, fewer=self.share < 1)
        if not tensor.is_expert:
            return OUTER_SHARE
        found = self.sampled.of(tensor.layer, kind.block)
        if found is None:
            return 1.0
        fine = FINE_MENDED if kind.bits_per_weight >= FINE_BITS else 1.0
        return 1 - fine * (1 - self._alone(found, tensor, kind, tokens, width))

    def _alone(self, found: Mended, tensor: Tensor, kind: ggml.GgmlType, tokens: float, width: int) -> float:
        """The share of ``tensor`` if nothing else were wrong."""
        if tensor.role != "expert_down":
            return min(1.0, LEFT_COST * found.inner(tokens / self.share))
        if not kind.feeds_back(width):
            return 1.0
        return min(1.0, LEFT_COST * found.down) if self.sampled.tried(kind.block) else FEEDBACK_SHARE


def expert_bits(architecture: Architecture, types: Mapping[str, str]) -> float:
    """Bits per weight of the experts on average, with the GGML ``types`` that are not the source's."""
    experts = [tensor for tensor in architecture.tensors if tensor.is_expert]
    nbytes = (ggml.tensor_bytes(types.get(tensor.name, tensor.type), tensor.shape) for tensor in experts)
    return 8 * sum(nbytes) / sum(math.prod(tensor.shape) for tensor in experts)
