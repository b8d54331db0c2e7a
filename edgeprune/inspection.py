"""What a model is and where it would fit, from headers alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from edgeprune.errors import EdgepruneError, Unsupported
from edgeprune.fitting import Fit, Shape, fits
from edgeprune.model import ggml, hub
from edgeprune.model.architecture import MOST_EXPERTS, MOST_LAYERS, Architecture, Tensor, read_architecture
from edgeprune.model.cached import cached
from edgeprune.model.checkpoint import EXPERT_TENSOR, Checkpoint, open_checkpoint, shown
from edgeprune.model.convert import bare_header
from edgeprune.model.converter import Converter, converter_for, own_converter
from edgeprune.model.download import beside_weights, downloaded_earlier, fetch_beside
from edgeprune.model.gguf import GgufFile
from edgeprune.model.headers import Header, read_header
from edgeprune.model.hub import Listing, Unreachable
from edgeprune.model.location import HubName, located
from edgeprune.model.planning import OUTPUT, Conversion
from edgeprune.model.quantised import FP8, MXFP4
from edgeprune.model.remote import Budget, remote_checkpoint, remote_header
from edgeprune.model.selection import chosen_gguf, has_checkpoint
from edgeprune.model.tokenizer import DIFFERENCES_KEY, tokenizer_entries
from edgeprune.model.values import MOST_HEADS, extra_layers, language_config, lookup, prefix_of
from edgeprune.settings import Listener, Silent
from edgeprune.stages.converting import require_convertible
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
_MOST_TOLD = 16  # differences of a tokenizer


@dataclass(frozen=True)
class Inspection:
    """Facts about a model: labelled figures, bytes by role, and its fit by profile.

    Attributes:
        nbytes: of its weights.
        refusal: why nothing can be made of it: llama.cpp does not load it, or it cannot be converted; or None.
        fetched_bytes: what it took to find out, of a model on the Hub.
    """

    facts: list[tuple[str, str]]
    roles: dict[str, int]
    fits: list[Fit]
    nbytes: int
    refusal: EdgepruneError | None = None
    fetched_bytes: int = 0

    def to_json(self) -> dict[str, Any]:
        cause = self.refusal.cause if self.refusal is not None else ""
        return {**asdict(replace(self, refusal=None)), "refusal": cause}


def inspect_model(model: str, listener: Listener | None = None, *, tokenizer: bool = False) -> Inspection:
    """What ``model`` is: ``demo``, a GGUF file, a checkpoint folder, or one of these on the Hub, of which only the
    headers are fetched.

    Args:
        listener: told of a tokenizer that is fetched.
        tokenizer: fetch that of a checkpoint on the Hub, some megabytes, and look at it too.

    Raises:
        UsageError: nothing there.
        Unsupported: a dense model, or a checkpoint without converter.
        EdgepruneError: the Hub cannot be read from.
    """
    place = Path(__file__).resolve().parent / "demo" if model == "demo" else located(model)
    if isinstance(place, HubName):
        if hub.is_offline():
            place = cached(place)
        else:
            listener = listener or Silent()
            try:
                return _inspect_remote(place, listener, tokenizer)
            except Unreachable as error:
                place = downloaded_earlier(place, error, listener.say)
    return _inspect_local(place)


def _inspect_local(place: Path) -> Inspection:
    if place.is_dir():
        checkpoint = open_checkpoint(place)
        total = sum((place / shard).stat().st_size for shard in set(checkpoint.shard_of.values()))
        return _inspect_checkpoint(checkpoint, total, place)
    return _inspect_gguf(GgufFile(place))


def _inspect_remote(name: HubName, listener: Listener, tokenizer: bool) -> Inspection:
    listing, budget = hub.list_files(name), Budget()
    if name.wanted or not has_checkpoint(listing):
        model = chosen_gguf(listing)
        header = remote_header(listing, model, budget)
        found, whole = _inspect_gguf(header), model.size
        if len(model.files) > 1:
            found.facts.append(("files", f"{len(model.files)} parts"))
    else:
        looked = remote_checkpoint(listing, budget)
        whole = looked.nbytes
        folder = _fetched_tokenizer(listing, listener) if tokenizer else None
        found = _inspect_checkpoint(looked.checkpoint, whole, folder)
        if folder is None:
            size = format_bytes(sum(file.size for file in beside_weights(listing)))
            found.facts.append(("tokenizer", f"not looked at; --tokenizer fetches it, at most {size}"))
        if looked.read < looked.files:
            found.facts.append(
                ("headers", f"{looked.read} of {looked.files} read; the other layers are like theirs, to the byte")
            )
    fetched = f"{format_bytes(budget.fetched)} of {format_bytes(whole)} in {budget.requests} requests"
    found.facts.append(("fetched", fetched))
    return replace(found, fetched_bytes=budget.fetched)


def _fetched_tokenizer(listing: Listing, listener: Listener) -> Path:
    with listener.progress("download the tokenizer") as progress:
        return fetch_beside(listing, progress, listener.say)


def _inspect_gguf(header: Header) -> Inspection:
    """A GGUF's facts."""
    architecture = read_architecture(header)
    facts = [("model", architecture.name), ("architecture", architecture.arch), *_numbers(architecture)]
    facts += [("tokenizer", text) for text in _texts(header.get(DIFFERENCES_KEY))]
    return _inspected(facts, architecture, header)


