"""The model as numbers: what a GGUF header says about layers, experts, router and tensors.

Dimension letters used throughout edgeprune: ``L`` layers, ``E`` experts, ``K`` kept experts,
``k`` experts used per token, ``D`` model width, ``F`` expert width, ``T`` tokens.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeprune.errors import BadFile, Unsupported
from edgeprune.model.headers import Header, TensorInfo
from edgeprune.model.parts import stem
from edgeprune.model.widths import UNKNOWN, WidthRule, width_rule

# Weights that every llama.cpp backend multiplies with in any type. Everything else (norms, routers,
# convolutions, state-space vectors, lookup tables) keeps the type it has.
_QUANTISABLE = re.compile(
    r"(?:blk\.\d+\.(?:attn_(?:q|k|v|kv|qkv|output|output_a|output_b|gate|q_a|q_b|kv_a_mqa|kv_b|k_b|v_b)"
    r"|ffn_(?:gate|up|down)(?:_exps|_shexp|_chexps)?|ffn_gate_up_exps|ffn_(?:latent|routed)_(?:down|up)"
    r"|shortconv\.(?:in_proj|out_proj)|ssm_in|ssm_out)|token_embd|output)\.weight"
)
_LAYER = re.compile(r"blk\.(\d+)\.(.+)")
_EXPERT_WEIGHT = re.compile(r"ffn_(gate|up|down|gate_up)_exps\.weight")
_EXPERT_VECTOR = re.compile(r"ffn_(gate|up|down|gate_up)_exps\.(bias|scale|input_scale)")
_CHANNEL_BIAS = re.compile(r"ffn_(gate|up|gate_up)_exps\.bias")
# gemma4's ffn_gate_inp.scale is a vector over the model width, not over experts.
_ROUTER = re.compile(r"ffn_gate_inp\.(weight|bias)|exp_probs_b(\.bias)?|exp_probs_b_vl\.bias")
# Architectures with experts whose outputs are no next tokens that could be compared.
_NO_LANGUAGE_MODELS = {"nomic-bert-moe": "is an encoder", "dflash": "drafts for another model"}
# Hard limits of llama.cpp (src/llama-hparams.h); beyond them it aborts its process.
MOST_EXPERTS = 1024
MOST_LAYERS = 512
_ANOTHER_MODEL = "the numbers are of another model than the weights, or the file is damaged; get it again"


@dataclass(frozen=True)
class Tensor:
    """A tensor and its part in the model.

    Attributes:
        shape: extents in ggml's order: row width first, experts last.
        layer: block index, or -1 outside the blocks.
        role: ``expert_gate``, ``expert_up``, ``expert_gate_up``, ``expert_down``, ``expert_vector``,
            ``router``, ``attention``, ``shared``, ``dense``, ``embedding``, ``output``, ``norm`` or ``other``.
        sliced: the last axis counts experts, so dropping experts shortens it.
        quantisable: may be given any type whose block divides the row width.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    nbytes: int
    layer: int
    role: str
    sliced: bool
    quantisable: bool

    @property
    def retypable(self) -> bool:
        """Whether llama.cpp's own quantizer might give it another type: a matrix, but no norm, router, table or
        convolution."""
        left_alone = self.role in ("norm", "router") or any(
            part in self.name for part in ("tid2eid", "conv1d", ".conv.")
        )
        return len(self.shape) >= 2 and self.name.endswith(".weight") and not left_alone

    @property
    def is_expert(self) -> bool:
        return self.role in ("expert_gate", "expert_up", "expert_gate_up", "expert_down")

    @property
    def matrices(self) -> int:
        """Independent matrices in the tensor: experts for expert tensors, else 1 or the outer extent."""
        return self.shape[2] if len(self.shape) > 2 else 1

    @property
    def channels(self) -> tuple[int, int] | None:
        """The axis that counts an expert's channels, and how often over (2 where gate and up are one tensor); None
        where no axis does."""
        if self.role == "expert_down":
            return 0, 1
        if self.is_expert:
            return 1, 2 if self.role == "expert_gate_up" else 1
        biased = _CHANNEL_BIAS.search(self.name) if self.role == "expert_vector" else None
        return (0, 2 if biased[1] == "gate_up" else 1) if biased else None

    def kept_shape(self, kept: int, width: int = 0) -> tuple[int, ...]:
        """Shape after dropping all but ``kept`` experts, and all but ``width`` channels of each unless that is 0."""
        shape = [*self.shape[:-1], kept] if self.sliced else list(self.shape)
        if width and self.channels is not None:
            axis, times = self.channels
            shape[axis] = times * width
        return tuple(shape)


