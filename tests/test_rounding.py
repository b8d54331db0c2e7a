"""What rounded activations cost: the arithmetic, and llama.cpp's own products beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toys
from observed import Toy

from edgeprune.build.builder import build
from edgeprune.decide.plan import Plan, Prediction
from edgeprune.measure import child
from edgeprune.measure.launch import Launch
from edgeprune.measure.rounding import rounding_error
from edgeprune.measure.sensitivity import RIPPLES, Sensitivity
from edgeprune.model import ggml
from edgeprune.model.architecture import Tensor, read_architecture
from edgeprune.model.gguf import GgufFile

pytest_plugins = ("observed_fixtures",)


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


def arguments(model: Path, folder: Path) -> dict[str, Any]:
    """Of ``measure``: a text, and what ``model`` says of it."""
    text = folder / "text.txt"
    text.write_text("".join(toys.training_lines()[:40]), encoding="utf-8")
    own: dict[str, Any] = {"texts": [{"domain": "text", "path": str(text), "split": "calibration"}]}
    own |= {"split": "calibration", "window": 64, "most_tokens": 1_024, "model": str(model)}
    child.call("edgeprune.measure.tasks:reference", {**own, "output": str(folder / "reference")})
    return {**own, "reference": str(folder / "reference")}


def test_every_product_is_observed(toy_gguf: Toy, tmp_path: Path) -> None:
    names = ["blk.0.attn_q.weight", "blk.1.ffn_gate_exps.weight", "blk.1.ffn_down_exps.weight", "no.such.weight"]
    model = toy_gguf("qwen3_moe")
    found = child.call("edgeprune.measure.rounding:measure", {**arguments(model, tmp_path), "weights": names})
    assert set(found["inputs"]) == set(names[:-1])
    for by_block in found["inputs"].values():
        assert all(errors and min(errors) > 0 for errors in by_block.values())
    ripple, *_, usual = (found["together"][str(error)] for error in RIPPLES)
    assert 0 <= ripple < 1e-3 < usual
    assert found["tokens_per_s"] > 10
    one = child.call("edgeprune.measure.rounding:measure", {**arguments(model, tmp_path), "weights": names[:1]})
    assert one["together"][str(RIPPLES[-1])] < usual
    assert 0 < one["floor"]["32"] < found["floor"]["32"]


@pytest.mark.parametrize(("kind", "block"), [("Q8_0", "32"), ("Q6_K", "256")])
def test_the_floor_is_what_llama_cpp_loses_where_no_weight_is_rounded(
    kind: str, block: str, toy_gguf: Toy, tmp_path: Path
) -> None:
    """A model of quantised weights, and the same weights as floats: only activations are rounded otherwise."""
    source = toy_gguf("qwen3_moe")
    quantised, floats = tmp_path / "quantised.gguf", tmp_path / "floats.gguf"
    names = [t.name for t in read_architecture(GgufFile(source)).tensors if t.quantisable and t.role != "embedding"]
    retyped(source, quantised, dict.fromkeys(names, kind))
    retyped(quantised, floats, dict.fromkeys(names, "F32"))
    given = arguments(floats, tmp_path)
    floor = child.call("edgeprune.measure.rounding:measure", {**given, "weights": names})["floor"]
    masks = {**given, "model": str(quantised), "masks": [None]}
    (lost,) = child.call("edgeprune.measure.tasks:divergence", masks)
    assert floor[block] == pytest.approx(lost["all"]["kl_mean"], rel=0.35)


def retyped(model: Path, output: Path, types: dict[str, str]) -> None:
    """``model`` with other types."""
    architecture = read_architecture(GgufFile(model))
    everyone = architecture.experts
    plan = Plan(
        architecture.arch, everyone, everyone, {}, types, Launch(), "none", "test", Prediction(), {"statistics": "x"}
    )
    build(str(model), plan.to_json(), str(output))
