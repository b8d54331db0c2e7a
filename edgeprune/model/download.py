"""Models of the Hub on this disk: in huggingface_hub's own cache, complete or not at all.

huggingface_hub starts a download that was cut off anew (version 2 deletes what it has) and compares no digests. Files
of tens of gigabytes over a home line need both, so the bytes are fetched here, into the place where huggingface_hub
looks for them, and it does the rest.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from edgeprune.errors import BadFile, Busy, EdgepruneError
from edgeprune.files import existing, require_space, room_for, write_text
from edgeprune.model import hub, selection
from edgeprune.model.cached import COMMIT, NotHere, cached, holds
from edgeprune.model.checkpoint import INDEX, Checkpoint, blaming_the_download, counts_experts
from edgeprune.model.content import known_digest
from edgeprune.model.convert import whole_header
from edgeprune.model.headers import Header
from edgeprune.model.hub import DEFAULT_REVISION, HubFile, Listing, Unreachable
from edgeprune.model.location import HubName, endpoint
from edgeprune.model.planning import known_converter, plan_conversion
from edgeprune.model.remote import Budget, NoRanges, remote_checkpoint, remote_config, remote_header
from edgeprune.units import format_bytes

Progress = Callable[[int, int], None]
# Bytes of one request: the Hub's servers do not hand out more than 50 GB at once.
SEGMENT = 8 << 30
_CHUNK = 1 << 20
_WORTH_TELLING = 1 << 30  # bytes to be read before anything happens
# Waiting before a connection that was cut is tried again; each new byte starts this anew.
PATIENCE_SECONDS = (1.0, 2.0, 4.0, 8.0)


Look = Callable[[Checkpoint | Header], object]


@dataclass(frozen=True)
class Aim:
    """What a model is wanted for.

    Attributes:
        output: the GGUF that a checkpoint becomes.
        base: type of its matrices.
        mtp: whether it keeps blocks that predict further tokens.
        look: shown the model as far as its headers tell, before its weights are fetched; raises to refuse it.
    """

    output: Path
    base: str = "auto"
    mtp: bool = False
    look: Look = lambda model: None


def fetch(name: HubName, progress: Progress, say: Callable[[str], None], aim: Aim | None = None) -> Path:
    """The checkpoint folder or the GGUF file (its first part) called ``name``, downloaded as far as it is not here.

    Args:
        aim: what the model is wanted for. A checkpoint that cannot be converted, or whose GGUF would have no room
            beside it, and whatever ``aim.look`` refuses, is refused before weights are fetched. None to fetch it
            whatever it is.
        progress: called with bytes that arrived and bytes that were missing.
        say: told what is downloaded, and when the network failed and an earlier download is used.

    Raises:
        UsageError: no such repository, revision, file or quantisation.
        BadFile: what arrived is not what the Hub lists.
        Unsupported: a checkpoint that cannot be converted.
        EdgepruneError: no access, no network, no room on the disk; and what ``aim.look`` raises.
    """
    if hub.is_offline():
        return cached(name)
    try:
        listing = hub.list_files(name)
    except Unreachable as error:
        return downloaded_earlier(name, error, say)
    if name.wanted or not selection.has_checkpoint(listing):
        model = selection.chosen_gguf(listing)
        download = _Download(listing, progress, say)
        if aim is not None and not all(map(download.is_here, model.files)):
            with contextlib.suppress(NoRanges):
                aim.look(remote_header(listing, model, Budget()))
        download.get(model.files)
        return _finished(listing) / model.files[0].path
    return _checkpoint(listing, _Download(listing, progress, say), aim)


def downloaded_earlier(name: HubName, error: Unreachable, say: Callable[[str], None]) -> Path:
    """What of ``name`` is here although the Hub cannot be reached, which is said.

    Raises:
        Unreachable: nothing, or not all of it; says that, too.
    """
    try:
        found = cached(name)
    except NotHere as lack:
        raise Unreachable(error.cause, rows=[("in the cache", lack.why), *lack.rows], hint=error.hint) from error
    say(f"{error.cause}; what was downloaded earlier is used")
    return found


def beside_weights(listing: Listing) -> list[HubFile]:
    """What a checkpoint holds beside its weights and their index: its tokenizer above all."""
    return [file for file in selection.small_files(listing) if file.path != INDEX]


def fetch_beside(listing: Listing, progress: Progress, say: Callable[[str], None]) -> Path:
    """A folder with a checkpoint's ``beside_weights``, downloaded as far as they are not here.

    Raises:
        BadFile: what arrived is not what the Hub lists.
        EdgepruneError: no access, no network, no room on the disk.
    """
    _Download(listing, progress, say).get(beside_weights(listing))
    return _place(listing, "")


def _checkpoint(listing: Listing, download: _Download, aim: Aim | None) -> Path:
    """The folder of a checkpoint, its weights last: a folder that has them has everything."""
    if aim is not None:  # a kilobyte may say that it is not to be converted, before tokenizers of megabytes
        _require_converter(listing)
    index = None
    if INDEX in listing.files:
        download.get([listing.files[INDEX]])
        index = _place(listing, INDEX).read_bytes()
    weights = selection.weights_of(listing, index)
    download.get(selection.small_files(listing))
    if aim is not None and not all(map(download.is_here, weights)):
        with contextlib.suppress(NoRanges):  # then all has to be fetched to see it
            _require_use(listing, download, weights, index, aim)
    download.get(weights)
    return _finished(listing)


def _require_converter(listing: Listing) -> None:
    """Refuse a checkpoint of which the configuration alone says that it cannot be converted.

    Raises:
        BadFile, Unsupported: why; of a dense model that it is one, which the names of its tensors tell.
    """
    config = remote_config(listing, Budget())
    try:
        known_converter(config)
    except EdgepruneError:
        if not counts_experts(config):
            with contextlib.suppress(NoRanges):
                remote_checkpoint(listing, Budget()).checkpoint.require_experts()
        raise


def _require_use(
    listing: Listing, download: _Download, weights: Sequence[HubFile], index: bytes | None, aim: Aim
) -> None:
    """Refuse, by the headers of its weights, a checkpoint that cannot be converted, that is of no use, or for which
    there is no room.

    Raises:
        BadFile, Unsupported: as the conversion.
        EdgepruneError: no room for the weights and the GGUF; and what ``aim.look`` raises.
    """
    folder = _place(listing, "")
    found = replace(remote_checkpoint(listing, Budget(), index).checkpoint, folder=folder)
    with blaming_the_download():
        planned = plan_conversion(found, aim.base, mtp=aim.mtp)
        made = whole_header(planned, listing.name.short, folder)[0].nbytes
    aim.look(found)
    old = aim.output.stat().st_size if aim.output.is_file() else 0
    _require_room(listing.name, download.missing(weights), max(made - old, 0), aim.output)


def _require_room(name: HubName, needed: int, made: int = 0, output: Path | None = None) -> None:
    """Refuse a download of ``needed`` bytes of which ``made`` bytes are to be made at ``output``, if there is no
    room for both.

    Raises:
        EdgepruneError: says how much there is.
    """
    cache = existing(hub.cache_folder())
    rows = [("to download", format_bytes(needed))]
    if output is not None:
        target = existing(output.parent)
        if target.stat().st_dev == cache.stat().st_dev:
            needed += made
            rows.append(("GGUF of it", format_bytes(made)))
        else:
            require_space(target, made)
    free = shutil.disk_usage(cache).free
    if free < needed:
        raise EdgepruneError(
            f"not enough disk space in {hub.cache_folder()} for {name}",
            rows=[*rows, ("free", format_bytes(free))],
            hint="free some space, or set HF_HOME to a folder on a larger disk",
        )


def _place(listing: Listing, path: str) -> Path:
    """Where a file of the repository is when it is here."""
    return hub.repo_folder(listing.name) / "snapshots" / listing.commit / path


def _finished(listing: Listing) -> Path:
    """The snapshot's folder, after noting that the revision means this commit, as huggingface_hub does."""
    revision = listing.name.revision or DEFAULT_REVISION
    if not COMMIT.fullmatch(revision):
        write_text(hub.repo_folder(listing.name) / "refs" / revision, listing.commit)
    return _place(listing, "")


