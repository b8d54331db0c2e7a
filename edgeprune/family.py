"""A family: one model fitted to several devices, measured once.

Every device has a run directory of its own below the family's. What was measured about the model does not depend on
the device and is linked from one to the next; the rankings of experts are among it. Keep-sets are cut from them, so
that those of a smaller file are subsets of those of a larger one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from edgeprune import pipeline
from edgeprune.errors import BrokenPromise, DoesNotFit, UsageError
from edgeprune.files import read_json, to_json, write_text
from edgeprune.prove.family import FAMILY, Family, Member, make_family
from edgeprune.prove.page import render_family
from edgeprune.prove.report import Report
from edgeprune.rundir import RunFolder
from edgeprune.settings import Listener, Settings

PAGE = "family.html"


def members_of(settings: Settings, devices: Sequence[str], file_sizes: Sequence[int]) -> tuple[Path, list[Settings]]:
    """The family's folder, and the settings of each run in it.

    Raises:
        UsageError: fewer than two targets, the same one twice, or also a single one.
    """
    if settings.device or settings.memory_bytes or settings.file_bytes:
        raise UsageError("a family has its own targets", hint="leave out --device, --memory and --file-size")
    folder = Path(settings.output) if settings.output else replace(settings, device="family").folder
    runs = [replace(settings, device=name) for name in devices]
    runs += [replace(settings, file_bytes=nbytes) for nbytes in file_sizes]
    names = [run.target for run in runs]
    if len(names) < 2 or len(set(names)) < len(names):
        example = "--devices cpu-16gb,cpu-8gb" if devices else "--file-sizes 9MB,7MB,5MB"
        raise UsageError(
            f"a family needs several targets, all different, not {', '.join(names)}", hint=f"for example `{example}`"
        )
    made = [replace(run, output=str(folder / run.target)) for run in runs]
    for run in made:
        run.check()
    return folder, made


def fit_family(
    settings: Settings, devices: Sequence[str], file_sizes: Sequence[int], listener: Listener
) -> tuple[Family, Path]:
    """Fit the model to every target and compare what came out; the family and its folder.

    Raises:
        BrokenPromise: some target was not met; the others are finished, and the page is written.
        UsageError: the folder is not a family's.
    """
    folder, runs = members_of(settings, devices, file_sizes)
    _claim(folder)
    members, failures, before = [], [], None
    for run in runs:
        listener.say(f"{run.target}:")
        own = RunFolder(run.folder)
        if before is not None:
            with own.locked(run.owner):
                _share(before, own)
        try:
            pipeline.fit(run, listener)
        except BrokenPromise as error:
            failures.append((run.target, error.cause))
            if isinstance(error, DoesNotFit):
                continue
        members.append(Member(run.target, Report.from_json(read_json(own.report))))
        before = own
    nats = _to_choose(members, folder, runs, listener)
    members = [_no_worse(member, members, nats, folder, runs, listener) for member in members]
    family = make_family(members, failures)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / FAMILY, to_json(family.to_json()))
    write_text(folder / PAGE, render_family(family))
    if failures:
        raise BrokenPromise(
            f"{len(failures)} of {len(runs)} targets were not met", rows=failures, hint=f"see {folder / PAGE}"
        )
    return family, folder


def _to_choose(
    members: Sequence[Member], folder: Path, runs: Sequence[Settings], listener: Listener
) -> dict[str, float]:
    """Nats per token of every member's file, by folder, on the half of the held-out text that files are chosen with:
    what the reports are about is no more to be chosen with here than elsewhere."""
    if len(members) < 2:
        return {member.folder: 0.0 for member in members}
    first = next(run for run in runs if run.target == members[0].folder)
    with pipeline.opened(first, listener) as run:
        nats = {
            member.folder: run.nats_to_choose(folder / member.file, f"{member.folder}, to choose")
            for member in members
        }
        run.clear_scratch()
    return nats


def _no_worse(
    member: Member,
    members: Sequence[Member],
    nats: Mapping[str, float],
    folder: Path,
    runs: Sequence[Settings],
    listener: Listener,
) -> Member:
    """``member``, or made anew with the plan of a smaller one that is better by ``nats``, see ``_to_choose``.

    Raises:
        BrokenPromise: as ``pipeline.fit``.
    """
    own = nats[member.folder]
    smaller = [other for other in members if other.report.build["nbytes"] < member.report.build["nbytes"]]
    best = min(smaller, key=lambda other: nats[other.folder], default=member)
    if not nats[best.folder] < own:
        return member
    listener.say(
        f"{member.folder} measures worse than the smaller {best.folder}: {own:.4g} nats, {nats[best.folder]:.4g}"
    )
    run = next(run for run in runs if run.target == member.folder)
    report, _ = pipeline.fit(run, listener, RunFolder(folder / best.folder))
    return replace(member, report=report)


def _claim(folder: Path) -> None:
    """Refuse a folder that holds anything but runs and the family's own files."""
    if (folder / ".edgeprune").exists():
        raise UsageError(f"{folder} is itself a run directory", hint="choose another folder with -o")
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name not in (FAMILY, PAGE) and not (path / ".edgeprune").is_file():
            raise UsageError(f"{path} is not edgeprune's", hint="choose an empty or new folder with -o")


def _share(before: RunFolder, own: RunFolder) -> None:
    """Link what was measured in ``before`` into ``own``, where it is missing; a copy where there are no links.

    Files are only ever replaced as a whole, never changed, so that a link is as good as a copy.
    """
    for path in before.measured:
        target = own.path / path.name
        if path.is_file() and not target.exists():
            try:
                os.link(path, target)
            except OSError:
                shutil.copyfile(path, target)
