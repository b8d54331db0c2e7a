"""The whole flow over a run directory: source, measure, decide, build, prove.

Every stage looks at what its file was made from, does nothing when that is unchanged, and says which
field changed when it is not. A run that was killed therefore goes on where it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from edgeprune.errors import BrokenPromise
from edgeprune.prove.comparison import Comparison
from edgeprune.prove.report import Report
from edgeprune.rundir import RunFolder
from edgeprune.settings import Listener, Progress, Settings
from edgeprune.stages import comparing, deepening
from edgeprune.stages.deepening import Wishes
from edgeprune.stages.proving import Run

__all__ = [
    "Listener",
    "Progress",
    "Run",
    "Settings",
    "Wishes",
    "compare",
    "fit",
    "opened",
    "raise_if_broken",
    "verify",
]


@contextlib.contextmanager
def opened(settings: Settings, listener: Listener) -> Iterator[Run]:
    """A run whose folder is locked for the time of the block."""
    run = Run(settings, listener)
    with run.folder.locked(settings.owner):
        yield run


def fit(settings: Settings, listener: Listener, smaller: RunFolder | None = None) -> tuple[Report, Path]:
    """The main job: source, measure, decide, build, prove; the report and the folder.

    Args:
        smaller: finished run of the same model for less room, whose plan is taken if its file measures better.

    Raises:
        DoesNotFit: no plan meets the budget.
        BrokenPromise: the built file is not what was promised; the report is written all the same.
        EdgepruneError: whatever is wrong with the input or the machine.
    """
    settings.check()
    with opened(settings, listener) as run:
        plan = run.best_plan()
        build = run.build(plan)
        if smaller is not None:
            plan, build = run.better_of(plan, build, smaller)
        report = run.verify(plan, build)
        run.clear_scratch()
        raise_if_broken(report, run.folder.page)
        return report, run.folder.path


def verify(settings: Settings, listener: Listener, wishes: Wishes) -> tuple[Report, Path]:
    """The last stage of ``fit``, and what it leaves out because of its cost; the report and the folder.

    Raises:
        UsageError: something is wished for that cannot be done.
        BrokenPromise: as ``fit``, after everything was measured.
    """
    settings.check()
    with opened(settings, listener) as run:
        finished = run.finished()
        plan = finished[0] if finished else run.best_plan()
        wishes.check(run.launch_here(plan.launch).context, run.architecture)
        build = finished[1] if finished else run.build(plan)
        report = deepening.deepen(run, run.verify(plan, build), wishes)
        run.clear_scratch()
        raise_if_broken(report, run.folder.page)
        return report, run.folder.path


def compare(
    settings: Settings, listener: Listener, fractions: Sequence[float], methods: Sequence[str] | None, seeds: int
) -> tuple[Comparison, Path]:
    """Methods of choosing experts side by side on held-out text; the comparison and the folder.

    Args:
        methods: all of ``decide.scores.METHODS`` that can be used on the model when None.
    """
    with opened(settings, listener) as run:
        found = comparing.compare(run, fractions, methods, seeds)
        run.show(found)
        run.clear_scratch()
        return found, run.folder.path


def raise_if_broken(report: Report, page: Path) -> None:
    """Raise for a report with a broken promise.

    Raises:
        BrokenPromise: lists the broken lines.
    """
    if report.broken:
        raise BrokenPromise(
            f"{report.title}: {len(report.broken)} promise(s) broken",
            rows=[(p.name, f"predicted {p.predicted}, measured {p.measured}") for p in report.broken],
            hint=f"see {page}",
        )
