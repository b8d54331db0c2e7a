"""What rounded activations cost: the arithmetic, and llama.cpp's own products beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import toys

from edgeprune.measure import child
from edgeprune.measure.rounding import rounding_error
from edgeprune.measure.sensitivity import Sensitivity
from edgeprune.model import ggml
from edgeprune.model.architecture import Tensor


def test_blocks_are_rounded_to_their_own_largest_magnitude() -> None:
    rows = np.random.default_rng(0).standard_normal((16, 512)).astype(np.float32)
    rows[3, 300] = 40.0
    found = rounding_error(rows, 256)
    expected = np.zeros(2)
    for row in rows.astype(np.float64):
        for block in range(2):
            values = row[256 * block : 256 * block + 256]
            step = np.abs(values).max() / 127
            expected[block] += np.sum((values - np.round(values / step) * step) ** 2)
    assert found == pytest.approx(expected, rel=1e-3)
    assert found[1] > 5 * found[0]  # the outlier makes its block's steps wide
    assert rounding_error(rows, 32).sum() < found.sum()
    assert not rounding_error(np.zeros((2, 64), np.float32), 32).any()


def test_floats_have_no_rounded_inputs_and_others_those_of_their_blocks() -> None:
    blocks = {name: ggml.BY_NAME[name].input_block for name in ("F32", "BF16", "Q8_0", "IQ4_NL", "Q6_K", "IQ1_S")}
    assert blocks == {"F32": 0, "BF16": 0, "Q8_0": 32, "IQ4_NL": 32, "Q6_K": 256, "IQ1_S": 256}
    tensor = Tensor("x.weight", (256, 64), "BF16", 1, 0, "attention", True, False)
    known = Sensitivity({}, {"x.weight": {}}, {}, {}, {}, {"x.weight": {32: 1e-5, 256: 1e-4}})
    assert [known.rounded(tensor, name) for name in ("F16", "Q8_0", "Q4_K")] == [0.0, 1e-5, 1e-4]


def test_every_product_is_observed(synthetic: toys.Maker, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some words of a text, more and more. " * 200)
    path = synthetic("qwen3moe")
    names = ["blk.0.attn_q.weight", "blk.1.ffn_gate_exps.weight", "blk.1.ffn_down_exps.weight", "no.such.weight"]
    found = child.call(
        "edgeprune.measure.rounding:observe",
        {
            "model": str(path),
            "texts": [{"domain": "text", "path": str(text), "split": "shared"}],
            "split": "calibration",
            "window": 64,
            "most_tokens": 128,
            "weights": names,
        },
    )
    assert set(found) == set(names[:-1])
    for by_block in found.values():
        assert all(errors and min(errors) > 0 for errors in by_block.values())
