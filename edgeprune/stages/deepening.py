"""What `verify` measures on request, of the file that a fit has built and against its source."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.errors import BadFile, BrokenPromise, NotFinite, Unsupported, UsageError
from edgeprune.files import digest
from edgeprune.measure import child
from edgeprune.measure.answers import shipped_prompts
from edgeprune.measure.kld_base import BaseFile
from edgeprune.measure.questions import chosen_questions, parse_task
from edgeprune.measure.repetition import LENGTH, MODES
from edgeprune.measure.slicing import json_requests, shipped_slices
from edgeprune.measure.text import REPORTING
from edgeprune.prove.deeper import Deeper, Loops, Named, Speed, Task
from edgeprune.prove.paired import Paired
from edgeprune.prove.report import disturbance
from edgeprune.units import format_bytes

if TYPE_CHECKING:
    from edgeprune.model.architecture import Architecture
    from edgeprune.prove.report import Report
    from edgeprune.stages.proving import Run

# Tokens that are prefilled and decoded at each depth.
_BLOCK, _GENERATED = 128, 16
# Most tokens of a JSON object.
_OBJECT_TOKENS = 192
# Filling the context for the speeds at depths takes this long at most, in seconds.
_FILL_SECONDS = 60.0
_BASE = "kld-base"  # the form of a file of log-probabilities


@dataclass(frozen=True)
class Wishes:
    """What is measured beyond a fit.

    Attributes:
        depths: where in the context speeds are measured, in tokens; None for quarters of it.
        loops: how many of the shipped questions are answered at length.
        tasks: ``FILE`` or ``FILE:FORMAT`` with questions whose answers are known.
        questions: how many of each are asked.
        slices: whether the shipped slices of text, and JSON under a grammar, are measured.
        base: a file of llama-perplexity to compare with, or None.
        write_base: where to write one of the source, or None.
    """

    depths: tuple[int, ...] | None = None
    loops: int = 0
    tasks: tuple[str, ...] = ()
    questions: int = 200
    slices: bool = False
    base: Path | None = None
    write_base: Path | None = None

    def check(self, context: int, architecture: Architecture) -> None:
        """Refuse what cannot be done, before anything is measured.

        Args:
            context: tokens that the built file is run with here.
            architecture: of the model.

        Raises:
            UsageError: says what.
            BadFile: a line of a task that is no record of it, or a base file that is damaged or of another model.
        """
        if self.depths and max(self.depths) > context - _BLOCK - _GENERATED:
            raise UsageError(
                f"--depths: {max(self.depths):,} tokens and the {_BLOCK + _GENERATED} that are measured behind them"
                f" are more than the context of {context:,}"
            )
        if self.loops > (most := len(shipped_prompts())):
            raise UsageError(f"--loops {self.loops}: there are {most} questions to ask")
        for task in self.tasks:
            chosen_questions(*parse_task(task), self.questions)
        if self.base is not None:
            _check_base(BaseFile.read(self.base), architecture)
        if self.write_base is not None and self.write_base.exists():
            raise UsageError(f"--write-kld-base: {self.write_base} exists already", hint="choose another name")
        if self.write_base is not None and not self.write_base.absolute().parent.is_dir():
            raise UsageError(f"--write-kld-base: there is no folder {self.write_base.parent}", hint="make it first")


def _check_base(base: BaseFile, architecture: Architecture) -> None:
    """Refuse log-probabilities of another model, or of longer chunks than this one reads.

    Raises:
        BadFile: names both figures.
    """
    for name, its, own in (
        ("vocabulary", base.vocabulary, architecture.vocabulary),
        ("context", base.context, architecture.context_length),
    ):
        if its != own if name == "vocabulary" else its > own > 0:
            rows = [(f"its {name}", f"{its:,}"), ("the model's", f"{own:,}")]
            raise BadFile(f"{base.path} is of another model than {architecture.name}", rows=rows)
    base.tokens()


def deepen(run: Run, report: Report, wishes: Wishes) -> Report:
    """Measure what ``wishes`` name, write it into the report as it comes, and return that."""
    built = run.folder.path / str(report.build["path"])

    def keep(deeper: Deeper) -> None:
        nonlocal report
        report = replace(report, deeper=deeper)
        run.save_report(report)

    speeds, share = _speeds(run, report, built, wishes.depths)
    if speeds:
        busy = {"speed at depths": disturbance(share)} if share is not None else {}
        report = replace(report, conditions={**report.conditions, **busy})
        keep(replace(report.deeper, speeds=speeds))
    if wishes.loops:
        keep(replace(report.deeper, loops=_loops(run, built, wishes.loops)))
    files = dict.fromkeys((path.resolve(), form) for path, form in map(parse_task, wishes.tasks))
    for path, form in files:
        others = [task for task in report.deeper.tasks if task.file != file_key(path, form)]
        found = _task(run, built, path, form, wishes.questions)
        name = short_name(path, [other for other, _ in files], {task.name for task in others if task.form == form})
        keep(replace(report.deeper, tasks=(*others, replace(found, name=name))))
    if wishes.slices:
        keep(replace(report.deeper, slices=_slices(run, built)))
        keep(replace(report.deeper, objects=_objects(run, built)))
    if wishes.write_base is not None:
        _write_base(run, wishes.write_base)
    if wishes.base is not None:
        path = wishes.base.resolve()
        bases = [base for base in report.deeper.bases if base.file != file_key(path, _BASE)]
        name = short_name(path, (), {base.name for base in bases})
        keep(replace(report.deeper, bases=(*bases, Named(name, _base(run, built, path), file_key(path, _BASE)))))
    return report


def _speeds(
    run: Run, report: Report, built: Path, depths: tuple[int, ...] | None
) -> tuple[tuple[Speed, ...], float | None]:
    """Speeds by depth, and the largest share of all cores that other programs used at one of them."""
    launch = run.launch_here(report.launch)
    wanted = _spread_depths(launch.context) if depths is None else sorted(set(depths))
    if not wanted:
        return (), None
    with run.listener.progress("speed at depths") as progress:
        rows: list[dict[str, Any]] = child.call(
            "edgeprune.measure.depths:at_depths",
            {
                "model": str(built),
                "launch": launch.to_json(),
                "depths": wanted,
                "block": _BLOCK,
                "generated": _GENERATED,
                "seconds": _FILL_SECONDS,
            },
            progress,
            as_user=True,
        )
    if len(rows) < len(wanted):
        run.listener.say(f"speed: depths from {wanted[len(rows)]:,} tokens on take more than {_FILL_SECONDS:.0f} s")
    speeds = tuple(
        Speed(row["depth"], tuple(row["prefill_per_s"]), tuple(row["decode_per_s"]), row["first_token_seconds"])
        for row in rows
    )
    return speeds, max((row["others"] for row in rows if row["others"] is not None), default=None)


def _spread_depths(context: int) -> list[int]:
    """Nothing, a quarter, a half and all of ``context`` but what is measured there; fewer where it is short."""
    deepest = context - _BLOCK - _GENERATED
    return sorted({depth for depth in (0, context // 4, context // 2, deepest) if 0 <= depth <= deepest})


def _loops(run: Run, built: Path, count: int) -> tuple[Loops, ...]:
    prompts, special = _asked(run, shipped_prompts()[:count])
    arguments = {"prompts": prompts, "special": special, "length": LENGTH}
    original, candidate = _of_both(run, built, "edgeprune.measure.loops:loops", arguments, "loops")
    return tuple(Loops.of(mode, LENGTH, original[mode], candidate[mode]) for mode in MODES)


def _asked(run: Run, questions: list[str]) -> tuple[list[str], bool]:
    """``questions`` as the model reads them, and whether special tokens in them are meant as such."""
    if run.template is None:
        return [f"{question}\n" for question in questions], False
    return run.asked(questions, "questions"), True


def _of_both(run: Run, built: Path, task: str, arguments: dict[str, Any], title: str) -> tuple[Any, Any]:
    """What ``task`` returns for the original and for the built file."""
    found = []
    for name, model in (("original", run.source), ("built file", built)):
        with run.listener.progress(f"{title} of the {name}") as progress, _finite(built, model):
            found.append(child.call(task, {"model": str(model), **arguments}, progress))
    return found[0], found[1]


@contextlib.contextmanager
def _finite(built: Path, model: Path) -> Iterator[None]:
    """A block that runs ``model``: where it is the ``built`` file, whose values are not finite, a promise is broken.

    Raises:
        BrokenPromise: it is.
    """
    try:
        yield
    except NotFinite as error:
        if model != built:
            raise
        raise BrokenPromise(error.cause, rows=error.rows, hint=error.hint) from error


def _task(run: Run, built: Path, path: Path, form: str, most: int) -> Task:
    questions, total = chosen_questions(path, form, most)
    arguments = {"questions": [one.to_json() for one in questions], "name": str(path)}
    both = _of_both(run, built, "edgeprune.measure.answering:answer", arguments, f"{path.name}: answers")
    return Task(path.name, form, total, Paired.of(*both), file_key(path, form))


def file_key(path: Path, form: str) -> str:
    """What a file of a task, or of log-probabilities, is known by in later reports; where it lies is nobody's
    business there."""
    return digest([str(path), form])[:16]


def short_name(path: Path, paths: Sequence[Path], taken: Collection[str]) -> str:
    """The shortest end of ``path`` that is no other's of ``paths``, all of them absolute, and not ``taken``."""
    others, parts = [other.parts for other in paths if other != path], path.parts
    for count in range(1, len(parts)):
        name = "/".join(parts[-count:])
        if name not in taken and all(other[-count:] != parts[-count:] for other in others):
            return name
    return str(path)


