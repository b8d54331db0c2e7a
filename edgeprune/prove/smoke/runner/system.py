"""What the system tells of processes and of itself."""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import sys
import time
from typing import Any

# Shorter than this, clocks that tick a hundred times a second tell nothing.
_LEAST_SECONDS = 0.25
_SIGNALS = {
    "SIGABRT": "llama.cpp aborted on a failed check",
    "SIGSEGV": "llama.cpp crashed with a memory fault",
    "SIGBUS": "a mapped file changed or shrank while it was read",
    "SIGILL": "llama.cpp was built for another processor",
    "SIGKILL": "it was killed, most likely for using too much memory",
}


def threads(job: dict[str, Any]) -> int:
    """Threads that are asked for, but no more than there are cores here: they wait for each other by spinning."""
    if job.get("status"):  # it runs on another machine than this
        return int(job["launch"]["threads"])
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(int(job["launch"]["threads"]), usable)


def high_water(text: str) -> int | None:
    """Peak resident memory in bytes in the text of a ``/proc/PID/status``."""
    for line in text.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None


def status(pid: str) -> str:
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as stream:
            return stream.read()
    except OSError:
        return ""


class Meanwhile:
    """From its making on: the share of all cores that others than process ``pid`` keep busy, where /proc tells.

    ``pid`` may be "self"; "" for one that is on another machine.
    """

    def __init__(self, pid: str) -> None:
        self._pid, self._began, self._before = pid, time.monotonic(), _ticks(pid)

    def others(self) -> float | None:
        """The share, 0 to 1; None where nobody knows, or after too short a time."""
        passed, now = time.monotonic() - self._began, _ticks(self._pid)
        if self._before is None or now is None or passed < _LEAST_SECONDS:
            return None
        busy, own = now[0] - self._before[0], now[1] - self._before[1]
        ticks = passed * os.sysconf("SC_CLK_TCK") * (os.cpu_count() or 1)
        return min(1.0, max(0.0, (busy - own) / ticks))


def _ticks(pid: str) -> tuple[int, int] | None:
    """Ticks that all cores were busy since the start of the machine, and those of process ``pid``."""
    try:
        with open("/proc/stat", encoding="ascii") as stream:
            user, nice, system, _, _, *rest = map(int, stream.readline().split()[1:9])  # idle and waiting are not
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stream:
            fields = stream.read().rpartition(")")[2].split()
        return user + nice + system + sum(rest), int(fields[11]) + int(fields[12])
    except (OSError, ValueError, IndexError):
        return None


def greatest(who: str) -> int | None:
    """Peak resident memory by ``getrusage``, where that is about one address space (not on Linux)."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    if sys.platform.startswith("linux"):
        return None
    return int(resource.getrusage(getattr(resource, who)).ru_maxrss)  # bytes on macOS


def reason(code: int) -> str:
    """What an exit code of a process means; shells say 128 + N for signal N."""
    number = -code if code < 0 else code - 128
    if 0 < number < 65:
        try:
            name = signal.Signals(number).name
        except ValueError:
            name = f"signal {number}"
        return _SIGNALS.get(name, name)
    return f"exit code {code}"


def machine() -> dict[str, Any]:
    """What this is, for the report, and how many programs wanted to run in the last minute."""
    memory = load = None
    with contextlib.suppress(OSError, ValueError, AttributeError):
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, AttributeError):
        load = os.getloadavg()[0]
    return {
        "load": load,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}".strip(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "memory_bytes": memory,
    }
