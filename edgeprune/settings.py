"""What the user asked for, and who hears what is done about it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from edgeprune.device.profile import find_profile
from edgeprune.errors import UsageError
from edgeprune.model.location import HubName, located
from edgeprune.model.parts import first_part, stem
from edgeprune.units import compact_bytes

Progress = Callable[[int, int], None]
# What runs the model over the calibration text.
LLAMA, TORCH = "llama.cpp", "torch"
ENGINES = (LLAMA, TORCH)
# What becomes of blocks that predict further tokens.
KEEP, DROP = "keep", "drop"


_FINE = 1000  # steps of a part, so that a whole of few parts moves evenly


def within(progress: Progress, before: int, weight: int, whole: int) -> Progress:
    """Callback for a part of what ``progress`` shows: ``weight`` of a ``whole``, after ``before`` of it."""

    def part(done: int, total: int) -> None:
        progress(_FINE * before + (_FINE * weight * min(done, total) // total if total else 0), _FINE * whole)

    return part


class Listener(Protocol):
    """Who hears what the pipeline does."""

    def say(self, text: str) -> None:
        """A line worth reading."""

    def progress(self, title: str) -> contextlib.AbstractContextManager[Progress]:
        """A stage that takes a while; the context gives a callback for steps done and steps in all."""


class Silent:
    """A listener who hears nothing."""

    def say(self, text: str) -> None:
        """Nothing."""

    def progress(self, title: str) -> contextlib.AbstractContextManager[Progress]:
        """Nothing, either."""
        return contextlib.nullcontext(lambda done, total: None)


@dataclass(frozen=True)
class Settings:
    """What the user asked for.

    Attributes:
        source: ``demo``, a checkpoint folder, a GGUF file (any part of a split one), or a model on the Hub as
            ``ORG/NAME[:FILE-or-QUANT][@REVISION]``.
        device: profile name, profile file or ``auto``; None with ``memory_bytes`` or ``file_bytes``.
        memory_bytes: usable memory instead of a device's.
        file_bytes: most bytes of the file, or of its parts together.
        part_bytes: most bytes of one file; a larger one is split into parts. None for one file.
        context, kv_type: of the launch; None for the profile's.
        texts, evaluation_texts: ``FILE`` or ``NAME=FILE``; empty for the shipped text.
        self_answers: how many answers of the model itself are calibrated on, too.
        keep: forced number of experts, or None.
        width: forced channels of every expert, or below 1 their share; 1 for all, 0 for as many as are best.
        narrowing: how channels are ranked, one of ``decide.neurons.NARROWINGS``.
        types: forced GGML types, or empty.
        method: how experts are ranked, one of ``decide.scores.METHODS``.
        mixture: how the domains of the text are put together for that, one of ``decide.keep.MIXTURES``.
        engine: what the statistics are measured with, one of ``ENGINES``; ``torch`` needs a checkpoint.
        reduce: what becomes of experts that are not kept, one of ``decide.plan.REDUCTIONS``.
        heal: whether the down projections of changed experts are fitted anew.
        train: whether what is left of a checkpoint is trained before, where experts are dropped or narrowed.
        training_tokens: most tokens that are used for it.
        training_steps: most steps that it takes.
        heal_stages: most groups of layers that this is done in, or 0 for the default.
        healing_tokens: how much text is used for it where experts are dropped; half of that where those that are
            left have fewer than 4 bits a weight on average, or all stay and are narrower; where all stay as wide as
            they were, a quarter in fewer than 5, else an eighth.
        mtp: what becomes of blocks that predict further tokens, ``keep`` or ``drop``.
        limit_seconds: most time for encoding what changes type, or 0 for any.
        output: run directory, or None for the default.
        window: tokens per calibration window.
        sensitivity_window: the same where little text is used, so that every domain takes part.
        calibration_tokens, evaluation_tokens, sensitivity_tokens: how much text is used.
        reservoir_tokens: how many calibration tokens are kept whole, for replays of single layers.
        baselines: whether stock presets are built and measured beside the plan.
        command: as it was typed, for the report; "" where there was none.
    """

    source: str
    device: str | None = None
    memory_bytes: int | None = None
    file_bytes: int | None = None
    part_bytes: int | None = None
    context: int | None = None
    kv_type: str | None = None
    texts: tuple[str, ...] = ()
    evaluation_texts: tuple[str, ...] = ()
    self_answers: int = 0
    keep: int | None = None
    width: float = 0.0
    narrowing: str = "ziplm"
    types: tuple[str, ...] = ()
    method: str = "replay"
    mixture: str = "pooled"
    engine: str = LLAMA
    reduce: str = "drop"
    heal: bool = True
    train: bool = False
    training_tokens: int = 131_072
    training_steps: int = 300
    heal_stages: int = 0
    healing_tokens: int = 49_152
    mtp: str = DROP
    limit_seconds: float = 0.0
    output: str | None = None
    window: int = 512
    calibration_tokens: int = 24_576
    reservoir_tokens: int = 8_192
    evaluation_tokens: int = 8_192
    sensitivity_tokens: int = 2_048
    sensitivity_window: int = 128
    baselines: bool = True
    command: str = ""

    def check(self) -> None:
        """Refuse a command line that contradicts itself.

        Raises:
            UsageError: says how.
        """
        targets = [self.device, self.memory_bytes, self.file_bytes]
        if sum(target is not None for target in targets) != 1:
            raise UsageError(
                "say what to fit: exactly one of --device, --memory and --file-size",
                hint="`--device auto` is this machine; `edgeprune profiles` lists the others",
            )
        if self.reduce != "drop" and self.width not in (0, 1):
            raise UsageError(
                f"--reduce {self.reduce} merges experts, and --width {self.width:g} narrows them without merging any",
                hint="do one of the two",
            )
        if self.train and not self.heal:
            raise UsageError("--heal train trains experts, and --no-heal leaves them as they are", hint="give one")
        if self.train and self.reduce != "drop":
            raise UsageError(
                f"--reduce {self.reduce} merges experts, and --heal train trains those of the original",
                hint="do one of the two",
            )
        if self.folder.resolve() == Path(self.source).resolve():
            raise UsageError(f"{self.folder} is the source itself", hint="choose another folder with -o")
        if self.device not in (None, "auto"):
            find_profile(self.device)  # a typo is found before a large checkpoint is converted

    @property
    def has_target(self) -> bool:
        """Whether there is anything that a model is to be fitted to."""
        return any(target is not None for target in (self.device, self.memory_bytes, self.file_bytes))

    @property
    def target(self) -> str:
        """Short name of the device or limit, for folders and titles."""
        if self.file_bytes is not None:
            return f"file-{compact_bytes(self.file_bytes)}"
        if self.memory_bytes is not None:
            return f"memory-{compact_bytes(self.memory_bytes)}"
        return Path(self.device or "auto").stem

    @property
    def owner(self) -> str:
        """The model that the run directory belongs to."""
        place = self._place
        return str(place) if isinstance(place, HubName) else "demo" if place is None else str(place.resolve())

    @property
    def folder(self) -> Path:
        """The run directory."""
        if self.output is not None:
            return Path(self.output)
        place = self._place
        if place is None:
            name = "demo"
        elif isinstance(place, HubName):
            name = place.short
        else:
            name = stem(place) if place.is_file() else place.resolve().name
        return Path("runs") / f"{name}-{self.target}"

    @property
    def _place(self) -> Path | HubName | None:
        """Where the source is; None for the demo model."""
        if self.source == "demo":
            return None
        found = located(self.source)
        return found if isinstance(found, HubName) else first_part(found)
