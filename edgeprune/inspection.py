"""What a model is and where it would fit, from headers alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from edgeprune.device.profile import find_profile, known_profiles
from edgeprune.errors import Unsupported
from edgeprune.model import ggml, hub
from edgeprune.model.architecture import MOST_EXPERTS, MOST_LAYERS, Architecture, Tensor, read_architecture
from edgeprune.model.checkpoint import EXPERT_TENSOR, Checkpoint, open_checkpoint
from edgeprune.model.converter import Converter, converter_for
from edgeprune.model.download import fetch
from edgeprune.model.gguf import GgufFile
from edgeprune.model.headers import Header
from edgeprune.model.location import HubName, located
from edgeprune.model.planning import OUTPUT
from edgeprune.model.quantised import MXFP4
from edgeprune.model.remote import Budget, remote_checkpoint, remote_header
from edgeprune.model.selection import chosen_gguf, has_checkpoint
from edgeprune.model.values import extra_layers, language_config, lookup, prefix_of
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
    """Facts about a model: labelled figures, bytes by role, and its fit by profile.

    Attributes:
        nbytes: of its weights.
        fetched_bytes: what it took to find out, of a model on the Hub.
    """

    facts: list[tuple[str, str]]
    roles: dict[str, int]
    fits: list[Fit]
    nbytes: int
    fetched_bytes: int = 0

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
    """What ``model`` is: ``demo``, a GGUF file, a checkpoint folder, or one of these on the Hub, of which only the
    headers are fetched.

    Raises:
        UsageError: nothing there.
        Unsupported: a dense model, or a checkpoint without converter.
        EdgepruneError: the Hub cannot be read from.
    """
    place = Path(__file__).resolve().parent / "demo" if model == "demo" else located(model)
    if isinstance(place, HubName):
        if not hub.is_offline():
            return _inspect_remote(place)
        place = fetch(place, lambda done, total: None, lambda text: None)
    if place.is_dir():
        checkpoint = open_checkpoint(place)
        total = sum((place / shard).stat().st_size for shard in set(checkpoint.shard_of.values()))
        return _inspect_checkpoint(checkpoint, total)
    return _inspect_gguf(GgufFile(place))


def _inspect_remote(name: HubName) -> Inspection:
    listing, budget = hub.list_files(name), Budget()
    if name.wanted or not has_checkpoint(listing):
        model = chosen_gguf(listing)
        header = remote_header(listing, model, budget)
        found, whole = _inspect_gguf(header), model.size
        if len(model.files) > 1:
            found.facts.append(("files", f"{len(model.files)} parts"))
    else:
        checkpoint, whole = remote_checkpoint(listing, budget)
        found = _inspect_checkpoint(checkpoint, whole)
    fetched = f"{format_bytes(budget.fetched)} of {format_bytes(whole)} in {budget.requests} requests"
    found.facts.append(("fetched", fetched))
    return replace(found, fetched_bytes=budget.fetched)


def _inspect_gguf(header: Header) -> Inspection:
    """A GGUF's facts."""
    architecture = read_architecture(header)
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


def _inspect_checkpoint(checkpoint: Checkpoint, total: int) -> Inspection:
    """A checkpoint's facts, from the headers of its files, which have ``total`` bytes."""
    checkpoint.require_experts()
    model_type = str(checkpoint.config.get("model_type", ""))
    converter = converter_for(model_type)
    architecture = _sketch(checkpoint, converter)
    experts = sum(tensor.nbytes for tensor in architecture.tensors if tensor.is_expert)
    if not experts:
        raise Unsupported(f"{checkpoint.folder} is a dense {model_type} model: it has no experts to choose from")
    facts = [
        ("checkpoint", str(checkpoint.folder)),
        ("model type", f"{model_type}, becomes {converter.arch}"),
        ("experts", f"{architecture.experts} per layer, {architecture.used} per token"),
        ("parameters", f"{architecture.parameters:,}"),
        ("weights", format_bytes(total)),
    ]
    roles = {"routed experts": experts, "everything else": total - experts}
    return Inspection(facts, roles, _fits(architecture), total)


