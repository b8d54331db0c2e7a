"""Writing the planned file: slices of what stays as it is, encodings of what changes type."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeprune.build.gather import Channel, gathered, gathered_rows
from edgeprune.build.overlay import opened
from edgeprune.build.store import Store
from edgeprune.decide.plan import PRESET, Plan
from edgeprune.device.probe import cores
from edgeprune.device.threads import in_order
from edgeprune.errors import BadFile
from edgeprune.files import atomic_writer, file_digest, require_space
from edgeprune.measure import channels as channel_orders
from edgeprune.measure.statistics import InputMoments, Statistics
from edgeprune.model import ggml, unbiased
from edgeprune.model.architecture import Architecture, Tensor, read_architecture
from edgeprune.model.gguf import GgufFile, align
from edgeprune.model.layout import layout
from edgeprune.model.parts import all_parts, part_name

Bytes = npt.NDArray[np.uint8]
# Weights that are decoded at once: bounds memory to a few hundred MB whatever the tensor's size.
_CHUNK_WEIGHTS = 1 << 22


@dataclass(frozen=True)
class Build:
    """A finished file: where, how large, its SHA-256 and that of the plan it obeys.

    Attributes:
        path: of the file, or of the first of its parts.
        nbytes: of all parts together.
        sha256: of the file, or of the SHA-256 of the parts one after the other, as hexadecimal digits.
        part_bytes: most bytes of a part that were asked for, or 0.
    """

    path: str
    nbytes: int
    sha256: str
    plan_digest: str
    part_bytes: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def paths(self) -> list[Path]:
        """Its file, or those of its parts."""
        return all_parts(Path(self.path))

    def is_whole(self) -> bool:
        """Whether what was built is still there, to the last byte."""
        return all(path.is_file() for path in self.paths) and digest_of(self.paths) == self.sha256


def digest_of(paths: Sequence[Path]) -> str:
    """What identifies a model in these files; see ``Build.sha256``."""
    return digest_of_parts([file_digest(path) for path in paths])


def digest_of_parts(digests: Sequence[str]) -> str:
    """What identifies a model whose files have these SHA-256; see ``Build.sha256``."""
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _kept_slices(raw: Bytes, tensor: Tensor, kept: Sequence[int], channels: Channel | None) -> Iterator[Bytes]:
    """The bytes of ``tensor`` expert by expert for the ``kept`` ids; all at once if it is not sliced."""
    if not tensor.sliced:
        yield raw
        return
    by_expert = raw.reshape(tensor.shape[-1], -1)
    for expert in kept:
        yield by_expert[expert] if channels is None else gathered(by_expert[expert], tensor, channels[expert])


def _row_chunks(raw: Bytes, kind: ggml.GgmlType, width: int) -> Iterator[Bytes]:
    """One matrix in runs of whole rows, each of at most ``_CHUNK_WEIGHTS`` weights."""
    row_bytes = kind.row_bytes(width)
    step = max(1, _CHUNK_WEIGHTS // width) * row_bytes
    for start in range(0, raw.size, step):
        yield raw[start : start + step]


def _encode_jobs(
    raw: Bytes,
    tensor: Tensor,
    target: ggml.GgmlType,
    kept: Sequence[int],
    means: npt.NDArray[np.float32] | None,
    stock: bool,
    channels: Channel | None = None,
) -> Iterator[Callable[[], Bytes]]:
    """Encoding jobs in file order; an expert is encoded with its own importance row."""
    kind, width = ggml.BY_NAME[tensor.type], tensor.shape[0]
    matrices = kept if tensor.sliced else range(tensor.matrices)
    by_matrix = raw.reshape(tensor.matrices, -1)
    for matrix in matrices:
        importance = None if means is None else means[matrix if len(means) > 1 else 0]
        if importance is None and (not stock or target.needs_imatrix):
            # As the distortion was measured: some encoders are others without any importance. A stock preset is
            # made as llama-quantize makes it.
            importance = np.ones(width, np.float32)
        own = None if channels is None or tensor.channels is None else channels[matrix]
        rows, picked = gathered_rows(by_matrix[matrix], tensor, own)
        if picked is not None and importance is not None:
            importance = importance[picked]
        for chunk in _row_chunks(rows, kind, width):

            def job(chunk: Bytes = chunk, importance: Any = importance, picked: Any = picked) -> Bytes:
                weights = ggml.decode(kind, chunk, width)
                way = ggml.encode if stock else unbiased.encode
                return way(target, weights if picked is None else weights[:, picked], importance, tensor.name)

            yield job


def build(
    model: str,
    plan: dict[str, Any],
    output: str,
    statistics: str = "",
    store: str = "",
    part_bytes: int = 0,
    channels: str = "",
    merged: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write the file that ``plan`` describes. A task for a child process.

    Args:
        model: the source GGUF.
        statistics: of the calibration, for the importance of each weight's inputs; may be empty when
            no tensor changes type.
        store: folder of tensors that are finished, or empty.
        part_bytes: most bytes of one file; what is larger is split, and then ``output`` names the parts. 0 for one.
        channels: file with the order of every expert's channels, if the plan narrows experts.
        merged: folder of the merged experts, if the plan merges any.
        progress: called with bytes written and bytes in all.

    Returns:
        a ``Build`` as JSON.

    Raises:
        BadFile: the plan does not fit the model, or a tensor is not finite.
    """
    file = opened(model, merged)
    obeyed = Plan.from_json(plan, "plan")
    architecture = read_architecture(file, mtp=obeyed.mtp)
    obeyed.check(architecture)
    stock = obeyed.origin.startswith(PRESET)
    made = layout(file, architecture, obeyed.kept, obeyed.types, obeyed.records(), part_bytes, width=obeyed.width)
    orders = channel_orders.loaded(channels, obeyed.channels)
    moments = Statistics.load(Path(statistics)).moments if statistics else {}
    finished = Store(Path(store)) if store else None
    paths = _outputs(Path(output), len(made.parts))
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    require_space(paths[0].parent, made.nbytes)
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(cores()))
        # All parts get their names when the last of them is finished.
        streams = [stack.enter_context(atomic_writer(path)) for path in paths]
        places = (stream for part, stream in zip(made.parts, streams, strict=True) for _ in range(part.tensors))
        for part, stream in zip(made.parts, streams, strict=True):
            stream.write(part.header)
        done = sum(len(part.header) for part in made.parts)
        for tensor, target, stream in zip(architecture.tensors, made.tensors, places, strict=True):
            written = 0
            if finished is not None and tensor.name in finished:
                pieces = iter((finished.read(tensor.name),))
            else:
                kept, own = obeyed.kept_of(tensor.layer), kept_channels(obeyed, orders, tensor)
                moment = moments.get(tensor.name)
                pieces = encoded(file, tensor, target.type, kept, moment, pool, stock=stock, channels=own)
            for piece in pieces:
                written += stream.write(piece.tobytes() if not piece.flags.c_contiguous else piece.data)
            if written != target.nbytes:
                raise BadFile(f"{tensor.name}: wrote {written:,} bytes, planned {target.nbytes:,}")
            stream.write(bytes(align(written, made.alignment) - written))
            done += align(written, made.alignment)
            file.release(tensor.name)
            if progress is not None:
                progress(done, made.nbytes)
    nbytes = sum(path.stat().st_size for path in paths)
    return Build(str(paths[0]), nbytes, digest_of(paths), obeyed.digest, part_bytes).to_json()


