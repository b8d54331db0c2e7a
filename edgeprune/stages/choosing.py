"""What training is good for beside the closed form is measured: the better file is taken, with or without either."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import Any

from edgeprune.decide.plan import SOLVER, Plan
from edgeprune.errors import BadFile
from edgeprune.files import digest, read_json, to_json, write_text
from edgeprune.stages.trying import TryStages, least

# Whether the closed form heals, and whether training comes before.
WAYS = {"closed form": (True, False), "training": (False, True), "training and closed form": (True, True)}


@dataclass
class ChooseStages(TryStages):
    """The plan whose file is best, and the way that its experts are healed."""

    def best_plan(self) -> Plan:
        """As before; where training was asked for, also the way of ``WAYS`` whose file measures best.

        The closed form answers for every layer by itself and training for the last one's outcome, so either may undo
        what the other did. A plan that was edited by hand is obeyed.
        """
        plan = super().best_plan()
        if not self.settings.train or plan.origin != SOLVER or not (plan.keep or plan.width):
            return plan
        about = self._about(plan)
        ways = {name: replace(plan, heal=heal, train=train) for name, (heal, train) in WAYS.items()}
        found = self.ways(about)
        if found is None:
            nats = {name: self.tried(own) for name, own in ways.items()}
            best = least(nats)
            found = {"made_from": about, "taken": best, "nats": nats}
            write_text(self.folder.ways, to_json(found))
            self.listener.say(f"taken: {in_words(found)}")
        taken = ways[found["taken"]]
        if taken == plan:
            return plan
        with contextlib.suppress(BadFile, KeyError):  # records say what was done, so the bytes differ by a few
            nbytes = int(read_json(self.trial(taken).with_suffix(".json"))["build"]["nbytes"])
            taken = replace(taken, predicted=replace(taken.predicted, file_bytes=nbytes))
        return self.saved(taken)

    def _about(self, plan: Plan) -> str:
        return digest([replace(plan, heal=True, train=True).digest, *self.judge])

    def ways(self, about: str) -> dict[str, Any] | None:
        """What was measured and taken for the plan and text with the digest ``about``."""
        with contextlib.suppress(BadFile, KeyError):
            known: dict[str, Any] = read_json(self.folder.ways)
            if known["made_from"] == about and known["taken"] in WAYS:
                return known
        return None

    def training_in_words(self, plan: Plan) -> str:
        """What training came to and why it was taken or not, in a line; "" where none was asked for."""
        if not plan.made_from.get("training") or not (plan.keep or plan.width):
            return ""
        with contextlib.suppress(BadFile, KeyError):
            learnt = read_json(self.folder.training)
            line = (
                f"{learnt['best']} steps on {learnt['tokens']:,} tokens; KL divergence on {learnt['held_out']:,} "
                f"others {learnt['before']:.4g} nats per token before, {learnt['after']:.4g} after"
            )
            known = self.ways(self._about(plan))
            return line if known is None else f"{line}; taken: {in_words(known)}"
        return ""


def in_words(known: dict[str, Any]) -> str:
    """``known``, as ``ChooseStages.ways`` gives it, in words."""
    others = [f"{name} {nats:.4g}" for name, nats in known["nats"].items() if name != known["taken"]]
    return f"{known['taken']}, {known['nats'][known['taken']]:.4g} nats per token ({', '.join(others)})"
