"""What a model weighs and where it would fit: a checkpoint and the GGUF made from it get the same answers."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import toys

from edgeprune import inspection
from edgeprune.inspection import Inspection, inspect_model
from edgeprune.model.architecture import read_architecture
from edgeprune.model.checkpoint import open_checkpoint
from edgeprune.model.converter import converter_for
from edgeprune.model.gguf import GgufFile

FAMILIES = ["qwen3_moe", "mixtral", "olmoe"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_is_sized_as_its_gguf_is(family: str, toy_checkpoint: toys.Maker, toy_gguf: toys.Maker) -> None:
    whole = read_architecture(GgufFile(toy_gguf(family)))
    sketch = inspection._sketch(open_checkpoint(toy_checkpoint(family)), converter_for(family))
    assert (sketch.experts, sketch.used) == (whole.experts, whole.used)
    assert sketch.allowed_counts() == whole.allowed_counts()
    for kept in whole.allowed_counts():
        assert inspection._smallest_bytes(sketch, kept) == pytest.approx(
            inspection._smallest_bytes(whole, kept), rel=0.02
        )
    assert sketch.nbytes == pytest.approx(whole.nbytes, rel=0.02)


def sparse(folder: Path, *, experts: int, used: Any, width: int, hidden: int, stacked: bool) -> Path:
    """A checkpoint of one layer with weights of zero, which take no room on the disk."""
    shapes = {"model.embed_tokens.weight": [32_000, width], "model.layers.0.mlp.gate.weight": [experts, width]}
    block = "model.layers.0.mlp.experts."
    if stacked:
        shapes |= {
            f"{block}gate_up_proj": [experts, 2 * hidden, width],
            f"{block}down_proj": [experts, width, hidden],
        }
    else:
        for expert in range(experts):
            shapes |= {f"{block}{expert}.{part}_proj.weight": [hidden, width] for part in ("gate", "up")}
            shapes[f"{block}{expert}.down_proj.weight"] = [width, hidden]
    header, end = {}, 0
    for name, (rows, *rest) in shapes.items():
        begin, end = end, end + 2 * rows * rest[0] * (rest[1] if len(rest) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": [rows, *rest], "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", len(encoded)) + encoded)
        stream.truncate(8 + len(encoded) + end)
    values = {"model_type": "qwen3_moe", "num_experts": experts, "num_experts_per_tok": used}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def verdict(found: Inspection, profile: str) -> str:
    return next(fit.verdict for fit in found.fits if fit.profile == profile)


@pytest.mark.parametrize("stacked", [False, True], ids=["one by one", "stacked"])
def test_a_checkpoint_that_can_never_fit_is_told_so(stacked: bool, tmp_path: Path) -> None:
    folder = sparse(tmp_path / "large", experts=64, used=8, width=16_384, hidden=49_152, stacked=stacked)
    found = inspect_model(str(folder))
    assert found.nbytes > 279 << 30
    assert dict(found.facts)["experts"] == "64 per layer, 8 per token"
    # 8 experts of 2.25 GiB weights at 1.5625 bits each are 3.5 GiB; 32 and 64 of them are 14 and 28 GiB.
    assert verdict(found, "rpi5-8gb") == "pruned and quantised"
    assert verdict(found, "cpu-16gb") == "pruned and quantised"
    assert verdict(found, "cpu-32gb") == "pruned and quantised"
    assert verdict(found, "strix-halo-128gb") == "quantised"
    toys.change_json(folder / "config.json", num_experts_per_tok=32)
    assert verdict(inspect_model(str(folder)), "rpi5-8gb").startswith("no, short of ")


@pytest.mark.parametrize("value", ["8", True, 0, -1, 10**9, None, [8, 4]])
def test_what_the_configuration_leaves_open_is_taken_from_the_tensors(value: Any, tmp_path: Path) -> None:
    folder = sparse(tmp_path / "small", experts=8, used=value, width=256, hidden=256, stacked=False)
    toys.change_json(folder / "config.json", num_experts=value)
    assert dict(inspect_model(str(folder)).facts)["experts"] == "8 per layer, 1 per token"


def test_a_header_without_extents_is_no_obstacle(tmp_path: Path) -> None:
    folder = sparse(tmp_path / "small", experts=8, used=2, width=256, hidden=256, stacked=False)
    encoded = json.dumps(
        {
            "scale": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
            "x.experts.0.bias": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [4, 8]},
        }
    ).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(encoded)) + encoded + bytes(8))
    with pytest.raises(inspection.Unsupported, match="dense"):
        inspect_model(str(folder))
