"""An Android device behind ``adb``. Its shell has no Python, so the runner stays here and leads programs there."""

from __future__ import annotations

import os
import posixpath
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO

from edgeprune.device.machine import Machine
from edgeprune.errors import EdgepruneError
from edgeprune.prove.smoke.packing import packed_runner
from edgeprune.prove.smoke.shelled import Shelled, client, finished, last_of, told, way_out
from edgeprune.prove.smoke.way import Job, ended, started, with_programs

# ``adb push`` cannot go on with a file; what is sent in pieces is lost by a piece at most.
_PIECE, _BLOCK = 256 << 20, 1 << 20
_FIRST_PORT, _PORTS = 20_000, 20_000
_WAYS_OUT = {
    "no devices": "connect it, switch USB debugging on, and see `adb devices`",
    "not found": "`adb devices` lists the serials; mend `serial` under [adb]",
    "more than one": "name one of them as `serial` under [adb]; `adb devices` lists them",
    "unauthorized": "allow this computer on the device's screen",
    "offline": "connect it anew",
}


class Adb(Shelled):
    """A way to ``machine`` through its debugging bridge."""

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        program = client("adb", machine, "install Android's platform tools and put `adb` on the path")
        self._command = [program, *(["-s", machine.serial] if machine.serial else [])]

    def _run(self, *words: str) -> str:
        code, printed, errors = finished([*self._command, *words])
        if code:
            last = last_of(told(errors or printed), code)
            own = last.startswith(("adb:", "error:"))  # adb's, not that of a program over there
            hint = way_out(_WAYS_OUT, [last]) if own else ""
            raise EdgepruneError(f"{self.name} ({self._machine.address}): {last}", hint=hint)
        return printed.decode("utf-8", errors="replace")

    def ask(self, script: str) -> str:
        return self._run("shell", script)

    def append(self, stream: BinaryIO, path: str, progress: Callable[[int], None]) -> None:
        sent, piece = 0, shlex.quote(f"{path}.piece")
        with tempfile.TemporaryDirectory(prefix="edgeprune-") as folder:
            here = Path(folder) / "piece"
            while count := _cut(stream, here):
                self._run("push", str(here), f"{path}.piece")
                self.ask(f"cat {piece} >> {shlex.quote(path)} && rm -f {piece}")
                sent += count
                progress(sent)

    @contextmanager
    def run(self, job: Job, log: IO[bytes]) -> Any:
        there = _FIRST_PORT + os.getpid() % _PORTS
        here = self._run("forward", "tcp:0", f"tcp:{there}").strip()
        try:
            with packed_runner() as runner, ended(started([sys.executable, str(runner)], log)) as process:
                yield process, {**job, **self._led(job, there), "port": int(here)}
        finally:
            self._run("forward", "--remove", f"tcp:{here}")

    def _led(self, job: Job, port: int) -> dict[str, Any]:
        """The commands by which the runner starts the programs, looks at their memory and ends them."""
        values = {"{port}": str(port), "{threads}": str(job["launch"]["threads"])}
        shell = [*self._command, "shell"]

        def start(words: Sequence[str]) -> list[str]:
            libraries = shlex.quote(posixpath.dirname(words[0]))
            whole = shlex.join(values.get(word, word) for word in words)
            # The shell's process id is the program's, which takes the shell's place.
            return [*shell, f"echo $$; LD_LIBRARY_PATH={libraries} exec {whole}"]

        named = with_programs(job, self._machine.runner)
        led = {"server": start(named["server"])} if self._machine.runner.server else {}
        return {
            **led,
            "bench": {name: start(words) for name, words in named.get("bench", {}).items()},
            "status": [*shell, "cat /proc/{pid}/status"],
            "kill": [*shell, "kill {pid}"],
        }


def _cut(stream: BinaryIO, path: Path) -> int:
    """Write the next piece of ``stream`` to ``path``; its bytes."""
    count = 0
    with path.open("wb") as out:
        while count < _PIECE and (block := stream.read(_BLOCK)):
            count += out.write(block)
    return count
