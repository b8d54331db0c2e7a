"""What a smoke test found, line by line, and the file it is kept in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgeprune.errors import BadFile
from edgeprune.files import check_keys, read_json

KEPT, BROKEN, INFORMATION, NOT_REACHED = "kept", "broken", "information", "not reached"
NOT_RUN = "not run"  # by an engine that cannot
NOT_JUDGED = "not judged"  # other programs may have spoiled it
# Raised when a report of the old form would be misread.
FORMAT = 1


@dataclass(frozen=True)
class Check:
    """One line of a smoke test.

    Attributes:
        key: short name, for machines.
        name: what was looked at.
        promised, measured: figures as text.
        verdict: ``kept``, ``broken``, ``information``, ``not reached``, ``not run`` or ``not judged``.
    """

    key: str
    name: str
    promised: str
    measured: str
    verdict: str

    @property
    def line(self) -> str:
        """The whole of it, for messages."""
        return f"{self.name}: {self.measured}" + (f"; promised: {self.promised}" if self.promised else "")


@dataclass(frozen=True)
class SmokeReport:
    """A smoke test of one file on one device.

    Attributes:
        device, profile: names.
        when: start, UTC, ISO 8601.
        file: name, bytes, SHA-256.
        launch: settings that it ran with, as ``Launch`` in JSON.
        engine: what ran it, with its version.
        machine: what the device says of itself.
        measured: what the runner sent.
        right: names of the questions that were answered rightly.
        checks: line by line.
    """

    device: str
    profile: str
    when: str
    file: dict[str, Any]
    launch: dict[str, Any]
    engine: str
    machine: dict[str, Any]
    measured: dict[str, Any]
    right: list[str]
    checks: list[Check]

    @property
    def broken(self) -> list[Check]:
        """The promises that were not kept."""
        return [check for check in self.checks if check.verdict == BROKEN]

    def step(self, name: str) -> Any:
        """What a step found, or None when it was not reached."""
        return self.measured["steps"].get(name)

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def load(cls, path: Path) -> SmokeReport:
        """The report in ``path``.

        Raises:
            BadFile: it is none.
        """
        value = read_json(path)
        check_keys(f"{path}: the report", value, {"format", *cls.__dataclass_fields__}, set())
        if value["format"] != FORMAT:
            raise BadFile(f"{path} is a report of form {str(value['format'])[:20]}, not {FORMAT}")
        try:
            checks = [Check(**row) for row in value["checks"]]
            report = cls(**{**{key: value[key] for key in cls.__dataclass_fields__}, "checks": checks})
            _require_comparable(report)
        except (TypeError, KeyError, AttributeError) as error:
            raise BadFile(f"{path} is no report of a smoke test: {error}") from error
        return report


def _require_comparable(report: SmokeReport) -> None:
    """Raise TypeError or KeyError where a field that later runs are compared with is not what it should be."""
    texts = (report.device, report.when, report.engine, report.file["sha256"], report.file["name"], *report.right)
    steps = report.measured["steps"]
    figures = [found[key] for name, key in _FIGURES if isinstance(found := _found(steps, name), Mapping)]
    if isinstance(memory := _found(steps, "memory"), Mapping):
        figures.append(memory.get("device_bytes"))  # of late
    right_kinds = all(isinstance(text, str) for text in texts) and isinstance(report.right, list)
    if not right_kinds or not all(figure is None or type(figure) in (int, float) for figure in figures):
        raise TypeError("a field is of another kind")


_FIGURES = (("speed", "decode_per_s"), ("speed", "prefill_per_s"), ("memory", "peak_bytes"))


def _found(steps: Any, name: str) -> Any:
    if not isinstance(steps, Mapping):
        raise TypeError("measured.steps is no table")
    return steps.get(name)