def _sketch(checkpoint: Checkpoint, converter: Converter) -> Architecture:
    """The checkpoint as far as its size matters: its tensors with the experts of a layer stacked, and the counts that
    limit how many experts may go. What the configuration leaves open is taken so that more seems to fit, not less."""
    config = language_config(converter, checkpoint.config)
    layers = _config_count(config, converter.layers, MOST_LAYERS) or 1
    extra = range(layers, layers + extra_layers(converter, config))
    behind = converter.with_prefix(prefix_of(converter, checkpoint)).left_behind(extra)
    names = [name for name in checkpoint.stored if not any(pattern.fullmatch(name) for pattern in behind.values())]
    tensors = _stacked(checkpoint, names, bool(config.get("tie_word_embeddings")))
    found = max((tensor.matrices for tensor in tensors if tensor.is_expert), default=1)
    experts = _config_count(config, converter.experts, MOST_EXPERTS) or found
    used, groups, groups_used = (
        _config_count(config, converter.metadata[key].config, experts) if key in converter.metadata else 0
        for key in ("expert_used_count", "expert_group_count", "expert_group_used_count")
    )
    return Architecture(
        name=checkpoint.folder.name,
        arch=converter.arch,
        layers=layers,
        experts=experts,
        used=used or 1,
        width=0,
        expert_width=0,
        groups=groups or 1,
        groups_used=groups_used or 1,
        moe_layers=(),
        context_length=0,
        vocabulary=0,
        obstacle="",
        tensors=tensors,
    )


def _config_count(config: dict[str, Any], keys: tuple[str, ...], most: int) -> int:
    """A number from 1 to ``most`` in the configuration, or 0 when there is no such number."""
    value = lookup(config, keys)
    if isinstance(value, list) and len(set(map(str, value))) == 1:  # one for each layer
        value = value[0]
    sensible = isinstance(value, int) and not isinstance(value, bool) and 0 < value <= most
    return int(value) if sensible else 0


def _stacked(checkpoint: Checkpoint, names: Iterable[str], tied: bool) -> tuple[Tensor, ...]:
    """The tensors ``names`` with shapes in ggml's order and the experts of a layer in one, as a GGUF has them."""
    shapes: dict[str, tuple[int, ...]] = {}
    types: dict[str, str] = {}
    for name in names:
        stored = checkpoint.stored[name]
        if name == OUTPUT and tied:  # ignored by the conversion too
            continue
        shape = tuple(reversed(stored.shape)) or (1,)
        expert = EXPERT_TENSOR.search(name)
        if expert and expert[1]:
            name = name[: expert.start(1)] + name[expert.end(1) + 1 :]
            shape = (*shape, shapes[name][-1] + 1 if name in shapes else 1)
        shapes[name], types[name] = shape, _ggml_type(stored.type)
    return tuple(_sized(name, shape, types[name]) for name, shape in shapes.items())


def _ggml_type(safetensors_type: str) -> str:
    """The GGML type of as many bytes; of what neither world knows, the smallest."""
    known = ggml.BY_NAME.get(safetensors_type.replace("U", "I"))
    return known.name if known is not None and (known.is_float or known.name == MXFP4) else "I8"


def _sized(name: str, shape: tuple[int, ...], type_name: str) -> Tensor:
    """A tensor of the checkpoint with the little that its smallest size depends on."""
    is_expert, is_router = EXPERT_TENSOR.search(name) is not None, name.endswith(".gate.weight")
    role = "expert_up" if is_expert and len(shape) == 3 else "router" if is_router else "other"
    return Tensor(
        name=name,
        shape=shape,
        type=type_name,
        nbytes=ggml.tensor_bytes(type_name, shape),
        layer=-1,
        role=role,
        sliced=is_expert or is_router,
        quantisable=len(shape) >= 2 and not is_router and "norm" not in name,
    )
