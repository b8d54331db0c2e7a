"""NaN in a file of weights is found, wherever it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import toys

from edgeprune.measure import child
from edgeprune.model import ggml, soundness
from edgeprune.model.gguf import GgufFile
from edgeprune.model.soundness import first_not_finite

# ggml looks at nothing in these: their values are always finite, or are no weights.
ALWAYS_FINITE = {"NVFP4", "Q8_1", "I8", "I16", "I32", "I64"}


@pytest.mark.parametrize("kind", ggml.BY_NAME.values(), ids=lambda kind: kind.name)
def test_blocks_of_every_type_are_looked_at(kind: ggml.GgmlType) -> None:
    blocks = np.zeros((5, kind.block_bytes), np.uint8)
    assert ggml.is_sound(kind, blocks.ravel())
    blocks[-1] = 255  # NaN, as a scale and as a value
    assert ggml.is_sound(kind, blocks.ravel()) == (kind.name in ALWAYS_FINITE)


def test_the_tensor_is_named_wherever_the_value_is(
    toy_gguf: toys.Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = toy_gguf("qwen3_moe")
    assert first_not_finite(GgufFile(source)) == ""
    monkeypatch.setattr(soundness, "_STEP", 1 << 10)
    told: list[tuple[int, int]] = []
    assert first_not_finite(GgufFile(source), lambda done, total: told.append((done, total))) == ""
    assert told[-1][0] == told[-1][1] and len(told) > len(GgufFile(source).tensors)
    for name in ("token_embd.weight", "blk.1.ffn_down_exps.weight", "output_norm.weight"):
        info, data = GgufFile(source).tensors[name], bytearray(source.read_bytes())
        end = info.offset + info.nbytes
        data[end - 4 : end] = np.float32(np.inf).tobytes()
        bad = tmp_path / f"{name}.gguf"
        bad.write_bytes(data)
        assert child.call("edgeprune.model.soundness:look", {"model": str(bad)}) == name
