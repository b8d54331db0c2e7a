"""What healing leaves of the errors of dropped experts and of coarser types."""

from __future__ import annotations

import math
from collections.abc import Mapping

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
# What healing leaves of the errors of coarser types inside the blocks. Re-fitted down projections answer for the
# errors that come before them in the expert, of which 0.39 to 0.45 were left at the output of a layer, whatever the
# type; not for their own rounding; and for a part of what attention before them did to the residual stream. That
# the three differ decides where bits go: with one share of 0.6 for all, KL divergence was higher by 7 % at 4.0 bits
# per weight, by 16 % at 3.2 and by 8 % at 2.6.
INNER_SHARE, DOWN_SHARE, OUTER_SHARE = 0.4, 1.0, 0.8
# Experts of fewer bits per weight on average are healed on more text, those of as many on less; see
# ``stages.healing``.
COARSE_BITS, FINE_BITS = 4.0, 5.0
# What of all this healing mends at more bits, where it has less text: files of 4.9 to 6.7 bits per weight came to
# 0.89 to 0.95 of what they are unhealed, and to 1.1 to 1.4 times what the shares above alone promised.
FINE_MENDED = 0.65
# What error feedback leaves of the error of a type whose blocks are shorter than the rows: 0.67 to 0.77.
FEEDBACK_SHARE = 0.75


def share_left(tensor: Tensor, name: str, width: int) -> float:
    """Share of the error of ``tensor`` as the type ``name``, in rows of ``width``, that healing leaves."""
    if tensor.layer < 0:
        return 1.0
    if not tensor.is_expert:
        return _less_mended(OUTER_SHARE, name)
    share = DOWN_SHARE if tensor.role == "expert_down" else INNER_SHARE
    return _less_mended(share, name) * (FEEDBACK_SHARE if ggml.BY_NAME[name].feeds_back(width) else 1.0)


def _less_mended(share: float, name: str) -> float:
    """Share of the errors of the type ``name`` that healing leaves, if it leaves ``share`` of a coarse one's."""
    bits = ggml.BY_NAME[name].bits_per_weight
    return 1 - (FINE_MENDED if bits >= COARSE_BITS else 1.0) * (1 - share)


def expert_bits(architecture: Architecture, types: Mapping[str, str]) -> float:
    """Bits per weight of the experts on average, with the GGML ``types`` that are not the source's."""
    experts = [tensor for tensor in architecture.tensors if tensor.is_expert]
    nbytes = (ggml.tensor_bytes(types.get(tensor.name, tensor.type), tensor.shape) for tensor in experts)
    return 8 * sum(nbytes) / sum(math.prod(tensor.shape) for tensor in experts)
