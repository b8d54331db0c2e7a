"""Hugging Face checkpoints on disk: configuration, and tensors by name over one or many safetensors.

Nothing is ever unpickled, and no weights from outside the checkpoint's folder are read: links that leave it are
refused, but for those of the Hugging Face cache, where a snapshot is links to the blobs of its own repository.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.errors import BadFile, Unsupported
from edgeprune.files import file_digest, read_json
from edgeprune.model.content import content_digest
from edgeprune.model.converter import own_converter
from edgeprune.model.headers import Readable
from edgeprune.model.quantised import MXFP4, MXFP4_NAN, Scaled, decoded, find_scales, mxfp4_rows

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Of what a checkpoint needs beside its weights: configurations, tokenizers, chat templates.
SMALL = (".json", ".jinja", ".model", ".tiktoken", ".txt")
_WEIGHTS_TOGETHER = 1 << 23  # that are compared in one go
# Raised when conversion changes its result, so that converted files are made again.
CONVERSION_FORMAT = 4
LARGEST_HEADER = 100_000_000
# Read of a shard before it is mapped anew. What was read stays in memory as long as its map does, and a shard may be
# as large as the model.
_MAPPED_BYTES = 64 << 20
# A weight of a routed expert, of one (``experts.7.``) or of all of them stacked.
EXPERT_TENSOR = re.compile(r"(?:^|\.)experts\.(?:(\d+)\.)?")
# How configurations call the number of experts; any family that has them has one of these.
_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_tok")


@dataclass(frozen=True)
class Stored:
    """A tensor as the header of its file describes it.

    Attributes:
        shape: in PyTorch's order.
        type: as safetensors spells it: F32, BF16, F8_E4M3, ...; or ``MXFP4`` for blocks with their scales.
    """

    shape: tuple[int, ...]
    type: str


@dataclass
class Checkpoint:
    """A folder as ``save_pretrained`` writes it.

    Attributes:
        folder: of the checkpoint.
        config: ``config.json``.
        shard_of: file name by tensor name.
        stored: shape and type by tensor name; scales count as parts of the tensors that they belong to.
        scaled: by name of a quantised tensor, where its scales are.
    """

    folder: Path
    config: dict[str, Any]
    shard_of: dict[str, str]
    stored: dict[str, Stored]
    scaled: dict[str, Scaled] = field(default_factory=dict)
    _open: dict[str, Any] = field(default_factory=dict, repr=False)
    _read_bytes: int = field(default=0, repr=False)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of tensor ``name`` in PyTorch's order."""
        return self.stored[name].shape

    def tensor(self, name: str, matrix: int | None = None) -> torch.Tensor:
        """Tensor ``name``, read from disk now; float32 when it is quantised.

        Args:
            matrix: only this one of a stack, as a stack of one.

        Raises:
            BadFile: it cannot be read, or its scales do not fit it.
        """
        if name not in self.scaled:
            return self._matrix(name, matrix)
        return decoded(
            self.scaled[name],
            self._matrix(name, matrix),
            self._scale(name, matrix),
            self.block,
        )

    def packed(self, name: str, matrix: int | None = None) -> torch.Tensor:
        """Tensor ``name``, which is stored as MXFP4, as uint8 [..., rows, bytes of a GGUF row].

        Args:
            matrix: only this one of a stack, as a stack of one.

        Raises:
            BadFile: it cannot be read, or a scale is not a number.
        """
        scales = self._scale(name, matrix)
        if bool((scales == MXFP4_NAN).any()):
            raise BadFile(f"tensor {self.scaled[name].scale} holds scales that are NaN")
        return mxfp4_rows(self._matrix(name, matrix), scales)

    def is_here(self, *names: str) -> bool:
        """Whether the files with the tensors ``names`` are in the folder, and not only known by their headers."""
        return all((self.folder / self.shard_of[name]).is_file() for name in names)

    def alike(self, one: str, two: str) -> bool:
        """Whether two matrices are stored with the same numbers; read some rows at a time and let go of again.

        Raises:
            BadFile: one of them cannot be read.
        """
        import torch

        if self.stored[one] != self.stored[two] or {one, two} & self.scaled.keys():
            return False
        rows, *columns = self.shape(one)
        step = max(_WEIGHTS_TOGETHER // max(math.prod(columns), 1), 1)
        for start in range(0, rows, step):
            if not torch.equal(*(self._raw(name, slice(start, start + step)) for name in (one, two))):
                return False
        return True

    def _scale(self, name: str, matrix: int | None) -> torch.Tensor:
        """The scales of tensor ``name``; of one matrix of a stack where every matrix has its own."""
        scale = self._raw(self.scaled[name].scale)
        own = matrix is not None and scale.dim() > 0 and len(scale) == self.shape(name)[0]
        return scale[matrix : matrix + 1] if own and matrix is not None else scale

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns of the blocks that have an FP8 scale in common."""
        settings = self.config.get("quantization_config")
        size = settings.get("weight_block_size") if isinstance(settings, dict) else None
        if isinstance(size, list) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size):
            return size[0], size[1]
        return 128, 128

    def _matrix(self, name: str, matrix: int | None) -> torch.Tensor:
        """One ``matrix`` of a stack as stored, or all of the tensor."""
        return self._raw(name, None if matrix is None else slice(matrix, matrix + 1))

    def _raw(self, name: str, part: slice | None = None) -> torch.Tensor:
        """As stored: the tensor ``name``, or a ``part`` along its first axis."""
        import safetensors

        handle = self._handle(name)
        try:
            tensor: torch.Tensor = handle.get_tensor(name) if part is None else handle.get_slice(name)[part]
        except safetensors.SafetensorError as error:
            raise BadFile(f"{self.folder / self.shard_of[name]}: tensor {name}: {error}") from error
        self._read_bytes += tensor.nbytes
        return tensor

    def require_experts(self) -> None:
        """Refuse a dense model, before anything is said of converters for it.

        Raises:
            Unsupported: neither the configuration nor a tensor speaks of experts.
        """
        if not counts_experts(self.config) and not any(EXPERT_TENSOR.search(name) for name in self.stored):
            model_type = str(self.config.get("model_type", ""))[:60]
            raise Unsupported(
                f"{self.folder} is a dense {model_type or 'language'} model: it has no experts to choose from",
                hint="convert dense models with llama.cpp's convert_hf_to_gguf.py and use llama-quantize",
            )

    def _handle(self, name: str) -> Any:
        shard = self.shard_of[name]
        if shard not in self._open or self._read_bytes > _MAPPED_BYTES:
            self._open, self._read_bytes = {}, 0  # the old map first; it goes when its last tensor does
            self._open = {shard: _open_shard(self.folder / shard)}
        return self._open[shard]

    def origin(self, *, mtp: bool = False, progress: Callable[[int, int], None] | None = None) -> str:
        """Digest of the checkpoint and of the way it is converted; ``mtp``: with its further blocks."""
        way = f"{CONVERSION_FORMAT}{' with further blocks' if mtp else ''}"
        own = own_converter(str(self.config.get("model_type", "")))
        if own is not None:
            way += f" by {file_digest(own)}"
        return hashlib.sha256(f"conversion {way}, {self.fingerprint(progress)}".encode()).hexdigest()

    def fingerprint(self, progress: Callable[[int, int], None] | None = None) -> str:
        """SHA-256 over the small files and over every shard, all of them whole.

        Args:
            progress: called with bytes done and bytes in all, of the shards.

        Raises:
            BadFile: one of them cannot be read.
        """
        state = hashlib.sha256()
        for path in _small_files(self.folder):
            state.update(path.name.encode() + path.read_bytes())
        shards = [self.folder / name for name in sorted(set(self.shard_of.values()))]
        sizes = [shard.stat().st_size for shard in shards] if progress is not None else []
        for number, shard in enumerate(shards):

            def told(done: int, total: int, number: int = number) -> None:
                if progress is not None:
                    share = sizes[number] * done // max(1, total)
                    progress(sum(sizes[:number]) + share, sum(sizes))

            state.update(content_digest(shard, told).encode())
            told(1, 1)  # also where it was known
        return state.hexdigest()


def counts_experts(config: Mapping[str, Any]) -> bool:
    """Whether a configuration speaks of experts. One that does not may still be of a model that has them."""
    tables = [config, *(part for part in config.values() if isinstance(part, dict))]
    return any(table.get(key) for table in tables for key in _EXPERT_KEYS)


@contextmanager
def blaming_the_download() -> Iterator[None]:
    """A block whose complaints of a checkpoint have a way out, if they name no better one."""
    try:
        yield
    except BadFile as error:
        error.hint = error.hint or "the download is damaged, or its files are of different models; get it again"
        raise


def shown(folder: Path) -> str:
    """What people call a checkpoint: ORG/NAME of one in the cache of the Hub, else the path of its folder."""
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return "/".join(repository.split("--")[1:])
    return str(folder)


def _open_shard(path: Path) -> Any:
    import safetensors

    try:
        return safetensors.safe_open(str(path), framework="pt")
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise BadFile(
            f"{path} is not a complete safetensors file: {error}", hint="download this file again"
        ) from error


def _shard_tensors(path: Path) -> dict[str, Stored]:
    """The tensors in one safetensors file, after checking that the file is as long as it says."""
    with path.open("rb") as stream:
        if path.stat().st_size == 0:  # which cannot be mapped
            return shard_header(b"", str(path))
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return shard_header(data, str(path))


def shard_header(data: Readable, where: str) -> dict[str, Stored]:
    """The tensors that the safetensors file ``data`` describes, after checking that it is as long as it says.

    Args:
        where: what it is called in messages.

    Raises:
        BadFile: no safetensors file, truncated, or corrupt.
    """
    size, prefix = len(data), data[:8]
    length: int = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
    if not 0 < length <= min(LARGEST_HEADER, size - 8):
        raise BadFile(
            f"{where} is not a safetensors file, or is truncated ({size:,} bytes)",
            hint="download this file again",
        )
    try:
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__", None)
        described = {name: _described(entry) for name, entry in header.items()}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise BadFile(
            f"{where} has a corrupt header: {str(error)[:100]!r}", hint="download this file again"
        ) from error
    needed = 8 + length + max((end for _, end in described.values()), default=0)
    if needed > size:
        raise BadFile(
            f"{where} is truncated: its header describes {needed:,} bytes, the file has {size:,}",
            hint="the download was cut off; get this file again",
        )
    return {name: stored for name, (stored, _) in described.items()}


def _described(entry: dict[str, Any]) -> tuple[Stored, int]:
    """The tensor that an entry of a header describes, and where its data ends.

    Raises:
        ValueError, LookupError, TypeError: the entry is not what the format says.
    """
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    for number in (begin, end, *shape):
        if not isinstance(number, int) or isinstance(number, bool) or number < 0:
            raise ValueError(f"{number!r} where a whole number from 0 is due")
    if begin > end:
        raise ValueError(f"data from {begin} to {end}")
    if math.prod(shape) > 8 * (end - begin):  # no type has less than a bit
        raise ValueError(f"the shape {list(shape)} in {end - begin} bytes")
    if not isinstance(entry["dtype"], str):
        raise TypeError(f"{entry['dtype']!r} as a type")
    return Stored(shape, entry["dtype"]), end


@blaming_the_download()
def open_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in ``folder``, with every shard present and complete.

    Raises:
        BadFile: no ``config.json`` or weights, a missing, truncated or corrupt shard, or one that lies elsewhere.
        Unsupported: weights only as pickles.
    """
    if not (folder / "config.json").is_file():
        raise BadFile(
            f"{folder} holds no config.json; it is no Hugging Face checkpoint",
            hint="give a folder as save_pretrained writes it, or a GGUF file",
        )
    for path in _small_files(folder):
        _require_inside(folder, str(path.relative_to(folder)))
    config = parsed_config((folder / "config.json").read_bytes(), str(folder / "config.json"))
    shards = _shards(folder)
    shard_of: dict[str, str] = {}
    stored: dict[str, Stored] = {}
    for shard in shards:
        if not (folder / shard).is_file():
            raise BadFile(
                f"{folder} lacks {shard}, one of its {len(shards)} files of weights",
                hint="the download is incomplete; get the missing file",
            )
        _require_inside(folder, shard)
        found = _shard_tensors(folder / shard)
        stored |= found
        shard_of |= dict.fromkeys(found, shard)
    if shards != [SINGLE]:
        require_as_listed(read_json(folder / INDEX), shard_of, str(folder))
    return described(folder, config, shard_of, stored)


def described(
    folder: Path, config: dict[str, Any], shard_of: dict[str, str], stored: dict[str, Stored]
) -> Checkpoint:
    """The checkpoint with the tensors ``stored``, of which scales belong to the weights that they scale."""
    scaled = find_scales({name: (tensor.type, tensor.shape) for name, tensor in stored.items()})
    for name, each in scaled.items():
        stored.pop(each.scale)
        if each.form == MXFP4:
            *outer, blocks, width = stored[name].shape
            stored[name] = Stored((*outer, blocks * width * 2), MXFP4)
    return Checkpoint(folder, config, shard_of, stored, scaled)


def parsed_config(content: bytes, where: str) -> dict[str, Any]:
    """The configuration of a checkpoint.

    Raises:
        BadFile: it is no JSON, or no table.
    """
    if not content.strip():
        raise BadFile(f"cannot read {where}: it is empty", hint="download this file again")
    try:
        config = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadFile(f"cannot read {where}: {str(error)[:100]}") from error
    if not isinstance(config, dict):
        raise BadFile(f"{where} is not a table")
    return config


def _small_files(folder: Path) -> list[Path]:
    """Configurations, tokenizer and chat templates: all that is read of a checkpoint beside its weights."""
    inside = [*folder.iterdir(), *(folder / "additional_chat_templates").glob("*.jinja")]
    return sorted(path for path in inside if path.suffix in SMALL and path.is_file())


def _require_inside(folder: Path, shard: str) -> None:
    """Refuse a link to what is no part of the checkpoint, any file of this user for instance.

    Raises:
        BadFile: names the file that it leads to.
    """
    home, target = folder.resolve(), (folder / shard).resolve()
    allowed = [home]
    if home.parent.name == "snapshots":  # REPOSITORY/snapshots/REVISION/FILE is a link to REPOSITORY/blobs/DIGEST
        allowed.append(home.parent.parent / "blobs")
    if not any(target.is_relative_to(place) for place in allowed):
        raise BadFile(
            f"{folder / shard} is a link that leaves the checkpoint's folder, to {target}",
            hint="if that is a part of it, move the file itself into the folder",
        )


def weight_files(index: Any, where: str) -> list[str]:
    """The files that the index of a checkpoint names, all of them in its own folder.

    Raises:
        BadFile: it is no index, or points outside.
    """
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadFile(f"{where} has no weight_map")
    names = sorted(set(map(str, weight_map.values())))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise BadFile(
            f"{where} points outside its folder: {outside[0]!r}",
            hint="no honest checkpoint does that; get it from another place",
        )
    return names


def require_as_listed(index: Any, shard_of: Mapping[str, str], where: str) -> None:
    """Refuse shards that hold other tensors than the index says: they are of another model, or of another revision.

    Args:
        index: content of the index.
        shard_of: the file that holds a tensor, by its name.
        where: the checkpoint, for messages.

    Raises:
        BadFile: names a tensor that is missing, elsewhere, or not listed.
    """
    listed: dict[str, str] = {str(name): str(shard) for name, shard in index["weight_map"].items()}
    wrong = [name for name, shard in listed.items() if shard_of.get(name) != shard]
    strange = [name for name in shard_of if name not in listed]
    if not wrong and not strange:
        return
    if wrong:
        there = shard_of.get(wrong[0])
        cause = (
            f"{where}: {INDEX} says that {listed[wrong[0]]} holds {wrong[0][:80]}, which "
            f"{f'is in {there}' if there else 'no file holds'}"
        )
    else:
        cause = f"{where}: {shard_of[strange[0]]} holds {strange[0][:80]}, which {INDEX} does not list"
    count = len(wrong) + len(strange)
    raise BadFile(
        cause + (f"; {count} tensors differ" if count > 1 else ""),
        hint="its files are of different revisions or models; get all of them again",
    )


def _shards(folder: Path) -> list[str]:
    if (folder / SINGLE).is_file():  # first, as for transformers, where both are there
        return [SINGLE]
    if (folder / INDEX).is_file():
        return weight_files(read_json(folder / INDEX), str(folder / INDEX))
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        raise Unsupported(
            f"{folder} has its weights as Python pickles, which can run code when they are opened",
            hint="save it again with safe_serialization=True",
        )
    if shards := len(list(folder.glob("*.safetensors"))):
        raise BadFile(
            f"{folder} lacks {INDEX}, which says what its {shards} safetensors hold",
            hint="the download is incomplete; get the missing file",
        )
    raise BadFile(f"{folder} holds no {SINGLE}", hint="the download is incomplete, or this is another folder")
