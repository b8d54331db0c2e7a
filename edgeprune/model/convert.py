"""A Hugging Face checkpoint as one GGUF file, streamed tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.errors import BadFile, Unsupported, UsageError
from edgeprune.files import atomic_writer, require_space
from edgeprune.model import ggml
from edgeprune.model.architecture import takes_any_type
from edgeprune.model.checkpoint import Checkpoint, open_checkpoint
from edgeprune.model.converter import Source, converter_for
from edgeprune.model.gguf import (
    DEFAULT_ALIGNMENT,
    MAGIC,
    TensorShape,
    align,
    file_bytes,
    header,
    make_entry,
)
from edgeprune.model.quantised import ACTIVATION_SCALES, FP8, MXFP4
from edgeprune.model.rope import rope_entries, rope_tensors
from edgeprune.model.tokenizer import tokenizer_entries
from edgeprune.model.transforms import TRANSFORMS, Sizes
from edgeprune.model.values import Settings, metadata_entries, read_settings
from edgeprune.units import format_bytes

if TYPE_CHECKING:
    import torch

BASE_TYPES = ("auto", "f32", "f16", "bf16", "q8_0")
SOURCE_KEY = "edgeprune.source_digest"
LARGEST_F16 = 65504.0
OUTPUT = "lm_head.weight"
Progress = Callable[[int, int], None]
_FLOATS = ("F32", "F16", "BF16")
# Ways of quantising a checkpoint that can be undone, or moved to GGUF as they are.
_KNOWN_QUANTISATIONS = ("fp8", "fbgemm_fp8", "compressed-tensors", "mxfp4")
_KNOWN_FORMS = ("float-quantized", "naive-quantized")  # of compressed-tensors
_ROWS_TOGETHER = 1 << 23  # weights that are quantised in one call


@dataclass(frozen=True)
class _Planned:
    """One GGUF tensor and the checkpoint tensors that it is made of, in order; or its ``values`` themselves."""

    target: TensorShape
    sources: tuple[str, ...]
    transform: str
    values: tuple[float, ...] = ()


def apply_tying(checkpoint: Checkpoint, config: dict[str, Any] | None = None) -> None:
    """Forget an output matrix beside tied embeddings: transformers ignores it, so it may be anything.

    Args:
        config: of the language model, where it has one of its own.

    Raises:
        BadFile: neither tied embeddings nor an output matrix.
    """
    tied = (config or checkpoint.config).get("tie_word_embeddings")
    outputs = [name for name in checkpoint.stored if f".{name}".endswith(f".{OUTPUT}")]
    if tied:
        for name in outputs:
            checkpoint.stored.pop(name)
    elif tied is False and not outputs:
        raise BadFile(f"{checkpoint.folder} lacks tensor {OUTPUT}, and its embeddings are not tied")


def _check_quantisation(name: str, config: dict[str, Any]) -> None:
    settings = config.get("quantization_config")
    if not settings:
        return
    settings = settings if isinstance(settings, dict) else {"quant_method": settings}
    method, form = settings.get("quant_method"), settings.get("format", "float-quantized")
    if method not in _KNOWN_QUANTISATIONS or form not in _KNOWN_FORMS:
        method = form if method in _KNOWN_QUANTISATIONS else method
        raise Unsupported(
            f"this {name} checkpoint is quantised already, as {str(method)[:40]!r}",
            hint="use the original checkpoint, in BF16 or F16",
        )


def _gguf_type(name: str, shape: tuple[int, ...], source: str, base: str, keeps_blocks: bool) -> str:
    """Norms, vectors and routers stay F32, as llama.cpp expects; matrices get the base type.

    Args:
        shape: in PyTorch's order.
        source: type in the checkpoint.
        keeps_blocks: its blocks can be moved as they are.
    """
    if not takes_any_type(name, len(shape)):
        return "F32"
    if base != "auto":
        wanted = ggml.type_named(base)
        return wanted.name if shape[-1] % wanted.block == 0 else "BF16"
    if source == MXFP4:
        return MXFP4 if keeps_blocks else "BF16"
    return source


def choose(checkpoint: Checkpoint, sources: tuple[Source, ...], layer: int) -> Source | None:
    """The first of ``sources`` that the checkpoint has, or None."""
    for source in sources:
        if source.name.format(layer=layer, expert=0) in checkpoint.stored:
            return source
    return None


def _places(settings: Settings) -> Iterator[tuple[str, int, tuple[Source, ...]]]:
    """Every GGUF tensor's template and layer, outer ones first, then block by block, with the sources of its kind."""
    tensors = settings.converter.tensors
    for template, sources in tensors.items():
        if "{layer}" not in template:
            yield template, 0, sources
    for layer, kinds in enumerate(settings.kinds):
        for template, sources in tensors.items():
            own = tuple(source for source in sources if not source.kind or source.kind in kinds)
            if "{layer}" in template and own:
                yield template, layer, own