def _slices(run: Run, built: Path) -> tuple[Named, ...]:
    texts = []
    for text in shipped_slices():
        try:
            texts.append(run.rendered(text))
        except (Unsupported, BadFile) as error:
            run.listener.say(f"slice {text.domain} is left out: {error.cause}")
    reference = run.folder.scratch / "slices.reference"
    arguments: dict[str, Any] = {"texts": [text.to_json() for text in texts], "split": REPORTING}
    arguments |= {"window": run.settings.window, "most_tokens": run.settings.evaluation_tokens}
    reference.parent.mkdir(parents=True, exist_ok=True)
    with run.listener.progress("reference (slices)") as progress:
        made = {"model": str(run.source), "output": str(reference), **arguments}
        child.call("edgeprune.measure.tasks:reference", made, progress)
    with run.listener.progress("quality on slices") as progress:
        asked = {"model": str(built), "reference": str(reference), "masks": [None], **arguments}
        (measured,) = child.call("edgeprune.measure.tasks:divergence", asked, progress)
    if not math.isfinite(measured["all"]["kl_mean"]):
        bad = [name for name, quality in measured["domains"].items() if not math.isfinite(quality["kl_mean"])]
        raise BrokenPromise(
            f"{built} computes values that are not finite on {', '.join(bad)}",
            hint="the file is damaged, or overflowed when it was made; build it again",
        )
    return tuple(Named(name, quality) for name, quality in measured["domains"].items())


def _objects(run: Run, built: Path) -> Paired:
    prompts, special = _asked(run, json_requests())
    arguments = {"prompts": prompts, "special": special, "length": _OBJECT_TOKENS}
    both = _of_both(run, built, "edgeprune.measure.structured:objects", arguments, "JSON")
    return Paired.of(*([bool(text) for text in own] for own in both))


def _write_base(run: Run, path: Path) -> None:
    with run.listener.progress(f"log-probabilities of the original for {path.name}") as progress:
        arguments = {"model": str(run.source), "output": str(path.resolve()), **run.reporting_arguments()}
        made = child.call("edgeprune.measure.against_base:write", arguments, progress)
    run.listener.say(f"{path}: {made['chunks']} chunks, {format_bytes(made['nbytes'])}")


def _base(run: Run, built: Path, path: Path) -> dict[str, Any]:
    """``Quality`` as JSON."""
    with run.listener.progress(f"quality against {path.name}") as progress, _finite(built, built):
        arguments = {"model": str(built), "base": str(path)}
        found: dict[str, Any] = child.call("edgeprune.measure.against_base:compare", arguments, progress)
        return found
