"""A Hugging Face checkpoint as one GGUF file, streamed tensor by tensor."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.errors import BadFile, Unsupported, UsageError
from edgeprune.files import atomic_writer, require_space
from edgeprune.model.architecture import MOST_EXPERTS, MOST_LAYERS
from edgeprune.model.checkpoint import Checkpoint, open_checkpoint
from edgeprune.model.converter import Converter, Source, converter_for
from edgeprune.model.gguf import (
    DEFAULT_ALIGNMENT,
    MAGIC,
    Entry,
    TensorShape,
    align,
    file_bytes,
    header,
    make_entry,
)
from edgeprune.model.tokenizer import tokenizer_entries
from edgeprune.model.transforms import TRANSFORMS, Heads

if TYPE_CHECKING:
    import torch

BASE_TYPES = ("auto", "f32", "f16", "bf16")
SOURCE_KEY = "edgeprune.source_digest"
LARGEST_F16 = 65504.0
MOST_HEADS = 4096
OUTPUT = "lm_head.weight"
Progress = Callable[[int, int], None]
# Settings of a scaled rotary embedding: those with a place in GGUF, and those that llama.cpp fixes.
_ROPE_KEYS = {
    "factor": ("factor", "f32"),
    "original_max_position_embeddings": ("original_context_length", "u32"),
}
_ROPE_FIXED = {"beta_fast": 32, "beta_slow": 1, "truncate": True}
_FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class _Planned:
    """One GGUF tensor and the checkpoint tensors that it is made of, in order."""

    target: TensorShape
    sources: tuple[str, ...]
    transform: str


def lookup(config: dict[str, Any], keys: tuple[str, ...]) -> Any:
    """The first of ``keys`` that the configuration has with a value; dots descend into tables."""
    for key in keys:
        value: Any = config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            return value
    return None


def _required(config: dict[str, Any], keys: tuple[str, ...], folder: Path) -> Any:
    value = lookup(config, keys)
    if value is None:
        raise BadFile(f"{folder / 'config.json'} has none of: {', '.join(keys)}")
    return value


def _count(config: dict[str, Any], keys: tuple[str, ...], folder: Path, most: int) -> int:
    """A positive number from the configuration; a huge one would be planned for at length."""
    value = _required(config, keys, folder)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= most:
        raise BadFile(f"{folder / 'config.json'}: {keys[0]} = {str(value)[:40]!r} is not a number from 1 to {most}")
    return value


def apply_tying(checkpoint: Checkpoint) -> None:
    """Forget an output matrix beside tied embeddings: transformers ignores it, so it may be anything.

    Raises:
        BadFile: neither tied embeddings nor an output matrix.
    """
    tied = checkpoint.config.get("tie_word_embeddings")
    if tied:
        checkpoint.stored.pop(OUTPUT, None)
    elif tied is False and OUTPUT not in checkpoint.stored:
        raise BadFile(f"{checkpoint.folder} lacks tensor {OUTPUT}, and its embeddings are not tied")


def _check_assumptions(converter: Converter, config: dict[str, Any]) -> None:
    for key, expected in converter.require.items():
        wanted = None if expected == "null" else expected
        # An absent key is off, empty or none; what a model needs switched on has to be written down.
        value = config.get(key)
        if value != wanted and (value or wanted):
            raise Unsupported(
                f"this {converter.name} checkpoint has {key} = {value!r}; "
                f"llama.cpp's {converter.arch} assumes {wanted!r}",
                hint="a GGUF of it that someone else has made works without a converter",
            )
    if config.get("quantization_config"):
        raise Unsupported(
            f"this {converter.name} checkpoint is quantised already",
            hint="use the original checkpoint, in BF16 or F16",
        )


def _metadata(converter: Converter, config: dict[str, Any], folder: Path) -> list[Entry]:
    entries = []
    for key, field in converter.metadata.items():
        value = lookup(config, field.config)
        if value is None and field.optional:
            continue
        if value is None:
            value = _required(config, field.config, folder)
        try:
            entries.append(make_entry(f"{converter.arch}.{key}", field.type, value))
        except Exception as error:
            raise BadFile(f"{folder / 'config.json'}: {field.config[0]} = {value!r} does not fit {key}") from error
    return entries


def _rope_base(prefix: str, base: Any) -> Entry:
    """The base frequency; families differ in its default, so it has to be written down."""
    if base is None:
        raise BadFile("config.json names no rope_theta, the base of the rotary embedding")
    return make_entry(f"{prefix}.freq_base", "f32", float(base))


def _rope_entries(converter: Converter, config: dict[str, Any]) -> list[Entry]:
    """Base frequency and scaling of the rotary embedding, from either place where they are kept."""
    rope = lookup(config, ("rope_parameters", "rope_scaling")) or {}
    base = lookup(config, ("rope_parameters.rope_theta", "rope_theta"))
    prefix = f"{converter.arch}.rope"
    try:
        kind = rope.get("rope_type", rope.get("type"))
        foreign = sorted(
            f"{key} = {value!r}"
            for key, value in rope.items()
            if key not in ("rope_type", "type", "rope_theta", *_ROPE_KEYS)
            and value not in (None, _ROPE_FIXED.get(key))
        )
        if kind in ("default", None):
            return [_rope_base(prefix, base)]
        if kind not in ("linear", "yarn") or foreign:
            what = f"with {foreign[0]} " if foreign else ""
            raise Unsupported(f"rotary embedding scaling '{kind}' {what}is not supported"[:200])
        entries = [make_entry(f"{prefix}.scaling.type", "str", kind)]
        for key, (ours, form) in _ROPE_KEYS.items():
            if rope.get(key) is not None or key == "factor":
                entries.append(make_entry(f"{prefix}.scaling.{ours}", form, rope[key]))
    except (AttributeError, LookupError, TypeError, ValueError, struct.error) as error:
        raise BadFile(f"config.json has unusable rotary embedding settings: {rope!r}"[:200]) from error
    return [_rope_base(prefix, base), *entries]


def _gguf_type(name: str, dimensions: int, base: str) -> str:
    """Norms, vectors and routers stay F32, as llama.cpp expects; matrices get the base type."""
    return "F32" if dimensions == 1 or "ffn_gate_inp" in name else base.upper()


def choose(checkpoint: Checkpoint, sources: tuple[Source, ...], layer: int) -> Source | None:
    """The first of ``sources`` that the checkpoint has, or None."""
    for source in sources:
        if source.name.format(layer=layer, expert=0) in checkpoint.stored:
            return source
    return None


def _planned(
    converter: Converter, checkpoint: Checkpoint, layers: int, experts: int, base: str
) -> Iterator[_Planned]:
    """All tensors of the GGUF, outer ones first, then block by block."""
    outer = [name for name in converter.tensors if "{layer}" not in name]
    inner = [name for name in converter.tensors if "{layer}" in name]
    for layer, template in [(0, n) for n in outer] + [(i, n) for i in range(layers) for n in inner]:
        source = choose(checkpoint, converter.tensors[template], layer)
        name = template.format(layer=layer)
        if source is None:
            if template in converter.optional:
                continue
            wanted = converter.tensors[template][0].name.format(layer=layer, expert=0)
            raise BadFile(f"{checkpoint.folder} lacks tensor {wanted}")
        count = experts if "{expert}" in source.name else 1
        names = tuple(source.name.format(layer=layer, expert=expert) for expert in range(count))
        _check_sources(checkpoint, names)
        shape = TRANSFORMS[source.transform].shape(checkpoint.shape(names[0]), count)
        target = TensorShape(name, tuple(reversed(shape)), _gguf_type(name, len(shape), base))
        yield _Planned(target, names, source.transform)


def _check_sources(checkpoint: Checkpoint, names: tuple[str, ...]) -> None:
    """Refuse sources that are missing, of a type without a value per weight, or of different shapes."""
    for name in names:
        stored = checkpoint.stored.get(name)
        if stored is None:
            raise BadFile(f"{checkpoint.folder} lacks tensor {name}")
        if stored.type not in _FLOATS:
            raise Unsupported(
                f"{checkpoint.folder} stores {name} as {stored.type}; F32, F16 and BF16 are supported",
                hint="use the original checkpoint, in BF16 or F16",
            )
        if stored.shape != checkpoint.shape(names[0]):
            raise BadFile(f"{checkpoint.folder}: {name} and {names[0]} differ in shape")


def _unclaimed(checkpoint: Checkpoint, planned: list[_Planned]) -> list[str]:
    """Checkpoint tensors that no GGUF tensor uses; buffers that can be recomputed do not count."""
    used = {name for plan in planned for name in plan.sources}
    return sorted(n for n in checkpoint.stored if n not in used and "rotary_emb" not in n)


def _piece_bytes(piece: torch.Tensor, kind: str, name: str) -> bytes:
    """``piece`` as little-endian bytes of type ``kind``, refused when it is not finite."""
    import torch

    if not bool(torch.isfinite(piece).all()):
        raise BadFile(
            f"tensor {name} holds values that are NaN or infinite",
            hint="the checkpoint is damaged or overflowed when it was saved; get it again",
        )
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
    if kind == "F16" and piece.numel() and float(piece.abs().max()) > LARGEST_F16:
        raise Unsupported(f"tensor {name} does not fit F16", hint="convert with --type bf16")
    contiguous = piece.to(dtype).contiguous()
    return contiguous.view(torch.uint8).numpy().tobytes()


def _base_type(base: str, checkpoint: Checkpoint) -> str:
    """The float type of the matrices: as asked, or the one that most of the checkpoint's weights have."""
    if base != "auto":
        return base
    weights = dict.fromkeys(_FLOATS, 0)
    for stored in checkpoint.stored.values():
        if stored.type in weights:
            weights[stored.type] += math.prod(stored.shape)
    return max(weights, key=lambda name: weights[name]).lower()


