"""Training: what is left of a checkpoint learns to answer as the original, before the closed form heals."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import Any

from edgeprune.build.trained import without_room
from edgeprune.decide.plan import Plan
from edgeprune.errors import Unsupported, UsageError
from edgeprune.files import digest, to_json, write_text
from edgeprune.measure import child
from edgeprune.settings import TORCH
from edgeprune.stages.measuring import tools
from edgeprune.stages.merging import MergeStages

_CLOSED_FORM = "--heal closed-form needs neither a checkpoint nor torch"
# Raised when the same wishes lead to other weights.
FORMAT = 1


@dataclass
class TrainStages(MergeStages):
    """What a plan's experts have learnt."""

    def check_training(self) -> None:
        """Refuse a model that cannot be trained, before anything is measured.

        Raises:
            UsageError: the source is a GGUF.
            Unsupported: torch does not run the checkpoint, or its experts are stored in a few bits.
        """
        if not self.settings.train:
            return
        if self.checkpoint is None:
            raise UsageError(
                f"{self.settings.source} is a GGUF, and --heal train runs a Hugging Face checkpoint",
                hint=f"give the checkpoint's folder; {_CLOSED_FORM}",
            )
        if not self.folder.training.is_file():  # else it was trained here before
            try:
                arguments = {"checkpoint": str(self.checkpoint.resolve())}
                child.call("edgeprune.measure.layerwise.distillation:require_trainable", arguments)
            except Unsupported as error:
                raise Unsupported(f"--heal train: {error.cause}", hint=_CLOSED_FORM) from error
        if small := without_room(self.architecture):
            raise Unsupported(
                f"{small.name} is stored in {small.type}, which has no room for what training changes",
                hint="--heal closed-form fits down projections anew and keeps the types of the others",
            )

    @property
    def training(self) -> str:
        """Digest of everything that training depends on beside the plan."""
        return digest({**self._trained_with, "format": FORMAT})

    @property
    def _trained_with(self) -> dict[str, Any]:
        return {
            **self._healing_made_from(self.settings.training_tokens),
            "tools": tools(TORCH),
            "steps": self.settings.training_steps,
            "seconds": self.settings.limit_seconds,
        }

    def trained(self, plan: Plan) -> str:
        """Folder with the trained tensors of ``plan``, or "" if it trains none."""
        if not plan.train:
            return ""
        assert self.checkpoint is not None
        request = [plan.kept, sorted(plan.keep.items()), plan.width, plan.channels, self.training]
        name = digest([str(part) for part in request])[:16]
        learnt = self.folder.path / f"trained-{name}.safetensors"
        store = self.folder.path / f"trained-{name}"
        scratch = self.folder.scratch / f"training-{name}"
        for other in self.folder.path.glob("trained-*"):
            if other not in (learnt, store):
                shutil.rmtree(other) if other.is_dir() else other.unlink()
        known = learnt.is_file()
        if not known:
            with self.listener.progress("train the experts") as progress:
                child.call(
                    "edgeprune.measure.layerwise.distillation:train",
                    {
                        "model": str(self.source),
                        "checkpoint": str(self.checkpoint.resolve()),
                        "output": str(learnt),
                        "folder": str(scratch),
                        **self._healing_texts(self.settings.training_tokens),
                        "window": self.settings.window,
                        "keep": {str(layer): list(ids) for layer, ids in plan.keep.items()},
                        "width": plan.width,
                        "channels": self.channels_of(plan),
                        "channels_digest": plan.channels,
                        "recipe": {"steps": self.settings.training_steps, "seconds": self.settings.limit_seconds},
                    },
                    progress,
                )
        shutil.rmtree(scratch, ignore_errors=True)
        arguments = {"model": str(self.source), "plan": plan.to_json(), "trained": str(learnt), "store": str(store)}
        with self.listener.progress("trained weights") as progress:
            found = child.call("edgeprune.build.trained:write_trained", arguments, progress)
        write_text(self.folder.training, to_json(found))
        if not known:
            nats = f"{found['before']:.4g} nats per token on held-out windows before, {found['after']:.4g} after"
            self.listener.say(f"trained on {found['device']}, {found['step']} steps: {nats} {found['best']}")
        return str(store)