def _planned(settings: Settings, checkpoint: Checkpoint, base: str) -> Iterator[_Planned]:
    """All tensors of the GGUF. ``base``: type of the matrices, or ``auto`` for that of most of the checkpoint."""
    common = _common_type(checkpoint)
    for name, values in rope_tensors(settings).items():
        yield _Planned(TensorShape(name, (len(values),), "F32"), (), "keep", tuple(values))
    for template, layer, sources in _places(settings):
        source = choose(checkpoint, sources, layer)
        name = template.format(layer=layer)
        if source is None:
            if template in settings.converter.optional:
                continue
            wanted = sources[0].name.format(layer=layer, expert=0)
            raise BadFile(f"{checkpoint.folder} lacks tensor {wanted}")
        transform = TRANSFORMS[source.transform]
        count = settings.experts if "{expert}" in source.name else 1
        names = tuple(source.name.format(layer=layer, expert=expert) for expert in range(count))
        _check_sources(checkpoint, names)
        shapes = tuple(checkpoint.shape(each) for each in names)
        try:
            shape = transform.shape(shapes, settings.sizes)
            fits = 0 < len(shape) <= 4 and 0 not in shape
        except (LookupError, TypeError, ValueError, ZeroDivisionError):  # another number of extents
            fits = False
        if not fits:
            raise BadFile(f"{checkpoint.folder}: {names[0]} of the shape {list(shapes[0])} cannot become {name}")
        stored = checkpoint.stored[names[0]].type
        kind = _gguf_type(
            name, shape, stored if stored == MXFP4 else common, base, transform.moves_rows and stored == MXFP4
        )
        yield _Planned(TensorShape(name, tuple(reversed(shape)), kind), names, source.transform)


def _check_sources(checkpoint: Checkpoint, names: tuple[str, ...]) -> None:
    """Refuse sources that are missing, of a type without a value per weight, or of different shapes."""
    for name in names:
        stored = checkpoint.stored.get(name)
        if stored is None:
            raise BadFile(f"{checkpoint.folder} lacks tensor {name}")
        if stored.type not in _FLOATS and name not in checkpoint.scaled:
            without = " without scales" if stored.type == FP8 else ""
            raise Unsupported(
                f"{checkpoint.folder} stores {name} as {stored.type}{without}; F32, F16 and BF16 are supported",
                hint="use the original checkpoint, in BF16 or F16",
            )
        if stored.shape != checkpoint.shape(names[0]):
            raise BadFile(f"{checkpoint.folder}: {name} and {names[0]} differ in shape")


def _unclaimed(checkpoint: Checkpoint, planned: list[_Planned]) -> list[str]:
    """Checkpoint tensors that no GGUF tensor uses; buffers that can be recomputed do not count."""
    used = {name for plan in planned for name in plan.sources}
    idle = ("rotary_emb", *ACTIVATION_SCALES)
    return sorted(n for n in checkpoint.stored if n not in used and not any(part in n for part in idle))


def _left_out(settings: Settings, checkpoint: Checkpoint, names: list[str]) -> tuple[list[str], list[str]]:
    """The names among ``names`` that the converter does not know, and a line on each thing that it leaves out."""
    lines = []
    extra = range(settings.layers, settings.layers + settings.extra_layers)
    for what, pattern in settings.converter.left_behind(extra).items():
        gone = [name for name in names if pattern.fullmatch(name)]
        if gone:
            size = format_bytes(sum(_stored_bytes(checkpoint, name) for name in gone))
            lines.append(f"left out: {what}, {len(gone)} tensors of {size}")
        names = [name for name in names if name not in set(gone)]
    return names, lines


def _stored_bytes(checkpoint: Checkpoint, name: str) -> int:
    stored = checkpoint.stored[name]
    bits = {MXFP4: 4, "F32": 32, "F16": 16, "BF16": 16}.get(stored.type, 8)
    return math.prod(stored.shape) * bits // 8


def _piece_bytes(piece: torch.Tensor, kind: str, name: str) -> bytes:
    """``piece`` as little-endian bytes of type ``kind``, refused when it is not finite."""
    import torch

    if not bool(torch.isfinite(piece).all()):
        raise BadFile(
            f"tensor {name} holds values that are NaN or infinite",
            hint="the checkpoint is damaged or overflowed when it was saved; get it again",
        )
    if kind not in _FLOATS:
        return _encoded(piece, kind, name)
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
    if kind == "F16" and piece.numel() and float(piece.abs().max()) > LARGEST_F16:
        raise Unsupported(f"tensor {name} does not fit F16", hint="convert with --type bf16")
    contiguous = piece.to(dtype).contiguous()
    return contiguous.view(torch.uint8).numpy().tobytes()


