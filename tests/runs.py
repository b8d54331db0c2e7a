"""Whole runs for tests: the real command in a process of its own, and what a finished fit left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

import edgeprune
from edgeprune.pipeline import Settings
from edgeprune.prove.report import Report

ROOT = Path(edgeprune.__file__).resolve().parents[1]
PATIENCE_SECONDS = 60.0


def environment(**changes: str) -> dict[str, str]:
    """Environment of a command that imports the same edgeprune as the tests do."""
    return {**os.environ, "PYTHONPATH": str(ROOT), **changes}


def edgeprune_command(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "edgeprune", *map(str, words)]


def run_edgeprune(*words: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """The real command in a process of its own, with its output as text."""
    options = {"env": environment(), "timeout": 300, **options}
    return subprocess.run(edgeprune_command(*words), capture_output=True, text=True, check=False, **options)


class Running:
    """The real command, watched from outside."""

    def __init__(self, *words: str | Path) -> None:
        self.process = subprocess.Popen(
            edgeprune_command(*words),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
            start_new_session=True,  # a group of its own, as a shell gives to each command
            # A shell without a terminal starts what runs in the background with the interrupt ignored, and
            # that is inherited; at a terminal it is not.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def wait_for_file(self, path: Path) -> None:
        """Come back as soon as ``path`` is there, or the command has ended."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not path.exists() and self.process.poll() is None:
            assert time.monotonic() < deadline, f"{path} did not appear in time"
            time.sleep(0.01)

    def wait_for(self, task: str) -> psutil.Process | None:
        """The child that began with ``task``, as soon as there is one; None if the command ends before."""
        own = psutil.Process(self.process.pid)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            for worker in own.children():
                try:
                    if any(word.endswith(task) for word in worker.cmdline()):
                        return worker
                except psutil.Error:
                    continue
            time.sleep(0.03)
        assert self.process.poll() is not None, f"{task} did not begin in time"
        return None

    def end(self) -> tuple[int, str, str]:
        """Exit code, stdout and stderr, once it has ended."""
        out, err = self.process.communicate(timeout=PATIENCE_SECONDS)
        return self.process.returncode, out, err


def gone(worker: psutil.Process) -> bool:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        if not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.01)
    return False


@dataclass
class Ear:
    """A listener that remembers what was said and which stages ran."""

    said: list[str] = field(default_factory=list)
    stages: list[str] = field(default_factory=list)

    def say(self, text: str) -> None:
        self.said.append(text)

    @contextmanager
    def progress(self, title: str) -> Iterator[Callable[[int, int], None]]:
        self.stages.append(title)
        yield lambda done, total: None


_PEAKS = """
import sys
from pathlib import Path
from edgeprune.measure.child import peak_memory_bytes
from edgeprune.model.convert import convert
for folder in sys.argv[2:]:
    convert(Path(folder), Path(folder + ".gguf"), sys.argv[1])
    print(peak_memory_bytes())
"""


def conversion_peaks(base: str, *folders: Path) -> list[int]:
    """Peak memory of a process after converting each of ``folders`` to type ``base`` in turn."""
    command = [sys.executable, "-c", _PEAKS, base, *map(str, folders)]
    lines = subprocess.run(command, capture_output=True, text=True, env=environment(), check=True).stdout
    return [int(line) for line in lines.split()]


@dataclass(frozen=True)
class Fit:
    """A finished fit: the command line after ``fit``, its folder and its report."""

    arguments: tuple[str, ...]
    folder: Path
    report: Report

    def copy(self, folder: Path) -> Path:
        """The run folder as a copy that a test may change; the files keep their times."""
        shutil.copytree(self.folder, folder)
        return folder


def settings(fit: Fit, output: Path, **changes: Any) -> Settings:
    """What the fit's command line means, for another folder and with other wishes."""
    source, _, text = fit.arguments[0], *fit.arguments[-2:]
    wishes: dict[str, Any] = {"file_bytes": 500_000, "width": 1.0, "texts": (text,), "output": str(output), **changes}
    return Settings(source, **wishes)


def few(checkpoint: Path, text: Path, output: Path, **changes: Any) -> Settings:
    """Settings of a whole run over few tokens, into 900 kB unless said otherwise."""
    tokens = {"window": 64, "calibration_tokens": 512, "evaluation_tokens": 256, "sensitivity_tokens": 128}
    wishes: dict[str, Any] = {"texts": (str(text),), "output": str(output), **tokens, **changes}
    if not wishes.keys() & {"device", "memory_bytes", "file_bytes"}:
        wishes["file_bytes"] = 900_000
    return Settings(str(checkpoint), **wishes)


def read(path: Path) -> Any:
    """The JSON value in ``path``."""
    return json.loads(path.read_text(encoding="utf-8"))