@dataclass(frozen=True)
class Architecture:
    """What matters about a model for pruning, sizing and placing it; read from the header alone.

    Attributes:
        name: of the model, for people.
        arch: llama.cpp's architecture string.
        layers: transformer blocks (L), without those that predict further tokens.
        experts: routed experts per MoE layer (E).
        used: experts per token (k).
        width: of the residual stream (D).
        expert_width: hidden width of one expert (F).
        groups: routing groups; 1 means ungrouped.
        groups_used: routing groups that a token may choose from.
        moe_layers: block indices that have routed experts, of the L blocks that text goes through.
        context_length: trained context, tokens.
        vocabulary: tokens.
        obstacle: why experts of this model cannot be dropped, or "".
        tensors: in file order; those of blocks that predict further tokens only where these are kept.
        left_out: tensors of such blocks where they are not kept.
        width_rule: whether and how experts can be made narrower.
    """

    name: str
    arch: str
    layers: int
    experts: int
    used: int
    width: int
    expert_width: int
    groups: int
    groups_used: int
    moe_layers: tuple[int, ...]
    context_length: int
    vocabulary: int
    obstacle: str
    tensors: tuple[Tensor, ...]
    left_out: tuple[Tensor, ...] = ()
    width_rule: WidthRule = UNKNOWN

    @property
    def further_moe_layers(self) -> tuple[int, ...]:
        """Kept blocks that predict further tokens and have routed experts. No text goes through them here."""
        return tuple(
            sorted({tensor.layer for tensor in self.tensors if tensor.is_expert and tensor.layer >= self.layers})
        )

    @property
    def sliced_layers(self) -> tuple[int, ...]:
        """Blocks that have one number of experts."""
        return (*self.moe_layers, *self.further_moe_layers)

    @property
    def parameters(self) -> int:
        return sum(int(np.prod(tensor.shape, dtype=np.int64)) for tensor in self.tensors)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def tensor(self, name: str) -> Tensor:
        return next(tensor for tensor in self.tensors if tensor.name == name)

    def allowed_counts(self) -> tuple[int, ...]:
        """Numbers of experts per layer worth trying, all experts first.

        Powers of two and multiples of 32 suit the kernels (CUDA's fused top-k exists for powers of
        two); small models get finer steps. Every count keeps the router's rules: at least the used
        experts, equal counts per group, two or more per group.
        """
        if self.obstacle:
            return (self.experts,)
        step = 32 if self.experts > 64 else 16 if self.experts > 32 else 8 if self.experts > 16 else 2
        counts = set(range(step, self.experts, step)) | {2**power for power in range(11)}
        return (
            self.experts,
            *sorted((n for n in counts if n < self.experts and self.count_allowed(n)), reverse=True),
        )

    def count_allowed(self, kept: int) -> bool:
        """Whether llama.cpp loads and routes correctly with ``kept`` experts per layer."""
        if kept == self.experts:
            return True
        if self.obstacle or not self.used <= kept < self.experts:
            return False
        if self.groups <= 1:
            return True
        per_group = kept // self.groups
        return kept % self.groups == 0 and per_group >= 2 and per_group * self.groups_used >= self.used


