"""Predictions propose, measurements decide: a few candidates are built and measured before one is taken."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from edgeprune.build.builder import Build
from edgeprune.decide.plan import FAMILY, PRESET, SOLVER, Plan
from edgeprune.errors import BadFile, DoesNotFit
from edgeprune.files import digest, read_json, to_json, write_text
from edgeprune.measure.text import CHOOSING
from edgeprune.rundir import RunFolder
from edgeprune.stages.deciding import DecideStages

_Key = TypeVar("_Key")
# Files that are built before one is taken.
MOST_TRIED = 4
# Plans that drop or narrow experts are tried beside another one only if their prediction is within this factor of
# its: nats of dropping and narrowing are less certain than nats of types.
_NEAR = 2.0


def least(nats: Mapping[_Key, float]) -> _Key:
    """The key of the smallest number; a file that computes none is never better than one that does."""
    return min(nats, key=lambda key: nats[key] if math.isfinite(nats[key]) else math.inf)


@dataclass
class TryStages(DecideStages):
    """The plan whose file is best."""

    def best_plan(self) -> Plan:
        """The plan in the folder, or a neighbour of it with more or fewer experts, or channels, that measures better.

        How much healing takes back of what dropping or narrowing experts costs is known roughly before, so where
        either is worth it their number, or their width, is found by building and measuring, from the predicted one up
        and down.
        """
        plan = self.plan()
        free = plan.origin == SOLVER and self.settings.keep is None and not self.settings.types and not self.width
        if not free or not plan.heal:
            return plan
        path, about = self.folder.tried, self._tried_for(plan)
        taken = _taken(path, about)
        if taken == place(plan):
            return plan
        line = sorted((candidate.plan for candidate in self.candidates()), key=place)
        places = [place(own) for own in line]
        if taken in places:  # a run that was killed had decided, but not saved the plan
            return self.saved(line[places.index(taken)])
        if place(plan) not in places:  # it is of other numbers than are proposed today
            return plan
        rivals = [own.predicted.nats for own in line if own.keep or own.width]
        if len(line) > 1 and rivals and min(rivals) <= _NEAR * plan.predicted.nats:
            nats = self._walk(line, places.index(place(plan)))
            best = line[least(nats)]
            tried = [
                {"kept": line[index].kept, "width": line[index].width, "nats": value} for index, value in nats.items()
            ]
            write_text(path, to_json({"made_from": about, "taken": place(best), "tried": tried}))
            if place(best) != place(plan):
                return self.saved(best)
        return plan

    def _tried_for(self, plan: Plan) -> str:
        return digest([plan.made_from, *self.judge])

    def tried_nats(self, plan: Plan) -> dict[tuple[int, int], float]:
        """Measured nats per token of the files that were built before ``plan`` was taken, by experts and channels
        that they keep (0: all channels); empty where none were."""
        with contextlib.suppress(BadFile, KeyError, TypeError):
            known = read_json(self.folder.tried)
            if known["made_from"] == self._tried_for(plan):
                return {(row["kept"], row["width"]): float(row["nats"]) for row in known["tried"]}
        return {}

    def saved(self, plan: Plan) -> Plan:
        """``plan``, in the folder."""
        plan.save(self.folder.plan)
        return plan

    def _walk(self, line: Sequence[Plan], start: int) -> dict[int, float]:
        """Measured nats per token by index: of ``start``, on from there while it gets better, and of what is best
        among the others by prediction. Those that are predicted far worse than ``start`` are not built.

        Args:
            line: from the fewest experts over all of them to the narrowest.
        """
        # Training every file would take as long, each, as training the one that is wanted.
        plans = [replace(own, train=False) for own in line]
        nats = {start: self.tried(plans[start])}
        near = {n for n, own in enumerate(line) if own.predicted.nats <= _NEAR * line[start].predicted.nats}
        for step in (1, -1) if line[start].width or not line[start].keep else (-1, 1):
            here = start
            while len(nats) < MOST_TRIED and here + step in near:
                nats[here + step] = self.tried(plans[here + step])
                if nats[here + step] >= nats[here]:
                    break
                here += step
            if len(nats) > 2:  # it got better that way, so not the other way
                break
        # Widths have their own types, so that predictions along the line are no single dale.
        worst = max(line[index].predicted.nats for index in nats)
        others = [
            n for n in near if n not in nats and (_across(line[n], line[start]) or line[n].predicted.nats < worst)
        ]
        if others and len(nats) < MOST_TRIED:
            best = min(others, key=lambda index: line[index].predicted.nats)
            nats[best] = self.tried(plans[best])
        return nats

    def better_of(self, plan: Plan, build: Build, smaller: RunFolder) -> tuple[Plan, Build]:
        """``plan`` and its file, or the plan of the finished run ``smaller``, built here, if its file is better.

        More room never makes a file worse to ship: what a plan costs is predicted, and of two that are close the
        larger may come out behind.
        """
        other, path = Plan.load(smaller.plan), smaller.path / Path(read_json(smaller.build)["path"]).name
        own = self.nats_to_choose(Path(build.path), "the plan, to choose")
        nats = self.nats_to_choose(path, "the smaller target's, to choose")
        if not nats < own:
            return plan, build
        origin = other.origin if other.origin.startswith(PRESET) else FAMILY
        with contextlib.suppress(DoesNotFit):
            taken = replace(other, made_from=plan.made_from, launch=plan.launch, origin=origin)
            plan = self.saved(self.repriced(taken, placed=False))
            self.listener.say(f"the plan of {smaller.path.name} is taken: {nats:.4g} nats per token, not {own:.4g}")
            build = self.build(plan)
        return plan, build

    @property
    def judge(self) -> list[Any]:
        """What files are chosen with: a part of the text."""
        return self.measured_on(CHOOSING)

    def measured_on(self, part: str) -> list[Any]:
        """What a figure of a ``part`` of the held-out text depends on beside the files."""
        return [part, self._digest_of(self._texts_for(part)), self.settings.evaluation_tokens, self.settings.window]

    def nats_to_choose(self, model: Path, title: str) -> float:
        """Nats per token of ``model`` on the half of the held-out text that files are chosen with."""
        return float(self.divergence(model, CHOOSING, title=title)[0]["all"]["kl_mean"])

    def tried(self, plan: Plan) -> float:
        """Measured nats per token of the file for ``plan``, which is kept until one is taken."""
        path = self.trial(plan)
        record = path.with_suffix(".json")
        with contextlib.suppress(BadFile, KeyError):
            known = read_json(record)
            if path.is_file() and known["judge"] == self.judge:
                return float(known["nats"])
        path.parent.mkdir(parents=True, exist_ok=True)
        more = f", {plan.width} channels each" if plan.width else ""
        more += (", trained and healed" if plan.heal else ", trained") if plan.train else ""
        self.listener.say(f"trying {plan.kept} of {plan.experts} experts per layer{more}")
        made = self.construct(plan, path)
        title = f"quality with F={plan.width}" if plan.width else f"quality with K={plan.kept}"
        nats = self.nats_to_choose(Path(made.path), title)
        healing = {"healing": read_json(self.folder.healing)} if plan.heal else {}
        write_text(record, to_json({"nats": nats, "judge": self.judge, "build": made.to_json(), **healing}))
        self.listener.say(f"  {nats:.4g} nats per token, predicted {plan.predicted.nats:.4g}")
        return nats


def _taken(path: Path, about: str) -> tuple[int, int] | None:
    """The place of the plan that was taken when files were last tried, or None if none were, or of other things."""
    with contextlib.suppress(BadFile, KeyError, TypeError, ValueError):
        known = read_json(path)
        if known["made_from"] == about:
            first, second = known["taken"]
            return int(first), int(second)
    return None


def place(plan: Plan) -> tuple[int, int]:
    """Where ``plan`` is in the line from the fewest experts over all of them to the narrowest."""
    return (0, plan.kept) if plan.keep else (1, -plan.width if plan.width else -(1 << 31))


def _across(plan: Plan, other: Plan) -> bool:
    """Whether one of the two drops experts and the other narrows them, or keeps everything."""
    return bool(plan.keep) != bool(other.keep)
