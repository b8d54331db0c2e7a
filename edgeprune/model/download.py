"""Models of the Hub on this disk: in huggingface_hub's own cache, complete or not at all.

huggingface_hub starts a download that was cut off anew (version 2 deletes what it has) and compares no digests. Files
of tens of gigabytes over a home line need both, so the bytes are fetched here, into the place where huggingface_hub
looks for them, and it does the rest.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from edgeprune.errors import BadFile, Busy, EdgepruneError
from edgeprune.files import room_for, write_text
from edgeprune.model import hub, selection
from edgeprune.model.checkpoint import INDEX, open_checkpoint
from edgeprune.model.hub import DEFAULT_REVISION, HubFile, Listing, Unreachable
from edgeprune.model.location import HubName
from edgeprune.units import format_bytes

Progress = Callable[[int, int], None]
# Bytes of one request: the Hub's servers do not hand out more than 50 GB at once.
SEGMENT = 8 << 30
_CHUNK = 1 << 20
# Waiting before a connection that was cut is tried again; each new byte starts this anew.
PATIENCE_SECONDS = (1.0, 2.0, 4.0, 8.0)
_COMMIT = re.compile(r"[0-9a-f]{40}")


def fetch(name: HubName, progress: Progress, say: Callable[[str], None]) -> Path:
    """The checkpoint folder or the GGUF file (its first part) called ``name``, downloaded as far as it is not here.

    Args:
        progress: called with bytes that arrived and bytes that were missing.
        say: told what is downloaded, and when the network failed and an earlier download is used.

    Raises:
        UsageError: no such repository, revision, file or quantisation.
        BadFile: what arrived is not what the Hub lists.
        EdgepruneError: no access, no network, no room on the disk.
    """
    if hub.is_offline():
        found = _cached(name)
        if found is None:
            raise hub.offline(name)
        return found
    try:
        listing = hub.list_files(name)
    except Unreachable as error:
        found = _cached(name)
        if found is None:
            raise
        say(f"{error.cause}; what was downloaded earlier is used")
        return found
    if name.wanted or not selection.has_checkpoint(listing):
        model = selection.chosen_gguf(listing)
        _Download(listing, progress, say).get(model.files)
        return _finished(listing) / model.files[0].path
    small = selection.small_files(listing)
    download = _Download(listing, progress, say)
    index = None
    if INDEX in listing.files:
        download.get([listing.files[INDEX]])
        index = _place(listing, INDEX).read_bytes()
    # Weights last: a folder that has them has everything.
    download.get([*small, *selection.weights_of(listing, index)])
    return _finished(listing)


def _place(listing: Listing, path: str) -> Path:
    """Where a file of the repository is when it is here."""
    return hub.repo_folder(listing.name) / "snapshots" / listing.commit / path


def _finished(listing: Listing) -> Path:
    """The snapshot's folder, after noting that the revision means this commit, as huggingface_hub does."""
    revision = listing.name.revision or DEFAULT_REVISION
    if not _COMMIT.fullmatch(revision):
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
        missing = [file for file in dict.fromkeys(files) if not self._is_here(file)]
        if not missing:
            return
        self.missing_bytes += sum(file.size - self._begun(file) for file in missing)
        self._require_room(sum(file.size - self._begun(file) for file in missing))
        if sum(file.size for file in missing) > _CHUNK:
            self._announce(missing)
        self.blobs.mkdir(parents=True, exist_ok=True)
        for file in missing:
            self._get(file)

    def _is_here(self, file: HubFile) -> bool:
        place = _place(self.listing, file.path)
        return place.is_file() and place.stat().st_size == file.size

    def _partial(self, file: HubFile) -> Path:
        return self.blobs / f"{file.digest}.incomplete"

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

    def _require_room(self, needed: int) -> None:
        folder = hub.cache_folder()
        while not folder.is_dir():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise EdgepruneError(
                f"not enough disk space in {hub.cache_folder()} for {self.listing.name}",
                rows=[("to download", format_bytes(needed)), ("free", format_bytes(free))],
                hint="free some space, or set HF_HOME to a folder on a larger disk",
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
            hf_hub_download(self.listing.name.repo, file.path, revision=self.listing.commit, endpoint=hub.endpoint())
        if not self._is_here(file):
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


def _cached(name: HubName) -> Path | None:
    """What ``name`` is in the cache, if an earlier download of it is complete."""
    folder, revision = hub.repo_folder(name), name.revision or DEFAULT_REVISION
    note = folder / "refs" / revision
    commit = revision if _COMMIT.fullmatch(revision) else note.read_text().strip() if note.is_file() else ""
    snapshot = folder / "snapshots" / commit
    if not _COMMIT.fullmatch(commit) or not snapshot.is_dir():
        return None
    files = {path.relative_to(snapshot).as_posix(): path for path in snapshot.rglob("*") if path.is_file()}
    listing = Listing(
        name, commit, {path: HubFile(path, own.stat().st_size, "", False) for path, own in files.items()}
    )
    try:
        if not name.wanted and selection.has_checkpoint(listing):
            open_checkpoint(snapshot)
            return snapshot
        return snapshot / selection.chosen_gguf(listing).files[0].path if selection.ggufs(listing) else None
    except BadFile:
        return None
