"""Narrower experts: which channels they keep, and what that costs before anything is built."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from edgeprune.decide.keep import KeepSet
from edgeprune.decide.narrowing import asked_width
from edgeprune.decide.neurons import NARROWINGS
from edgeprune.decide.plan import Plan
from edgeprune.errors import BadFile, Unsupported
from edgeprune.files import digest, to_json, write_text
from edgeprune.measure import child
from edgeprune.measure.channels import Channels
from edgeprune.measure.distortion import candidate_types
from edgeprune.stages.measuring import MeasureStages

# In front of a score of neurons, among the names of methods of choosing experts.
NARROW = "narrow:"


@dataclass
class NarrowStages(MeasureStages):
    """The order of every expert's channels, and the cost of keeping only the first of them."""

    _digests: dict[str, str] = field(default_factory=dict, init=False)

    @cached_property
    def width(self) -> int:
        """Channels that the user wants every expert to keep, or 0 for all.

        Raises:
            UsageError: experts of this model cannot have that width.
        """
        asked = self.settings.width
        return asked_width(asked, self.architecture) if asked not in (0, 1) else 0

    def channels(self, narrowing: str) -> Path:
        """File with the order of every expert's channels by the score ``narrowing``, made if need be."""
        differentiates = NARROWINGS[narrowing].differentiates
        measured = self.gradients if differentiates else self.statistics
        statistics = self.folder.gradients if measured is not self.statistics else self.folder.statistics
        made_from = {"statistics": digest(measured.made_from), "model": self.fingerprint, "narrowing": narrowing}
        path = self.folder.channels(narrowing)
        if path.is_file():
            with contextlib.suppress(BadFile):
                found = Channels.load(path)
                if found.made_from == made_from:
                    self._digests[narrowing] = found.digest
                    return path
                self._changed("channels", found.made_from, made_from)
        with self.listener.progress(f"channels by {narrowing}") as progress:
            result = child.call(
                "edgeprune.decide.narrowing:rank",
                {
                    "model": str(self.source),
                    "statistics": str(statistics),
                    "narrowing": narrowing,
                    "output": str(path),
                    "made_from": made_from,
                },
                progress,
            )
        self._digests[narrowing] = result["digest"]
        return path

    def channels_digest(self, narrowing: str) -> str:
        """What tells one order of channels from another."""
        if narrowing not in self._digests:
            self.channels(narrowing)
        return self._digests[narrowing]

    def narrowable(self) -> tuple[str, ...]:
        """The ways of narrowing that are compared unless some are named: without those that need gradients, and
        without those that the experts or the text do not show enough for, which is said."""
        if not self.architecture.width_rule.widths():
            return ()
        usable = []
        for name, narrowing in NARROWINGS.items():
            if narrowing.differentiates:
                continue
            try:
                self.channels(name)
                usable.append(f"{NARROW}{name}")
            except (BadFile, Unsupported) as error:
                self.listener.say(f"{NARROW}{name} is left out: {error.cause}")
        return tuple(usable)

    def channels_of(self, plan: Plan) -> str:
        """Path of the file with the channels that ``plan`` keeps, or "" where it keeps all."""
        return str(self.channels(plan.narrowing)) if plan.width else ""

    def narrowed(self, width: int, narrowing: str) -> dict[str, Any]:
        """A mask of all but ``width`` channels of every expert, for ``divergence``."""
        return {"width": width, "channels": str(self.channels(narrowing))}

    def narrow_nats(self, width: int, narrowing: str, keep: KeepSet | None = None) -> float:
        """Nats per token of keeping ``width`` channels of every expert, and of experts only those in ``keep``,
        measured by masking; remembered where all experts stay."""
        known = self.sensitivity.drops.setdefault(f"{narrowing}, {self.channels_digest(narrowing)[:16]}", {})
        if keep or width not in known:
            router = {str(layer): list(ids) for layer, ids in (keep or {}).items()} or None
            masks = [self.narrowed(width, narrowing)]
            found = self.divergence(self.source, "sensitivity", [router], "narrowing experts", masks)
            nats = float(found[0]["all"]["kl_mean"])
            if keep:
                return nats
            known[width] = nats
            write_text(self.folder.sensitivity, to_json(self.sensitivity.to_json()))
        return known[width]

    def measure_narrow_types(self, width: int) -> None:
        """Make sure that the distortion of down projections is known for the types of small blocks that ``width``
        leaves them; as they are on rows of the full length."""
        down = (tensor for tensor in self.architecture.tensors if tensor.role == "expert_down")
        rows = {tensor: tensor.kept_shape(1, width)[0] for tensor in down}
        self.measure_types({own.name: candidate_types(own, row) for own, row in rows.items() if row != own.shape[0]})
