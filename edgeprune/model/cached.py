"""What was downloaded earlier, for when the network may not or cannot be used: found, and found unchanged."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from edgeprune.errors import BadFile, EdgepruneError, UsageError
from edgeprune.model import hub, selection
from edgeprune.model.checkpoint import open_checkpoint
from edgeprune.model.content import content_digest, git_digest
from edgeprune.model.hub import DEFAULT_REVISION, HubFile, Listing
from edgeprune.model.location import HubName

COMMIT = re.compile(r"[0-9a-f]{40}")
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def holds(place: Path, digest: str) -> bool:
    """Whether the file is the one with this SHA-256, or this digest of git's."""
    return (content_digest(place) if len(digest) == 64 else git_digest(place)) == digest


class NotHere(EdgepruneError):
    """A model that is not in the cache, or not all of it, while the network may not or cannot be used.

    Attributes:
        why: one line without the name, such as "it was never downloaded".
    """

    def __init__(self, name: HubName, why: str, rows: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(
            f"{name}: {why}, and HF_HUB_OFFLINE forbids the network",
            rows=rows,
            hint="unset HF_HUB_OFFLINE, or give a local path",
        )
        self.why = why


def cached(name: HubName) -> Path:
    """What ``name`` is in the cache, from an earlier download.

    Raises:
        NotHere: it was never downloaded, or not this revision, this file or all of it; says which.
        BadFile: it has changed since.
    """
    snapshot = _snapshot(name)
    files = {path.relative_to(snapshot).as_posix(): path for path in snapshot.rglob("*") if path.is_file()}
    described = {path: HubFile(path, own.stat().st_size, "", False) for path, own in files.items()}
    listing = Listing(name, snapshot.name, described)
    if not name.wanted and selection.has_checkpoint(listing):
        try:
            checkpoint = open_checkpoint(snapshot)
        except BadFile as error:
            raise NotHere(name, f"it was not downloaded completely: {error.cause}") from error
        _require_unchanged(name, [snapshot / shard for shard in sorted(set(checkpoint.shard_of.values()))])
        return snapshot
    if not selection.ggufs(listing):
        raise NotHere(name, f"nothing of it but {len(files)} small files was downloaded")
    try:
        model = selection.chosen_gguf(listing)
    except UsageError as error:
        raise NotHere(
            name, f"{name.wanted or 'no single model'} is not among what was downloaded", error.rows
        ) from error
    except BadFile as error:
        raise NotHere(name, f"it was not downloaded completely: {error.cause}") from error
    _require_unchanged(name, [snapshot / file.path for file in model.files])
    return snapshot / model.files[0].path


def _snapshot(name: HubName) -> Path:
    """The folder of the revision that is named, as far as it was downloaded.

    Raises:
        NotHere: nothing of it was.
    """
    folder, revision = hub.repo_folder(name), name.revision or DEFAULT_REVISION
    if not (folder / "snapshots").is_dir():
        raise NotHere(name, f"it was never downloaded to {hub.cache_folder()}")
    note = folder / "refs" / revision
    commit = revision if COMMIT.fullmatch(revision) else note.read_text().strip() if note.is_file() else ""
    snapshot = folder / "snapshots" / commit
    if not COMMIT.fullmatch(commit) or not snapshot.is_dir():
        refs = folder / "refs"
        known = sorted(path.relative_to(refs).as_posix() for path in refs.rglob("*") if path.is_file())
        raise NotHere(
            name, f"its revision {revision} was never downloaded", [("downloaded", ", ".join(known) or "none")]
        )
    return snapshot


def _require_unchanged(name: HubName, files: Sequence[Path]) -> None:
    """Compare files with the digests that their blobs in the cache are called by, where these are links to blobs.

    Raises:
        BadFile: one differs.
    """
    blobs = hub.repo_folder(name).resolve() / "blobs"
    for path in files:
        blob = path.resolve()
        if blob.parent == blobs and _DIGEST.fullmatch(blob.name) and not holds(blob, blob.name):
            raise BadFile(
                f"{path} has changed since it was downloaded: its digest is no more {blob.name[:12]}...",
                hint="run the same command with the network, which fetches it again",
            )
