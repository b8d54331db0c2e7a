"""A device behind OpenSSH's own client, which brings along keys, agents, jump hosts and the user's configuration."""

from __future__ import annotations

import shlex
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from typing import IO, Any, BinaryIO

from edgeprune.device.machine import Machine
from edgeprune.errors import EdgepruneError
from edgeprune.files import file_digest
from edgeprune.prove.smoke.delivery import deliver
from edgeprune.prove.smoke.packing import packed_runner
from edgeprune.prove.smoke.shelled import Shelled, client, finished, last_of, told, way_out
from edgeprune.prove.smoke.way import Job, ended, started, with_programs

_BLOCK = 1 << 20
_CONNECT_SECONDS = 15
_LOST = 255  # ssh's own exit code, whatever the command's
_WAYS_OUT = {
    "Host key verification failed": "log in once by hand, or name a file of host keys as `known_hosts` under [ssh]",
    "Permission denied": "name a private key as `identity` under [ssh], or add it to your agent",
    "Could not resolve hostname": "mend `host` under [ssh] in the device's file",
    "Connection refused": "is the SSH server running there, on that port?",
    "timed out": "is the device switched on, and in reach?",
}


class Ssh(Shelled):
    """A way to ``machine`` through the user's own SSH client."""

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        self._command = [client("ssh", machine, "install the OpenSSH client"), *_options(machine), machine.host]

    def _words(self, script: str) -> list[str]:
        # Whatever the login shell there is, the script is for sh.
        return [*self._command, f"sh -c {shlex.quote(script)}"]

    def ask(self, script: str) -> str:
        code, printed, errors = finished(self._words(script))
        if code:
            raise self._failure(code, errors)
        return printed.decode("utf-8", errors="replace")

    def _failure(self, code: int, said: bytes) -> EdgepruneError:
        lines = told(said)
        last = last_of(lines, code)
        if code != _LOST:
            return EdgepruneError(f"{self.name}: {last}")
        hint = way_out(_WAYS_OUT, lines)
        return EdgepruneError(f"cannot reach {self.name} ({self._machine.address}): {last}", hint=hint)

    def append(self, stream: BinaryIO, path: str, progress: Callable[[int], None]) -> None:
        with tempfile.TemporaryFile() as log:
            words = self._words(f"cat >> {shlex.quote(path)}")
            process = subprocess.Popen(words, stdin=subprocess.PIPE, stderr=log)
            assert process.stdin is not None
            sent = 0
            try:
                while block := stream.read(_BLOCK):
                    process.stdin.write(block)
                    sent += len(block)
                    progress(sent)
                process.stdin.close()
            except OSError:  # the connection is gone; what ssh says of it is in the log
                pass
            except BaseException:
                process.kill()
                raise
            finally:
                code = process.wait()
            if code:
                log.seek(0)
                found = self._failure(code, log.read())
                raise EdgepruneError(found.cause, hint=found.hint or "run the same command again; it goes on there")

    @contextmanager
    def run(self, job: Job, log: IO[bytes]) -> Any:
        runner = self._send_runner()
        words = self._words(f"exec {shlex.quote(self._machine.runner.python)} {shlex.quote(runner)}")
        with ended(started(words, log)) as process:
            yield process, with_programs(job, self._machine.runner)

    def _send_runner(self) -> str:
        """The runner's path over there, once it is there and its hash is right."""
        with packed_runner() as runner:
            digest, unheard = file_digest(runner), lambda done, total: None
            return deliver(self, runner, self._machine.folder, digest, unheard, ending="pyz")


def _options(machine: Machine) -> list[str]:
    words = ["-T", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={_CONNECT_SECONDS}"]
    # A device that is switched off in the middle is noticed within a minute.
    words += ["-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4", "-p", str(machine.port)]
    if machine.user:
        words += ["-l", machine.user]
    if machine.identity:
        words += ["-i", machine.identity, "-o", "IdentitiesOnly=yes"]
    if machine.known_hosts:
        words += ["-o", f'UserKnownHostsFile="{machine.known_hosts}"', "-o", "GlobalKnownHostsFile=/dev/null"]
    return words