def _role(name: str) -> tuple[int, str, bool]:
    """(layer, role, sliced) of the tensor called ``name``."""
    match = _LAYER.fullmatch(name)
    if match is None:
        outer = {"token_embd.weight": "embedding", "output.weight": "output"}
        return -1, outer.get(name, "norm" if "norm" in name else "other"), False
    layer, rest = int(match[1]), match[2]
    if expert := _EXPERT_WEIGHT.fullmatch(rest):
        return layer, f"expert_{expert[1]}", True
    if _EXPERT_VECTOR.fullmatch(rest):
        return layer, "expert_vector", True
    if _ROUTER.fullmatch(rest):
        return layer, "router", True
    if "norm" in rest:
        return layer, "norm", False
    if rest.startswith("attn_"):
        return layer, "attention", False
    if "shexp" in rest:
        return layer, "shared", False
    if re.fullmatch(r"ffn_(gate|up|down)\.weight", rest):
        return layer, "dense", False
    return layer, "other", False


def takes_any_type(name: str, dimensions: int) -> bool:
    """Whether llama.cpp multiplies with the tensor called ``name`` in any type; the others stay as they are."""
    return dimensions >= 2 and _QUANTISABLE.fullmatch(name) is not None


def _described(info: TensorInfo) -> Tensor:
    layer, role, sliced = _role(info.name)
    return Tensor(
        name=info.name,
        shape=info.shape,
        type=info.type,
        nbytes=info.nbytes,
        layer=layer,
        role=role,
        sliced=sliced,
        quantisable=takes_any_type(info.name, len(info.shape)),
    )


def _dimensions(tensor: Tensor) -> int:
    """How many extents a tensor of this role has; those that nothing depends on keep theirs."""
    if tensor.is_expert:
        return 3
    return 2 if tensor.role == "embedding" else len(tensor.shape)


def _printable(name: Any) -> str:
    """A model's own name without line breaks and terminal codes, or ""."""
    return "".join(c for c in name if c.isprintable())[:120].strip() if isinstance(name, str) else ""


def _scalar(file: Header, key: str, default: int) -> int:
    """A metadata number that may be a per-layer array; the first layer counts (facts of llama.cpp)."""
    value = file.get(key, default)
    try:
        return int(value[0]) if isinstance(value, np.ndarray) else int(value)
    except (TypeError, ValueError, IndexError, OverflowError):
        raise BadFile(f"{file.path}: metadata {key} is not a number") from None


def _obstacle(file: Header, arch: str, tensors: tuple[Tensor, ...]) -> str:
    """Why dropping experts would be unsafe for this file, or ""."""
    names = {tensor.name for tensor in tensors}
    if any("chexps" in name for name in names):
        return "its experts share chunk experts (grovemoe)"
    if any("tid2eid" in name for name in names):
        return "some layers route by a token table"
    if arch == "llama4" and _scalar(file, f"{arch}.expert_count", 0) == 128:
        return "llama.cpp takes another number of experts than 128 for a Llama 4 that normalises queries and keys"
    if isinstance(file.get(f"{arch}.expert_used_count"), np.ndarray):
        return "its experts per token vary by layer"
    return ""


def _width_rule(file: Header, arch: str, tensors: tuple[Tensor, ...], obstacle: str, layers: int) -> WidthRule:
    """How the experts can be made narrower; what stands in the way of dropping them leaves too little known of them
    for this, too."""
    expert_widths = frozenset(t.shape[0] for t in tensors if t.role == "expert_down")
    shared_widths = frozenset(t.shape[0] for t in tensors if t.name.endswith("ffn_down_shexp.weight"))
    if any(t.is_expert and t.layer >= layers for t in tensors):
        obstacle = obstacle or "its kept blocks that predict further tokens have experts that no text goes through"
    if obstacle:
        return WidthRule(obstacle, max(expert_widths, default=0))
    dense = any(t.role == "dense" for t in tensors)
    return width_rule(file, arch, expert_widths, shared_widths, dense=dense)


