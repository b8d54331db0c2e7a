"""Models of full size without their weights, for the other benchmarks: a real header, and made-up measurements."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from edgeprune.measure.cost import Response
from edgeprune.measure.distortion import candidate_types
from edgeprune.measure.reservoir import Reservoir
from edgeprune.measure.sensitivity import Sensitivity, all_sites
from edgeprune.measure.statistics import ACCUMULATORS, RATIO_BINS, InputMoments, LayerStatistics, Statistics
from edgeprune.model import ggml
from edgeprune.model.architecture import Architecture
from edgeprune.model.gguf import DEFAULT_ALIGNMENT, Entry, TensorShape, file_bytes, header, make_entry

Doubles = npt.NDArray[np.float64]
T = TypeVar("T")


@dataclass(frozen=True)
class Size:
    """Extents of a Qwen3-MoE; those of Qwen3-30B-A3B when nothing is said."""

    layers: int = 48
    experts: int = 128
    used: int = 8
    width: int = 2048
    expert_width: int = 768
    vocabulary: int = 151_936
    heads: int = 32
    key_heads: int = 4
    head: int = 128


def metadata(size: Size) -> list[Entry]:
    """The header's entries, with a vocabulary and merges as many as a real model's."""
    from tokenizers import pre_tokenizers

    numbers = {
        "block_count": size.layers,
        "context_length": 40_960,
        "embedding_length": size.width,
        "feed_forward_length": 3 * size.width,
        "attention.head_count": size.heads,
        "attention.head_count_kv": size.key_heads,
        "attention.key_length": size.head,
        "attention.value_length": size.head,
        "expert_count": size.experts,
        "expert_used_count": size.used,
        "expert_feed_forward_length": size.expert_width,
    }
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [f"word{index:06}" for index in range(size.vocabulary - len(alphabet))]
    merges = [f"{word[:5]} {word[5:]}" for word in words]
    return [
        make_entry("general.architecture", "str", "qwen3moe"),
        make_entry("general.name", "str", f"synthetic-{size.layers}x{size.experts}"),
        *(make_entry(f"qwen3moe.{key}", "u32", value) for key, value in numbers.items()),
        make_entry("qwen3moe.attention.layer_norm_rms_epsilon", "f32", 1e-6),
        make_entry("qwen3moe.rope.freq_base", "f32", 1e6),
        make_entry("tokenizer.ggml.model", "str", "gpt2"),
        make_entry("tokenizer.ggml.pre", "str", "qwen2"),
        make_entry("tokenizer.ggml.tokens", "[str]", [*alphabet, *words]),
        make_entry("tokenizer.ggml.token_type", "[i32]", [1] * size.vocabulary),
        make_entry("tokenizer.ggml.merges", "[str]", merges),
        make_entry("tokenizer.ggml.eos_token_id", "u32", size.vocabulary - 1),
    ]


def tensors(size: Size) -> list[TensorShape]:
    """Matrices in BF16, norms and routers in F32."""
    shapes = [TensorShape("token_embd.weight", (size.width, size.vocabulary), "BF16")]
    block = {
        "attn_norm.weight": (size.width,),
        "attn_q.weight": (size.width, size.heads * size.head),
        "attn_k.weight": (size.width, size.key_heads * size.head),
        "attn_v.weight": (size.width, size.key_heads * size.head),
        "attn_q_norm.weight": (size.head,),
        "attn_k_norm.weight": (size.head,),
        "attn_output.weight": (size.heads * size.head, size.width),
        "ffn_norm.weight": (size.width,),
        "ffn_gate_inp.weight": (size.width, size.experts),
        "ffn_gate_exps.weight": (size.width, size.expert_width, size.experts),
        "ffn_up_exps.weight": (size.width, size.expert_width, size.experts),
        "ffn_down_exps.weight": (size.expert_width, size.width, size.experts),
    }
    for layer in range(size.layers):
        for name, shape in block.items():
            kind = "F32" if len(shape) == 1 or "gate_inp" in name else "BF16"
            shapes.append(TensorShape(f"blk.{layer}.{name}", shape, kind))
    shapes.append(TensorShape("output_norm.weight", (size.width,), "F32"))
    return [*shapes, TensorShape("output.weight", (size.width, size.vocabulary), "BF16")]


def shadow(path: Path, size: Size) -> Path:
    """A GGUF with a hole instead of weights."""
    shapes = tensors(size)
    top = header(metadata(size), shapes, DEFAULT_ALIGNMENT)
    with path.open("wb") as stream:
        stream.write(top)
        stream.truncate(file_bytes(len(top), shapes, DEFAULT_ALIGNMENT))
    return path


@dataclass(frozen=True)
class _Alike(Mapping[Any, T]):
    """The same value under every key, so that only one is held in memory."""

    names: tuple[Any, ...]
    value: T

    def __getitem__(self, key: Any) -> T:
        if key not in self.names:
            raise KeyError(key)
        return self.value

    def __iter__(self) -> Iterator[Any]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def reservoir(size: Size, tokens: int, *, renormalised: bool = True, seed: int = 0) -> Reservoir:
    """Tokens whose routing is that of random logits, some experts favoured, and whose outputs are noise.

    Args:
        renormalised: coefficients sum to one, as in Qwen3; otherwise they are bare probabilities, as in OLMoE.
    """
    random = np.random.default_rng(seed)
    favour = random.normal(0, 1.0, size.experts)
    logits = (favour + random.normal(0, 1.5, (tokens, size.experts))).astype(np.float32)
    probs = np.exp(logits - logits.max(axis=1, keepdims=True))
    probs /= probs.sum(axis=1, keepdims=True)
    ids = np.argsort(-logits, axis=1, kind="stable")[:, : size.used]
    gates = np.take_along_axis(probs, ids, axis=1)
    return Reservoir(
        domain=np.zeros(tokens, np.int16),
        x=random.standard_normal((tokens, size.width), np.float32),
        y=random.standard_normal((tokens, size.width), np.float32),
        ids=ids.astype(np.int16),
        gates=gates / gates.sum(axis=1, keepdims=True) if renormalised else gates,
        selection=logits,
        probs=probs,
        residual=np.full(tokens, 2 * size.width**0.5, np.float32),
        turn=np.full(tokens, 0.1, np.float32),
        stream=None,
    )


def _sums(size: Size, kept: Reservoir) -> LayerStatistics:
    """Accumulators with every array of its right extent, and counts that agree with the routing."""
    random = np.random.default_rng(1)
    extents = {"E": size.experts, "D": size.width, "F": size.expert_width, "R": size.used - 1, "B": RATIO_BINS}
    arrays = {
        name: random.lognormal(0, 1, (1, *(extents[axis] for axis in kind.axes)))
        for name, kind in ACCUMULATORS.items()
    }
    logits = kept.selection.astype(np.float64)
    arrays["tokens"] = np.array([float(len(kept))])
    arrays["routed"] = np.bincount(kept.ids.ravel(), minlength=size.experts)[None].astype(float)
    arrays["logit_gram"], arrays["logit_sum"] = (logits.T @ logits)[None], logits.sum(axis=0)[None]
    return LayerStatistics(arrays)


def statistics(architecture: Architecture, size: Size, tokens: int, made_from: dict[str, Any]) -> Statistics:
    """What a calibration pass leaves, with a reservoir of ``tokens``; every layer alike."""
    kept = reservoir(size, tokens)
    sums = _sums(size, kept)
    moments = {}
    for tensor in architecture.tensors:
        if tensor.quantisable:
            square = np.ones((tensor.matrices, tensor.shape[0]))
            moments[tensor.name] = InputMoments(square, np.ones(tensor.matrices), np.ones(tensor.matrices))
    layers = architecture.moe_layers
    return Statistics(["text"], tokens, 512, _Alike(layers, sums), moments, made_from, _Alike(layers, kept))


def sensitivity(architecture: Architecture, methods: tuple[str, ...], made_from: dict[str, Any]) -> Sensitivity:
    """Costs that are spread over two decades between tensors, and fall with the bits as they do on real ones."""
    random = np.random.default_rng(2)
    responses = {}
    for site in all_sites(architecture):
        small = float(random.lognormal(-7, 1))
        responses[site.key] = Response(small, 10 * small)
    distortions: dict[str, dict[str, list[float]]] = {}
    for tensor in architecture.tensors:
        if tensor.quantisable:
            spread = float(random.lognormal(0, 0.3))
            errors = {kind: spread * 4.0 ** -ggml.BY_NAME[kind].bits_per_weight for kind in candidate_types(tensor)}
            distortions[tensor.name] = {kind: [error, error] for kind, error in errors.items()}
    experts = architecture.experts
    drops = {kept: 4 * (1 - kept / experts) ** 2 for kept in architecture.allowed_counts() if kept < experts}
    return Sensitivity(responses, distortions, {f"{method}, pooled": dict(drops) for method in methods}, made_from)
