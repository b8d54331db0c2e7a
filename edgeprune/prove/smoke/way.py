"""What ways to a device have in common: the interface, and a runner as a process."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Protocol

from edgeprune.device.machine import Runner

Progress = Callable[[int, int], None]
Job = Mapping[str, Any]


class Transport(Protocol):
    """A way to a device."""

    def deliver(self, model: Path, sha256: str, progress: Progress) -> str:
        """Bring ``model`` there, unless it is there; its path over there.

        Raises:
            EdgepruneError: the device cannot be reached, has no room, or what arrived is not what was sent.
        """

    def remove(self, model: str) -> None:
        """Delete what ``deliver`` brought to the path ``model``; nothing where the file was used as it lay."""

    def run(self, job: Job, log: IO[bytes]) -> AbstractContextManager[tuple[subprocess.Popen[bytes], Job]]:
        """The runner as a process whose standard input and output are pipes, and the job as it is to be told there;
        what goes wrong is written to ``log``. The process has ended when the block has."""


def started(words: Sequence[str], log: IO[bytes]) -> subprocess.Popen[bytes]:
    """A process whose standard input and output are pipes; its errors go to ``log``."""
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)


@contextmanager
def ended(process: subprocess.Popen[bytes]) -> Any:
    """A block after which ``process`` is no more, and its pipes are closed."""
    try:
        yield process
    finally:
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with suppress(OSError):  # what was written last never arrived
                    stream.close()
        try:
            process.wait(5)  # a runner ends by itself when its input closes
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def with_programs(job: Job, runner: Runner) -> dict[str, Any]:
    """``job`` with the command lines of llama.cpp's own programs in it, where ``runner`` names some."""
    whole = dict(job)
    if runner.server:
        whole["server"] = [runner.server, *job["server"]]
    if runner.bench:
        whole["bench"] = {name: [runner.bench, *words] for name, words in job["bench"].items()}
    return whole
