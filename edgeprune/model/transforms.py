"""The closed list of things a converter may do to a tensor between checkpoint and GGUF.

Each transform has a name, the shape it makes, and the pieces it yields. Shapes here are PyTorch's
(rows before columns, experts first); GGUF stores the same bytes with the order of extents reversed.
Pieces are yielded one after the other so that a stack of experts is never whole in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from edgeprune.errors import BadFile
from edgeprune.model import recurrent

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Sizes:
    """Numbers of the model that shapes do not show.

    Attributes:
        query, key: attention heads: query heads and key/value heads.
        named: others, by the names that the converter gives them in ``[sizes]``.
    """

    query: int = 1
    key: int = 1
    named: Mapping[str, int] = field(default_factory=dict)

    def __getitem__(self, name: str) -> int:
        if name not in self.named:
            raise BadFile(
                f"the converter names no size '{name}', which its transforms need",
                hint="name it under [sizes] (README: Add a family)",
            )
        return self.named[name]


@dataclass(frozen=True)
class Transform:
    """One entry of the list.

    Attributes:
        shape: from the shapes of all sources to that of the result.
        apply: yields consecutive pieces of the result from one source tensor.
        one_by_one: the matrices of a stack may be given one after the other, each as a stack of one.
        moves_rows: only whole rows move, so that it may be done to rows of packed blocks.
    """

    shape: Callable[[tuple[Shape, ...], Sizes], Shape]
    apply: Callable[[torch.Tensor, Sizes], Iterator[torch.Tensor]]
    one_by_one: bool = False
    moves_rows: bool = False


def _same(shapes: tuple[Shape, ...], _: Sizes) -> Shape:
    return shapes[0]


def _stacked(shapes: tuple[Shape, ...], _: Sizes) -> Shape:
    return (len(shapes), *shapes[0])


def _halved(shapes: tuple[Shape, ...], _: Sizes) -> Shape:
    """Half of the rows of every matrix of a stack."""
    return (shapes[0][0], shapes[0][1] // 2, *shapes[0][2:])


def _turned(shapes: tuple[Shape, ...], _: Sizes) -> Shape:
    """Rows for columns in every matrix of a stack."""
    experts, rows, columns = shapes[0]
    return (experts, columns, rows)


def _half_turned(shapes: tuple[Shape, ...], _: Sizes) -> Shape:
    experts, rows, columns = shapes[0]
    return (experts, columns // 2, rows)


def _flat(shapes: tuple[Shape, ...], _: Sizes) -> Shape:
    return (math.prod(shapes[0]),)


def _whole(weight: torch.Tensor, _: Sizes) -> Iterator[torch.Tensor]:
    yield weight


def _each(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor, Sizes], Iterator[torch.Tensor]]:
    """``change`` for every matrix of a stack."""
    return lambda weight, _: (change(expert) for expert in weight)


def _permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head reordered from (half, pair) to (pair, half).

    Hugging Face rotates row i with row i + d/2 of a head, llama.cpp's ``ROPE_TYPE_NORM`` row 2i with
    row 2i + 1. ``weight``: [heads * head_dim, D] or [heads * head_dim].
    """
    if weight.shape[0] % (2 * heads):
        raise BadFile(f"{weight.shape[0]} attention rows do not divide into {heads} heads")
    split = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return split.transpose(1, 2).reshape(weight.shape)


def _latent(weight: torch.Tensor, sizes: Sizes) -> torch.Tensor:
    """DeepSeek's ``kv_b_proj`` by head: [heads, nope + value, latent]."""
    rows = sizes["nope"] + sizes["value"]
    if weight.dim() != 2 or weight.shape[0] != sizes.query * rows:
        raise BadFile(f"kv_b_proj of the shape {list(weight.shape)} is not {sizes.query} heads of {rows} rows")
    return weight.reshape(sizes.query, rows, weight.shape[1])


def _key_of_latent(weight: torch.Tensor, sizes: Sizes) -> Iterator[torch.Tensor]:
    """The keys' part, turned round: llama.cpp multiplies the query with it instead of the latent vector."""
    yield _latent(weight, sizes)[:, : sizes["nope"]].transpose(1, 2)


def _value_of_latent(weight: torch.Tensor, sizes: Sizes) -> Iterator[torch.Tensor]:
    yield _latent(weight, sizes)[:, sizes["nope"] :]


def _kernel(shapes: tuple[Shape, ...], _: Sizes) -> Shape:
    return (shapes[0][0], shapes[0][-1])


