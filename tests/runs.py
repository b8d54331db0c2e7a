"""Whole runs for tests: the real command in a process of its own, and what a finished fit left."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import edgeprune
from edgeprune.pipeline import Settings
from edgeprune.prove.report import Report

ROOT = Path(edgeprune.__file__).resolve().parents[1]


def environment(**changes: str) -> dict[str, str]:
    """Environment of a command that imports the same edgeprune as the tests do."""
    return {**os.environ, "PYTHONPATH": str(ROOT), **changes}


def edgeprune_command(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "edgeprune", *map(str, words)]


def run_edgeprune(*words: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """The real command in a process of its own, with its output as text."""
    options = {"env": environment(), "timeout": 120, **options}
    return subprocess.run(edgeprune_command(*words), capture_output=True, text=True, check=False, **options)


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
    wishes: dict[str, Any] = {"file_bytes": 500_000, "texts": (text,), "output": str(output), **changes}
    return Settings(source, **wishes)


def read(path: Path) -> Any:
    """The JSON value in ``path``."""
    return json.loads(path.read_text(encoding="utf-8"))
