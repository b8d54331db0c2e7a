"""What the ways to another machine share: a client program here, and a shell over there."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from edgeprune.device.machine import Machine
from edgeprune.errors import EdgepruneError
from edgeprune.prove.smoke.delivery import deliver
from edgeprune.prove.smoke.way import Progress


def client(program: str, machine: Machine, hint: str) -> str:
    """The path of ``program``.

    Raises:
        EdgepruneError: it is not installed.
    """
    found = shutil.which(program)
    if found is None:
        raise EdgepruneError(f"{machine.name} is reached by {program}, which is not installed here", hint=hint)
    return found


def finished(words: Sequence[str]) -> tuple[int, bytes, bytes]:
    """Exit code, output and errors of a command that reads nothing."""
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    return done.returncode, done.stdout, done.stderr


def told(said: bytes) -> list[str]:
    """The lines of ``said`` that are not blank."""
    return [line.strip() for line in said.decode("utf-8", errors="replace").splitlines() if line.strip()]


def last_of(lines: Sequence[str], code: int) -> str:
    """The last line that a program said, or its exit code."""
    return lines[-1][:200] if lines else f"exit code {code}"


def way_out(ways: Mapping[str, str], lines: Sequence[str]) -> str:
    """The hint in ``ways`` whose sign is in one of ``lines``, or ""."""
    return next((way for sign, way in ways.items() if any(sign in line for line in lines)), "")


class Shelled(ABC):
    """A way to ``machine`` with a shell at its end."""

    def __init__(self, machine: Machine) -> None:
        self.name, self._machine = machine.name, machine

    @abstractmethod
    def ask(self, script: str) -> str:
        """What ``script`` prints over there."""

    @abstractmethod
    def append(self, stream: BinaryIO, path: str, progress: Callable[[int], None]) -> None:
        """Send the rest of ``stream`` to the end of the file at ``path`` over there."""

    def deliver(self, model: Path, sha256: str, progress: Progress) -> str:
        """Where ``model`` is over there, once it is."""
        return deliver(self, model, self._machine.folder, sha256, progress)

    def remove(self, model: str) -> None:
        """Delete the file at ``model`` over there."""
        self.ask(f"rm -f {shlex.quote(model)}")
