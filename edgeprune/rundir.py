"""The run directory: one folder per model and device, locked while in use, every file with its origin.

A stage is skipped iff what its file was made from equals what it would be made from now; when not, the
field that changed is named.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune.errors import Busy, UsageError
from edgeprune.files import PARTIAL_SUFFIX, remove_partials, write_text


def changed_fields(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One line per field that differs: name, old and new value, digests shortened."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            lines.append(f"{key}: {_short(old.get(key))} -> {_short(new.get(key))}")
    return lines


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return f"{text[:12]}..." if len(text) > 60 else text


@dataclass(frozen=True)
class RunFolder:
    """Names of the files in a run directory."""

    path: Path

    @property
    def source(self) -> Path:
        return self.path / "source.gguf"

    @property
    def answers(self) -> Path:
        return self.path / "self.jsonl"

    @property
    def statistics(self) -> Path:
        return self.path / "statistics.safetensors"

    @property
    def gradients(self) -> Path:
        return self.path / "gradients.safetensors"

    @property
    def healing(self) -> Path:
        return self.path / "healing.json"

    @property
    def training(self) -> Path:
        return self.path / "training.json"

    @property
    def ways(self) -> Path:
        return self.path / "ways.json"

    @property
    def tried(self) -> Path:
        return self.path / "tried.json"

    def channels(self, narrowing: str) -> Path:
        return self.path / f"channels-{narrowing}.safetensors"

    def teacher(self, tokens: int) -> Path:
        return self.scratch / f"teacher-{tokens}.safetensors"

    @property
    def imatrix(self) -> Path:
        return self.path / "imatrix.gguf"

    @property
    def sensitivity(self) -> Path:
        return self.path / "sensitivity.json"

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def build(self) -> Path:
        return self.path / "build.json"

    @property
    def report(self) -> Path:
        return self.path / "report.json"

    @property
    def page(self) -> Path:
        return self.path / "report.html"

    @property
    def card(self) -> Path:
        return self.path / "README.md"

    @property
    def scratch(self) -> Path:
        return self.path / "scratch"

    @property
    def measured(self) -> list[Path]:
        """Files about the model alone, which every run over the same text may use; some may be missing."""
        more = [self.path / name for name in ("rankings.json", "weights.safetensors")]
        own = [self.source, self.answers, self.statistics, self.gradients, self.imatrix, self.sensitivity]
        return [*own, *more, *sorted(self.path.glob(self.channels("*").name))]

    def owner(self) -> str:
        """The model whose run directory it is.

        Raises:
            UsageError: it is none.
        """
        marker = self.path / ".edgeprune"
        if not marker.is_file():
            raise UsageError(f"{self.path} is not a run directory", hint="`edgeprune fit` makes one")
        return marker.read_text(encoding="utf-8").strip()

    def claim(self, owner: str) -> None:
        """Mark the folder as the run directory of the model ``owner``, so that nothing of anybody else's is
        overwritten or deleted in it.

        Raises:
            UsageError: it holds other files, or the run of another model.
        """
        marker = self.path / ".edgeprune"
        if marker.is_file():
            if (known := marker.read_text(encoding="utf-8").strip()) != owner:
                raise UsageError(
                    f"{self.path} is the run directory of {known}", hint="choose another folder with -o, or delete it"
                )
            return
        # A kill in the middle of the marker's own write leaves its beginning.
        if {path.name for path in self.path.iterdir()} - {".lock", marker.name + PARTIAL_SUFFIX}:
            raise UsageError(
                f"{self.path} holds files that are not edgeprune's", hint="choose an empty or new folder with -o"
            )
        write_text(marker, owner + "\n")

    @contextmanager
    def locked(self, owner: str) -> Iterator[None]:
        """Hold the folder for this process, and clear away what was left half-written, before and after.

        The lock is the operating system's and ends with the process, however it ends. A run that failed
        before it had anything to keep leaves no folder.

        Raises:
            Busy: another process holds it.
        """
        from filelock import FileLock, Timeout

        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(str(self.path / ".lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise Busy(
                f"another edgeprune is working in {self.path}",
                hint="wait for it, or use another folder",
            ) from None
        try:
            self.claim(owner)
            try:
                self._remove_partials()
                yield
            finally:
                self._remove_partials()
        finally:
            self._tidy(Path(lock.lock_file))
            lock.release()

    def _remove_partials(self) -> None:
        for folder in (self.path, self.scratch):
            remove_partials(folder)

    def _tidy(self, lock: Path) -> None:
        """Take the lock's file out of a folder that is not a run directory, and delete one that holds nothing else;
        who waits for a deleted lock tries again."""
        marker = self.path / ".edgeprune"
        with suppress(OSError):
            self.scratch.rmdir()  # only if it is empty
        with suppress(OSError):
            empty = set(self.path.iterdir()) <= {lock, marker}
            if empty:
                marker.unlink(missing_ok=True)
            if not marker.exists():
                lock.unlink()
            if empty:
                self.path.rmdir()