def read_architecture(file: Header, *, mtp: bool = False) -> Architecture:
    """The architecture that the header of ``file`` describes.

    Args:
        mtp: with the blocks behind the last layer that predict further tokens.

    Raises:
        BadFile: metadata that contradict the tensors, or that llama.cpp would abort on.
        Unsupported: not a Mixture-of-Experts model.
    """
    arch = file.get("general.architecture")
    if not isinstance(arch, str) or not re.fullmatch(r"[\w.-]{1,64}", arch):
        raise BadFile(f"{file.path} names no architecture; it is no language model")
    tensors = tuple(_described(info) for info in file.tensors.values())
    experts = _scalar(file, f"{arch}.expert_count", 0)
    blocks = _scalar(file, f"{arch}.block_count", 0)
    layers = blocks - _scalar(file, f"{arch}.nextn_predict_layers", 0)
    expert_tensors = [tensor for tensor in tensors if tensor.is_expert]
    if experts == 0 or not expert_tensors:
        raise Unsupported(
            f"{file.path.name} is a dense {arch} model: it has no experts to choose from",
            hint="use llama-quantize for dense models",
        )
    if arch in _NO_LANGUAGE_MODELS:
        raise Unsupported(f"{file.path.name} is a {arch} model, which {_NO_LANGUAGE_MODELS[arch]}")
    used = _scalar(file, f"{arch}.expert_used_count", 0)
    groups = _scalar(file, f"{arch}.expert_group_count", 1)
    groups_used = _scalar(file, f"{arch}.expert_group_used_count", 0)
    if not (0 < layers <= MOST_LAYERS and 0 < experts <= MOST_EXPERTS and 0 < used <= experts):
        raise BadFile(
            f"{file.path}: impossible metadata: {layers} layers, {experts} experts, {used} used per token",
            hint=_ANOTHER_MODEL,
        )
    found = 1 + max(tensor.layer for tensor in tensors)
    if found > blocks:
        raise BadFile(
            f"{file.path}: the metadata count {blocks} blocks, the tensors are of {found}", hint=_ANOTHER_MODEL
        )
    if groups > 1 and (groups >= experts or experts % groups or not 0 < groups_used < groups):
        raise BadFile(f"{file.path}: impossible routing groups: {groups_used} of {groups} over {experts} experts")
    for tensor in tensors:
        if tensor.sliced and tensor.shape[-1] != experts:
            raise BadFile(
                f"{file.path}: {tensor.name} has {tensor.shape[-1]} experts, the metadata {experts}",
                hint=_ANOTHER_MODEL,
            )
        if len(tensor.shape) != _dimensions(tensor):
            raise BadFile(f"{file.path}: {tensor.name} has the impossible shape {list(tensor.shape)}")
    left_out = () if mtp else tuple(tensor for tensor in tensors if tensor.layer >= layers)
    tensors = tuple(tensor for tensor in tensors if mtp or tensor.layer < layers)
    expert_tensors = [tensor for tensor in tensors if tensor.is_expert and tensor.layer < layers]
    if not expert_tensors:
        raise Unsupported(f"{file.path.name} has experts only in blocks that predict further tokens")
    down = next((t for t in expert_tensors if t.role == "expert_down"), expert_tensors[0])
    embedding = next((t for t in tensors if t.role == "embedding"), None)
    return Architecture(
        name=_printable(file.get("general.name")) or stem(file.path),
        arch=arch,
        layers=layers,
        experts=experts,
        used=used,
        width=_scalar(file, f"{arch}.embedding_length", 0),
        expert_width=down.shape[0],
        groups=max(groups, 1),
        groups_used=max(groups_used, 1),
        moe_layers=tuple(sorted({tensor.layer for tensor in expert_tensors})),
        context_length=_scalar(file, f"{arch}.context_length", 0),
        vocabulary=embedding.shape[1] if embedding else 0,
        obstacle=(obstacle := _obstacle(file, arch, tensors)),
        tensors=tensors,
        left_out=left_out,
        width_rule=_width_rule(file, arch, tensors, obstacle, layers),
    )
