"""How much of this machine other programs use while something is measured."""

from __future__ import annotations

import os
import time

import psutil

# Shorter than this, the system's clocks, which tick a hundred times a second, tell nothing.
_LEAST_SECONDS = 0.25
# Of all cores, used by other programs: from here on a speed is theirs, too.
DISTURBED_SHARE = 0.1
_IDLE = ("idle", "iowait")
_TWICE = ("guest", "guest_nice")  # counted in user and nice, too


class Meanwhile:
    """From its making on: the share of all cores that others than this process keep busy.

    A virtual machine's cores that its host gives to somebody else (steal) are busy, too.
    """

    def __init__(self) -> None:
        self._began, self._busy, self._own = time.perf_counter(), _busy_seconds(), time.process_time()

    def others(self) -> float | None:
        """The share, 0 to 1; None after too short a time."""
        passed = time.perf_counter() - self._began
        if passed < _LEAST_SECONDS:
            return None
        own = time.process_time() - self._own
        share = (_busy_seconds() - self._busy - own) / (passed * (os.cpu_count() or 1))
        return min(1.0, max(0.0, share))


def _busy_seconds() -> float:
    """Processor time of the whole machine since it was started that was not idle, in seconds."""
    times = psutil.cpu_times()._asdict()
    return float(sum(value for name, value in times.items() if name not in (*_IDLE, *_TWICE)))
