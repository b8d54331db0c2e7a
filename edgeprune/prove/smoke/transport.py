"""Ways to a device: bring the file there, and start the runner beside it."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from edgeprune.device.machine import ADB, LOCAL, Machine
from edgeprune.errors import EdgepruneError
from edgeprune.prove.smoke.adb import Adb
from edgeprune.prove.smoke.packing import packed_runner
from edgeprune.prove.smoke.ssh import Ssh
from edgeprune.prove.smoke.way import Job, Progress, Transport, ended, started, with_programs


class Local:
    """This machine; a model is used where it lies."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def deliver(self, model: Path, sha256: str, progress: Progress) -> str:
        return str(model.resolve())

    def remove(self, model: str) -> None:
        pass

    @contextmanager
    def run(self, job: Job, log: IO[bytes]) -> Any:
        python = self._machine.runner.python or sys.executable
        with packed_runner() as runner:
            try:
                process = started([python, str(runner)], log)
            except OSError as error:
                raise EdgepruneError(
                    f"{self._machine.name}: {python} cannot be started: {error.strerror or error}",
                    hint="mend `python` under [runner] in the device's file",
                ) from error
            with ended(process):
                yield process, with_programs(job, self._machine.runner)


def transport_to(machine: Machine) -> Transport:
    """The way to ``machine``.

    Raises:
        EdgepruneError: what it takes is not installed here.
    """
    if machine.transport == LOCAL:
        return Local(machine)
    if machine.transport == ADB:
        return Adb(machine)
    return Ssh(machine)
