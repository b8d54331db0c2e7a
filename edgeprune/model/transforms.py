"""The closed list of things a converter may do to a tensor between checkpoint and GGUF.

Each transform has a name, the shape it makes, and the pieces it yields. Shapes here are PyTorch's
(rows before columns, experts first); GGUF stores the same bytes with the order of extents reversed.
Pieces are yielded one after the other so that a stack of experts is never whole in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeprune.errors import BadFile

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Heads:
    """Attention heads of the model: query heads and key/value heads."""

    query: int
    key: int


@dataclass(frozen=True)
class Transform:
    """``shape`` maps the source's shape and the number of sources to the result's; ``apply`` yields
    consecutive pieces of the result from one source tensor."""

    shape: Callable[[Shape, int], Shape]
    apply: Callable[[torch.Tensor, Heads], Iterator[torch.Tensor]]


def _permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head reordered from (half, pair) to (pair, half).

    Hugging Face rotates row i with row i + d/2 of a head, llama.cpp's ``ROPE_TYPE_NORM`` row 2i with
    row 2i + 1. ``weight``: [heads * head_dim, D] or [heads * head_dim].
    """
    if weight.shape[0] % (2 * heads):
        raise BadFile(f"{weight.shape[0]} attention rows do not divide into {heads} heads")
    split = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return split.transpose(1, 2).reshape(weight.shape)


def _halved(shape: Shape, _: int) -> Shape:
    return (shape[0], shape[1] // 2, *shape[2:])


TRANSFORMS: dict[str, Transform] = {
    "keep": Transform(lambda shape, _: shape, lambda weight, _: iter((weight,))),
    # One 2-D matrix per expert becomes one 3-D tensor, experts in order.
    "stack_experts": Transform(lambda shape, count: (count, *shape), lambda weight, _: iter((weight,))),
    # [E, 2F, D] with the gate rows first: gate and up are separate tensors in GGUF.
    "gate_of_gate_up": Transform(_halved, lambda weight, _: (expert[: weight.shape[1] // 2] for expert in weight)),
    "up_of_gate_up": Transform(_halved, lambda weight, _: (expert[weight.shape[1] // 2 :] for expert in weight)),
    "permute_rope_query": Transform(
        lambda shape, _: shape, lambda weight, heads: iter((_permuted(weight, heads.query),))
    ),
    "permute_rope_key": Transform(
        lambda shape, _: shape, lambda weight, heads: iter((_permuted(weight, heads.key),))
    ),
}
