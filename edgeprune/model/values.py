"""What a converter reads from a checkpoint's configuration: settings, sizes, kinds of layers, metadata."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from edgeprune.errors import BadFile, Unsupported
from edgeprune.model.architecture import MOST_EXPERTS, MOST_LAYERS
from edgeprune.model.checkpoint import Checkpoint
from edgeprune.model.converter import FURTHER, Converter, Field, Requirement, Rule
from edgeprune.model.gguf import Entry, make_entry
from edgeprune.model.transforms import Sizes

MOST_HEADS = 4096
BLOCKS = "block_count"
GROUPING = ("expert_group_count", "expert_group_used_count")
MOST_EXTRA_LAYERS = 16
_ANOTHER_MODEL = "the configuration is of another model, or the download is not complete; get both again"


@dataclass(frozen=True)
class Settings:
    """One checkpoint through the eyes of its converter.

    Attributes:
        converter: with the checkpoint's own prefix in its names.
        config: of the language model, with derived values.
        layers: blocks, without those that predict further tokens.
        extra_layers: blocks behind the last layer that predict further tokens.
        further: how many of these are kept.
        experts: routed experts per layer.
        kinds: of every layer, and of the further blocks that are kept.
        sizes: for transforms.
    """

    converter: Converter
    config: dict[str, Any]
    layers: int
    extra_layers: int
    further: int
    experts: int
    kinds: tuple[frozenset[str], ...]
    sizes: Sizes


def lookup(config: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    """The first of ``keys`` that the configuration has with a value; dots descend into tables."""
    for key in keys:
        value: Any = config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None:
            return value
    return None


def language_config(converter: Converter, config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of the language model, which models that see or hear have in a table of its own."""
    nested = config.get(converter.nested) if converter.nested else None
    merged = {**config, **nested} if isinstance(nested, dict) else dict(config)
    merged["by_layer_type"] = _by_layer_type(merged)
    for key, field in converter.derived.items():
        value = _evaluated(field, merged, f"config.json: {key}")
        if value is not None:
            merged[key] = value
    return merged


