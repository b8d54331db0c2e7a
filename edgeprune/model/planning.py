"""What a checkpoint becomes as a GGUF, planned from headers alone: every tensor, its type and its sources."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from edgeprune.errors import BadFile, EdgepruneError, Unsupported
from edgeprune.model import ggml
from edgeprune.model.architecture import takes_any_type
from edgeprune.model.checkpoint import Checkpoint
from edgeprune.model.converter import Converter, Source, converter_for, place_for
from edgeprune.model.gguf import TensorShape
from edgeprune.model.quantised import ACTIVATION_SCALES, FP8, MXFP4
from edgeprune.model.rope import rope_tensors
from edgeprune.model.transforms import TRANSFORMS
from edgeprune.model.values import Settings, read_settings
from edgeprune.units import format_bytes

OUTPUT = "lm_head.weight"
FLOATS = ("F32", "F16", "BF16")
FURTHER_BLOCKS = "blocks that predict further tokens"  # as converters call them in what they leave out
_MOST_NAMED = 3  # tensors in a message
# Ways of quantising a checkpoint that can be undone, or moved to GGUF as they are.
_KNOWN_QUANTISATIONS = ("fp8", "fbgemm_fp8", "compressed-tensors", "mxfp4")
_KNOWN_FORMS = ("float-quantized", "naive-quantized")  # of compressed-tensors


@dataclass(frozen=True)
class Planned:
    """One GGUF tensor and the checkpoint tensors that it is made of, in order; or its ``values`` themselves."""

    target: TensorShape
    sources: tuple[str, ...]
    transform: str
    values: tuple[float, ...] = ()


def apply_tying(checkpoint: Checkpoint, converter: Converter, config: Mapping[str, Any]) -> None:
    """Forget an output matrix that repeats the embeddings which it is tied to.

    One with other numbers counts, whatever the configuration says (transformers, ``modeling_utils.tie_weights``). The
    configuration is believed where the weights are not here yet.

    Args:
        converter: with the checkpoint's own prefix in its names.
        config: of the language model, which is asked after the outer one: transformers' class goes by that.

    Raises:
        BadFile: neither tied embeddings nor an output matrix; or one of them cannot be read.
    """
    tied = checkpoint.config.get("tie_word_embeddings")
    tied = config.get("tie_word_embeddings") if tied is None else tied
    outputs = [name for name in checkpoint.stored if f".{name}".endswith(f".{OUTPUT}")]
    embeddings = choose(checkpoint, converter.tensors["token_embd.weight"], 0)
    if tied and embeddings is not None:
        for name in outputs:
            if not checkpoint.is_here(name, embeddings.name) or checkpoint.alike(name, embeddings.name):
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
    further = ".nextn." in name and len(shape) > 1
    if not takes_any_type(name, len(shape)) and not further:
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


def _planned(settings: Settings, checkpoint: Checkpoint, base: str) -> Iterator[Planned]:
    """All tensors of the GGUF. ``base``: type of the matrices, or ``auto`` for that of most of the checkpoint."""
    common = _common_type(checkpoint)
    for name, values in rope_tensors(settings).items():
        yield Planned(TensorShape(name, (len(values),), "F32"), (), "keep", tuple(values))
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
        yield Planned(TensorShape(name, tuple(reversed(shape)), kind), names, source.transform)


def _check_sources(checkpoint: Checkpoint, names: tuple[str, ...]) -> None:
    """Refuse sources that are missing, of a type without a value per weight, or of different shapes."""
    for name in names:
        stored = checkpoint.stored.get(name)
        if stored is None:
            raise BadFile(f"{checkpoint.folder} lacks tensor {name}")
        if stored.type not in FLOATS and name not in checkpoint.scaled:
            without = " without scales" if stored.type == FP8 else ""
            raise Unsupported(
                f"{checkpoint.folder} stores {name} as {stored.type}{without}; F32, F16 and BF16 are supported",
                hint="use the original checkpoint, in BF16 or F16",
            )
        if stored.shape != checkpoint.shape(names[0]):
            raise BadFile(f"{checkpoint.folder}: {name} and {names[0]} differ in shape")


def _unclaimed(checkpoint: Checkpoint, planned: Iterable[Planned]) -> list[str]:
    """Checkpoint tensors that no GGUF tensor uses; buffers that can be recomputed do not count."""
    used = {name for plan in planned for name in plan.sources}
    idle = ("rotary_emb", *ACTIVATION_SCALES)
    return sorted(n for n in checkpoint.stored if n not in used and not any(part in n for part in idle))


def _left_out(settings: Settings, checkpoint: Checkpoint, names: list[str]) -> tuple[list[str], list[str]]:
    """The names among ``names`` that the converter does not know, and a line on each thing that it leaves out.

    Raises:
        Unsupported: a part of a block that is to be kept would be left out.
    """
    lines = []
    extra = range(settings.layers, settings.layers + settings.extra_layers)
    for what, pattern in settings.converter.left_behind(extra).items():
        gone = [name for name in names if pattern.fullmatch(name)]
        if gone and settings.further and what == FURTHER_BLOCKS:
            raise Unsupported(
                f"{checkpoint.folder}: llama.cpp's {settings.converter.arch} has no place for {gone[0]} in its block "
                "that predicts further tokens",
                hint="--mtp drop leaves such blocks out",
            )
        if gone:
            size = format_bytes(sum(_stored_bytes(checkpoint, name) for name in gone))
            lines.append(f"left out: {what}, {len(gone)} tensors of {size}")
        names = [name for name in names if name not in set(gone)]
    return names, lines


def _stored_bytes(checkpoint: Checkpoint, name: str) -> int:
    stored = checkpoint.stored[name]
    bits = {MXFP4: 4, "F32": 32, "F16": 16, "BF16": 16}.get(stored.type, 8)
    return math.prod(stored.shape) * bits // 8


def _common_type(checkpoint: Checkpoint) -> str:
    """The float type that most of the checkpoint's weights have; of those in FP8, the one that holds them exactly."""
    weights = dict.fromkeys(FLOATS, 0)
    for stored in checkpoint.stored.values():
        kind = "BF16" if stored.type in (FP8, MXFP4) else stored.type
        if kind in weights:
            weights[kind] += math.prod(stored.shape)
    return max(weights, key=lambda name: weights[name])