def _outputs(output: Path, count: int) -> list[Path]:
    """Where the parts of the file called ``output`` go."""
    return [output] if count == 1 else [output.with_name(part_name(output.stem, n, count)) for n in range(count)]


def encoded(
    file: GgufFile,
    tensor: Tensor,
    target: str,
    kept: Sequence[int],
    moment: InputMoments | None,
    pool: ThreadPoolExecutor,
    *,
    stock: bool = False,
    channels: Channel | None = None,
) -> Iterator[Bytes]:
    """The data of ``tensor`` in type ``target`` with the ``kept`` experts alone, in consecutive pieces; a copy where
    the type is the tensor's own, unless channels are picked out of its blocks.

    Args:
        moment: of its inputs, or None.
        stock: as llama-quantize would.
        channels: that stay of every expert of the source, int [E, F'], or None for all.
    """
    raw = file.raw(tensor.name)
    blocks = channels is not None and tensor.role == "expert_down" and ggml.BY_NAME[tensor.type].block > 1
    if target == tensor.type and not blocks:
        yield from _kept_slices(raw, tensor, kept, channels)
        return
    means = None if moment is None else moment.mean()
    jobs = _encode_jobs(raw, tensor, ggml.BY_NAME[target], kept, means, stock, channels)
    yield from in_order(pool, jobs)


def kept_channels(plan: Plan, orders: channel_orders.Channels | None, tensor: Tensor) -> Channel | None:
    """The channels of every expert that stay in ``tensor``, int [E, F'], or None where none goes.

    Raises:
        BadFile: the plan narrows experts, and nothing says which channels they keep.
    """
    if not plan.width or tensor.channels is None:
        return None
    if orders is None:
        raise BadFile("the plan narrows experts, and the order of their channels is missing", hint="plan anew")
    return orders.best(tensor.layer, plan.width)


def describe(architecture: Architecture, plan: Plan) -> str:
    """A file name for the planned model: name, experts kept, bits per weight."""
    stem = "".join(c if c.isalnum() or c in "-._" else "-" for c in architecture.name).strip("-") or "model"
    shapes = (tensor.kept_shape(plan.kept, plan.width) for tensor in architecture.tensors)
    bits = 8 * plan.predicted.file_bytes / sum(int(np.prod(shape, dtype=np.int64)) for shape in shapes)
    experts = f"-K{plan.kept}of{plan.experts}" if plan.kept < plan.experts else ""
    experts += f"-F{plan.width}of{architecture.expert_width}" if plan.width else ""
    return f"{stem}{experts}-{bits:.2f}bpw.gguf"
