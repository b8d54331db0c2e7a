"""The job that a runner gets, and what it says while it works."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import IO, Any

from edgeprune.errors import EdgepruneError
from edgeprune.prove.smoke.forecast import STEPS, Forecast

Progress = Callable[[int, int], None]
_FACTS = {*STEPS, "machine"}
_LOG_LINES = 6


@dataclass(frozen=True)
class Measured:
    """What came back from a device.

    Attributes:
        steps: what each step that ended well found, by its name; ``machine`` too.
        failed: the step that did not end well, or "".
        cause: why, one line.
        log: the end of the log.
    """

    steps: dict[str, Any] = field(default_factory=dict)
    failed: str = ""
    cause: str = ""
    log: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def converse(
    process: subprocess.Popen[bytes], job: Mapping[str, Any], log: IO[bytes], progress: Progress
) -> Measured:
    """Give ``job`` to the runner behind ``process`` and listen until it has ended.

    Args:
        log: what the process writes its standard error to.

    Raises:
        EdgepruneError: the runner says that nothing can be run there, or it ended before it was done.
    """
    assert process.stdin is not None and process.stdout is not None
    steps: dict[str, Any] = {}
    forecast = Forecast(job)
    failure: Mapping[str, Any] = {}
    ended = False
    with contextlib.suppress(OSError):  # it has died already; its log says why
        process.stdin.write(json.dumps(job).encode() + b"\n")
        process.stdin.flush()
    for line in process.stdout:
        message = _message(line)
        if "error" in message:
            raise EdgepruneError(str(message["error"])[:400], hint=str(message.get("hint", ""))[:400])
        if "result" in message and message["result"].get("step") in _FACTS:
            steps[message["result"]["step"]] = message["result"].get("value")
            forecast.learn(message["result"]["step"], message["result"].get("value"))
        elif "failed" in message:
            failure = message["failed"]
        elif "step" in message:
            progress(*forecast.share(message))
        ended = ended or bool(message.get("end"))
    process.wait()
    if not ended:
        log.seek(0)
        said = [part.strip() for part in log.read().decode("utf-8", errors="replace").splitlines()]
        raise EdgepruneError(
            f"the runner on the device ended early (exit code {process.returncode})",
            rows=[("log", part[:160]) for part in said if part][-_LOG_LINES:],
            hint="if the connection was lost, run the same command again",
        )
    log_lines = [str(part)[:160] for part in failure.get("log", [])][-_LOG_LINES:]
    return Measured(steps, str(failure.get("step", "")), str(failure.get("cause", ""))[:400], log_lines)


def _message(line: bytes) -> dict[str, Any]:
    """What a line says; nothing if it is no message: a login shell may print what it likes."""
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(line)
        if isinstance(found, dict):
            for key in ("result", "failed"):
                if key in found and not isinstance(found[key], dict):
                    return {}
            return found
    return {}