def _half(shapes: tuple[Shape, ...], _: Sizes) -> Shape:
    return (shapes[0][0] // 2, *shapes[0][1:])


def _column(shapes: tuple[Shape, ...], _: Sizes) -> Shape:
    return (math.prod(shapes[0]), 1)


def _by_group(shapes: tuple[Shape, ...], sizes: Sizes) -> Shape:
    groups, width = sizes["state_groups"], math.prod(shapes[0])
    if not groups or width % groups:
        raise BadFile(f"{width} weights of a norm do not divide into {groups} groups")
    return (groups, width // groups)


def _linear(sizes: Sizes) -> tuple[int, int, int, int]:
    """Key and value heads of a linear attention, and the width of each."""
    names = ("linear_key_heads", "linear_value_heads", "linear_key_width", "linear_value_width")
    keys, values, key_width, value_width = (sizes[name] for name in names)
    return keys, values, key_width, value_width


def _qkv_rows(shapes: tuple[Shape, ...], sizes: Sizes) -> Shape:
    keys, values, key_width, value_width = _linear(sizes)
    return (2 * keys * key_width + values * value_width, *shapes[0][1:])


def _gate_rows(shapes: tuple[Shape, ...], sizes: Sizes) -> Shape:
    _, values, _, value_width = _linear(sizes)
    return (values * value_width, *shapes[0][1:])


def _of(function: Callable[[torch.Tensor, Sizes], torch.Tensor]) -> Callable[..., Iterator[torch.Tensor]]:
    """A transform that makes one piece of one source."""
    return lambda weight, sizes: iter((function(weight, sizes),))


TRANSFORMS: dict[str, Transform] = {
    "keep": Transform(_same, _whole, one_by_one=True, moves_rows=True),
    # One 2-D matrix per expert becomes one 3-D tensor, experts in order.
    "stack_experts": Transform(_stacked, _whole, moves_rows=True),
    # One row, or one column, as the vector that it is.
    "vector": Transform(_flat, lambda weight, _: iter((weight.reshape(-1),))),
    # [E, 2F, D] with the gate rows first: gate and up are separate tensors in GGUF.
    "gate_of_gate_up": Transform(
        _halved, _each(lambda expert: expert[: len(expert) // 2]), one_by_one=True, moves_rows=True
    ),
    "up_of_gate_up": Transform(
        _halved, _each(lambda expert: expert[len(expert) // 2 :]), one_by_one=True, moves_rows=True
    ),
    # [E, D, 2F], each expert turned round, with the gate's columns first (Llama 4) or every other (gpt-oss).
    "gate_of_columns": Transform(
        _half_turned, _each(lambda expert: expert[:, : expert.shape[1] // 2].T), one_by_one=True
    ),
    "up_of_columns": Transform(
        _half_turned, _each(lambda expert: expert[:, expert.shape[1] // 2 :].T), one_by_one=True
    ),
    "even_columns_turned": Transform(_half_turned, _each(lambda expert: expert[:, ::2].T), one_by_one=True),
    "odd_columns_turned": Transform(_half_turned, _each(lambda expert: expert[:, 1::2].T), one_by_one=True),
    "turned": Transform(_turned, _each(lambda expert: expert.T), one_by_one=True),
    # Rows and columns that take turns: [E, 2F, D] and, for biases, [E, 2F].
    "even_rows": Transform(_halved, _each(lambda expert: expert[::2]), one_by_one=True, moves_rows=True),
    "odd_rows": Transform(_halved, _each(lambda expert: expert[1::2]), one_by_one=True, moves_rows=True),
    "even_columns": Transform(_halved, lambda weight, _: iter((weight[:, ::2],))),
    "odd_columns": Transform(_halved, lambda weight, _: iter((weight[:, 1::2],))),
    # [2F, D] with the gate rows first, of a shared expert.
    "upper_rows": Transform(_half, _of(lambda weight, _: weight[: weight.shape[0] // 2]), moves_rows=True),
    "lower_rows": Transform(_half, _of(lambda weight, _: weight[weight.shape[0] // 2 :]), moves_rows=True),
    "permute_rope_query": Transform(_same, lambda weight, sizes: iter((_permuted(weight, sizes.query),))),
    "permute_rope_key": Transform(_same, lambda weight, sizes: iter((_permuted(weight, sizes.key),))),
    # DeepSeek's multi-head latent attention.
    "key_of_latent": Transform(lambda shapes, s: (s.query, shapes[0][-1], s["nope"]), _key_of_latent),
    "value_of_latent": Transform(lambda shapes, s: (s.query, s["value"], shapes[0][-1]), _value_of_latent),
    # Norms that multiply with one plus their weight; in float32, where the sum is exact enough.
    "plus_one": Transform(_same, _of(lambda weight, _: weight.float() + 1)),
    # The kernel [C, 1, K] of a convolution channel by channel.
    "kernel": Transform(_kernel, _of(lambda weight, _: weight.flatten(1))),
    # State-space layers (Mamba 2).
    "column": Transform(_column, _of(lambda weight, _: weight.reshape(-1, 1))),
    "decay_rates": Transform(_same, _of(lambda weight, _: recurrent.decay_rates(weight))),
    "decay_rates_column": Transform(_column, _of(lambda weight, _: recurrent.decay_rates(weight).reshape(-1, 1))),
    "by_state_group": Transform(
        _by_group, _of(lambda weight, sizes: weight.reshape(_by_group((tuple(weight.shape),), sizes)))
    ),
    # Linear attention (gated delta rule).
    "qkv_of_qkvz": Transform(
        _qkv_rows, _of(lambda weight, sizes: recurrent.qkv_of_qkvz(weight, *_linear(sizes))), moves_rows=True
    ),
    "gate_of_qkvz": Transform(
        _gate_rows, _of(lambda weight, sizes: recurrent.gate_of_qkvz(weight, *_linear(sizes))), moves_rows=True
    ),
    "tile_value_heads": Transform(
        _same, _of(lambda weight, sizes: recurrent.tile_value_heads(weight, *_linear(sizes)[:2])), moves_rows=True
    ),
    "tile_value_heads_of_qkv": Transform(
        _same, _of(lambda weight, sizes: recurrent.tile_value_heads_of_qkv(weight, *_linear(sizes))), moves_rows=True
    ),
    "tile_value_heads_of_kernel": Transform(
        _kernel, _of(lambda weight, sizes: recurrent.tile_value_heads_of_qkv(weight.flatten(1), *_linear(sizes)))
    ),
    "tile_value_columns": Transform(
        _same, _of(lambda weight, sizes: recurrent.tile_value_heads(weight.T, *_linear(sizes)[:2]).T)
    ),
    "tiled_decay_rates": Transform(
        _same,
        _of(lambda weight, sizes: recurrent.decay_rates(recurrent.tile_value_heads(weight, *_linear(sizes)[:2]))),
    ),
}
