"""A large file to a machine behind a POSIX shell: sent once, gone on with after a break, and checked by its hash."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Protocol

from edgeprune.errors import EdgepruneError
from edgeprune.units import format_bytes

Progress = Callable[[int, int], None]


class Shell(Protocol):
    """A shell on another machine."""

    name: str

    def ask(self, script: str) -> str:
        """What ``script`` prints.

        Raises:
            EdgepruneError: the machine cannot be reached, or the script fails.
        """

    def append(self, stream: BinaryIO, path: str, progress: Callable[[int], None]) -> None:
        """Append the rest of ``stream`` to the file ``path`` over there; ``progress`` hears how much has left."""


def deliver(shell: Shell, model: Path, folder: str, sha256: str, progress: Progress, *, ending: str = "gguf") -> str:
    """The path of ``model`` on the other machine, after bringing it there unless it is there already.

    The file is named after its hash, so that the same file is sent once whatever it is called, and a part of one file
    is never gone on with as if it were of another. ``ending`` is what its name ends in there.

    Raises:
        EdgepruneError: no room, or what arrived is not what was sent.
    """
    target, size = f"{folder}/{sha256[:32]}.{ending}", model.stat().st_size
    partial = f"{target}.partial"
    there, begun, free = _look(shell, folder, target, partial)
    if there == size and _sha256(shell, target) == sha256:
        return target
    if begun > size:
        shell.ask(f"rm -f {shlex.quote(partial)}")
        begun, free = 0, free + begun
    if free < size - begun:
        raise EdgepruneError(
            f"{shell.name} has no room for {model.name} in {folder}",
            rows=[("needed", format_bytes(size - begun)), ("free", format_bytes(free))],
            hint="free some space there, or name another folder in the device's file",
        )
    if begun and not _sent(shell, model, begun, partial, sha256, progress):
        begun = 0  # the part that was there was damaged, or of another sender
        shell.ask(f"rm -f {shlex.quote(partial)}")
    elif begun:
        begun = size
    if begun == 0 and not _sent(shell, model, 0, partial, sha256, progress):
        shell.ask(f"rm -f {shlex.quote(partial)}")
        raise EdgepruneError(
            f"what arrived at {shell.name} is not {model.name}: its SHA-256 differs",
            hint="the file may be changing here, or the memory card over there may be failing; try again",
        )
    shell.ask(f"mv -f {shlex.quote(partial)} {shlex.quote(target)}")
    return target


def _look(shell: Shell, folder: str, target: str, partial: str) -> tuple[int, int, int]:
    """Bytes of the file and of the part that are there, and bytes free, with the folder made."""
    quoted = " ".join(map(shlex.quote, (target, partial)))
    script = (
        f"mkdir -p {shlex.quote(folder)} && for f in {quoted}; do "
        f'if [ -f "$f" ]; then wc -c < "$f"; else echo 0; fi; done && df -Pk {shlex.quote(folder)} | tail -n 1'
    )
    lines = [line.split() for line in shell.ask(script).splitlines() if line.strip()]
    try:
        # File system, blocks, used, available; a name with spaces makes more words in front.
        capacity = next(index for index, word in enumerate(lines[-1]) if word.endswith("%"))
        return int(lines[-3][0]), int(lines[-2][0]), int(lines[-1][capacity - 1]) * 1024
    except (IndexError, ValueError, StopIteration) as error:
        raise EdgepruneError(f"{shell.name} does not say what its folder {folder} holds") from error


def _sha256(shell: Shell, path: str) -> str:
    quoted = shlex.quote(path)
    said = shell.ask(
        f"if command -v sha256sum > /dev/null; then sha256sum < {quoted}; else shasum -a 256 < {quoted}; fi"
    )
    return said.split()[0].lower() if said.split() else ""


def _sent(shell: Shell, model: Path, begun: int, partial: str, sha256: str, progress: Progress) -> bool:
    """Send what follows the first ``begun`` bytes; whether the whole is then right."""
    size = model.stat().st_size
    with model.open("rb") as stream:
        stream.seek(begun)
        shell.append(stream, partial, lambda count: progress(begun + count, size))
    return _sha256(shell, partial) == sha256