def _encoded(piece: torch.Tensor, kind: str, name: str) -> bytes:
    """``piece`` in a quantised type, some rows at a time."""
    rows = piece.reshape(-1, piece.shape[-1])
    step = max(_ROWS_TOGETHER // rows.shape[1], 1)
    parts = (rows[start : start + step].float().numpy() for start in range(0, rows.shape[0], step))
    return b"".join(ggml.encode(ggml.BY_NAME[kind], part, None, name).tobytes() for part in parts)


def _common_type(checkpoint: Checkpoint) -> str:
    """The float type that most of the checkpoint's weights have; of those in FP8, the one that holds them exactly."""
    weights = dict.fromkeys(_FLOATS, 0)
    for stored in checkpoint.stored.values():
        kind = "BF16" if stored.type in (FP8, MXFP4) else stored.type
        if kind in weights:
            weights[kind] += math.prod(stored.shape)
    return max(weights, key=lambda name: weights[name])


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
) -> list[str]:
    """``convert`` as a task for a child process."""
    return convert(Path(folder), Path(output), base, name, progress)


def convert(
    folder: Path, output: Path, base: str = "auto", name: str = "", progress: Progress | None = None
) -> list[str]:
    """Write the checkpoint in ``folder`` as the GGUF ``output``.

    Args:
        base: type of the matrices, one of ``BASE_TYPES``; ``auto`` keeps the checkpoint's.
        name: of the model, for people; the folder's by default.
        progress: called with bytes written and bytes in all.

    Returns:
        A line on each part of the checkpoint that is not part of the language model, and was left out.

    Raises:
        BadFile: something is missing, damaged or not finite.
        Unsupported: a dense model, no converter, or a configuration that llama.cpp cannot represent.
    """
    checkpoint = open_checkpoint(folder)
    settings, planned, remarks = _prepared(checkpoint, base)
    converter = settings.converter
    vocabulary = next(p.target.shape[1] for p in planned if p.target.name == "token_embd.weight")
    entries = [
        make_entry("general.architecture", "str", converter.arch),
        make_entry("general.type", "str", "model"),
        make_entry("general.name", "str", name or folder.resolve().name),
        *metadata_entries(settings, str(folder / "config.json")),
        *rope_entries(settings),
        *tokenizer_entries(folder, settings.config, vocabulary),
        make_entry("general.quantization_version", "u32", 2),
        make_entry(SOURCE_KEY, "str", checkpoint.origin()),
    ]
    top = header(entries, [plan.target for plan in planned], DEFAULT_ALIGNMENT)
    _write(checkpoint, planned, top, output, settings.sizes, progress)
    return remarks


def require_convertible(folder: Path) -> None:
    """Refuse a checkpoint that cannot be converted, by its headers alone.

    Raises:
        BadFile, Unsupported: as ``convert``.
    """
    _prepared(open_checkpoint(folder), "auto")


def _prepared(checkpoint: Checkpoint, base: str) -> tuple[Settings, list[_Planned], list[str]]:
    """What the converter finds, the tensors of the GGUF, and a line on each thing that is left out."""
    checkpoint.require_experts()
    converter = converter_for(str(checkpoint.config.get("model_type", "")))
    _check_quantisation(converter.name, checkpoint.config)
    settings = read_settings(converter, checkpoint)
    apply_tying(checkpoint, settings.config)
    planned = list(_planned(settings, checkpoint, base))
    unknown, remarks = _left_out(settings, checkpoint, _unclaimed(checkpoint, planned))
    if unknown:
        raise Unsupported(
            f"{checkpoint.folder} has {len(unknown)} tensors that {converter.name} does not: {unknown[0]}"
        )
    return settings, planned, remarks


def _write(
    checkpoint: Checkpoint,
    planned: list[_Planned],
    top: bytes,
    output: Path,
    sizes: Sizes,
    progress: Progress | None,
) -> None:
    total = file_bytes(len(top), [plan.target for plan in planned], DEFAULT_ALIGNMENT)
    output.parent.mkdir(parents=True, exist_ok=True)
    require_space(output.parent, total)
    with atomic_writer(output) as stream:
        stream.write(top)
        for plan in planned:
            written = 0
            for data in _data(checkpoint, plan, sizes):
                written += stream.write(data)
            if written != plan.target.nbytes:
                raise BadFile(f"{plan.target.name} came out with {written:,} bytes, not {plan.target.nbytes:,}")
            stream.write(bytes(align(written, DEFAULT_ALIGNMENT) - written))
            if progress is not None:
                progress(stream.tell(), total)


def _data(checkpoint: Checkpoint, plan: _Planned, sizes: Sizes) -> Iterator[bytes]:
    """The bytes of one GGUF tensor, piece by piece."""
    import torch

    if plan.values:
        yield _piece_bytes(torch.tensor(plan.values), plan.target.type, plan.target.name)
    transform = TRANSFORMS[plan.transform]
    for source in plan.sources:
        stored = checkpoint.stored[source]
        stack = transform.one_by_one and len(stored.shape) == 3
        for matrix in range(stored.shape[0]) if stack else (None,):
            if plan.target.type == MXFP4 and stored.type == MXFP4:
                for piece in transform.apply(checkpoint.packed(source, matrix), sizes):
                    yield piece.contiguous().numpy().tobytes()
            else:
                for piece in transform.apply(checkpoint.tensor(source, matrix), sizes):
                    yield _piece_bytes(piece, plan.target.type, source)
