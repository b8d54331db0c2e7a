"""Reading ``converters/<model_type>.toml``: what one architecture is called in each world.

The user's own files in the configuration folder win over the shipped ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgeprune.device.lookup import known_files, user_folder
from edgeprune.errors import BadFile, Unsupported
from edgeprune.files import check_keys, data_folder, read_toml
from edgeprune.model.gguf import TYPE_IDS
from edgeprune.model.transforms import TRANSFORMS

# Families that llama.cpp runs, but computes otherwise than the authors' code, and what it cost on a toy model.
COMPUTED_OTHERWISE = {
    "phimoe": "it renormalises the weights of the chosen experts, of which Phi-3.5-MoE gives nearly 1 to each, "
    "and its norms do not subtract the mean; together 0.46 nats per token on a toy model",
}
_KIND = "converters"
PREFIX = "{model}"  # in names of checkpoint tensors: whatever stands before "embed_tokens" in this checkpoint
OPERATIONS = ("sum", "product", "quotient", "length")
FURTHER = "further"  # the kind of blocks behind the last layer that predict further tokens, where they are kept
# How the layers that are of a kind are found; each rule is one of these.
RULES = ("below", "every", "members", "list", "unless", "has", "when")


@dataclass(frozen=True)
class Source:
    """Where a GGUF tensor may come from.

    Attributes:
        name: template with ``{layer}`` and ``{expert}``.
        transform: one of ``TRANSFORMS``.
        kind: of the layers that it is for; "" for all.
    """

    name: str
    transform: str
    kind: str = ""


@dataclass(frozen=True)
class Field:
    """A value from the configuration.

    Attributes:
        type: of the GGUF entry; one in brackets is an array with an element for each layer.
        config: configuration keys, tried in order.
        operation, operands: computed from keys and numbers when no key is there; one of ``OPERATIONS``.
        layers_of: a kind, whose layers are counted.
        default: when neither is there; None for no default. A field with nothing else is a constant.
        map: from the configuration's words to llama.cpp's numbers or words; others are refused, unless ``*`` is
            there.
        by_kind: for an array: the key or number for the layers of each kind, the first that fits.
        optional: may be absent.
    """

    type: str
    config: tuple[str, ...] = ()
    operation: str = ""
    operands: tuple[str | int | float, ...] = ()
    layers_of: str = ""
    default: Any = None
    map: Mapping[str, Any] | None = None
    by_kind: Mapping[str, str | int | float] | None = None
    optional: bool = False


@dataclass(frozen=True)
class Requirement:
    """Values of a configuration key that the target graph assumes.

    Attributes:
        allowed: one of these; or, where it is
        cycle: for a list with an element for each layer, these over and over; an absent list is taken for right.
        same_as: the value of another key.
        default: the value of an absent key.
        unless: another key, whose presence makes this one say nothing.
    """

    key: str
    allowed: tuple[Any, ...] = ()
    cycle: tuple[Any, ...] = ()
    same_as: str = ""
    default: Any = None
    unless: str = ""


@dataclass(frozen=True)
class Rule:
    """Which layers are of a kind.

    Attributes:
        rule: ``below`` a number in the configuration; ``every`` so many-th; ``members`` of a list of indices;
            ``list``: those whose element of a list (or letter of a text) is one of ``equals``; ``unless`` of one of
            these kinds; ``has`` a tensor; all or none of them ``when`` a key has a value.
        keys: of the configuration; kinds for ``unless``, a template for ``has``.
        equals: values for ``list`` and ``when``.
        default: of an absent key.
    """

    rule: str
    keys: tuple[str, ...]
    equals: tuple[Any, ...]
    default: Any


@dataclass(frozen=True)
class Rope:
    """Where the settings of the rotary embedding are, and which of them llama.cpp's graph computes alike.

    Attributes:
        rotary: whether there is one.
        parameters: tables of the configuration, tried in order.
        base: base frequency of a configuration that names none, or None where it has to.
        scaling: kinds of scaling that are right in this graph.
        known: further settings in the table that are read elsewhere.
        log_multiplier: YaRN scales the attention by ``mscale_all_dim`` (DeepSeek).
        sections: pairs of dimensions that turn with time, height and width, where the configuration names none;
            empty for a rotation by one position.
    """

    rotary: bool = True
    parameters: tuple[str, ...] = ("rope_parameters", "rope_scaling")
    base: float | None = None
    scaling: tuple[str, ...] = ("linear", "yarn")
    known: tuple[str, ...] = ()
    log_multiplier: bool = False
    sections: tuple[int, ...] = ()


@dataclass(frozen=True)
class Converter:
    """One architecture in Hugging Face and in GGUF.

    Attributes:
        name: ``model_type`` of the configuration.
        aliases: other values of ``model_type`` for the same model.
        arch: llama.cpp's architecture string.
        layers, experts: configuration keys, tried in order.
        extra_layers: keys for the number of blocks behind the last layer that predict further tokens; without any,
            the one whose names are those of tensors of the kind ``FURTHER``.
        nested: table of the configuration that describes the language model, "" for the top one.
        prefixes: what ``{model}`` in names may stand for.
        require: configuration values that the target graph assumes.
        derived: values computed from the configuration, in order, that count as keys of it from then on.
        sizes: numbers that transforms ask for by name.
        kinds: rules by kind of layer.
        rope: of the rotary embedding.
        metadata: GGUF key (without the architecture's prefix) to its source.
        tensors: GGUF name template to alternatives, the first present one wins.
        optional: GGUF names that may have no source.
        left_out: what it is to name patterns of tensors that stay behind; ``{extra}`` is an extra layer.
    """

    name: str
    aliases: tuple[str, ...]
    arch: str
    layers: tuple[str, ...]
    experts: tuple[str, ...]
    extra_layers: tuple[str, ...]
    nested: str
    prefixes: tuple[str, ...]
    require: tuple[Requirement, ...]
    derived: dict[str, Field]
    sizes: dict[str, Field]
    kinds: dict[str, Rule]
    rope: Rope
    metadata: dict[str, Field]
    tensors: dict[str, tuple[Source, ...]]
    optional: frozenset[str]
    left_out: dict[str, tuple[str, ...]]

    def with_prefix(self, prefix: str) -> Converter:
        """The same with ``prefix`` for ``{model}`` in all names."""

        def placed(texts: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(text.replace(PREFIX, prefix) for text in texts)

        def moved(source: Source) -> Source:
            return replace(source, name=source.name.replace(PREFIX, prefix))

        return replace(
            self,
            kinds={kind: replace(rule, keys=placed(rule.keys)) for kind, rule in self.kinds.items()},
            tensors={name: tuple(map(moved, sources)) for name, sources in self.tensors.items()},
            left_out={what: placed(patterns) for what, patterns in self.left_out.items()},
        )

    def left_behind(self, extra: Iterable[int]) -> dict[str, re.Pattern[str]]:
        """Which names of tensors are left out, by what they are. ``extra``: indices of the extra layers."""
        found = {}
        for what, patterns in self.left_out.items():
            spelt = [
                pattern.replace("{extra}", str(layer))
                for pattern in patterns
                for layer in (extra if "{extra}" in pattern else (0,))
            ]
            found[what] = re.compile("|".join(re.escape(each).replace(r"\*", ".*") for each in spelt) or r"(?!)")
        return found


_MEND = "mend this file; README, Add a family, says what belongs into one"


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """A block that reads the converter in ``path``, which may be a user's: what is wrong with it becomes one line."""
    try:
        yield
    except BadFile as error:
        error.hint = error.hint or _MEND
        raise
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        cause = f"{path} holds a value of another kind than it should: {str(error)[:100]}"
        raise BadFile(cause, hint=_MEND) from error


def _list(where: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise BadFile(f"{where} = {str(value)[:40]!r} is not a list")
    return value


def _template(where: str, name: Any, **places: int) -> str:
    """A name with places for numbers, and no other ones."""
    try:
        str(name).replace(PREFIX, "").format(**places)
        sound = isinstance(name, str)
    except (LookupError, ValueError):
        sound = False
    if not sound:
        known = ", ".join(f"{{{place}}}" for place in places)
        raise BadFile(f"{where}: {str(name)[:80]!r} is no name with places for {known}")
    return str(name)


def _text(where: str, value: Any) -> str:
    if not isinstance(value, str):
        raise BadFile(f"{where} = {str(value)[:40]!r} is not a text")
    return value


def _texts(where: str, value: Any) -> tuple[str, ...]:
    """One text or a list of them."""
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not values or not all(isinstance(text, str) for text in values):
        raise BadFile(f"{where} is neither a text nor a list of texts")
    return tuple(values)


def _sources(where: str, alternatives: Any, kind: str) -> tuple[Source, ...]:
    sources = []
    for alternative in _list(where, alternatives):
        check_keys(where, alternative, {"name"}, {"transform"})
        transform = alternative.get("transform", "keep")
        if transform not in TRANSFORMS:
            raise BadFile(f"{where}: unknown transform {transform}", hint=f"known: {', '.join(TRANSFORMS)}")
        name = _template(where, alternative["name"], layer=0, expert=0)
        sources.append(Source(name, transform, kind))
    if not sources:
        raise BadFile(f"{where}: no source")
    return tuple(sources)


def _tensors(path: Path, table: dict[str, Any], kinds: Mapping[str, Rule]) -> dict[str, tuple[Source, ...]]:
    """All tensors with their sources; those of one name for layers of several kinds come together."""
    found: dict[str, tuple[Source, ...]] = {}
    groups = [("", table["tensors"]), ("", table.get("optional_tensors", {})), *table.get("tensors_of", {}).items()]
    for kind, group in groups:
        if kind and kind not in (*kinds, FURTHER):
            raise BadFile(f"{path}: tensors of the unknown kind {kind}", hint=f"known: {', '.join(kinds)}")
        for name, entry in group.items():
            _template(str(path), name, layer=0)
            found[name] = (*found.get(name, ()), *_sources(f"{path}: {name}", entry, kind))
    return found


def _field(where: str, entry: Any, kinds: Mapping[str, Rule], kind: str | None = None) -> Field:
    """A field; its type is written in it, unless ``kind`` says it."""
    optional = {"config", "value", "default", "map", "by_kind", "layers_of", "optional", *OPERATIONS}
    check_keys(where, entry, {"type"} if kind is None else set(), optional)
    kind = entry["type"] if kind is None else kind
    if not isinstance(kind, str) or (kind[1:-1] if kind.startswith("[") else kind) not in TYPE_IDS:
        raise BadFile(f"{where} has the unknown type {kind}")
    operations = [name for name in OPERATIONS if name in entry]
    if len(operations) > 1 or ("value" in entry and len(entry) > ("type" in entry) + 1):
        raise BadFile(f"{where} is described in more than one way")
    by_kind = entry.get("by_kind")
    if by_kind is not None and (not kind.startswith("[") or set(by_kind) - {*kinds, FURTHER}):
        raise BadFile(f"{where}: by_kind is for arrays, by the kinds {', '.join(kinds)}")
    if not isinstance(entry.get("map", {}), dict):
        raise BadFile(f"{where}: map is not a table")
    field = Field(
        type=kind,
        config=_texts(where, entry["config"]) if "config" in entry else (),
        operation=operations[0] if operations else "",
        operands=tuple(_list(where, entry[operations[0]])) if operations else (),
        layers_of=entry.get("layers_of", ""),
        default=entry.get("value", entry.get("default")),
        map=entry.get("map"),
        by_kind=by_kind,
        optional=bool(entry.get("optional", False)),
    )
    if field.layers_of and field.layers_of not in kinds:
        raise BadFile(f"{where}: the unknown kind {field.layers_of}")
    if not (field.config or field.operation or field.by_kind or field.layers_of or field.default is not None):
        raise BadFile(f"{where} has no source")
    return field


def _requirement(where: str, key: str, entry: Any) -> Requirement:
    """``key = value``, or a table with what is allowed and what an absent key means."""
    if not isinstance(entry, dict):
        entry = {"is": entry}
    ways = ("is", "one_of", "cycle", "same_as")
    check_keys(where, entry, set(), {*ways, "default", "unless"})
    if not set(ways) & entry.keys() or {"is", "one_of"} <= entry.keys():
        raise BadFile(f"{where} needs one of: {', '.join(ways)}")
    allowed = _list(where, entry.get("one_of", [entry["is"]] if "is" in entry else []))
    return Requirement(
        key=key,
        allowed=tuple(None if value == "null" else value for value in allowed),
        cycle=tuple(_list(where, entry.get("cycle", []))),
        same_as=_text(f"{where}: same_as", entry.get("same_as", "")),
        default=entry.get("default"),
        unless=_text(f"{where}: unless", entry.get("unless", "")),
    )


def _rule(where: str, entry: Any, earlier: Mapping[str, Rule]) -> Rule:
    check_keys(where, entry, set(), {*RULES, "equals", "default"})
    named = [rule for rule in RULES if rule in entry]
    if len(named) != 1 or (("equals" in entry) != (named[0] in ("list", "when"))):
        raise BadFile(f"{where} needs one of: {', '.join(RULES)}", hint="`list` and `when` need `equals` too")
    rule, keys = named[0], _texts(where, entry[named[0]])
    if rule == "unless" and (unknown := set(keys) - set(earlier)):
        raise BadFile(f"{where}: the kind {sorted(unknown)[0]} is not described before")
    if rule == "has":
        keys = tuple(_template(where, key, layer=0, expert=0) for key in keys)
    return Rule(rule, keys, tuple(_list(where, entry.get("equals", []))), entry.get("default"))


_ROPE_TEXTS = ("parameters", "scaling", "known")


def _rope(path: Path, entry: Any) -> Rope:
    check_keys(f"{path}: rope", entry, set(), set(Rope.__dataclass_fields__))
    base = entry.get("base", 1.0)
    if not isinstance(base, int | float) or isinstance(base, bool):
        raise BadFile(f"{path}: rope: base = {str(base)[:40]!r} is not a number")
    texts = {key: _texts(f"{path}: rope: {key}", entry[key]) for key in _ROPE_TEXTS if entry.get(key, []) != []}
    lists = {key: tuple(value) for key, value in entry.items() if isinstance(value, list)}
    return Rope(**{**entry, **lists, **texts})


_REQUIRED = {"name", "arch", "layers", "experts", "metadata", "tensors"}
_OPTIONAL = {
    "aliases", "extra_layers", "nested", "prefixes", "require", "derived", "sizes", "kinds", "rope",
    "tensors_of", "optional_tensors", "left_out",
}  # fmt: skip


def load_converter(path: Path) -> Converter:
    """The converter in ``path``.

    Raises:
        BadFile: unknown or missing keys, unknown types or transforms, a name other than the file's.
    """
    with _explained(path):
        return _converter(path, read_toml(path))


def _converter(path: Path, table: dict[str, Any]) -> Converter:
    check_keys(str(path), table, _REQUIRED, _OPTIONAL)
    if table["name"] != path.stem:
        raise BadFile(f"{path}: the name {table['name']!r} differs from the file's")
    for key in ("arch", "nested"):
        _text(f"{path}: {key}", table.get(key, ""))
    if "token_embd.weight" not in table["tensors"]:
        raise BadFile(f"{path} has no source for token_embd.weight")
    kinds: dict[str, Rule] = {}
    for kind, entry in table.get("kinds", {}).items():
        kinds[kind] = _rule(f"{path}: kind {kind}", entry, kinds)
    return Converter(
        name=table["name"],
        aliases=_texts(f"{path}: aliases", table["aliases"]) if "aliases" in table else (),
        arch=table["arch"],
        layers=_texts(f"{path}: layers", table["layers"]),
        experts=_texts(f"{path}: experts", table["experts"]),
        extra_layers=_texts(f"{path}: extra_layers", table["extra_layers"]) if "extra_layers" in table else (),
        nested=table.get("nested", ""),
        prefixes=_texts(f"{path}: prefixes", table.get("prefixes", "model.")),
        require=tuple(
            _requirement(f"{path}: require {key}", key, entry) for key, entry in table.get("require", {}).items()
        ),
        derived={
            key: _field(f"{path}: derived {key}", e, kinds, "f64") for key, e in table.get("derived", {}).items()
        },
        sizes={key: _field(f"{path}: size {key}", e, kinds, "u32") for key, e in table.get("sizes", {}).items()},
        kinds=kinds,
        rope=_rope(path, table.get("rope", {})),
        metadata={key: _field(f"{path}: metadata {key}", e, kinds) for key, e in table["metadata"].items()},
        tensors=_tensors(path, table, kinds),
        optional=frozenset(table.get("optional_tensors", {})),
        left_out={
            what: _texts(f"{path}: left_out {what}", entry) for what, entry in table.get("left_out", {}).items()
        },
    )


def shipped_converters() -> Iterator[Path]:
    """The files of all shipped converters, by name."""
    yield from sorted(data_folder(_KIND).glob("*.toml"))


def _aliases(path: Path) -> tuple[str, ...]:
    with _explained(path):
        return _texts(f"{path}: aliases", read_toml(path).get("aliases", [path.stem]))


def _file_for(model_type: str) -> Path | None:
    """The user's own converter for a ``model_type``, else the shipped one, else None."""
    own = sorted(user_folder(_KIND).glob("*.toml"))
    for paths in (own, list(shipped_converters())):
        named = (path for path in paths if path.stem == model_type)
        also = (path for path in paths if model_type in _aliases(path))
        if (found := next(named, None) or next(also, None)) is not None:
            return found
    return None


def own_converter(model_type: str) -> Path | None:
    """The file of the user's own converter for a ``model_type``, which is taken instead of a shipped one; or None."""
    found = _file_for(model_type)
    return found if found is not None and found.parent == user_folder(_KIND) else None


def place_for(model_type: str) -> str:
    """Where a converter of the user's own for a ``model_type`` belongs, and what to begin with, for hints."""
    found = _file_for(model_type)
    name = model_type if re.fullmatch(r"\w{1,60}", model_type) else "MODEL_TYPE"
    place = user_folder(_KIND) / (found.name if found is not None else f"{name}.toml")
    copy = f", a copy of {found}" if found not in (None, place) else ""
    return f"{place}{copy} (README: Add a family)"


def converter_for(model_type: str) -> Converter:
    """The converter for a configuration's ``model_type``, the user's own or a shipped one.

    Raises:
        BadFile: it is empty; or a converter of the user's cannot be read.
        Unsupported: there is none, and which there are; or llama.cpp computes the family otherwise.
    """
    if model_type in ("", "None"):
        raise BadFile(
            "the configuration does not say which model it is of: it has no model_type",
            hint="config.json of a Hugging Face checkpoint names it; get that file again",
        )
    found = _file_for(model_type)
    if found is None and model_type in COMPUTED_OTHERWISE:
        raise Unsupported(
            f"llama.cpp computes {model_type} models wrongly: {COMPUTED_OTHERWISE[model_type]}",
            hint="a GGUF of it is pruned against what llama.cpp computes, not against the original",
        )
    if found is None:
        raise Unsupported(
            f"no converter for checkpoints of type '{model_type}'"[:200],
            hint=f"known: {', '.join(known_files(_KIND))}; describe another in {place_for(model_type)}; a GGUF "
            "of any MoE architecture works without a converter",
        )
    return load_converter(found)
