"""What a model is and where it would fit, from headers alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgeprune.device.profile import find_profile, known_profiles
from edgeprune.errors import Unsupported, UsageError
from edgeprune.model import ggml
from edgeprune.model.architecture import Architecture, read_architecture
from edgeprune.model.checkpoint import open_checkpoint
from edgeprune.model.converter import converter_for
from edgeprune.model.gguf import GgufFile
from edgeprune.units import format_bytes

_NAMED_ROLES = {
    "expert_gate": "routed experts",
    "expert_up": "routed experts",
    "expert_gate_up": "routed experts",
    "expert_down": "routed experts",
    "expert_vector": "routed experts",
    "shared": "shared experts",
    "dense": "dense layers",
    "attention": "attention",
    "embedding": "embeddings",
    "output": "output",
    "router": "routers",
    "norm": "norms",
    "other": "other",
}
# Smallest useful types, for the question whether a model can be made to fit at all.
_SMALLEST_EXPERT, _SMALLEST_OTHER = "IQ1_S", "IQ2_XXS"


@dataclass(frozen=True)
class Fit:
    """Whether a model's weights fit a profile: ``as it is``, ``quantised``, ``pruned`` or ``no``.

    Only weights are counted here; ``edgeprune plan`` also counts the KV cache and buffers.
    """

    profile: str
    usable_bytes: int
    verdict: str


@dataclass(frozen=True)
class Inspection:
    """Facts about a model: labelled figures, bytes by role, and its fit by profile."""

    facts: list[tuple[str, str]]
    roles: dict[str, int]
    fits: list[Fit]
    nbytes: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def _smallest_bytes(architecture: Architecture, kept: int) -> int:
    """Bytes with ``kept`` experts and the smallest types that divide the rows."""
    total = 0
    for tensor in architecture.tensors:
        shape = tensor.kept_shape(kept)
        kind = tensor.type
        if tensor.quantisable:
            small = _SMALLEST_EXPERT if tensor.is_expert else _SMALLEST_OTHER
            candidates = [n for n in (small, "IQ4_NL") if shape[0] % ggml.BY_NAME[n].block == 0]
            kind = candidates[0] if candidates else kind
        total += min(ggml.tensor_bytes(kind, shape), ggml.tensor_bytes(tensor.type, shape))
    return total


def _fits(architecture: Architecture) -> list[Fit]:
    whole = architecture.nbytes
    counts = architecture.allowed_counts()
    quantised = _smallest_bytes(architecture, architecture.experts)
    pruned = _smallest_bytes(architecture, min(counts))
    fits = []
    for name in known_profiles():
        usable = find_profile(name).usable_bytes
        if whole <= usable:
            verdict = "as it is"
        elif quantised <= usable:
            verdict = "quantised"
        elif pruned <= usable:
            verdict = "pruned and quantised"
        else:
            verdict = f"no, short of {format_bytes(pruned - usable)}"
        fits.append(Fit(name, usable, verdict))
    return fits


def inspect_model(model: str) -> Inspection:
    """What the GGUF file or checkpoint folder ``model`` is.

    Raises:
        UsageError: nothing there.
        Unsupported: a dense model, or a checkpoint without converter.
    """
    path = Path(__file__).resolve().parent / "demo" if model == "demo" else Path(model)
    if path.is_dir():
        return _inspect_checkpoint(path)
    if not path.is_file():
        raise UsageError(f"no model at {model}", hint="give `demo`, a checkpoint folder or a GGUF file")
    architecture = read_architecture(GgufFile(path))
    roles: dict[str, int] = {}
    for tensor in architecture.tensors:
        role = _NAMED_ROLES[tensor.role]
        roles[role] = roles.get(role, 0) + tensor.nbytes
    types: dict[str, int] = {}
    for tensor in architecture.tensors:
        types[tensor.type] = types.get(tensor.type, 0) + tensor.nbytes
    counts = ", ".join(map(str, architecture.allowed_counts()))
    facts = [
        ("model", architecture.name),
        ("architecture", architecture.arch),
        ("layers", f"{architecture.layers}, {len(architecture.moe_layers)} with experts"),
        ("experts", f"{architecture.experts} per layer, {architecture.used} per token"),
        (
            "experts that may be kept",
            counts if not architecture.obstacle else f"all: {architecture.obstacle}",
        ),
        ("widths", f"model {architecture.width}, expert {architecture.expert_width}"),
        ("vocabulary", f"{architecture.vocabulary:,}"),
        ("context", f"{architecture.context_length:,} tokens"),
        ("parameters", f"{architecture.parameters:,}"),
        ("weights", format_bytes(architecture.nbytes)),
        ("types", ", ".join(f"{name} {format_bytes(n)}" for name, n in types.items())),
    ]
    return Inspection(
        facts, dict(sorted(roles.items(), key=lambda i: -i[1])), _fits(architecture), architecture.nbytes
    )


def _inspect_checkpoint(path: Path) -> Inspection:
    """A checkpoint's facts; its header-only conversion gives the rest."""
    checkpoint = open_checkpoint(path)
    model_type = str(checkpoint.config.get("model_type", ""))
    converter = converter_for(model_type)
    import math

    sizes = {name: checkpoint.shape(name) for name in checkpoint.shard_of}
    total = sum((path / shard).stat().st_size for shard in set(checkpoint.shard_of.values()))
    experts = sum(math.prod(shape) for name, shape in sizes.items() if "experts" in name)
    everything = sum(math.prod(shape) for shape in sizes.values())
    if not experts:
        raise Unsupported(f"{path} is a dense {model_type} model: it has no experts to choose from")
    facts = [
        ("checkpoint", str(path)),
        ("model type", f"{model_type}, becomes {converter.arch}"),
        ("parameters", f"{everything:,}"),
        ("weights", format_bytes(total)),
    ]
    share = experts / everything
    roles = {"routed experts": int(total * share), "everything else": int(total * (1 - share))}
    fits = [
        Fit(name, usable, "as it is" if total <= usable else "after fitting; see `edgeprune plan`")
        for name in known_profiles()
        for usable in [find_profile(name).usable_bytes]
    ]
    return Inspection(facts, roles, fits, total)
