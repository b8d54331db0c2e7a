"""Weights of state-space and linear-attention layers in llama.cpp's order, on numbers that say where they belong."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from edgeprune.errors import BadFile
from edgeprune.model import recurrent
from edgeprune.model.transforms import TRANSFORMS, Sizes

# Two key heads of two rows; six value heads of three rows, three to a key head.
HEADS = (2, 6, 2, 3)


def rows(*names: str) -> torch.Tensor:
    """One row for each name, which is a number of its own by the order in which names come."""
    return torch.tensor([[float(sum(ord(c) * 256**i for i, c in enumerate(name)))] for name in names])


def test_value_heads_take_turns_over_the_key_heads() -> None:
    grouped = rows("a0", "a1", "a2", "b0", "b1", "b2")
    assert torch.equal(recurrent.tile_value_heads(grouped, 2, 6), rows("a0", "b0", "a1", "b1", "a2", "b2"))


def test_rows_of_a_value_head_stay_together() -> None:
    grouped = rows("a0x", "a0y", "a1x", "a1y", "b0x", "b0y", "b1x", "b1y")
    tiled = rows("a0x", "a0y", "b0x", "b0y", "a1x", "a1y", "b1x", "b1y")
    assert torch.equal(recurrent.tile_value_heads(grouped, 2, 4), tiled)


def test_as_many_value_heads_as_key_heads_stay_in_order() -> None:
    weight = torch.arange(12.0).reshape(6, 2)
    assert torch.equal(recurrent.tile_value_heads(weight, 3, 3), weight)


def test_queries_and_keys_stay_where_they_are() -> None:
    weight = torch.arange(26.0)
    found = recurrent.tile_value_heads_of_qkv(weight, *HEADS)
    assert torch.equal(found[:8], weight[:8])
    assert torch.equal(found[8:], recurrent.tile_value_heads(weight[8:], 2, 6))


def test_joint_projection_is_parted_by_what_rows_are_for() -> None:
    # [q k v z] of the first key head, then of the second: two queries, two keys, nine values, nine gates each.
    names = [
        f"{part}{head}{row}"
        for head in "ab"
        for part, n in (("q", 2), ("k", 2), ("v", 9), ("z", 9))
        for row in range(n)
    ]
    weight = rows(*names)
    expected = [
        f"{part}{head}{row}" for part, n in (("q", 2), ("k", 2), ("v", 9)) for head in "ab" for row in range(n)
    ]
    assert torch.equal(recurrent.qkv_of_qkvz(weight, *HEADS), rows(*expected))
    gates = [f"z{head}{row}" for head in "ab" for row in range(9)]
    assert torch.equal(recurrent.gate_of_qkvz(weight, *HEADS), rows(*gates))


def test_decay_is_computed_in_float32() -> None:
    logarithms = torch.tensor([0.3, 2.7], dtype=torch.bfloat16)
    found = recurrent.decay_rates(logarithms)
    assert found.tolist() == pytest.approx([-math.exp(float(x)) for x in logarithms], rel=1e-6)


def test_norms_that_add_one_keep_their_small_weights() -> None:
    (found,) = TRANSFORMS["plus_one"].apply(torch.tensor([1e-3], dtype=torch.bfloat16), Sizes())
    assert found.dtype == torch.float32 and abs(float(found) - 1.001) < 1e-5


WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "value heads that key heads do not divide": (
        lambda: recurrent.tile_value_heads(torch.ones(9, 1), 2, 3),
        "9 rows do not divide into 3 value heads of 2 key heads",
    ),
    "no key heads": (lambda: recurrent.tile_value_heads(torch.ones(9, 1), 0, 3), "of 0 key heads"),
    "rows that value heads do not divide": (
        lambda: recurrent.tile_value_heads(torch.ones(7, 1), 2, 6),
        "7 rows do not divide",
    ),
    "too many rows": (
        lambda: recurrent.tile_value_heads_of_qkv(torch.ones(27, 1), *HEADS),
        "does not hold queries, keys and values, which are 26 rows",
    ),
    "too few rows": (
        lambda: recurrent.gate_of_qkvz(torch.ones(43, 1), *HEADS),
        "does not hold queries, keys, values and gates, which are 44 rows",
    ),
    "groups that do not divide a norm": (
        lambda: TRANSFORMS["by_state_group"].shape(((10,),), Sizes(named={"state_groups": 3})),
        "10 weights of a norm do not divide into 3 groups",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_shapes_are_refused(case: str) -> None:
    call, cause = WRONG[case]
    with pytest.raises(BadFile, match=cause):
        call()
