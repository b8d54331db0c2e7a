"""Files: strict TOML, canonical JSON, atomic writes, digests, shipped data folders."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from edgeprune.errors import BadFile, EdgepruneError
from edgeprune.units import format_bytes

_PACKAGE = Path(__file__).resolve().parent
_BLOCK = 1 << 20  # of a file that is read through
PARTIAL_SUFFIX = ".partial"
NO_ROOM = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is too large for this file system or process",
}


def data_folder(name: str) -> Path:
    """Folder ``profiles``, ``converters`` or ``devices``: in the wheel, else beside the package."""
    shipped = _PACKAGE / "data" / name
    return shipped if shipped.is_dir() else _PACKAGE.parent / name


def read_toml(path: Path) -> dict[str, Any]:
    """The table in ``path``.

    Raises:
        BadFile: missing, unreadable or not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadFile(f"cannot read {path}: {error}") from error
    except RecursionError:
        raise BadFile(f"cannot read {path}: it is nested too deeply to be honest TOML") from None


def check_keys(where: str, table: Mapping[str, Any], required: set[str], optional: set[str]) -> None:
    """Refuse a table with a missing or an unknown key, so that a typo is never a silent default.

    Raises:
        BadFile: names the keys; or ``table`` is no table at all.
    """
    if not isinstance(table, Mapping):
        raise BadFile(f"{where} is not a table of keys and values")
    missing, unknown = required - table.keys(), table.keys() - required - optional
    if missing:
        raise BadFile(f"{where} lacks {', '.join(sorted(missing))}")
    if unknown:
        raise BadFile(
            f"{where} has unknown keys: {', '.join(sorted(unknown))}",
            hint=f"known keys: {', '.join(sorted(required | optional))}",
        )


def checked_int(where: str, value: Any, least: int, most: int) -> int:
    """``value``, which has to be a whole number from ``least`` to ``most``.

    Raises:
        BadFile: it is something else, a truth value or a text of digits for instance.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise BadFile(f"{where} = {str(value)[:40]!r} is not a whole number from {least:,} to {most:,}")
    return value


def checked_number(where: str, value: Any) -> float:
    """``value``, which has to be a finite number.

    Raises:
        BadFile: it is something else.
    """
    # A whole number that no float can hold is "not finite" here.
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= sys.float_info.max:
        raise BadFile(f"{where} = {str(value)[:40]!r} is not a finite number")
    return float(value)


def to_json(value: Any) -> str:
    """Readable JSON, equal for equal values: sorted keys, newline at the end."""
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def read_json(path: Path) -> Any:
    """The value in ``path``.

    Raises:
        BadFile: missing, unreadable or not JSON.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if not text.strip():
            raise BadFile(f"cannot read {path}: it is empty")
        return json.loads(text)
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise BadFile(f"cannot read {path}: {error}") from error
    except RecursionError:  # brackets within brackets, a hundred thousand deep
        raise BadFile(f"cannot read {path}: it is nested too deeply to be honest JSON") from None


def digest(value: Any) -> str:
    """SHA-256 of the canonical JSON of ``value``, 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path, progress: Callable[[int, int], None] | None = None) -> str:
    """SHA-256 of the whole file, 64 hexadecimal digits.

    Args:
        progress: called with the bytes that are read and all there are.
    """
    state, block, done, total = hashlib.sha256(), memoryview(bytearray(_BLOCK)), 0, path.stat().st_size
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(block):
            state.update(block[:count])
            done += count
            if progress is not None:
                progress(done, total)
    return state.hexdigest()


def existing(folder: Path) -> Path:
    """The folder, or the one above it that is there."""
    folder = Path(folder).absolute()
    while not folder.is_dir():
        folder = folder.parent
    return folder


def require_space(folder: Path, needed_bytes: int) -> None:
    """Refuse to start writing what the disk cannot hold; the folder need not be there yet.

    Raises:
        EdgepruneError: less than ``needed_bytes`` are free.
    """
    there = existing(folder)
    if not os.access(there, os.W_OK):  # a read-only file system has no space either, which is not what is wrong
        raise EdgepruneError(f"cannot write to {folder}", hint="choose another folder")
    free = shutil.disk_usage(there).free
    if free < needed_bytes:
        raise EdgepruneError(
            f"not enough disk space in {folder}",
            rows=[("needed", format_bytes(needed_bytes)), ("free", format_bytes(free))],
            hint="free some space, or choose another folder",
        )


@contextmanager
def atomic_writer(path: Path) -> Iterator[BinaryIO]:
    """A binary stream that becomes ``path`` only when the block ends well.

    The bytes go to a neighbour with the suffix ``.partial``, are flushed to the disk and renamed,
    so that a reader sees the old file or the new one, and a failure leaves nothing behind.

    Raises:
        EdgepruneError: the folder cannot be written to, or the disk is full.
    """
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        opened = partial.open("wb")
    except OSError as error:
        raise EdgepruneError(
            f"cannot write {path}: {error.strerror or error}", hint="choose another folder with -o"
        ) from error
    try:
        with room_for(path), opened as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def room_for(path: Path) -> Iterator[None]:
    """A block that writes ``path``: running out of room in it is explained.

    Raises:
        EdgepruneError: the disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise EdgepruneError(
            f"{NO_ROOM[error.errno]}: writing {path} failed",
            rows=[("free", format_bytes(shutil.disk_usage(path.parent).free))],
            hint="free some space and run the same command again; it goes on where it was",
        ) from error


def write_text(path: Path, text: str) -> None:
    """Atomic write of UTF-8 text."""
    with atomic_writer(path) as stream:
        stream.write(text.encode("utf-8"))


def remove_partials(folder: Path) -> None:
    """Delete what a killed run left half-written directly in ``folder``."""
    for leftover in folder.glob(f"*{PARTIAL_SUFFIX}"):
        leftover.unlink(missing_ok=True)
