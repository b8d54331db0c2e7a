"""What healing leaves of the errors of dropped experts and of coarser types."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from edgeprune.measure.refit import FITTED
from edgeprune.measure.shares import Mended, Sampled
from edgeprune.model import ggml
from edgeprune.model.architecture import Architecture, Tensor

# What healing leaves of the nats that dropping experts costs. On a model of 41 M weights, with half of the text,
# beside types of 2 bits, which is about where dropping is worth it, 0.17 at 24 of 32 experts and 0.25 at 16. With
# all of the text and types as they were it is 0.08 to 0.11 (tests/benchmarks/healing.py), so dropping beside fine
# types is foretold twice as bad as it is; it is far from worth it there. Other models will differ: neighbours
# that are predicted within twice the best are built and measured.
HEALED_SHARE = 0.2
# The same of narrowing them, on the same model. With all of the text, beside types of 3.6 bits per weight, which have
# errors of their own, 0.09 at seven eighths of the width and 0.17 at three quarters; where types stay, 0.25 and, at a
# half, 0.21 (tests/benchmarks/narrowing.py). With half of the text, whole files came to 1.1 times of what they are
# with all of it. A trial of single layers does not tell these shares: it found a half of the errors left on this
# model where a tenth of the divergence was, and as much as the divergence on the demo.
NARROW_HEALED_SHARE = 0.22
# What is left of errors inside the experts is sampled (``measure.shares``), as a share of the squared error at the
# layer's output. What a fit, or feedback, could not take back costs more than an error at random of its size. On a
# model of 41 M weights, with an eighth of the text, half and all of it, 0.48, 0.39 and 0.37 of the error of gate and
# up was left, and of the divergence as much as errors of 1.2, 1.1 and 1.0 times that cost; on the demo, with an
# eighth, of 1.1 times; of down projections in 32-blocks 1.4 and 1.0. Whole files, in which errors meet that healing
# does not see, come to what 1.4 says: above 2.5 bits per weight 0.82 to 1.04 of their divergence was predicted.
LEFT_COST = 1.4
# What is mended of the errors of types of ``FINE_BITS`` or more, in what the trial of one layer promises: in a whole
# model they drown in what rounds activations and sends tokens to other experts, which no fit foresees.
FINE_MENDED = 0.35
# What is left of errors of attention and other dense tensors of a block, which is healed in part by the experts
# behind them: of the divergence that two types cost, with an eighth of the text, 0.89 and 0.95 on the model of 41 M
# weights and 0.62 on the demo, and with half of it 0.8 on the former; of the error a little less.
OUTER_SHARE = 0.75
# What error feedback leaves of the error of a type whose blocks are shorter than the rows, where none was tried.
FEEDBACK_SHARE = 0.75
# Share of the healing text that is used where experts are narrower, in coarse types, in others, and in fine ones;
# where some are dropped all is, unless types are coarse. It is a trade: where types change, the extra time of
# healing is to stay within four times that of encoding. A file of 4.5 bits per weight was 0.00094 nats away with
# half of the text, 0.00101 with a third and 0.00105 with a quarter; healing took 5.2, 4.1 and 2.9 times as long
# as encoding alone. Files of many bits are encoded in no time. Narrower experts beside types of 3.6 bits were
# 0.00237 nats away with all of the text, 0.00267 with half and 0.00320 with a quarter. 24 of 32 experts in 2 bits
# were 0.0478 away with all and 0.0574 with half; healing took 4.9 and 2.8 times as long as encoding.
SHARE_OF_NARROWER, SHARE_OF_COARSE, SHARE_OF_WHOLE, SHARE_OF_FINE = 0.5, 0.5, 0.25, 0.125
# Experts of fewer bits per weight on average are coarse, those of as many are fine.
COARSE_BITS, FINE_BITS = 4.0, 5.0


@dataclass(frozen=True)
class HealingText:
    """How much text there is to heal on.

    Attributes:
        asked: tokens that are used where experts are dropped and what is left is not coarse.
        most: tokens that the disk is to hold.
    """

    asked: int
    most: int

    def wanted(self, bits: float, *, fewer: bool, narrower: bool) -> int:
        """Tokens that a plan is to be healed on whose experts have so many ``bits`` per weight on average.

        Args:
            fewer: whether it has fewer experts than the source.
            narrower: whether it has narrower ones.
        """
        share = SHARE_OF_WHOLE if bits < FINE_BITS else SHARE_OF_FINE
        if bits < COARSE_BITS:
            share = SHARE_OF_COARSE
        elif fewer:
            share = 1.0
        elif narrower:
            share = SHARE_OF_NARROWER
        return int(share * self.asked)

    def tokens(self, bits: float, *, fewer: bool, narrower: bool) -> int:
        """As many of those as the disk is to hold."""
        return min(self.wanted(bits, fewer=fewer, narrower=narrower), self.most)


@dataclass(frozen=True)
class Mending:
    """What healing leaves of the errors of types, with so many experts of a width.

    Attributes:
        sampled: what a trial found.
        text: that healing uses.
        kept: share of the experts that are kept: there are as many more tokens for each.
        channels: share of their channels that are kept: as much less is fitted with the tokens.
    """

    sampled: Sampled
    text: HealingText
    kept: float = 1.0
    channels: float = 1.0

    def left(self, tensor: Tensor, name: str, width: int) -> float:
        """Share of the error of ``tensor`` as the type ``name``, in rows of ``width``, that healing leaves."""
        if tensor.layer < 0:
            return 1.0
        kind = ggml.BY_NAME[name]
        # The other experts' types are not known yet; they will be much like this one.
        tokens = FITTED * self.text.tokens(kind.bits_per_weight, fewer=self.kept < 1, narrower=self.channels < 1)
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
            return min(1.0, LEFT_COST * found.inner(tokens / (self.kept * self.channels)))
        if not kind.feeds_back(width):
            return 1.0
        return min(1.0, LEFT_COST * found.down) if self.sampled.tried(kind.block) else FEEDBACK_SHARE


def expert_bits(architecture: Architecture, types: Mapping[str, str]) -> float:
    """Bits per weight of the experts on average, with the GGML ``types`` that are not the source's."""
    experts = [tensor for tensor in architecture.tensors if tensor.is_expert]
    nbytes = (ggml.tensor_bytes(types.get(tensor.name, tensor.type), tensor.shape) for tensor in experts)
    return 8 * sum(nbytes) / sum(math.prod(tensor.shape) for tensor in experts)
