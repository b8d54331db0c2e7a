"""Healing: layers fitted a few at a time, each stage observed through what is already built."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from edgeprune.build.store import Store
from edgeprune.decide.mended import FINE_BITS, HealingText, expert_bits
from edgeprune.decide.plan import PRESET, Plan
from edgeprune.device.probe import cores
from edgeprune.errors import BadFile
from edgeprune.files import digest, read_json, to_json, write_text
from edgeprune.measure import child
from edgeprune.measure.statistics import Statistics
from edgeprune.measure.text import shipped_texts, texts_digest
from edgeprune.measure.weights import layer_tensors
from edgeprune.model.architecture import Architecture
from edgeprune.settings import Progress, within
from edgeprune.stages.measuring import tools
from edgeprune.stages.narrowing import NarrowStages
from edgeprune.units import format_bytes

# Raised when layers come out otherwise: a run that was begun before is not gone on with.
FORMAT = 4
# Groups of layers by default: more cost a pass over the text each, fewer leave the fits with inputs that are further
# from those of the finished model. Where all experts stay that matters less: three groups of six layers left 1.00 of
# the KL divergence that six did at 4.9 bits per weight, 1.02 at 3.1; at 5.75, one did what three did.
MOST_STAGES, MOST_STAGES_OF_WHOLE, LAYERS_OF_WHOLE, STAGES_OF_FINE = 8, 4, 2, 1
# Times that a fit multiplies every token's hidden values with a matrix like the down projection: twice for the gate
# and up projections, twice a sweep, and once for each look at what is left; matrices of an expert and its tokens go
# through at half the speed of large ones.
FIT_PRODUCTS = 28
# Shares of the time of building what comes before, observing it and fitting, for a bar that moves.
STEPS = (1, 10, 15)
# Of the tokens that are kept whole on disk.
MOST_BYTES = 8 << 30


def changed_layers(plan: Plan, architecture: Architecture) -> list[int]:
    """Layers whose experts are not as in the source."""
    retyped = {t.layer for t in architecture.tensors if t.is_expert and plan.types.get(t.name, t.type) != t.type}
    return [layer for layer in architecture.moe_layers if plan.keep or plan.width or layer in retyped]


def _changes(plan: Plan) -> dict[str, bool]:
    """Whether ``plan`` has fewer experts than the source, and narrower ones."""
    return {"fewer": bool(plan.keep), "narrower": bool(plan.width)}


def groups(layers: Sequence[int], count: int) -> list[tuple[int, int]]:
    """``layers``, ascending, in at most ``count`` runs: first layer and the one after the last of each."""
    count = min(count, len(layers))
    bounds = [round(index * len(layers) / count) for index in range(count + 1)] if count else []
    return [(layers[a], layers[b - 1] + 1) for a, b in pairwise(bounds)]


@dataclass
class HealStages(NarrowStages):
    """What the original answers, and the down projections that answer the same in the smaller model."""

    def _healing_texts(self, most: int) -> dict[str, Any]:
        """Text to heal on, ``most`` tokens in all: the calibration text, and as much general text beside a text of
        the user's, because layers that are fitted to one domain alone forget the others."""
        own: list[dict[str, str]] = self._text_arguments("calibration")["texts"]
        beside = [text.to_json() for text in shipped_texts()] if self.settings.texts else []
        return {"texts": own, "beside": beside, "most_tokens": most // 2 if beside else most}

    @property
    def healing_text(self) -> HealingText:
        """How much text there is: what was asked for, and what the disk is to hold.

        Every layer keeps what goes in and comes out and the residual stream, at two bytes a channel, and what the
        router saw, at twice four bytes an expert.
        """
        architecture = self.architecture
        token_bytes = len(architecture.moe_layers) * (6 * architecture.width + 8 * architecture.experts)
        return HealingText(self.settings.healing_tokens, MOST_BYTES // max(token_bytes, 1))

    def healing_tokens(self, plan: Plan) -> int:
        """Tokens that ``plan`` is healed on."""
        return self.healing_text.tokens(expert_bits(self.architecture, plan.types), **_changes(plan))

    def _healing_made_from(self, tokens: int) -> dict[str, Any]:
        return {
            "model": self.fingerprint,
            "text": self.text_digest,
            "general": texts_digest(shipped_texts()) if self.settings.texts else None,
            "tokens": tokens,
            "window": self.settings.window,
            "tools": tools(),
        }

    @property
    def healing(self) -> str:
        """Digest of everything that healing depends on beside the plan."""
        made_from = self._healing_made_from(self.settings.healing_tokens)
        return digest({**made_from, "stages": self._most_stages, "format": FORMAT})

    @property
    def _most_stages(self) -> int:
        return self.settings.heal_stages or MOST_STAGES

    def _stages(self, plan: Plan, changed: Sequence[int]) -> list[tuple[int, int]]:
        """Groups of the layers that ``plan`` has ``changed``."""
        most = self._most_stages
        if not self.settings.heal_stages and not any(_changes(plan).values()):
            fine = expert_bits(self.architecture, plan.types) >= FINE_BITS
            most = min(STAGES_OF_FINE if fine else MOST_STAGES_OF_WHOLE, -(-len(changed) // LAYERS_OF_WHOLE))
        return groups(changed, most)

    def healing_seconds(self, plan: Plan) -> float:
        """About how long healing ``plan`` takes here, from measured rates: the source is observed once, and for each
        group of layers the model as far as these; the fits are matrix products over all of the tokens."""
        speeds, architecture = self.sensitivity.speeds, self.architecture
        if not speeds.get("tokens") or not speeds.get("products"):
            return 0.0
        changed, tokens = changed_layers(plan, architecture), self.healing_tokens(plan)
        passes = 1 + sum(end for _, end in self._stages(plan, changed)) / architecture.layers
        width = architecture.width * (plan.width or architecture.expert_width)
        products = FIT_PRODUCTS * tokens * min(architecture.used, plan.kept) * width * len(changed)
        return tokens * passes / speeds["tokens"] + products / (speeds["products"] * cores())

    def teacher(self, tokens: int) -> Path:
        """Statistics of the source over ``tokens`` of the healing text, with every token kept."""
        made_from, path = self._healing_made_from(tokens), self.folder.teacher(tokens)
        with contextlib.suppress(BadFile):
            if path.is_file() and Statistics.load(path).made_from == made_from:
                return path
        with self.listener.progress("what the original answers") as progress:
            self._tokens(self.source, path, made_from, tokens, self.architecture.experts, progress)
        return path

    def _tokens(
        self,
        model: Path,
        output: Path,
        made_from: dict[str, Any],
        most: int,
        experts: int,
        progress: Progress,
        layers: tuple[int, int] | None = None,
    ) -> None:
        """Statistics of ``model`` over ``most`` tokens of the healing text, in ``layers`` alone if given."""
        looked_at = range(*layers) if layers else range(self.architecture.layers)
        # The products with these weights show what goes into the experts.
        roles = ("expert_gate", "expert_up", "expert_gate_up")
        wanted = [t.name for t in self.architecture.tensors if t.role in roles and t.layer in looked_at]
        child.call(
            "edgeprune.measure.calibration:collect",
            {
                **self._healing_texts(most),
                "model": str(model),
                "output": str(output),
                "scratch": str(self.folder.scratch),
                "window": self.settings.window,
                "weights": wanted,
                "experts": experts,
                "arch": self.architecture.arch,
                "made_from": made_from,
                "reservoir_tokens": most,
                "layers": list(layers) if layers else None,
                "tokens_only": True,
            },
            progress,
        )

    def healed(self, plan: Plan, merged: str = "") -> str:
        """Folder with the finished tensors of the layers that ``plan`` changes, or "" if it heals none.

        Args:
            merged: folder of the merged experts, if it merges any.
        """
        changed = changed_layers(plan, self.architecture)
        if not plan.heal or plan.origin.startswith(PRESET) or not changed:
            return ""
        folder = self.folder.path / f"healed-{plan.digest[:16]}"
        for other in self.folder.path.glob("healed-*"):
            if other != folder:
                shutil.rmtree(other)
        folder.mkdir(parents=True, exist_ok=True)
        record, store = folder / "record.json", Store(folder)
        done: dict[str, Any] = {}
        with contextlib.suppress(BadFile):
            recorded = dict(read_json(record))
            done = {layer: found for layer, found in recorded.items() if self._whole(store, layer, found)}
        stages = self._stages(plan, changed)
        stages = [s for s in stages if not all(str(layer) in done for layer in changed if layer in range(*s))]
        if stages:
            self._say_cut(plan)
            teacher = self.teacher(self.healing_tokens(plan))
            with self.listener.progress("heal the experts") as progress, child.Worker() as encoder:
                passed, whole = 0, sum(end for _, end in stages)
                for stage in stages:  # one costs as it is deep: all before it is built and observed
                    part = within(progress, passed, stage[1], whole)
                    done |= self._heal(encoder, plan, store, stage, merged, teacher, part)
                    write_text(record, to_json(done))
                    passed += stage[1]
        for layer, found in done.items():
            if "reason" in found:
                self.listener.say(f"layer {layer} is not healed: {found['reason']}")
        write_text(self.folder.healing, to_json(done))
        return str(folder)

    def _say_cut(self, plan: Plan) -> None:
        tokens = self.healing_tokens(plan)
        if tokens < self.healing_text.wanted(expert_bits(self.architecture, plan.types), **_changes(plan)):
            limit = format_bytes(MOST_BYTES)
            self.listener.say(f"healing on {tokens:,} tokens, as many as {limit} of disk hold for layers so wide")

    def _whole(self, store: Store, layer: str, found: dict[str, Any]) -> bool:
        """Whether all is there that the record says of ``layer``: a run may have been killed while it deleted them,
        and what is missing would be encoded without healing."""
        roles = ("expert_gate", "expert_up", "expert_gate_up", "expert_down")
        own = layer_tensors(self.architecture, int(layer))
        return "reason" in found or all(own[role].name in store for role in roles if role in own)

    def _heal(
        self,
        encoder: child.Worker,
        plan: Plan,
        store: Store,
        stage: tuple[int, int],
        merged: str,
        teacher: Path,
        progress: Progress,
    ) -> dict[str, Any]:
        """One stage: build the prefix, observe it, fit."""
        common = {
            "model": str(self.source),
            "plan": plan.to_json(),
            "store": str(store.folder),
            "layers": list(stage),
            "channels": self.channels_of(plan),
            "merged": merged,
        }
        self.folder.scratch.mkdir(parents=True, exist_ok=True)
        prefix = self.folder.scratch / "prefix.gguf"
        student = self.folder.scratch / "student.safetensors"
        tokens = self.healing_tokens(plan)
        statistics = self.statistics_file if plan.types else ""
        build, observe, fit = (
            within(progress, *part, sum(STEPS)) for part in zip((0, *accumulate(STEPS)), STEPS, strict=False)
        )
        encoder.call(
            "edgeprune.build.staged:write_prefix",
            {**common, "output": str(prefix), "statistics": statistics},
            build,
        )
        made_from = {"model": plan.digest, "stage": list(stage)}
        self._tokens(prefix, student, made_from, tokens, plan.kept, observe, stage)
        found: dict[str, Any] = encoder.call(
            "edgeprune.build.staged:heal_layers",
            {**common, "teacher": str(teacher), "student": str(student)},
            fit,
        )
        prefix.unlink()
        student.unlink()
        return found
