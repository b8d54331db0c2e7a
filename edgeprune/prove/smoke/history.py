"""Reports of smoke tests as they gather beside a device, and what got worse since."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from edgeprune.errors import BadFile
from edgeprune.files import to_json, write_text
from edgeprune.prove.report import rate
from edgeprune.prove.smoke.checks import KEYS, busy, verdict
from edgeprune.prove.smoke.report import BROKEN, INFORMATION, NOT_JUDGED, Check, SmokeReport
from edgeprune.units import format_bytes

# Speed is held against the median of the last few runs: other programs disturb runs, by half at times, and the worst
# of them would allow a little less with every run. Where there are few, more has to be allowed.
_LATEST, _FEW = 5, 3
_WORSE = (BROKEN, NOT_JUDGED)
_SLOWER, _SLOWER_THAN_FEW, _LARGER = 0.7, 0.5, 1.05


def save(report: SmokeReport, folder: Path) -> Path:
    """Write ``report`` into ``folder`` under a name that sorts by time."""
    stem = f"{re.sub(r'[^0-9TZ]', '', report.when)}-{report.file['sha256'][:12]}"
    path, number = folder / f"{stem}.json", 1
    while path.exists():
        number += 1
        path = folder / f"{stem}-{number}.json"
    write_text(path, to_json(report.to_json()))
    return path


def earlier(report: SmokeReport, folder: Path, say: Callable[[str], None]) -> list[SmokeReport]:
    """The latest reports in ``folder`` on the same file and device, oldest first.

    Runs with other settings, or another kind of engine, are others' business.
    """
    found = []
    for path in sorted(folder.glob(f"*-{report.file['sha256'][:12]}*.json")):
        try:
            old = SmokeReport.load(path)
        except BadFile as error:
            say(f"an earlier report is left out: {error.cause}")
            continue
        # What was worse than before is no measure for what comes after, or a second run would turn every fall green.
        if _like(old, report) and not any(c.key == "earlier" and c.verdict in _WORSE for c in old.checks):
            found.append(old)
    return found[-_LATEST:]


def _like(old: SmokeReport, new: SmokeReport) -> bool:
    same = (old.device, old.file["sha256"], old.launch) == (new.device, new.file["sha256"], new.launch)
    return same and _kind(old.engine) == _kind(new.engine)


def _kind(engine: str) -> tuple[list[str], bool]:
    """What runs the model, and whether llama-bench measures the speed."""
    return engine.split()[:1], "llama-bench" in engine


def against_earlier(report: SmokeReport, before: Sequence[SmokeReport]) -> Check:
    """Everything in which ``report`` is worse than ``before``, in one line; speed is not judged on a busy machine."""
    if not before:
        return Check("earlier", KEYS["earlier"], "", "this is the first run", INFORMATION)
    slower, worse = _slower(report, before), [*_larger(report, before), *_forgotten(report, before[-1])]
    others = busy(report.measured["steps"]) if slower else ""
    said = NOT_JUDGED if slower and others and not worse else verdict(not slower and not worse)
    measured = "; ".join(["; ".join(slower) + others, *worse] if slower else worse) or "no worse"
    count = "the run before" if len(before) == 1 else f"the last {len(before)} runs"
    return Check("earlier", KEYS["earlier"], f"no worse than {count}", measured, said)


def _figures(reports: Sequence[SmokeReport], step: str, key: str) -> list[float]:
    return [found[key] for report in reports if (found := report.step(step)) and found.get(key)]


def _slower(report: SmokeReport, before: Sequence[SmokeReport]) -> list[str]:
    lines = []
    for what in ("decode", "prefill"):
        old, new = (_figures(reports, "speed", f"{what}_per_s") for reports in (before, [report]))
        allowed = _SLOWER_THAN_FEW if len(old) < _FEW else _SLOWER
        if old and new and new[0] < allowed * (usual := statistics.median(old)):
            of_all = " in the median" if len(old) > 1 else ""
            lines.append(f"{what} {rate(new[0])} tokens per second, was {rate(usual)}{of_all}")
    return lines


def _larger(report: SmokeReport, before: Sequence[SmokeReport]) -> list[str]:
    lines = []
    for key, name in (("peak_bytes", KEYS["memory"]), ("device_bytes", KEYS["vram"])):
        old, new = (_figures(reports, "memory", key) for reports in (before, [report]))
        if old and new and new[0] > _LARGER * max(old):
            lines.append(f"{name} {format_bytes(new[0])}, was {format_bytes(max(old))} or less")
    return lines


def _forgotten(report: SmokeReport, old: SmokeReport) -> list[str]:
    """Fewer right answers: a file that is the same to the byte has no reason to know less."""
    if report.step("answers") is None or len(report.right) >= len(old.right):
        return []
    lost = ", ".join(name for name in old.right if name not in report.right)
    return [f"{len(report.right)} right answers, were {len(old.right)}; lost: {lost}"]


def against_baseline(report: SmokeReport, baseline: SmokeReport) -> Check:
    """Right answers beside those of ``baseline``, a run of the source model for instance."""
    name, count = "baseline", len(baseline.right)
    promised = f"at least the {count} right answers of {baseline.file['name']}"
    if report.step("answers") is None:
        return Check(name, KEYS[name], promised, "no answers", verdict(False))
    lost = [question for question in baseline.right if question not in report.right]
    said = f"{len(report.right)}" + (f"; lost: {', '.join(lost)}" if lost else "")
    return Check(name, KEYS[name], promised, said, verdict(len(report.right) >= count))