def check_output(folder: Path, output: Path) -> None:
    """Refuse an output that would replace anything but an earlier GGUF, or that would be taken for a part of the
    checkpoint in ``folder``: weights cost days to get again, and one slip on the command line replaces them.

    Raises:
        UsageError: ``output`` is no GGUF, or has a place and a name that the checkpoint's own files have.
    """
    target = output.resolve()
    if target.is_file():
        with target.open("rb") as stream:
            if stream.read(len(MAGIC)) != MAGIC:
                raise UsageError(
                    f"{output} is a file of {target.stat().st_size:,} bytes that is not a GGUF; it is not replaced",
                    hint="choose a new name that ends in .gguf, or delete that file first",
                )
    elif target.is_relative_to(folder.resolve()) and target.suffix != ".gguf":
        raise UsageError(
            f"{output} would lie among the files of the checkpoint {folder}",
            hint="choose a name that ends in .gguf, or another folder",
        )


def convert_task(
    folder: str, output: str, base: str = "auto", name: str = "", progress: Progress | None = None
) -> None:
    """``convert`` as a task for a child process."""
    convert(Path(folder), Path(output), base, name, progress)


def convert(folder: Path, output: Path, base: str = "auto", name: str = "", progress: Progress | None = None) -> None:
    """Write the checkpoint in ``folder`` as the GGUF ``output``.

    Args:
        base: type of the matrices, one of ``BASE_TYPES``; ``auto`` keeps the checkpoint's.
        name: of the model, for people; the folder's by default.
        progress: called with bytes written and bytes in all.

    Raises:
        BadFile: something is missing, damaged or not finite.
        Unsupported: a dense model, no converter, or a configuration that llama.cpp cannot represent.
    """
    checkpoint = open_checkpoint(folder)
    checkpoint.require_experts()
    config = checkpoint.config
    converter = converter_for(str(config.get("model_type", "")))
    _check_assumptions(converter, config)
    layers = _count(config, converter.layers, folder, MOST_LAYERS)
    experts = _count(config, converter.experts, folder, MOST_EXPERTS)
    apply_tying(checkpoint)
    planned = list(_planned(converter, checkpoint, layers, experts, _base_type(base, checkpoint)))
    if unclaimed := _unclaimed(checkpoint, planned):
        raise Unsupported(f"{folder} has {len(unclaimed)} tensors that {converter.name} does not: {unclaimed[0]}")
    vocabulary = next(p.target.shape[1] for p in planned if p.target.name == "token_embd.weight")
    entries = [
        make_entry("general.architecture", "str", converter.arch),
        make_entry("general.type", "str", "model"),
        make_entry("general.name", "str", name or folder.resolve().name),
        *_metadata(converter, config, folder),
        *_rope_entries(converter, config),
        *tokenizer_entries(folder, config, vocabulary),
        make_entry("general.quantization_version", "u32", 2),
        make_entry(SOURCE_KEY, "str", checkpoint.origin()),
    ]
    heads = _count(config, ("num_attention_heads",), folder, MOST_HEADS)
    counts = Heads(heads, _count(config, ("num_key_value_heads", "num_attention_heads"), folder, MOST_HEADS))
    _write(checkpoint, planned, entries, output, counts, progress)


def _write(
    checkpoint: Checkpoint,
    planned: list[_Planned],
    entries: list[Entry],
    output: Path,
    heads: Heads,
    progress: Progress | None,
) -> None:
    targets = [plan.target for plan in planned]
    top = header(entries, targets, DEFAULT_ALIGNMENT)
    total = file_bytes(len(top), targets, DEFAULT_ALIGNMENT)
    output.parent.mkdir(parents=True, exist_ok=True)
    require_space(output.parent, total)
    with atomic_writer(output) as stream:
        stream.write(top)
        for plan in planned:
            written = 0
            for source in plan.sources:
                for piece in TRANSFORMS[plan.transform].apply(checkpoint.tensor(source), heads):
                    written += stream.write(_piece_bytes(piece, plan.target.type, source))
            if written != plan.target.nbytes:
                raise BadFile(f"{plan.target.name} came out with {written:,} bytes, not {plan.target.nbytes:,}")
            stream.write(bytes(align(written, DEFAULT_ALIGNMENT) - written))
            if progress is not None:
                progress(stream.tell(), total)
