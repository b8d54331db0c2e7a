"""Models of almost no weights: what is left of their time is what llama.cpp itself takes, token by token and layer by
layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.files import atomic_writer
from edgeprune.model.gguf import DEFAULT_ALIGNMENT, TensorShape, align, header, make_entry

ARCH, EXPERTS, USED, EXPERT_WIDTH, VOCABULARY, HEADS = "qwen3moe", 8, 2, 64, 320, 4


def layer_shapes(width: int) -> dict[str, tuple[int, ...]]:
    """Tensors of a layer, in ggml's order: as wide as tall attention, and small experts."""
    head = width // HEADS
    return {
        "attn_norm.weight": (width,),
        "attn_q.weight": (width, width),
        "attn_k.weight": (width, width // 2),
        "attn_v.weight": (width, width // 2),
        "attn_output.weight": (width, width),
        "attn_q_norm.weight": (head,),
        "attn_k_norm.weight": (head,),
        "ffn_norm.weight": (width,),
        "ffn_gate_inp.weight": (width, EXPERTS),
        "ffn_gate_exps.weight": (width, EXPERT_WIDTH, EXPERTS),
        "ffn_up_exps.weight": (width, EXPERT_WIDTH, EXPERTS),
        "ffn_down_exps.weight": (EXPERT_WIDTH, width, EXPERTS),
    }


def write_tiny(path: Path, layers: int, width: int) -> None:
    """A random F32 GGUF of ``layers`` MoE layers that llama.cpp loads and runs, without a tokenizer."""
    numbers: dict[str, tuple[str, Any]] = {
        "block_count": ("u32", layers),
        "context_length": ("u32", 2048),
        "embedding_length": ("u32", width),
        "feed_forward_length": ("u32", 2 * EXPERT_WIDTH),
        "attention.head_count": ("u32", HEADS),
        "attention.head_count_kv": ("u32", HEADS // 2),
        "attention.key_length": ("u32", width // HEADS),
        "attention.value_length": ("u32", width // HEADS),
        "attention.layer_norm_rms_epsilon": ("f32", 1e-6),
        "rope.freq_base": ("f32", 10000.0),
        "vocab_size": ("u32", VOCABULARY),
        "expert_count": ("u32", EXPERTS),
        "expert_used_count": ("u32", USED),
        "expert_feed_forward_length": ("u32", EXPERT_WIDTH),
    }
    entries = [make_entry("general.architecture", "str", ARCH), make_entry("tokenizer.ggml.model", "str", "no_vocab")]
    entries += [make_entry(f"{ARCH}.{key}", kind, value) for key, (kind, value) in numbers.items()]
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (width, VOCABULARY)}
    for layer in range(layers):
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in layer_shapes(width).items()}
    shapes |= {"output_norm.weight": (width,), "output.weight": (width, VOCABULARY)}
    tensors = [TensorShape(name, shape, "F32") for name, shape in shapes.items()]
    random = np.random.default_rng(0)
    with atomic_writer(path) as stream:
        stream.write(header(entries, tensors, DEFAULT_ALIGNMENT))
        for tensor in tensors:
            values = random.standard_normal(tensor.nbytes // 4).astype(np.float32) / np.sqrt(tensor.shape[0])
            stream.write(values.tobytes())
            stream.write(b"\0" * (align(tensor.nbytes, DEFAULT_ALIGNMENT) - tensor.nbytes))