def _few(names: list[str]) -> str:
    """The first of ``names`` and how many more there are."""
    return ", ".join(name[:100] for name in names[:_MOST_NAMED]) + (", ..." if len(names) > _MOST_NAMED else "")


@contextmanager
def naming(where: str) -> Iterator[None]:
    """A block whose complaints of ``config.json`` say which one."""
    try:
        yield
    except EdgepruneError as error:
        if not error.cause.startswith("config.json"):
            raise
        cause = where + error.cause.removeprefix("config.json")
        raise type(error)(cause, rows=error.rows, hint=error.hint) from error


@dataclass(frozen=True)
class Conversion:
    """What becomes of a checkpoint.

    Attributes:
        settings: what the converter found in it.
        base: type of the matrices, or ``auto``.
        tensors: of the GGUF, in file order.
        remarks: a line on each thing that is left out.
    """

    settings: Settings
    base: str
    tensors: tuple[Planned, ...]
    remarks: tuple[str, ...]

    @property
    def shapes(self) -> tuple[TensorShape, ...]:
        return tuple(plan.target for plan in self.tensors)

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding matrix."""
        return next(shape.shape[1] for shape in self.shapes if shape.name == "token_embd.weight")

    def sources_of(self, name: str) -> tuple[str, ...]:
        """The checkpoint's tensors that the GGUF tensor ``name`` is made of."""
        return next((plan.sources for plan in self.tensors if plan.target.name == name), ())


def known_converter(config: dict[str, Any]) -> Converter:
    """The converter for a checkpoint, as far as its configuration alone tells that it can be converted.

    Raises:
        Unsupported: no converter, or it is quantised in a way that is not known.
    """
    converter = converter_for(str(config.get("model_type", "")))
    _check_quantisation(converter.name, config)
    return converter


def plan_conversion(checkpoint: Checkpoint, base: str = "auto", *, mtp: bool = False) -> Conversion:
    """The GGUF of ``checkpoint``, from its configuration and the headers of its weights.

    Args:
        base: type of the matrices, or ``auto`` for that of most of the checkpoint.
        mtp: keep blocks that predict further tokens.

    Raises:
        BadFile: something is missing or contradicts itself.
        Unsupported: a dense model, no converter, or a configuration that llama.cpp cannot represent.
    """
    checkpoint.require_experts()
    converter = known_converter(checkpoint.config)
    with naming(str(checkpoint.folder / "config.json")):
        settings = read_settings(converter, checkpoint, mtp=mtp)
    apply_tying(checkpoint, settings.converter, settings.config)
    with naming(str(checkpoint.folder / "config.json")):
        tensors = tuple(_planned(settings, checkpoint, base))
    unknown, remarks = _left_out(settings, checkpoint, _unclaimed(checkpoint, tensors))
    if unknown:
        raise Unsupported(
            f"{checkpoint.folder} has {len(unknown)} tensors that {converter.name} does not: {_few(unknown)}",
            hint="a variant that llama.cpp may not compute: a GGUF of it that someone else has made works without a "
            f"converter; where they may stay behind, name them under [left_out] in {place_for(converter.name)}",
        )
    conversion = Conversion(settings, base, tensors, tuple(remarks))
    vocabulary = settings.config.get("vocab_size")
    if isinstance(vocabulary, int) and vocabulary != conversion.vocabulary:
        raise BadFile(
            f"{checkpoint.folder}: config.json has vocab_size = {vocabulary}, the embeddings have "
            f"{conversion.vocabulary} rows",
            hint="the configuration is of another model, or the weights are; get both again",
        )
    return conversion
