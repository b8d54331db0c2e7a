"""Headers of files on the Hub: a few hundred kilobytes of a model of any size, fetched by range requests.

The data of tensors is never asked for. A hostile header, which may claim anything, costs at most ``Budget``.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import Any

from edgeprune.errors import BadFile
from edgeprune.model import hub
from edgeprune.model.checkpoint import (
    INDEX,
    SINGLE,
    Checkpoint,
    Stored,
    described,
    parsed_config,
    require_as_listed,
    shard_header,
)
from edgeprune.model.deduced import deduced
from edgeprune.model.headers import Header, read_header
from edgeprune.model.hub import HubFile, Listing, Unreachable
from edgeprune.model.parts import joined, names_of_parts
from edgeprune.model.selection import CONFIG, Gguf, weights_of
from edgeprune.model.table import find_table
from edgeprune.units import format_bytes

# Files as save_pretrained numbers them, or DeepSeek (00001-of-000163), Moonshot (1-of-61), Qwen3.5 (after a suffix).
_SHARD = re.compile(r"model(?:\.safetensors)?-(\d{1,6})-of-(\d{1,6})\.safetensors")
# Of one request; a header that goes on is fetched in ever larger steps.
_FIRST_STEP, _LARGEST_STEP = 1 << 14, 4 << 20
# Of all shards together, to see how long their headers are; and headers that are read at once whatever they say.
_LENGTHS, _FEW = 1 << 16, 3 << 17
# Files that are looked at side by side: large checkpoints have more than a hundred.
_AT_ONCE = 8
# Of all headers of a model. The largest that are known, vocabularies of 260,000 tokens, take 16 MiB.
MOST_BYTES = 96 << 20


class NoRanges(BadFile):
    """A server that sends files only as a whole."""


@dataclass
class Budget:
    """What has been fetched of a model, and the most that may be.

    Attributes:
        fetched: bytes of bodies.
        requests: how many it took.
        most: bytes.
    """

    most: int = field(default_factory=lambda: MOST_BYTES)
    fetched: int = 0
    requests: int = 0
    _lock: Lock = field(default_factory=Lock)

    def take(self, count: int, what: str) -> None:
        """Ask for ``count`` bytes more.

        Raises:
            BadFile: too many.
        """
        with self._lock:
            if self.fetched + count > self.most:
                raise BadFile(
                    f"{what}: its header goes on beyond {format_bytes(self.most)}, which no honest one does",
                    hint="download it and look at it here, if you trust it",
                )
            self.fetched += count
            self.requests += 1


@dataclass
class RemoteBytes:
    """The bytes of a file on the Hub, fetched when they are looked at and then kept.

    Sequential reads are fetched ahead, in steps that double; a jump starts small again.

    Attributes:
        first: bytes of the first step.
    """

    listing: Listing
    file: HubFile
    budget: Budget
    first: int = _FIRST_STEP
    _starts: list[int] = field(default_factory=list)
    _pieces: list[bytes] = field(default_factory=list)
    _step: int = 0

    def __len__(self) -> int:
        return self.file.size

    def __getitem__(self, key: slice, /) -> bytes:
        start, stop, _ = key.indices(self.file.size)
        found = bytearray()
        while start < stop:
            own = self._piece(start, stop)
            found += own
            start += len(own)
        return bytes(found)

    def _piece(self, start: int, stop: int) -> bytes:
        """Some of the bytes from ``start``, at most up to ``stop``."""
        index = bisect_right(self._starts, start) - 1
        if index >= 0 and start < self._starts[index] + len(self._pieces[index]):
            begin = self._starts[index]
            return self._pieces[index][start - begin : stop - begin]
        follows = index >= 0 and start == self._starts[index] + len(self._pieces[index])
        self._step = min(2 * self._step, _LARGEST_STEP) if follows else self.first
        end = min(max(stop, start + self._step), self.file.size)
        if index + 1 < len(self._starts):
            end = min(end, self._starts[index + 1])
        self._starts.insert(index + 1, start)
        self._pieces.insert(index + 1, self._fetch(start, end))
        return self._piece(start, stop)

    def _fetch(self, start: int, end: int) -> bytes:
        """The bytes from ``start`` to before ``end``, and not one more, whatever the server wants to send."""
        from huggingface_hub import get_session, hf_raise_for_status

        what = f"{self.listing.name.repo}/{self.file.path}"
        self.budget.take(end - start, what)
        url = hub.address(self.listing, self.file.path)
        headers = hub.request_headers(Range=f"bytes={start}-{end - 1}")
        body = bytearray()
        with (
            hub.explained(self.listing.name, self.file.path),
            get_session().stream("GET", url, headers=headers, timeout=hub.SECONDS_TO_ANSWER) as answer,
        ):
            hf_raise_for_status(answer)
            if answer.status_code != 206 and (start, end) != (0, self.file.size):
                raise NoRanges(
                    f"the server of {what} sends files only as a whole (HTTP {answer.status_code} to a request for "
                    f"bytes from {start:,})",
                    hint="try another HF_ENDPOINT, or download it",
                )
            for chunk in answer.iter_bytes():
                body += chunk
                if len(body) >= end - start:
                    break
        if len(body) < end - start:
            raise Unreachable(f"the server sent {len(body):,} of {end - start:,} bytes of {what}")
        return bytes(body[: end - start])


def remote_header(listing: Listing, model: Gguf, budget: Budget) -> Header:
    """The header of a GGUF model on the Hub, of all its parts.

    Raises:
        BadFile: not a GGUF, hostile, or parts that are not of one model.
        Unsupported: GGUF version 1.
        EdgepruneError: the Hub cannot be read from.
    """
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        headers = list(pool.map(lambda file: _header(listing, file, budget), model.files))
    names = [PurePosixPath(file.path).name for file in model.files]
    if names_of_parts(names[0], headers[0]) != names:
        raise BadFile(f"{headers[0].path}: its metadata speak of other parts than there are ({len(names)})")
    return joined(headers)


def _header(listing: Listing, file: HubFile, budget: Budget) -> Header:
    data = RemoteBytes(listing, file, budget)
    return read_header(data, Path(f"{listing.name.repo}/{file.path}"), find_table)


def _weights(listing: Listing, budget: Budget) -> list[HubFile]:
    """The files of weights, from their names alone where all are numbered: the index of a large model is larger than
    all its headers."""
    if INDEX not in listing.files:
        return weights_of(listing, None)
    shards = {path: match for path in listing.files if (match := _SHARD.fullmatch(path))}
    counts = {int(match[2]) for match in shards.values()}
    if len(counts) == 1 and len(shards) == counts.pop():
        return [listing.files[path] for path in sorted(shards, key=lambda path: int(shards[path][1]))]
    return weights_of(listing, RemoteBytes(listing, listing.files[INDEX], budget)[:])


def remote_config(listing: Listing, budget: Budget) -> dict[str, Any]:
    """The configuration of a checkpoint on the Hub.

    Raises:
        BadFile: it is no configuration.
        EdgepruneError: the Hub cannot be read from.
    """
    content = RemoteBytes(listing, listing.files[CONFIG], budget)[:]
    return parsed_config(content, f"{listing.name.repo}/{CONFIG}")


@dataclass(frozen=True)
class Looked:
    """A checkpoint on the Hub as far as its configuration and the headers of its weights tell.

    Attributes:
        nbytes: of its files of weights.
        files, read: how many of these there are, and of how many the header was read.
    """

    checkpoint: Checkpoint
    nbytes: int
    files: int
    read: int


def remote_checkpoint(listing: Listing, budget: Budget, index: bytes | None = None) -> Looked:
    """A checkpoint on the Hub. Of one whose layers are alike not all headers are read, unless there is an index.

    Args:
        index: content of the index of its shards, which are held against it, if it is here anyway.

    Raises:
        BadFile: something is corrupt or missing.
        Unsupported: weights only as pickles.
        EdgepruneError: the Hub cannot be read from.
    """
    repo = listing.name.repo
    config = remote_config(listing, budget)
    files = _weights(listing, budget) if index is None else weights_of(listing, index)
    shards = _Shards(listing, files, budget)
    stored = shards.whole() if index is not None else shards.enough(config)
    if index is not None and [file.path for file in files] != [SINGLE]:
        require_as_listed(json.loads(index), shards.shard_of, repo)
    checkpoint = described(Path(repo), config, shards.shard_of, stored)
    return Looked(checkpoint, sum(file.size for file in files), len(files), len(shards.read))


class _Shards:
    """Files of weights and what was seen of them.

    Attributes:
        seen: tensors by name.
        shard_of: the file that holds a tensor, by its name.
        read: numbers of the files whose headers were read.
    """

    def __init__(self, listing: Listing, files: list[HubFile], budget: Budget) -> None:
        self.repo, self.files = listing.name.repo, files
        first = min(_FIRST_STEP, _LENGTHS // max(len(files), 1))
        self.data = [RemoteBytes(listing, file, budget, first) for file in files]
        self.seen: dict[str, Stored] = {}
        self.shard_of: dict[str, str] = {}
        self.read: set[int] = set()

    def whole(self) -> dict[str, Stored]:
        """All tensors, from all headers."""
        self._read(range(len(self.files)))
        return self.seen

    def enough(self, config: dict[str, Any]) -> dict[str, Stored]:
        """All tensors, from as many headers as it takes to be certain of them, from both ends."""
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            lengths = list(pool.map(lambda data: int.from_bytes(data[:8], "little"), self.data))
        data_bytes = sum(file.size - 8 - length for file, length in zip(self.files, lengths, strict=True))
        count = len(self.files)
        order = [number for pair in zip(range(count), reversed(range(count)), strict=True) for number in pair]
        order = list(dict.fromkeys(order))
        while sum(lengths) > _FEW and (step := max(2, len(self.read) // 4)) < count - len(self.read):
            self._read(order[len(self.read) :][:step])
            found = deduced(Checkpoint(Path(self.repo), config, {}, self.seen), data_bytes)
            if found is not None:
                return found
        return self.whole()

    def _read(self, numbers: Iterable[int]) -> None:
        """Read the headers of these files, those that were not yet."""
        new = [number for number in numbers if number not in self.read]

        def tensors(number: int) -> dict[str, Stored]:
            return shard_header(self.data[number], f"{self.repo}/{self.files[number].path}")

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for number, found in zip(new, pool.map(tensors, new), strict=True):
                self.seen |= found
                self.shard_of |= dict.fromkeys(found, self.files[number].path)
        self.read.update(new)
