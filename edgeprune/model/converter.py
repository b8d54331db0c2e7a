"""Reading ``converters/<model_type>.toml``: what one architecture is called in each world."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune.errors import BadFile, Unsupported
from edgeprune.files import check_keys, data_folder, read_toml
from edgeprune.model.gguf import TYPE_IDS
from edgeprune.model.transforms import TRANSFORMS


@dataclass(frozen=True)
class Source:
    """Where a GGUF tensor may come from: a name template with ``{layer}`` and ``{expert}``, a transform."""

    name: str
    transform: str


@dataclass(frozen=True)
class Field:
    """A GGUF metadata value: its type, and the configuration keys to try in order."""

    type: str
    config: tuple[str, ...]
    optional: bool


@dataclass(frozen=True)
class Converter:
    """One architecture in Hugging Face and in GGUF.

    Attributes:
        name: ``model_type`` of the configuration.
        arch: llama.cpp's architecture string.
        layers, experts: configuration keys, tried in order.
        require: configuration values that the target graph assumes.
        metadata: GGUF key (without the architecture's prefix) to its source.
        tensors: GGUF name template to alternatives, the first present one wins.
        optional: GGUF names that may have no source.
    """

    name: str
    arch: str
    layers: tuple[str, ...]
    experts: tuple[str, ...]
    require: dict[str, Any]
    metadata: dict[str, Field]
    tensors: dict[str, tuple[Source, ...]]
    optional: frozenset[str]


def _sources(where: str, alternatives: Any) -> tuple[Source, ...]:
    sources = []
    for alternative in alternatives:
        check_keys(where, alternative, {"name"}, {"transform"})
        transform = alternative.get("transform", "keep")
        if transform not in TRANSFORMS:
            raise BadFile(f"{where}: unknown transform {transform}", hint=f"known: {', '.join(TRANSFORMS)}")
        sources.append(Source(alternative["name"], transform))
    if not sources:
        raise BadFile(f"{where}: no source")
    return tuple(sources)


def load_converter(path: Path) -> Converter:
    """The converter in ``path``.

    Raises:
        BadFile: unknown or missing keys, unknown types or transforms, a name other than the file's.
    """
    table = read_toml(path)
    keys = {"name", "arch", "layers", "experts", "require", "metadata", "tensors", "optional_tensors"}
    check_keys(str(path), table, keys, set())
    if table["name"] != path.stem:
        raise BadFile(f"{path}: the name {table['name']!r} differs from the file's")
    metadata = {}
    for key, entry in table["metadata"].items():
        check_keys(f"{path}: metadata {key}", entry, {"type", "config"}, {"optional"})
        if entry["type"] not in TYPE_IDS:
            raise BadFile(f"{path}: metadata {key} has the unknown type {entry['type']}")
        metadata[key] = Field(entry["type"], tuple(entry["config"]), bool(entry.get("optional", False)))
    described = {**table["tensors"], **table["optional_tensors"]}
    return Converter(
        name=table["name"],
        arch=table["arch"],
        layers=tuple(table["layers"]),
        experts=tuple(table["experts"]),
        require=dict(table["require"]),
        metadata=metadata,
        tensors={name: _sources(f"{path}: {name}", entry) for name, entry in described.items()},
        optional=frozenset(table["optional_tensors"]),
    )


def converter_for(model_type: str) -> Converter:
    """The shipped converter for a configuration's ``model_type``.

    Raises:
        Unsupported: there is none; names those there are.
    """
    folder = data_folder("converters")
    known = sorted(path.stem for path in folder.glob("*.toml"))
    if model_type not in known:
        raise Unsupported(
            f"no converter for checkpoints of type '{model_type}'",
            hint=f"known: {', '.join(known)}; a GGUF of any MoE architecture works without a converter",
        )
    return load_converter(folder / f"{model_type}.toml")
