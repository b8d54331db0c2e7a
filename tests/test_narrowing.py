"""Narrower experts: masking channels equals cutting them out of the file, to the byte as planned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import toys

from edgeprune.build import builder
from edgeprune.build.gather import gathered
from edgeprune.decide.plan import Plan, Prediction
from edgeprune.errors import BadFile, EdgepruneError
from edgeprune.measure.channels import Channels
from edgeprune.measure.divergence import Reference, summarise
from edgeprune.measure.launch import Launch
from edgeprune.measure.llama import EvalCallback, session
from edgeprune.measure.observers import ChannelMask, Masks, RouterMask
from edgeprune.model import ggml
from edgeprune.model.architecture import Architecture, read_architecture
from edgeprune.model.convert import convert
from edgeprune.model.gguf import GgufFile
from edgeprune.model.layout import layout

Toy = Callable[[str], Path]
TOKENS = 48
LAUNCH = Launch(context=64, batch=64, threads=1, kv_type="F32")
SYNTHETIC = ["qwen3moe", "qwen2moe", "deepseek2", "gpt-oss"]
CONVERTED = ["qwen3_moe", "mixtral", "olmoe"]
# Shared experts as wide as two, gate and up in one tensor with GELU, general width with a shared expert of its own
# width, no gate and another width inside, clamps.
FAMILIES = ["glm4_moe", "gemma4", "hunyuan_v1_moe", "nemotron_h", "granitemoehybrid", "qwen3_next"]


def random_channels(architecture: Architecture, path: Path, seed: int = 0) -> Channels:
    """Every expert's channels in an order of its own."""
    random = np.random.default_rng(seed)
    shape = (architecture.experts, architecture.expert_width)
    orders = {
        layer: random.permuted(np.tile(np.arange(shape[1], dtype=np.int16), (shape[0], 1)), axis=1)
        for layer in architecture.moe_layers
    }
    Channels(orders, {}).save(path)
    return Channels.load(path)


def narrow_plan(architecture: Architecture, width: int, digest: str = "", **changes: Any) -> Plan:
    values: dict[str, Any] = {
        "arch": architecture.arch,
        "experts": architecture.experts,
        "kept": architecture.experts,
        "keep": {},
        "types": {},
        "launch": Launch(),
        "method": "test",
        "origin": "user",
        "predicted": Prediction(),
        "made_from": {"source": "toy"},
        "width": width,
        "narrowing": "camera",
        "channels": digest,
    }
    return Plan(**{**values, **changes})


def logits(model: Path, tokens: list[int], observer: EvalCallback | None = None) -> Any:
    with session(model, LAUNCH, observer) as opened:
        return opened.run(tokens).copy()


def apart(first: Any, second: Any, tokens: list[int], folder: Path) -> float:
    """KL divergence of ``second`` from ``first``, nats per token."""
    (folder / "reference").unlink(missing_ok=True)  # or else it would be continued
    kept = Reference(folder / "reference", first.shape[1])
    kept.append(first)
    kept.rewind()
    return summarise([kept.compare(second, tuple(tokens))]).kl_mean


def model_of(name: str, synthetic: Toy, toy_gguf: Toy, folder: Path) -> Path:
    if name in SYNTHETIC:
        return synthetic(name)
    if name in CONVERTED:
        return toy_gguf(name)
    checkpoint = families.make_checkpoint(name, folder / name, {})
    convert(checkpoint, folder / "model.gguf", "f32")
    return folder / "model.gguf"


@pytest.mark.parametrize("name", [*SYNTHETIC, *CONVERTED, *FAMILIES])
def test_masking_channels_equals_the_narrowed_file(name: str, synthetic: Toy, toy_gguf: Toy, tmp_path: Path) -> None:
    model = model_of(name, synthetic, toy_gguf, tmp_path)
    file = GgufFile(model)
    architecture = read_architecture(file)
    width = next(w for w in architecture.width_rule.widths() if w <= architecture.expert_width // 2)
    channels = random_channels(architecture, tmp_path / "channels")
    plan = narrow_plan(architecture, width, channels.digest)
    output = tmp_path / "narrow.gguf"
    made = builder.build(str(model), plan.to_json(), str(output), channels=str(tmp_path / "channels"))
    predicted = layout(file, architecture, plan.kept, {}, plan.records(), width=width).nbytes
    assert predicted == made["nbytes"] == output.stat().st_size < model.stat().st_size
    assert read_architecture(GgufFile(output)).expert_width == width
    tokens = np.random.default_rng(1).integers(3, architecture.vocabulary - 16, TOKENS).tolist()
    mask = ChannelMask(channels, width)
    masked, narrow = logits(model, tokens, mask), logits(output, tokens)
    mask.check()
    assert apart(masked, narrow, tokens, tmp_path) < 1e-6
    assert apart(logits(model, tokens), narrow, tokens, tmp_path) > 1e-3
