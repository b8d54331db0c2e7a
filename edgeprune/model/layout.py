"""The exact shape and header of a file to be written, before a byte of it exists."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from edgeprune.model.architecture import Architecture
from edgeprune.model.gguf import Entry, GgufFile, TensorShape, file_bytes, header, make_entry, replaced
from edgeprune.model.parts import PREFIX

# llama.cpp's "file type" (llama.h, enum llama_ftype) for a file that is mostly of one tensor type.
_FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "Q5_0": 8, "Q2_K": 10, "Q3_K": 12, "Q4_K": 15, "Q5_K": 17,
    "Q6_K": 18, "IQ2_XXS": 19, "IQ2_XS": 20, "IQ3_XXS": 23, "IQ1_S": 24, "IQ4_NL": 25, "IQ3_S": 26,
    "IQ2_S": 28, "IQ4_XS": 30, "IQ1_M": 31, "BF16": 32, "MXFP4": 38,
}  # fmt: skip
_GUESSED_FILE_TYPE = 1024


@dataclass(frozen=True)
class Layout:
    """A file to be written.

    Attributes:
        header: its bytes up to the tensor data, padded.
        tensors: in file order.
        alignment: of tensor data, bytes.
        nbytes: exact size of the whole file.
    """

    header: bytes
    tensors: tuple[TensorShape, ...]
    alignment: int
    nbytes: int


def shapes(architecture: Architecture, kept: int, types: Mapping[str, str]) -> tuple[TensorShape, ...]:
    """All tensors in file order with ``kept`` experts and the types in ``types``; others keep theirs."""
    return tuple(
        TensorShape(tensor.name, tensor.kept_shape(kept), types.get(tensor.name, tensor.type))
        for tensor in architecture.tensors
    )


def _file_type(tensors: Iterable[TensorShape]) -> int:
    weight: dict[str, int] = {}
    for tensor in tensors:
        weight[tensor.type] = weight.get(tensor.type, 0) + tensor.nbytes
    return _FILE_TYPES.get(max(weight, key=lambda name: weight[name]), _GUESSED_FILE_TYPE)


def layout(
    file: GgufFile, architecture: Architecture, kept: int, types: Mapping[str, str], records: Iterable[Entry]
) -> Layout:
    """The file with ``kept`` experts per layer and ``types`` by tensor.

    Metadata are those of ``file``, copied raw, except the keys that must change; ``records`` are added.
    """
    tensors = shapes(architecture, kept, types)
    changes = [
        make_entry("general.file_type", "u32", _file_type(tensors)),
        make_entry("general.quantization_version", "u32", 2),
        *records,
    ]
    entries = {key: entry for key, entry in file.entries.items() if not key.startswith(PREFIX)}
    if kept != architecture.experts:
        changes.append(make_entry(f"{architecture.arch}.expert_count", "u32", kept))
        # "30B-A3B" and the like would no longer be true.
        entries.pop("general.size_label", None)
    top = header(replaced(entries, changes), tensors, file.alignment)
    return Layout(top, tensors, file.alignment, file_bytes(len(top), tensors, file.alignment))
