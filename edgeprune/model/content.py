"""What a large file holds, as one digest: read whole once, known at once when it is asked for again.

Samples are no identity: weights that were pruned, merged or damaged in place differ from the old ones only here and
there, and what was measured on the old ones would be used for the new ones. Reading a file once, at the speed of the
disk, costs minutes where measuring it costs hours; so the whole file counts.

The digest is remembered in the user's cache folder together with what the system says of the file (size, times,
inode). A file that was only copied, moved or touched is read once more and has the digest that it had, so nothing is
measured again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import platformdirs

from edgeprune.errors import BadFile, EdgepruneError
from edgeprune.files import file_digest, read_json, to_json, write_text

# A file that changed so short a time ago may change again with the same times: file systems count in steps of up to
# two seconds. Its digest is not remembered.
_SETTLED_NS = 3_000_000_000
_known: dict[str, dict[str, Any]] = {}


def content_digest(path: Path, progress: Callable[[int, int], None] | None = None) -> str:
    """SHA-256 of the whole file, 64 hexadecimal digits; of a file that was not touched since, without reading it.

    Args:
        progress: as of ``file_digest``.

    Raises:
        BadFile: it cannot be read.
    """
    try:
        real = path.resolve(strict=True)
        state, started = _state(real), time.time_ns()
        note = _note(real)
        remembered = _known.get(str(note)) or _read_note(note)
        if remembered.get("state") == state:
            return str(remembered["digest"])
        digest = file_digest(real, progress)
        unchanged = _state(real) == state
    except OSError as error:
        raise BadFile(f"cannot read {path}: {error.strerror or error}") from error
    if unchanged and max(state["mtime_ns"], state["ctime_ns"]) < started - _SETTLED_NS:
        _remember(note, {"path": str(real), "state": state, "digest": digest})
    return digest


def known_digest(path: Path) -> str:
    """What ``content_digest`` would return without reading the file, or "" where it would have to."""
    try:
        real = path.resolve(strict=True)
        note = _note(real)
        remembered = _known.get(str(note)) or _read_note(note)
        return str(remembered["digest"]) if remembered.get("state") == _state(real) else ""
    except OSError:
        return ""


def git_digest(path: Path) -> str:
    """SHA-1 that git gives to the file as a blob, 40 hexadecimal digits.

    Raises:
        BadFile: it cannot be read.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BadFile(f"cannot read {path}: {error.strerror or error}") from error
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _state(path: Path) -> dict[str, int]:
    """All that changes with a file's content. A program can set the time of the last change back to what it was,
    but not that of the last change of the inode (on Windows this is the time of creation, which does no harm)."""
    found = os.stat(path)
    return {
        "size": found.st_size,
        "mtime_ns": found.st_mtime_ns,
        "ctime_ns": found.st_ctime_ns,
        "inode": found.st_ino,
        "volume": found.st_dev,
    }


def _note(path: Path) -> Path:
    """Where the digest of ``path`` is remembered: one small file per path, so that runs do not disturb each other."""
    name = hashlib.sha256(os.fsencode(path)).hexdigest()[:32]
    return Path(platformdirs.user_cache_dir("edgeprune")) / "digests" / f"{name}.json"


def _read_note(note: Path) -> dict[str, Any]:
    """What was remembered; nothing when it is missing or damaged."""
    with contextlib.suppress(BadFile):
        found = read_json(note)
        if isinstance(found, dict) and isinstance(found.get("digest"), str) and len(found["digest"]) == 64:
            return found
    return {}


def _remember(note: Path, value: dict[str, Any]) -> None:
    """Keep ``value`` for this process and, where the cache folder can be written to, for the next ones."""
    _known[str(note)] = value
    with contextlib.suppress(OSError, EdgepruneError):
        write_text(note, to_json(value))
