"""The exact shape and header of a file to be written, before a byte of it exists."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from edgeprune.model.architecture import Architecture
from edgeprune.model.gguf import (
    DEFAULT_ALIGNMENT,
    Entry,
    TensorShape,
    align,
    file_bytes,
    header,
    make_entry,
    replaced,
)
from edgeprune.model.headers import ARRAY, SCALARS, Header
from edgeprune.model.parts import PREFIX

# llama.cpp's "file type" (llama.h, enum llama_ftype) for a file that is mostly of one tensor type.
_FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "Q5_0": 8, "Q2_K": 10, "Q3_K": 12, "Q4_K": 15, "Q5_K": 17,
    "Q6_K": 18, "IQ2_XXS": 19, "IQ2_XS": 20, "IQ3_XXS": 23, "IQ1_S": 24, "IQ4_NL": 25, "IQ3_S": 26,
    "IQ2_S": 28, "IQ4_XS": 30, "IQ1_M": 31, "BF16": 32, "MXFP4": 38,
}  # fmt: skip
_GUESSED_FILE_TYPE = 1024
_BY_POSITION = "dimension_sections"  # four numbers in models of any depth
_ARRAY_HEAD = 16  # bytes in front of an array's elements: kind, kind of elements, count


@dataclass(frozen=True)
class Part:
    """One file of those that a model is split into, or the only one.

    Attributes:
        header: its bytes up to the tensor data, padded.
        tensors: how many of the layout's tensors it holds, after those of earlier parts.
        nbytes: exact size.
    """

    header: bytes
    tensors: int
    nbytes: int


@dataclass(frozen=True)
class Layout:
    """A file to be written.

    Attributes:
        header: its bytes up to the tensor data, padded, were it one file.
        tensors: in file order.
        alignment: of tensor data, bytes.
        nbytes: exact size of the whole file, or of all parts together.
        parts: the files, in their order; one unless it is to be split.
    """

    header: bytes
    tensors: tuple[TensorShape, ...]
    alignment: int
    nbytes: int
    parts: tuple[Part, ...]


def shapes(
    architecture: Architecture, kept: int, types: Mapping[str, str], width: int = 0
) -> tuple[TensorShape, ...]:
    """All tensors in file order with ``kept`` experts of ``width`` channels, 0 for all, and the types in ``types``;
    others keep theirs."""
    return tuple(
        TensorShape(tensor.name, tensor.kept_shape(kept, width), types.get(tensor.name, tensor.type))
        for tensor in architecture.tensors
    )


def _file_type(tensors: Iterable[TensorShape]) -> int:
    weight: dict[str, int] = {}
    for tensor in tensors:
        weight[tensor.type] = weight.get(tensor.type, 0) + tensor.nbytes
    return _FILE_TYPES.get(max(weight, key=lambda name: weight[name]), _GUESSED_FILE_TYPE)


def layout(
    file: Header,
    architecture: Architecture,
    kept: int,
    types: Mapping[str, str],
    records: Iterable[Entry],
    part_bytes: int = 0,
    *,
    width: int = 0,
) -> Layout:
    """The file with ``kept`` experts per layer and ``types`` by tensor.

    Metadata are those of ``file``, copied raw, except the keys that must change; ``records`` are added.

    Args:
        width: channels of every expert, or 0 for all.
        part_bytes: most bytes of one file, as far as a single tensor and the metadata are not larger; 0 for one file.
    """
    tensors = shapes(architecture, kept, types, width)
    changes = [
        make_entry("general.file_type", "u32", _file_type(tensors)),
        make_entry("general.quantization_version", "u32", 2),
        *records,
    ]
    entries = {key: entry for key, entry in file.entries.items() if not key.startswith(PREFIX)}
    if kept != architecture.experts:
        changes.append(make_entry(f"{architecture.arch}.expert_count", "u32", kept))
    if width:
        own = architecture.width_rule.metadata(width)
        changes += [make_entry(f"{architecture.arch}.{key}", "u32", value) for key, value in own.items()]
    if kept != architecture.experts or width:
        # "30B-A3B" and the like would no longer be true.
        entries.pop("general.size_label", None)
    if architecture.left_out:
        changes += without_further_blocks(entries, architecture)
    whole = replaced(entries, changes)
    top = header(whole, tensors, file.alignment)
    alone = Part(top, len(tensors), file_bytes(len(top), tensors, file.alignment))
    parts = [alone] if not part_bytes or alone.nbytes <= part_bytes else _split(whole, tensors, file, part_bytes)
    return Layout(top, tensors, file.alignment, sum(part.nbytes for part in parts), tuple(parts))


def without_further_blocks(entries: Mapping[str, Entry], architecture: Architecture) -> list[Entry]:
    """Metadata of a file without the blocks that predict further tokens: llama.cpp wants arrays with an element for
    each block to be as long as there are blocks (src/llama-model-loader.cpp, ``get_key_or_arr``)."""
    prefix, layers = f"{architecture.arch}.", architecture.layers
    blocks = int(entries[f"{prefix}block_count"].value())
    changes = [
        make_entry(f"{prefix}block_count", "u32", layers),
        make_entry(f"{prefix}nextn_predict_layers", "u32", 0),
    ]
    for key, entry in entries.items():
        by_layer = (
            key.startswith(prefix)
            and entry.kind == ARRAY
            and entry.count == blocks
            and not key.endswith(_BY_POSITION)
        )
        if by_layer and entry.element in SCALARS:
            size = (len(entry.raw) - _ARRAY_HEAD) // blocks
            head = entry.raw[:8] + layers.to_bytes(8, "little")
            raw = head + entry.raw[_ARRAY_HEAD : _ARRAY_HEAD + layers * size]
            changes.append(Entry(key, ARRAY, entry.element, layers, raw))
    return changes


def _split(entries: Sequence[Entry], tensors: Sequence[TensorShape], file: Header, part_bytes: int) -> list[Part]:
    """Files of at most ``part_bytes``, with all metadata in the first, as llama-gguf-split does it."""
    groups = _grouped(entries, tensors, file.alignment, part_bytes)
    found = []
    for number, group in enumerate(groups):
        alignment = [] if file.alignment == DEFAULT_ALIGNMENT else [file.entries["general.alignment"]]
        own = [*(entries if number == 0 else alignment), *_split_entries(number, len(groups), len(tensors))]
        top = header(own, group, file.alignment)
        found.append(Part(top, len(group), file_bytes(len(top), group, file.alignment)))
    return found


def _split_entries(number: int, count: int, tensors: int) -> list[Entry]:
    """What llama.cpp asks of a part; it is strict about these types."""
    return [
        make_entry(f"{PREFIX}no", "u16", number),
        make_entry(f"{PREFIX}count", "u16", count),
        make_entry(f"{PREFIX}tensors.count", "i32", tensors),
    ]


def _grouped(
    entries: Sequence[Entry], tensors: Sequence[TensorShape], alignment: int, part_bytes: int
) -> list[list[TensorShape]]:
    """Tensors in their order, in groups that fit one file each with its header."""
    fixed = len(header([*entries, *_split_entries(0, 2, 1)], [], 1))
    groups: list[list[TensorShape]] = [[]]
    described = data = 0
    for tensor in tensors:
        own, nbytes = len(header([], [tensor], 1)) - len(header([], [], 1)), align(tensor.nbytes, alignment)
        if groups[-1] and align(fixed + described + own, alignment) + data + nbytes > part_bytes:
            # Later parts have no metadata but these, and perhaps the alignment.
            fixed = len(header([*_split_entries(0, 2, 1), make_entry("general.alignment", "u32", alignment)], [], 1))
            groups.append([])
            described = data = 0
        groups[-1].append(tensor)
        described, data = described + own, data + nbytes
    return groups
