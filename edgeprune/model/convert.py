"""A Hugging Face checkpoint as one GGUF file, streamed tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune.errors import BadFile, Unsupported, UsageError
from edgeprune.files import atomic_writer, require_space
from edgeprune.model import ggml
from edgeprune.model.checkpoint import Checkpoint, open_checkpoint
from edgeprune.model.gguf import DEFAULT_ALIGNMENT, MAGIC, Entry, TensorShape, align, file_bytes, header, make_entry
from edgeprune.model.headers import Header, Holed
from edgeprune.model.planning import FLOATS, Conversion, Planned, naming, plan_conversion
from edgeprune.model.quantised import MXFP4
from edgeprune.model.rope import rope_entries
from edgeprune.model.sampler import sampler_entries
from edgeprune.model.tokenizer import tokenizer_entries
from edgeprune.model.transforms import TRANSFORMS, Sizes
from edgeprune.model.values import metadata_entries

if TYPE_CHECKING:
    import torch

BASE_TYPES = ("auto", "f32", "f16", "bf16", "q8_0")
SOURCE_KEY = "edgeprune.source_digest"
# In headers that stand for those of files that are not made yet; they are up to one alignment shorter.
PADDING = "edgeprune.padding"
LARGEST_F16 = 65504.0
Progress = Callable[[int, int], None]
_WEIGHTS_TOGETHER = 1 << 23  # that are looked at and encoded in one go


def _piece_bytes(piece: torch.Tensor, kind: str, name: str) -> Iterator[bytes]:
    """``piece`` as little-endian bytes of type ``kind``, some rows at a time: of the embedding matrix of a large
    vocabulary there would be several copies in memory else.

    Raises:
        BadFile: it is not finite.
        Unsupported: it does not fit the type.
    """
    rows = piece.reshape(-1, piece.shape[-1]) if piece.dim() else piece.reshape(1, 1)
    step = max(_WEIGHTS_TOGETHER // max(rows.shape[1], 1), 1)
    for start in range(0, rows.shape[0], step):
        yield _row_bytes(rows[start : start + step], kind, name)


def _row_bytes(rows: torch.Tensor, kind: str, name: str) -> bytes:
    import torch

    if not bool(torch.isfinite(rows).all()):
        raise BadFile(
            f"tensor {name} holds values that are NaN or infinite",
            hint="the checkpoint is damaged or overflowed when it was saved; get it again",
        )
    if kind not in FLOATS:
        return ggml.encode(ggml.BY_NAME[kind], rows.float().numpy(), None, name).tobytes()
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
    if kind == "F16" and rows.numel() and float(rows.abs().max()) > LARGEST_F16:
        raise Unsupported(f"tensor {name} does not fit F16", hint="convert with --type bf16")
    return rows.to(dtype).contiguous().view(torch.uint8).numpy().tobytes()


def check_place(output: Path) -> None:
    """Refuse an output that would replace anything but an earlier GGUF, weights for instance, which cost days to get
    again; or that nothing can be written to. This can be known before there is a checkpoint.

    Raises:
        UsageError: ``output`` is no GGUF, or lies below a file.
    """
    target = output.resolve()
    if target.is_file():
        with target.open("rb") as stream:
            if stream.read(len(MAGIC)) != MAGIC:
                raise UsageError(
                    f"{output} is a file of {target.stat().st_size:,} bytes that is not a GGUF; it is not replaced",
                    hint="choose a new name that ends in .gguf, or delete that file first",
                )
    folder = next(parent for parent in target.parents if parent.exists())
    if not folder.is_dir():
        raise UsageError(
            f"{output} cannot be written: {folder} is a file, no folder", hint="choose another folder for it"
        )


def check_output(folder: Path, output: Path) -> None:
    """``check_place``, and refuse an output that would be taken for a part of the checkpoint in ``folder``: one slip
    on the command line replaces its files.

    Raises:
        UsageError: as that, or ``output`` has a place and a name that the checkpoint's own files have.
    """
    check_place(output)
    target = output.resolve()
    if not target.is_file() and target.is_relative_to(folder.resolve()) and target.suffix != ".gguf":
        raise UsageError(
            f"{output} would lie among the files of the checkpoint {folder}",
            hint="choose a name that ends in .gguf, or another folder",
        )


def convert_task(
    folder: str,
    output: str,
    base: str = "auto",
    name: str = "",
    mtp: bool = False,
    origin: str = "",
    progress: Progress | None = None,
) -> list[str]:
    """``convert`` as a task for a child process."""
    return convert(Path(folder), Path(output), base, name, progress, mtp=mtp, origin=origin)


def convert(
    folder: Path,
    output: Path,
    base: str = "auto",
    name: str = "",
    progress: Progress | None = None,
    *,
    mtp: bool = False,
    origin: str = "",
) -> list[str]:
    """Write the checkpoint in ``folder`` as the GGUF ``output``.

    Args:
        base: type of the matrices, one of ``BASE_TYPES``; ``auto`` keeps the checkpoint's.
        name: of the model, for people; the folder's by default.
        progress: called with bytes written and bytes in all.
        mtp: keep blocks that predict further tokens, where llama.cpp has a graph for them.
        origin: ``Checkpoint.origin``, if it is known.

    Returns:
        A line on each part of the checkpoint that is not part of the language model, and was left out.

    Raises:
        BadFile: something is missing, damaged or not finite.
        Unsupported: a dense model, no converter, or a configuration that llama.cpp cannot represent.
    """
    checkpoint = open_checkpoint(folder)
    planned = plan_conversion(checkpoint, base, mtp=mtp)
    entries = [
        *model_entries(planned, name or folder.resolve().name, str(folder / "config.json")),
        *sampler_entries(folder),
        *tokenizer_entries(folder, planned.settings.config, planned.vocabulary),
        make_entry(SOURCE_KEY, "str", origin or checkpoint.origin(mtp=mtp)),
    ]
    _write(checkpoint, planned, header(entries, planned.shapes, DEFAULT_ALIGNMENT), output, progress)
    return list(planned.remarks)


def model_entries(planned: Conversion, name: str, where: str) -> list[Entry]:
    """The metadata of the model, without those of its tokenizer.

    Args:
        name: of the model, for people.
        where: the configuration's path, for messages.

    Raises:
        BadFile: a value is missing or does not fit its type.
        Unsupported: a value that llama.cpp has no word for.
    """
    with naming(where):
        own = [*metadata_entries(planned.settings, where), *rope_entries(planned.settings)]
    return [
        make_entry("general.architecture", "str", planned.settings.converter.arch),
        make_entry("general.type", "str", "model"),
        make_entry("general.name", "str", name),
        *own,
        make_entry("general.quantization_version", "u32", 2),
    ]


def whole_header(planned: Conversion, name: str, folder: Path) -> tuple[Holed, list[Entry]]:
    """The header of the GGUF with the tokenizer in ``folder``, of its exact length, and the tokenizer's entries.

    Raises:
        BadFile, Unsupported: as ``model_entries`` and ``tokenizer_entries``.
    """
    tokenizer = tokenizer_entries(folder, planned.settings.config, planned.vocabulary)
    unread = make_entry(SOURCE_KEY, "str", 64 * "0")  # as long as the digest, for which weights have to be read
    model = model_entries(planned, name, str(folder / "config.json"))
    entries = [*model, *sampler_entries(folder), *tokenizer, unread]
    top = header(entries, planned.shapes, DEFAULT_ALIGNMENT)
    return Holed(top, file_bytes(len(top), planned.shapes, DEFAULT_ALIGNMENT)), tokenizer


def bare_header(planned: Conversion, name: str, where: str) -> Holed:
    """The header of the GGUF with token numbers for a vocabulary, which llama.cpp loads as well. The arguments and
    errors are those of ``model_entries``."""
    entries = without_vocabulary(model_entries(planned, name, where), planned.vocabulary)
    top = header(entries, planned.shapes, DEFAULT_ALIGNMENT)
    return Holed(top, file_bytes(len(top), planned.shapes, DEFAULT_ALIGNMENT))


def without_weights(far: Header, vocabulary: int) -> Header:
    """The header ``far``, also of a file that is far away, as llama.cpp loads it with a hole instead of weights.

    Args:
        vocabulary: rows of the embedding matrix, which have numbers instead of words; as much padding makes up for
            these, so that a file of it is as large, but for the alignment.
    """
    entries = [entry for entry in far.entries.values() if entry.raw]  # what was skipped of a far file
    bare = without_vocabulary(entries, vocabulary)
    shapes = [TensorShape(info.name, info.shape, info.type) for info in far.tensors.values()]
    empty = header([*bare, make_entry(PADDING, "str", "")], shapes, far.alignment)
    missing = far.data_offset - len(empty) - far.alignment  # never larger, whatever is added to it
    bare.append(make_entry(PADDING, "str", " " * max(missing, 0)))
    own = {entry.key: entry for entry in bare}
    return Header(far.path, own, far.tensors, far.alignment, far.data_offset, far.size)


def without_vocabulary(entries: Iterable[Entry], tokens: int) -> list[Entry]:
    """``entries`` with a vocabulary of so many numbers instead of what there is."""
    kept = {entry.key: entry for entry in entries if not entry.key.startswith("tokenizer.")}
    size = make_entry(f"{kept['general.architecture'].value()}.vocab_size", "u32", tokens)
    return [*(kept | {size.key: size}).values(), make_entry("tokenizer.ggml.model", "str", "no_vocab")]


def _write(checkpoint: Checkpoint, planned: Conversion, top: bytes, output: Path, progress: Progress | None) -> None:
    total = file_bytes(len(top), planned.shapes, DEFAULT_ALIGNMENT)
    output.parent.mkdir(parents=True, exist_ok=True)
    require_space(output.parent, total)
    with atomic_writer(output) as stream:
        stream.write(top)
        for plan in planned.tensors:
            written = 0
            for data in _data(checkpoint, plan, planned.settings.sizes):
                written += stream.write(data)
            if written != plan.target.nbytes:
                raise BadFile(f"{plan.target.name} came out with {written:,} bytes, not {plan.target.nbytes:,}")
            stream.write(bytes(align(written, DEFAULT_ALIGNMENT) - written))
            if progress is not None:
                progress(stream.tell(), total)


def _data(checkpoint: Checkpoint, plan: Planned, sizes: Sizes) -> Iterator[bytes]:
    """The bytes of one GGUF tensor, piece by piece."""
    import torch

    if plan.values:
        yield from _piece_bytes(torch.tensor(plan.values), plan.target.type, plan.target.name)
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
                    yield from _piece_bytes(piece, plan.target.type, source)
