"""What each type does to each tensor: errors of a sample, and no entry for a type that cannot hold the weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import toys

from edgeprune.errors import BadFile
from edgeprune.measure import distortion
from edgeprune.measure.sensitivity import Sensitivity
from edgeprune.model.architecture import Tensor, read_architecture
from edgeprune.model.gguf import GgufFile, TensorShape

NAME = "blk.0.ffn_down_exps.weight"
EXPERTS, ROWS, WIDTH = 8, 64, 256


def stored(kind: str, weights: np.ndarray) -> np.ndarray:
    """The bytes of ``weights`` float32 in the float type ``kind``."""
    if kind == "F32":
        return weights.view(np.uint8)
    if kind == "F16":
        return weights.astype(np.float16).view(np.uint8)
    return (weights.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)


def model(path: Path, kind: str, outlier: float) -> tuple[GgufFile, Tensor]:
    """A file with one tensor of experts in which one weight of half a million is ``outlier``."""
    weights = np.random.default_rng(1).standard_normal((EXPERTS, ROWS, WIDTH)).astype(np.float32)
    weights[5, 40, 77] = outlier
    toys.write_gguf(path, [], [(TensorShape(NAME, (WIDTH, ROWS, EXPERTS), kind), stored(kind, weights).reshape(-1))])
    file = GgufFile(path)
    info = file.tensors[NAME]
    return file, Tensor(NAME, info.shape, kind, info.nbytes, 0, "expert_down", True, True)


@pytest.mark.parametrize("chunk", [1 << 30, 4096])
@pytest.mark.parametrize(
    ("kind", "outlier"), [("F32", -70_000.0), ("F32", 3e38), ("BF16", -65_536.0), ("F16", -60_032.0), ("F32", 9.5)]
)
def test_the_largest_weight_is_found_wherever_it_is(
    kind: str, outlier: float, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distortion, "_CHUNK_BYTES", chunk)
    assert distortion._largest(*model(tmp_path / "model.gguf", kind, outlier), []) == pytest.approx(abs(outlier))


@pytest.mark.parametrize(("outlier", "kept"), [(5.0e4, ["Q4_K", "Q8_0", "BF16"]), (-7.0e4, ["BF16"])])
def test_type_that_cannot_hold_the_largest_weight_has_no_entry(
    outlier: float, kept: list[str], tmp_path: Path
) -> None:
    file, tensor = model(tmp_path / "model.gguf", "F32", outlier)
    found = distortion._distortions(file, tensor, None, ["Q4_K", "Q8_0", "BF16"], seed=0, rates={})
    assert list(found) == kept


def test_type_without_an_entry_cannot_be_asked_for(synthetic: toys.Maker) -> None:
    tensor = read_architecture(GgufFile(synthetic("qwen3moe"))).tensor("blk.0.attn_q.weight")
    for known in ({}, {tensor.name: {}}):
        with pytest.raises(BadFile, match=r"blk\.0\.attn_q\.weight cannot be given the type Q4_K") as refusal:
            Sensitivity({}, known, {}, {}).cost(tensor, "Q4_K")
        assert refusal.value.hint == "leave it in F32"
        assert Sensitivity({}, known, {}, {}).cost(tensor, "F32").nats == 0.0