def _by_layer_type(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What transformers keeps by layer in ``per_layer_config``, by type of layer.

    Raises:
        Unsupported: layers of one type that differ.
    """
    by_layer, types = config.get("per_layer_config"), config.get("layer_types")
    if not isinstance(by_layer, dict) or not isinstance(types, list):
        return {}
    numbered = {int(key): own for key, own in by_layer.items() if key.isdecimal()}  # "05" in a model of 30 layers
    found: dict[str, dict[str, Any]] = {}
    for layer, kind in enumerate(types):
        own = numbered.get(layer, {})
        if found.setdefault(str(kind), own) != own:
            raise Unsupported(f"config.json: layers of the type {str(kind)[:60]} differ in per_layer_config")
    return found


def read_settings(converter: Converter, checkpoint: Checkpoint, *, mtp: bool = False) -> Settings:
    """What ``converter`` finds in ``checkpoint``.

    Args:
        mtp: count the blocks that predict further tokens among the layers, as kinds of ``FURTHER``, where the
            converter has names for them and the checkpoint has them.

    Raises:
        BadFile: a value is missing or of the wrong kind.
        Unsupported: a value that the target graph does not compute.
    """
    placed = converter.with_prefix(prefix_of(converter, checkpoint))
    config = language_config(converter, checkpoint.config)
    for requirement in converter.require:
        _check(converter, requirement, config)
    layers = _count(config, converter.layers, checkpoint, MOST_LAYERS)
    experts = _count(config, converter.experts, checkpoint, MOST_EXPERTS)
    _check_experts(placed, experts, checkpoint)
    extra = extra_layers(converter, config)
    _check_layers(placed, layers + extra, checkpoint)
    further = _further(placed, extra, checkpoint, layers) if mtp else 0
    kinds = _kinds(placed, config, checkpoint, layers, further)
    return Settings(
        converter=placed,
        config=config,
        layers=layers,
        extra_layers=extra,
        further=further,
        experts=experts,
        kinds=kinds,
        sizes=sizes_of(converter, config, checkpoint),
    )


def _check_layers(placed: Converter, layers: int, checkpoint: Checkpoint) -> None:
    """Hold the number of layers in the configuration against the weights, where these have more.

    Raises:
        BadFile: they have.
    """
    found = 1 + max(_numbers("layer", placed, checkpoint), default=-1)
    if found > layers:
        raise BadFile(f"config.json says {layers} layers, the weights hold {found}", hint=_ANOTHER_MODEL)


def _numbers(what: str, placed: Converter, checkpoint: Checkpoint) -> list[int]:
    """The numbers that stand for ``what``, ``layer`` or ``expert``, in names of the checkpoint's tensors."""
    names = {source.name for own in placed.tensors.values() for source in own if f"{{{what}}}" in source.name}
    spelt = (
        re.escape(name)
        .replace(rf"\{{{what}\}}", r"(\d{1,9})")
        .replace(r"\{layer\}", r"\d+")
        .replace(r"\{expert\}", r"\d+")
        for name in sorted(names)
    )
    pattern = re.compile("|".join(spelt) or r"(?!)")
    found = (pattern.fullmatch(name) for name in checkpoint.stored)
    return [int(match[match.lastindex or 0]) for match in found if match]


def _check_experts(placed: Converter, experts: int, checkpoint: Checkpoint) -> None:
    """Hold the number of experts in the configuration against that in the weights, where the last one has a number,
    or all are stacked.

    Raises:
        BadFile: it is another one.
    """
    found = 1 + max(_numbers("expert", placed, checkpoint), default=-1)
    if not found:
        stacks = [source.name for name, own in placed.tensors.items() if "_exps." in name for source in own]
        named = (name.format(layer=layer, expert=0) for name in stacks for layer in range(MOST_LAYERS))
        shapes = (checkpoint.shape(name) for name in named if name in checkpoint.stored)
        found = next((shape[0] for shape in shapes if len(shape) == 3), 0)
    if found and found != experts:
        raise BadFile(f"config.json says {experts} experts, the weights hold {found}", hint=_ANOTHER_MODEL)


def _further(placed: Converter, extra: int, checkpoint: Checkpoint, layer: int) -> int:
    """How many blocks from ``layer`` predict further tokens, as far as the converter has names for them.

    Args:
        extra: how many the configuration counts; those of some families are one that it does not speak of.

    Raises:
        Unsupported: more than there are names for, because llama.cpp's graph has one.
    """
    own = [source.name for sources in placed.tensors.values() for source in sources if source.kind == FURTHER]
    if not any(name.format(layer=layer, expert=0) in checkpoint.stored for name in own):
        return 0
    if extra > 1 and not any("{layer}" in name for name in own):
        raise Unsupported(
            f"{checkpoint.folder} has {extra} blocks that predict further tokens; llama.cpp's {placed.arch} computes "
            "one",
            hint="--mtp drop leaves them out",
        )
    return extra if placed.extra_layers else 1


def sizes_of(converter: Converter, config: dict[str, Any], checkpoint: Checkpoint) -> Sizes:
    """What transforms need to know. ``config``: of the language model.

    Raises:
        BadFile: a size is missing or no number.
    """
    heads = _count(config, ("num_attention_heads",), checkpoint, MOST_HEADS)
    keys = _count(config, ("num_key_value_heads", "num_attention_heads"), checkpoint, MOST_HEADS)
    named = {name: _size(name, field, config) for name, field in converter.sizes.items()}
    return Sizes(heads, keys, named)


def extra_layers(converter: Converter, config: Mapping[str, Any]) -> int:
    """Blocks behind the last layer that predict further tokens."""
    extra = lookup(config, converter.extra_layers)
    return extra if isinstance(extra, int) and 0 < extra <= MOST_EXTRA_LAYERS else 0


def prefix_of(converter: Converter, checkpoint: Checkpoint) -> str:
    """The first of the converter's prefixes that tensors of the checkpoint have."""
    for prefix in converter.prefixes:
        if any(name.startswith(prefix) for name in checkpoint.stored):
            return prefix
    return converter.prefixes[0]


def _count(config: dict[str, Any], keys: tuple[str, ...], checkpoint: Checkpoint, most: int) -> int:
    """A positive number from the configuration; a huge one would be planned for at length."""
    where = checkpoint.folder / "config.json"
    key = next((key for key in keys if lookup(config, (key,)) is not None), "")
    if not key:
        raise BadFile(f"{where} has none of: {', '.join(keys)}")
    value = _uniform(lookup(config, (key,)), key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= most:
        raise BadFile(f"{where}: {key} = {repr(value)[:40]} is not a number from 1 to {most}")
    return value


def _size(name: str, field: Field, config: dict[str, Any]) -> int:
    value = _evaluated(field, config, f"config.json: {name}")
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise BadFile(f"config.json: {', '.join(field.config) or name} = {repr(value)[:40]} is not a size")
    return value


def _check(converter: Converter, requirement: Requirement, config: dict[str, Any]) -> None:
    if requirement.unless and lookup(config, (requirement.unless,)) is not None:
        return
    value = lookup(config, (requirement.key,))
    if value is None:
        value = requirement.default
    allowed = requirement.allowed
    if requirement.same_as:
        allowed = (*allowed, lookup(config, (requirement.same_as,)))
    if requirement.cycle and (value is None or isinstance(value, list)):
        length = len(value or ())
        allowed = ((list(requirement.cycle) * length)[:length],)
    # An absent key without a default is off, empty or none; what a model needs switched on has to be written down.
    if any(value == wanted or not (value or wanted) for wanted in allowed):
        return
    raise Unsupported(
        f"this {converter.name} checkpoint has {requirement.key} = {repr(value)[:60]}; "
        f"llama.cpp's {converter.arch} assumes {' or '.join(repr(wanted)[:60] for wanted in allowed)}",
        hint="a GGUF of it that someone else has made works without a converter",
    )


# Values.


def _spelt(value: Any) -> str:
    """``value`` as a key of a converter's map."""
    if isinstance(value, list | dict):
        return ""
    return {None: "null", True: "true", False: "false"}.get(value, str(value))


def _mapped(value: Any, field: Field, where: str) -> Any:
    if field.map is None or value is None:
        return value
    if isinstance(value, list):
        return [_mapped(element, field, where) for element in value]
    if _spelt(value) not in field.map and "*" in field.map:
        return field.map["*"]
    if _spelt(value) not in field.map:
        known = ", ".join(field.map)
        raise Unsupported(
            f"{where} = {repr(_spelt(value) or value)[:60]} has no place in llama.cpp", hint=f"known: {known}"
        )
    return field.map[_spelt(value)]


def _computed(field: Field, config: Mapping[str, Any], where: str) -> Any:
    """The operation over its operands, or None when one is absent; ``length`` takes the first that is there."""
    if field.operation == "length":
        listed = lookup(config, tuple(map(str, field.operands)))
        return len(listed) if isinstance(listed, list | str) else None
    operands = [lookup(config, (part,)) if isinstance(part, str) else part for part in field.operands]
    if any(value is None for value in operands):
        return None
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in operands):
        raise BadFile(f"{where}: {', '.join(map(str, field.operands))} are not all numbers")
    if field.operation == "sum":
        return sum(operands)
    if field.operation == "product":
        return math.prod(operands)
    over, under = operands
    if not under:
        raise BadFile(f"{where}: {field.operands[1]} is zero")
    return over // under if isinstance(over, int) and isinstance(under, int) and over % under == 0 else over / under


def _evaluated(field: Field, config: Mapping[str, Any], where: str) -> Any:
    """The field's value, or None."""
    value = lookup(config, field.config)
    computed = value is None and bool(field.operation)
    if computed:
        value = _computed(field, config, where)
    if value is None:
        value = field.default
    value = _mapped(value, field, where)
    whole = field.type.strip("[]")[:1] in ("u", "i") and isinstance(value, float) and math.isfinite(value)
    # As transformers cuts off what is computed; a fraction that is written down is a mistake.
    return int(value) if whole and (computed or value.is_integer()) else value


def _uniform(value: Any, where: str) -> Any:
    """A list in place of one number has to be the same throughout."""
    if not isinstance(value, list):
        return value
    if not value:
        raise BadFile(f"config.json: {where} = [] is an empty list")
    if any(element != value[0] for element in value):
        raise Unsupported(f"config.json: {where} differs between layers, for which llama.cpp has one value")
    return value[0]


def _by_layer(value: Any, settings: Settings, where: str) -> list[Any]:
    """A value for each layer; blocks behind the last one are like it, unless the configuration counts them too."""
    if not isinstance(value, list):
        return [value] * len(settings.kinds)
    if len(value) not in (settings.layers, len(settings.kinds)):
        raise BadFile(f"config.json: {where} has {len(value)} elements for {settings.layers} layers")
    return value + value[-1:] * (len(settings.kinds) - len(value))


def _by_kind(field: Field, settings: Settings, where: str) -> list[Any]:
    values = []
    for layer, kinds in enumerate(settings.kinds):
        source = next((value for kind, value in (field.by_kind or {}).items() if kind in kinds), None)
        value = lookup(settings.config, (source,)) if isinstance(source, str) else source
        if value is None:
            raise BadFile(f"config.json: layer {layer} has no {where}")
        values.append(_by_layer(value, settings, where)[layer])
    return values


def metadata_entries(settings: Settings, where: str) -> list[Entry]:
    """The converter's metadata. ``where``: the configuration's path, for messages.

    Raises:
        BadFile: a value is missing or does not fit its type.
        Unsupported: a value that llama.cpp has no word for.
    """
    entries = []
    for key, field in settings.converter.metadata.items():
        label = field.config[0] if field.config else key
        if field.by_kind is not None:
            value: Any = _by_kind(field, settings, key)
        elif field.layers_of:
            value = sum(field.layers_of in kinds for kinds in settings.kinds)
        else:
            value = _evaluated(field, settings.config, f"{where}: {label}")
            if value is None and field.optional:
                continue
            if value is None:
                raise BadFile(f"{where} has none of: {', '.join(map(str, field.config or field.operands))}")
            array = field.type.startswith("[")
            value = _by_layer(value, settings, label) if array else _uniform(value, label)
        if key == BLOCKS:
            value = len(settings.kinds)
        if key in GROUPING and _all_groups(settings):  # which llama.cpp knows as one group
            value = 1
        try:
            entries.append(make_entry(f"{settings.converter.arch}.{key}", field.type, value))
            sane = not field.type.endswith("f32") or _is_sane(value, key)
        except Exception as error:
            raise BadFile(f"{where}: {label} = {repr(value)[:60]} does not fit {key}") from error
        if not sane:
            raise BadFile(f"{where}: {label} = {repr(value)[:60]} is no {key} that a model can have")
    if settings.further:
        entries.append(make_entry(f"{settings.converter.arch}.nextn_predict_layers", "u32", settings.further))
    return entries


def _all_groups(settings: Settings) -> bool:
    """Whether every token may go to experts of all groups, as if there were none."""
    fields = settings.converter.metadata
    return len({_evaluated(fields[key], settings.config, key) for key in GROUPING if key in fields}) == 1


def _is_sane(value: Any, key: str) -> bool:
    """Whether numbers that become float32 are finite, and an epsilon lies between nothing and everything."""
    most = 1.0 if key.endswith("epsilon") else float(np.finfo(np.float32).max)
    return all(
        abs(number) <= most and (not key.endswith("epsilon") or number >= 0)
        for number in (value if isinstance(value, list) else [value])
    )


# Kinds of layers.


def kinds_by_config(converter: Converter, checkpoint: Checkpoint) -> tuple[frozenset[str], ...]:
    """The kinds of every layer as far as the configuration alone says them.

    Raises:
        BadFile, Unsupported: as ``read_settings``.
    """
    config = language_config(converter, checkpoint.config)
    told = {kind: rule for kind, rule in converter.kinds.items() if rule.rule != "has"}
    layers = _count(config, converter.layers, checkpoint, MOST_LAYERS)
    return _kinds(replace(converter, kinds=told), config, checkpoint, layers, 0)


def _kinds(
    converter: Converter, config: dict[str, Any], checkpoint: Checkpoint, layers: int, further: int
) -> tuple[frozenset[str], ...]:
    found: list[set[str]] = [set() for _ in range(layers)] + [{FURTHER} for _ in range(further)]
    for kind, rule in converter.kinds.items():
        for layer, own in enumerate(found):
            if _is_of(rule, config, checkpoint, layer, own):
                own.add(kind)
    return tuple(map(frozenset, found))


def _is_of(rule: Rule, config: dict[str, Any], checkpoint: Checkpoint, layer: int, earlier: set[str]) -> bool:
    """Whether ``rule`` is true of ``layer``, whose kinds so far are ``earlier``. Lists may end before further
    blocks."""
    if rule.rule == "unless":
        return not earlier & set(rule.keys)
    if rule.rule == "has":
        return any(key.format(layer=layer, expert=0) in checkpoint.stored for key in rule.keys)
    value = lookup(config, rule.keys)
    value = rule.default if value is None else value
    where = f"config.json: {rule.keys[0]}"
    if rule.rule == "when":
        return value in rule.equals
    if rule.rule in ("below", "every"):
        if not isinstance(value, int) or isinstance(value, bool) or value < (rule.rule == "every"):
            raise BadFile(f"{where} = {repr(value)[:40]} is not a number of layers")
        return layer < value if rule.rule == "below" else (layer + 1) % value == 0
    if not isinstance(value, list | str):
        raise BadFile(f"{where} = {repr(value)[:40]} is not a list")
    if rule.rule == "members":
        return layer in value
    if layer >= len(value):
        if FURTHER in earlier:
            return False
        raise BadFile(f"{where} ends before layer {layer}")
    return value[layer] in rule.equals