class _Download:
    """Files of one repository on their way into the cache."""

    def __init__(self, listing: Listing, progress: Progress, say: Callable[[str], None]) -> None:
        self.listing, self.progress, self.say = listing, progress, say
        self.blobs = hub.repo_folder(listing.name) / "blobs"
        self.arrived = self.missing_bytes = 0

    def get(self, files: Sequence[HubFile]) -> None:
        """Make all ``files`` be here, each of the size and with the digest that the Hub lists."""
        wanted = list(dict.fromkeys(files))
        self._check(wanted)
        missing = [file for file in wanted if not self.is_here(file)]
        if not missing:
            return
        self.missing_bytes += self.missing(missing)
        _require_room(self.listing.name, self.missing(missing))
        if sum(file.size for file in missing) > _CHUNK:
            self._announce(missing)
        self.blobs.mkdir(parents=True, exist_ok=True)
        for file in missing:
            self._get(file)

    def is_here(self, file: HubFile) -> bool:
        place = _place(self.listing, file.path)
        return place.is_file() and place.stat().st_size == file.size

    def _check(self, files: Sequence[HubFile]) -> None:
        """Forget what is here under the name of one of ``files`` and is something else. What was read once and not
        touched since is known at once."""
        here = {file: _place(self.listing, file.path) for file in files if self.is_here(file)}
        unread = sum(file.size for file, place in here.items() if file.large and not known_digest(place))
        if unread > _WORTH_TELLING:
            self.say(
                f"compare {format_bytes(unread)} of {self.listing.name} in {hub.cache_folder()} with their SHA-256"
            )
        for file, place in here.items():
            if not holds(place, file.digest):
                self.say(
                    f"{file.path} of {self.listing.name} has changed since it was downloaded; it is fetched again"
                )
                if place.resolve().parent == self.blobs.resolve():
                    place.resolve().unlink(missing_ok=True)
                place.unlink(missing_ok=True)

    def _partial(self, file: HubFile) -> Path:
        return self.blobs / f"{file.digest}.incomplete"

    def missing(self, files: Sequence[HubFile]) -> int:
        """Bytes of ``files`` that are not here."""
        return sum(file.size - self._begun(file) for file in files if not self.is_here(file))

    def _begun(self, file: HubFile) -> int:
        """Bytes of ``file`` that are here already."""
        for path in (self.blobs / file.digest, self._partial(file)):
            if path.is_file():
                return min(path.stat().st_size, file.size)
        return 0

    def _announce(self, missing: Sequence[HubFile]) -> None:
        begun = sum(self._begun(file) for file in missing)
        self.say(
            f"download {format_bytes(sum(file.size for file in missing))} of {self.listing.name} in {len(missing)} "
            f"file{'s' if len(missing) > 1 else ''} to {hub.cache_folder()}"
            + (f"; {format_bytes(begun)} are here already" if begun else "")
        )

    def _get(self, file: HubFile) -> None:
        from filelock import FileLock, Timeout

        lock = hub.cache_folder() / ".locks" / self.blobs.parent.name / f"{file.digest}.lock"  # huggingface_hub's
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(str(lock), timeout=0):
                blob = self.blobs / file.digest
                if blob.is_file() and blob.stat().st_size != file.size:  # cut off since: go on with it
                    blob.replace(self._partial(file))
                if blob.is_file() and not holds(blob, file.digest):
                    blob.unlink()
                if not blob.is_file():
                    self._fill(file)
                    self._partial(file).replace(blob)
        except Timeout:
            raise Busy(
                f"another program downloads {file.path} of {self.listing.name.repo}", hint="wait for it"
            ) from None
        self._link(file)

    def _link(self, file: HubFile) -> None:
        """Have huggingface_hub put the finished file into the snapshot."""
        from huggingface_hub import hf_hub_download

        with hub.explained(self.listing.name, file.path):
            hf_hub_download(self.listing.name.repo, file.path, revision=self.listing.commit, endpoint=endpoint())
        if not self.is_here(file):
            raise BadFile(
                f"{file.path} of {self.listing.name.repo} is not of the {file.size:,} bytes that the Hub lists",
                hint=f"delete {hub.repo_folder(self.listing.name)} and run the same command again",
            )

    def _fill(self, file: HubFile) -> None:
        """Bring the partial file to its full length and compare its digest."""
        partial = self._partial(file)
        digest = hashlib.sha256() if file.large else hashlib.sha1(f"blob {file.size}\0".encode())
        with room_for(partial), partial.open("a+b") as stream:
            if stream.tell() > file.size:
                stream.truncate(0)
            stream.seek(0)
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
            self._append(file, stream, digest)
        if digest.hexdigest() != file.digest:
            partial.unlink()
            kind = "SHA-256" if file.large else "git digest"
            raise BadFile(
                f"{file.path} of {self.listing.name.repo} arrived with the {kind} {digest.hexdigest()[:12]}..., "
                f"the Hub lists {file.digest[:12]}...",
                hint="it was deleted; run the same command again",
            )

    def _append(self, file: HubFile, stream: IO[bytes], digest: Any) -> None:
        """Fetch what is missing, trying again where the connection is cut, as long as something arrives."""
        failures = 0
        while (position := stream.tell()) < file.size:
            try:
                self._fetch_segment(file, stream, digest)
            except Unreachable:
                failures = 0 if stream.tell() > position else failures + 1
                if failures >= len(PATIENCE_SECONDS):
                    raise
                time.sleep(PATIENCE_SECONDS[failures])

    def _fetch_segment(self, file: HubFile, stream: IO[bytes], digest: Any) -> None:
        from huggingface_hub import get_session, hf_raise_for_status

        position, last = stream.tell(), min(stream.tell() + SEGMENT, file.size) - 1
        headers = hub.request_headers(Range=f"bytes={position}-{last}")
        url = hub.address(self.listing, file.path)
        with (
            hub.explained(self.listing.name, file.path),
            get_session().stream("GET", url, headers=headers, timeout=hub.SECONDS_TO_ANSWER) as answer,
        ):
            hf_raise_for_status(answer)
            if answer.status_code != 206 and (position or last + 1 < file.size):
                raise BadFile(
                    f"the server sends {file.path} of {self.listing.name.repo} only as a whole (HTTP "
                    f"{answer.status_code} to a request for bytes from {position:,})",
                    hint="delete what was begun, or try another HF_ENDPOINT",
                )
            for chunk in answer.iter_bytes():
                if stream.tell() + len(chunk) > last + 1:
                    raise BadFile(
                        f"the server sends more of {file.path} than the {file.size:,} bytes that the Hub lists"
                    )
                stream.write(chunk)
                digest.update(chunk)
                self.arrived += len(chunk)
                self.progress(self.arrived, self.missing_bytes)
        if stream.tell() <= position:
            raise Unreachable(f"the server sent nothing of {file.path}", hint="try again later")
