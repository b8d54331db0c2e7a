"""Toy GGUFs of every language model with experts that llama.cpp loads.

``architectures.json`` has, for each of them, the metadata beyond those in ``COMMON`` and the tensors, with ``*`` for
every block. It was made by asking llama.cpp's loader (0.5.0-dev, as llama-cpp-python 0.3.36 has it): load a header,
add what it misses in the shape that it expects, and load again, until it is content and its graph computes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import toys

from edgeprune.model.gguf import TensorShape, make_entry

LAYERS, EXPERTS, USED, WIDTH, EXPERT_WIDTH, VOCABULARY = 2, 8, 2, 64, 32, 320
COMMON: dict[str, tuple[str, Any]] = {
    "block_count": ("u32", LAYERS),
    "context_length": ("u32", 256),
    "embedding_length": ("u32", WIDTH),
    "feed_forward_length": ("u32", 2 * EXPERT_WIDTH),
    "attention.head_count": ("u32", 4),
    "attention.head_count_kv": ("u32", 2),
    "attention.layer_norm_rms_epsilon": ("f32", 1e-6),
    "attention.layer_norm_epsilon": ("f32", 1e-6),
    "rope.freq_base": ("f32", 1e4),
    "vocab_size": ("u32", VOCABULARY),
    "expert_count": ("u32", EXPERTS),
    "expert_used_count": ("u32", USED),
    "expert_feed_forward_length": ("u32", EXPERT_WIDTH),
}
KNOWN: dict[str, Any] = json.loads(Path(__file__).with_name("architectures.json").read_text(encoding="utf-8"))
# Those whose loader takes gate and up projections in one tensor (``create_tensor_gate_up_exps``).
FUSED = ["cohere2moe", "deepseek2", "deepseek2-ocr", "gemma4", "granite_swa", "hy_v3", "qwen35moe", "qwen3next"]
# Those whose graph multiplies the experts' products with scales.
SCALED = ["cohere2moe", "gemma4", "hy_v3", "llama", "mellum", "mistral3", "nemotron_h_moe", "qwen35moe", "qwen3moe"]


def tensors(arch: str) -> dict[str, tuple[int, ...]]:
    """Shapes by name, every block written out."""
    known = KNOWN[arch]
    layers = known["metadata"].get("block_count", COMMON["block_count"])[1]
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in known["tensors"].items():
        numbers = range(layers) if ".*." in name else range(1)
        found |= {name.replace(".*.", f".{number}."): tuple(shape) for number in numbers}
    return found


def fused(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The same with gate and up projections of the experts in one tensor."""
    found = {}
    for name, shape in shapes.items():
        if "ffn_gate_exps" in name:
            found[name.replace("gate_exps", "gate_up_exps")] = (shape[0], 2 * shape[1], shape[2])
        elif "ffn_up_exps" not in name:
            found[name] = shape
    return found


def scaled(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The same with a scale for every expert's products."""
    weights = [name for name in shapes if name.endswith("_exps.weight") and "norm" not in name]
    return {**shapes, **{name.replace(".weight", ".scale"): shapes[name][-1:] for name in weights}}


def toy(
    path: Path, arch: str, shapes: Mapping[str, tuple[int, ...]] | None = None, seed: int = 0, **metadata: Any
) -> Path:
    """A random F32 model of ``arch`` whose tokens are bytes.

    Args:
        shapes: instead of ``tensors(arch)``.
        metadata: further (type, value) by key, with ``__`` for a dot.
    """
    values = {**COMMON, **KNOWN[arch]["metadata"], **{key.replace("__", "."): own for key, own in metadata.items()}}
    entries = [make_entry("general.architecture", "str", arch), make_entry("general.name", "str", f"toy {arch}")]
    entries += [make_entry(f"{arch}.{key}", form, value) for key, (form, value) in values.items()]
    random = np.random.default_rng(seed)
    pairs = []
    for name, shape in (tensors(arch) if shapes is None else shapes).items():
        weights = toys._values(name, shape, random)
        if name.endswith("ssm_a"):  # of a decay: negative
            weights = -np.abs(weights) - np.float32(0.1)
        elif name.endswith("tid2eid.weight"):
            weights = random.integers(0, EXPERTS, tuple(reversed(shape)), np.int32)
        pairs.append((TensorShape(name, shape, "I32" if weights.dtype == np.int32 else "F32"), weights))
    return toys.write_gguf(path, [*entries, *toys._byte_vocabulary(VOCABULARY)], pairs)
