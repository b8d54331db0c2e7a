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
from edgeprune.prove.smoke.conversation import RUNNER
from edgeprune.prove.smoke.shelled import Shelled, client, finished, last_of, told, way_out
from edgeprune.prove.smoke.transport import Job, ended, with_server

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
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
        with ended(process):
            yield process, with_server(job, self._machine.runner.server)

    def _send_runner(self) -> str:
        """The runner's path over there; it is small, so it is always sent."""
        path = f"{self._machine.folder}/runner-{file_digest(RUNNER)[:12]}.py"
        new = shlex.quote(path + ".new")
        self.ask(f"mkdir -p {shlex.quote(self._machine.folder)} && rm -f {new}")
        with RUNNER.open("rb") as stream:
            self.append(stream, path + ".new", lambda count: None)
        self.ask(f"mv -f {new} {shlex.quote(path)}")
        return path


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