def _texts(found: Any) -> list[str]:
    """Differences of a tokenizer as a file tells them, which may hold anything."""
    texts = found if isinstance(found, list) else []
    return ["".join(c for c in str(text) if c.isprintable())[:300] for text in texts[:_MOST_TOLD]]


def _inspected(facts: list[tuple[str, str]], architecture: Architecture, header: Header) -> Inspection:
    """What is said of a model whose GGUF header is known."""
    roles: dict[str, int] = {}
    for tensor in architecture.tensors:
        role = _NAMED_ROLES[tensor.role]
        roles[role] = roles.get(role, 0) + tensor.nbytes
    found = fits(architecture, header, Shape())
    facts = [*facts, ("KV cache and buffers", found.basis), *found.reasons]
    roles = dict(sorted(roles.items(), key=lambda role: -role[1]))
    return Inspection(facts, roles, found.profiles, architecture.nbytes, found.refusal)


def _numbers(architecture: Architecture) -> list[tuple[str, str]]:
    """What an architecture says of itself."""
    types: dict[str, int] = {}
    for tensor in architecture.tensors:
        types[tensor.type] = types.get(tensor.type, 0) + tensor.nbytes
    counts = ", ".join(map(str, architecture.allowed_counts()))
    facts = [
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
    if architecture.left_out:
        size = format_bytes(sum(tensor.nbytes for tensor in architecture.left_out))
        facts.append(("further tokens", f"blocks of {size} that predict them are left out, unless with --mtp keep"))
    return facts


def _inspect_checkpoint(checkpoint: Checkpoint, total: int, folder: Path | None) -> Inspection:
    """A checkpoint's facts, from the headers of its files, which have ``total`` bytes: those of the GGUF that it
    becomes, or as much as can be said of one that cannot be converted. Its tokenizer is in ``folder``, if here."""
    checkpoint.require_experts()
    model_type = str(checkpoint.config.get("model_type", ""))
    converter = converter_for(model_type)
    facts = [
        ("checkpoint", f"{shown(checkpoint.folder)}, {format_bytes(total)}"),
        ("model type", f"{model_type}, becomes {converter.arch}"),
        *((("converter", str(own)),) if (own := own_converter(model_type)) is not None else ()),
    ]
    stored = dict(checkpoint.stored)
    try:
        planned = require_convertible(checkpoint)
        where = checkpoint.folder / "config.json"
        header = read_header(bare_header(planned, checkpoint.folder.name, str(where)), where)
        architecture = read_architecture(header)
    except EdgepruneError as error:
        checkpoint.stored = stored
        return _inspect_sketch(checkpoint, converter, facts, error)
    facts += [*_numbers(architecture), *(("conversion", remark) for remark in planned.remarks)]
    told, refusal = _told(folder, planned) if folder is not None else ([], None)
    found = _inspected([*facts, *(("tokenizer", text) for text in told)], architecture, header)
    return replace(found, refusal=found.refusal or refusal)


def _told(folder: Path, planned: Conversion) -> tuple[list[str], EdgepruneError | None]:
    """What llama.cpp's tokenizer does otherwise, or why the checkpoint's cannot be converted."""
    try:
        entries = tokenizer_entries(folder, planned.settings.config, planned.vocabulary)
    except EdgepruneError as error:
        return [f"cannot be converted: {error.cause}"], error
    return _texts(next((entry.value() for entry in entries if entry.key == DIFFERENCES_KEY), [])), None


def _inspect_sketch(
    checkpoint: Checkpoint, converter: Converter, facts: list[tuple[str, str]], refusal: EdgepruneError
) -> Inspection:
    """What there is to say of a checkpoint that cannot be converted, and why."""
    architecture = _sketch(checkpoint, converter)
    experts = sum(tensor.nbytes for tensor in architecture.tensors if tensor.is_expert)
    if not experts:
        model_type = str(checkpoint.config.get("model_type", ""))
        raise Unsupported(f"{checkpoint.folder} is a dense {model_type} model: it has no experts to choose from")
    config = language_config(converter, checkpoint.config)
    heads = _config_count(config, ("num_key_value_heads", "num_attention_heads"), MOST_HEADS)
    queries, width = (_config_count(config, (key,), 1 << 24) for key in ("num_attention_heads", "hidden_size"))
    head = _config_count(config, ("head_dim",), 1 << 20) or (width // queries if queries else 0)
    vocabulary = _config_count(config, ("vocab_size",), 1 << 24)
    shape = Shape(_config_count(config, converter.layers, MOST_LAYERS), heads, head, vocabulary)
    cause = "because there is no GGUF that llama.cpp could be asked about"
    found = fits(architecture, None, shape, cause, "cannot be converted; by its size: ")
    facts += [
        ("conversion", f"refused: {refusal.cause}"),
        ("experts", f"{architecture.experts} per layer, {architecture.used} per token"),
        ("parameters", f"{architecture.parameters:,}"),
        ("weights", format_bytes(architecture.nbytes)),
        ("KV cache and buffers", found.basis),
    ]
    roles = {"routed experts": experts, "everything else": architecture.nbytes - experts}
    return Inspection(facts, roles, found.profiles, architecture.nbytes, refusal)


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
        if name == OUTPUT and tied:  # by rule a copy, which the conversion leaves out
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
    if safetensors_type == FP8:  # becomes
        return "BF16"
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
