"""Reordering weights of state-space and linear-attention layers, from Hugging Face's order to llama.cpp's.

Letters: ``G`` key heads, ``V`` value heads, ``k`` and ``v`` their widths; r = V / G value heads share a key head.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from edgeprune.errors import BadFile

if TYPE_CHECKING:
    import torch


def _require_rows(weight: torch.Tensor, rows: int, what: str) -> None:
    if weight.shape[0] != rows:
        raise BadFile(f"a tensor of the shape {list(weight.shape)} does not hold {what}, which are {rows} rows")


def _tiled(weight: torch.Tensor, key_heads: int, value_heads: int) -> torch.Tensor:
    """Rows by value head, reordered from (key head, its value heads) to (value head of each key head in turn).

    llama.cpp repeats the key heads as a whole for the value heads, Hugging Face repeats each of them.
    """
    repeats = value_heads // key_heads
    split = weight.reshape(key_heads, repeats, weight.shape[0] // value_heads, *weight.shape[1:])
    return split.transpose(0, 1).reshape(weight.shape)


def tile_value_heads(weight: torch.Tensor, key_heads: int, value_heads: int) -> torch.Tensor:
    """``weight``: [V * any, ...].

    Raises:
        BadFile: rows that the heads do not divide.
    """
    if not key_heads or value_heads % key_heads or weight.shape[0] % max(value_heads, 1):
        raise BadFile(f"{weight.shape[0]} rows do not divide into {value_heads} value heads of {key_heads} key heads")
    return _tiled(weight, key_heads, value_heads)


def tile_value_heads_of_qkv(
    weight: torch.Tensor, key_heads: int, value_heads: int, key_width: int, value_width: int
) -> torch.Tensor:
    """Queries and keys as they are, the value heads behind them tiled. ``weight``: [2 G k + V v, ...].

    Raises:
        BadFile: another number of rows.
    """
    import torch

    both = 2 * key_heads * key_width
    _require_rows(weight, both + value_heads * value_width, "queries, keys and values")
    return torch.cat((weight[:both], tile_value_heads(weight[both:], key_heads, value_heads)))


def _parts_of_qkvz(
    weight: torch.Tensor, key_heads: int, value_heads: int, key_width: int, value_width: int
) -> tuple[torch.Tensor, ...]:
    """Queries, keys, values and gates of a joint projection that has the four of a key head together."""
    values = value_heads // max(key_heads, 1) * value_width
    rows = 2 * key_width + 2 * values
    _require_rows(weight, key_heads * rows, "queries, keys, values and gates")
    by_head = weight.reshape(key_heads, rows, *weight.shape[1:])
    ends = (0, key_width, 2 * key_width, 2 * key_width + values, rows)
    parts = (by_head[:, start:end] for start, end in pairwise(ends))
    return tuple(part.reshape(-1, *weight.shape[1:]) for part in parts)


def qkv_of_qkvz(
    weight: torch.Tensor, key_heads: int, value_heads: int, key_width: int, value_width: int
) -> torch.Tensor:
    """All queries, then all keys, then all values: [2 G k + V v, D] of [G (2 k + 2 r v), D].

    Raises:
        BadFile: another number of rows.
    """
    import torch

    return torch.cat(_parts_of_qkvz(weight, key_heads, value_heads, key_width, value_width)[:3])


def gate_of_qkvz(
    weight: torch.Tensor, key_heads: int, value_heads: int, key_width: int, value_width: int
) -> torch.Tensor:
    """The gates of all value heads: [V v, D] of [G (2 k + 2 r v), D].

    Raises:
        BadFile: another number of rows.
    """
    return _parts_of_qkvz(weight, key_heads, value_heads, key_width, value_width)[3]


def decay_rates(logarithms: torch.Tensor) -> torch.Tensor:
    """-exp(``A_log``), in float32: what the state's logarithm loses per unit of time. Any shape."""
    return -logarithms.float().exp()
