"""Predictions propose, measurements decide: a few candidates are built and measured before one is taken."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune.decide.plan import SOLVER, Plan
from edgeprune.errors import BadFile
from edgeprune.files import digest, read_json, to_json, write_text
from edgeprune.measure.text import CHOOSING
from edgeprune.stages.deciding import DecideStages

# Files that are built before one is taken.
MOST_TRIED = 4
# A plan that drops experts is tried beside one that keeps all only if its prediction is within this factor: nats of
# dropping are less certain than nats of types.
_NEAR = 2.0


@dataclass
class TryStages(DecideStages):
    """The plan whose file is best."""

    def best_plan(self) -> Plan:
        """The plan in the folder, or a neighbour of it with more or fewer experts that measures better.

        How much healing takes back of what dropping experts costs is known roughly before, so where experts are
        dropped the number of them is found by building and measuring, from the predicted one up and down.
        """
        plan = self.plan()
        free = plan.origin == SOLVER and self.settings.keep is None and not self.settings.types
        if not free or not plan.heal:
            return plan
        path = self.folder.path / "tried.json"
        about = digest([plan.made_from, *self._judge])
        with contextlib.suppress(BadFile, KeyError):
            if read_json(path)["made_from"] == about:
                return plan
        found = {candidate.plan.kept: candidate.plan for candidate in self.candidates()}
        rivals = [own.predicted.nats for kept, own in found.items() if kept < own.experts]
        if len(found) > 1 and min(rivals) <= _NEAR * plan.predicted.nats:
            nats = self._walk(found, plan.kept)
            best = min(nats, key=lambda kept: nats[kept])
            if best != plan.kept:
                plan = found[best]
                plan.save(self.folder.plan)
            tried = {str(kept): value for kept, value in nats.items()}
            write_text(path, to_json({"made_from": about, "nats": tried}))
        return plan

    def _walk(self, found: Mapping[int, Plan], start: int) -> dict[int, float]:
        """Measured nats per token by number of experts: of ``start``, and on from there while it gets better."""
        counts = sorted(found, reverse=True)
        nats = {start: self._tried(found[start])}
        for step in (1, -1):
            here = counts.index(start)
            while len(nats) < MOST_TRIED and 0 <= here + step < len(counts):
                there = counts[here + step]
                nats[there] = self._tried(found[there])
                if nats[there] >= nats[counts[here]]:
                    break
                here += step
            if len(nats) > 2:  # it got better that way, so not the other way
                break
        return nats

    @property
    def _judge(self) -> list[Any]:
        """What files are chosen with: a part of the text."""
        chosen = self.settings
        text = self._digest_of(self._texts_for(CHOOSING))
        return [CHOOSING, text, chosen.evaluation_tokens, chosen.window]

    def nats_to_choose(self, model: Path, title: str) -> float:
        """Nats per token of ``model`` on the half of the held-out text that files are chosen with."""
        return float(self.divergence(model, CHOOSING, title=title)[0]["all"]["kl_mean"])

    def _tried(self, plan: Plan) -> float:
        """Measured nats per token of the file for ``plan``, which is kept until one is taken."""
        path = self.trial(plan)
        record = path.with_suffix(".json")
        with contextlib.suppress(BadFile, KeyError):
            known = read_json(record)
            if path.is_file() and known["judge"] == self._judge:
                return float(known["nats"])
        path.parent.mkdir(parents=True, exist_ok=True)
        self.listener.say(f"trying {plan.kept} of {plan.experts} experts per layer")
        made = self.construct(plan, path)
        nats = self.nats_to_choose(Path(made.path), f"quality with K={plan.kept}")
        write_text(record, to_json({"nats": nats, "judge": self._judge, "build": made.to_json()}))
        self.listener.say(f"  {nats:.4g} nats per token, predicted {plan.predicted.nats:.4g}")
        return nats
