"""What other programs use of this machine: they are counted, this process is not."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import psutil

from edgeprune.measure.meanwhile import Meanwhile

SECONDS, CORES = 0.7, os.cpu_count() or 1
SLACK = 0.08  # the system's clock ticks a hundred times a second


def test_another_program_counts() -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        known = psutil.Process(other.pid)
        meanwhile, started, before = Meanwhile(), time.perf_counter(), sum(known.cpu_times()[:2])
        time.sleep(SECONDS)
        share = meanwhile.others()
        used = (sum(known.cpu_times()[:2]) - before) / (time.perf_counter() - started) / CORES
        other.kill()
    assert share is not None and used - SLACK <= share <= 1 and used > 0


def test_this_process_does_not_count() -> None:
    meanwhile, started, end = Meanwhile(), time.perf_counter(), time.process_time() + SECONDS
    while time.process_time() < end:
        pass
    share, own = meanwhile.others(), SECONDS / (time.perf_counter() - started) / CORES
    assert share is not None and 0 <= share <= 1 - own + SLACK


def test_a_moment_tells_nothing() -> None:
    assert Meanwhile().others() is None
