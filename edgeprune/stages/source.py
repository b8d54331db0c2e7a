"""From what the user named to a GGUF, a profile and a budget."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from edgeprune.device.budget import Budget, make_budget
from edgeprune.device.probe import this_machine
from edgeprune.device.profile import Profile, find_profile
from edgeprune.errors import EdgepruneError
from edgeprune.measure import child, memory
from edgeprune.measure.launch import Launch
from edgeprune.measure.rates import KernelRates, kernel_rates
from edgeprune.model.architecture import Architecture, read_architecture
from edgeprune.model.checkpoint import Checkpoint, open_checkpoint
from edgeprune.model.convert import SOURCE_KEY, without_weights
from edgeprune.model.download import Aim, fetch
from edgeprune.model.gguf import GgufFile
from edgeprune.model.headers import Header
from edgeprune.model.layout import layout
from edgeprune.model.location import HubName, located
from edgeprune.model.parts import first_part
from edgeprune.rundir import RunFolder, changed_fields
from edgeprune.settings import KEEP, Listener, Settings, Silent
from edgeprune.stages.converting import Scrutiny, convert_checked
from edgeprune.units import format_bytes

DEMO = Path(__file__).resolve().parents[1] / "demo"


def found_at(source: str, listener: Listener, aim: Aim | None = None) -> Path:
    """The checkpoint folder or the GGUF file (its first part) that ``source`` names, downloaded if need be.

    Args:
        aim: what it is wanted for; see ``fetch``.

    Raises:
        UsageError: there is none.
        EdgepruneError: it cannot be downloaded; and what ``aim.look`` raises.
    """
    if source == "demo":
        return DEMO
    found = located(source)
    if not isinstance(found, HubName):
        return first_part(found)
    with listener.progress(f"download {found}") as progress:
        return fetch(found, progress, listener.say, aim)


def hub_short_name(source: str) -> str:
    """What to call a model of the Hub, whose folder in the cache is called like its commit; "" for others."""
    found = DEMO if source == "demo" else located(source)
    return found.short if isinstance(found, HubName) else ""


@dataclass
class SourceStages:
    """One model, one target, one folder."""

    settings: Settings
    listener: Listener
    folder: RunFolder = field(init=False)

    def __post_init__(self) -> None:
        self.folder = RunFolder(self.settings.folder)

    @cached_property
    def place(self) -> Path:
        """The checkpoint folder or the GGUF file (its first part) that was named, downloaded if need be."""
        aim = Aim(self.folder.source, mtp=self.settings.mtp == KEEP, look=self._look)
        return found_at(self.settings.source, self.listener, aim)

    def _look(self, model: Checkpoint | Header) -> None:
        """Refuse a model by its headers, before its weights are fetched or converted.

        Raises:
            EdgepruneError: it cannot be converted, llama.cpp does not take it, or it is of no use here.
        """
        if isinstance(model, Checkpoint):
            self._scrutiny.name = self._name(model.folder)
            model = self._scrutiny(model)
        header = without_weights(model, read_architecture(model).vocabulary)
        if memory.takes_shadows(header.size):
            self._require_use(header)

    def _require_use(self, header: Header) -> None:
        """Refuse the model of this GGUF, which has no weights yet. Here: one that llama.cpp does not take.

        Raises:
            EdgepruneError: says why.
        """
        architecture = read_architecture(header, mtp=self.settings.mtp == KEEP)
        memory.price_each(layout(header, architecture, architecture.experts, {}, []), [Launch()], architecture)

    def _with(self, header: Header) -> Self:
        """These stages with a model of which nothing but its ``header`` is here, and nobody who listens."""
        other = copy.copy(self)
        other.listener = Silent()
        vars(other).update(file=header, fingerprint="")
        return other

    @cached_property
    def _scrutiny(self) -> Scrutiny:
        return Scrutiny(self.listener, mtp=self.settings.mtp == KEEP)

    @property
    def checkpoint(self) -> Path | None:
        """The Hugging Face checkpoint that the source is, or None."""
        return self.place if self.place.is_dir() else None

    @cached_property
    def source(self) -> Path:
        """The source as a GGUF: the file itself, or the converted checkpoint."""
        return self.place if self.checkpoint is None else self._converted(self.checkpoint)

    def _converted(self, checkpoint: Path) -> Path:
        output = self.folder.source
        mtp = self.settings.mtp == KEEP
        if not output.is_file() and not self._scrutiny.done:
            self._look(open_checkpoint(checkpoint))  # before all of it is read for its fingerprint
        with self.listener.progress("fingerprint of the checkpoint") as progress:
            origin = open_checkpoint(checkpoint).origin(mtp=mtp, progress=progress)
        if output.is_file():
            with contextlib.suppress(EdgepruneError):
                old = str(GgufFile(output).get(SOURCE_KEY, ""))
                if old == origin:
                    return output
                self._changed("the checkpoint", {"content": old}, {"content": origin})
            if not self._scrutiny.done:
                self._look(open_checkpoint(checkpoint))
        convert_checked(checkpoint, output, self.listener, name=self._name(checkpoint), mtp=mtp, origin=origin)
        return output

    def _name(self, checkpoint: Path) -> str:
        if checkpoint == DEMO:
            return "edgeprune-demo"
        return hub_short_name(self.settings.source) or checkpoint.resolve().name

    def _changed(self, what: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
        for line in changed_fields(old, new):
            self.listener.say(f"{what} changed: {line}; doing it again")

    @cached_property
    def file(self) -> GgufFile:
        return GgufFile(self.source)

    @cached_property
    def architecture(self) -> Architecture:
        found = read_architecture(self.file, mtp=self.settings.mtp == KEEP)
        if found.left_out:
            size = format_bytes(sum(tensor.nbytes for tensor in found.left_out))
            self.listener.say(
                f"left out: blocks that predict further tokens, {size}, which llama.cpp loads with --spec-type "
                "draft-mtp alone; --mtp keep keeps them"
            )
        return found

    @cached_property
    def fingerprint(self) -> str:
        """Of the source's content. The first look at a large file takes as long as reading it."""
        with self.listener.progress("fingerprint of the model") as progress:
            return self.file.fingerprint(progress)

    @cached_property
    def profile(self) -> Profile:
        """The device's profile; this machine's when only a size is given."""
        device = self.settings.device
        if device is not None and device != "auto":
            return find_profile(device)
        profile = this_machine(child.call("edgeprune.measure.llama:backend_devices", {}))
        if device == "auto":
            for line in profile.why:
                self.listener.say(f"auto: {line}")
        else:
            profile = replace(profile, name=self.settings.target)
        return profile

    @cached_property
    def rates(self) -> KernelRates | None:
        """How fast this machine's products are, where it is the device and its CPU computes."""
        if self.settings.device not in (None, "auto") or self.profile.backend != "cpu":
            return None
        try:
            with self.listener.progress("speed of this machine") as progress:
                return kernel_rates(progress)
        except EdgepruneError as error:
            self.listener.say(f"the speed is predicted from the bandwidth alone: {error.cause}")
            return None

    @cached_property
    def launch(self) -> Launch:
        """Launch settings before placement."""
        longest = self.architecture.context_length or 4096
        context = self.settings.context or min(self.profile.context, longest)
        kv_type = (self.settings.kv_type or self.profile.kv_type).upper()
        here = self.settings.device in (None, "auto")
        return Launch(context=context, kv_type=kv_type, threads=0 if here else self.profile.threads)

    @cached_property
    def budget(self) -> Budget:
        """Memory by pool, with llama.cpp's own figures for what is not weights."""
        return self.budget_of(self.launch)

    def budget_of(self, launch: Launch) -> Budget:
        """The budget of a server that is started with ``launch``."""
        whole = layout(self.file, self.architecture, self.architecture.experts, {}, [])
        layers = -1 if self.profile.on_gpu else 0
        priced = replace(launch, threads=0, gpu_layers=layers, cpu_experts=0)
        needs = memory.price(whole, priced, self.architecture)
        other = self.profile.backend != "cpu" and needs.backends == ("CPU",)
        basis = f"KV cache and compute buffers as llama.cpp's {' and '.join(needs.backends)} backend allocates them"
        if other:
            basis += f" (this build has no {self.profile.backend} backend; its compute buffers may differ)"
        limit, memory_bytes = self.settings.file_bytes, self.settings.memory_bytes
        if limit is not None:  # the file is the limit, not the memory of the machine that makes it
            memory_bytes = limit + needs.all_bytes
        return make_budget(
            self.profile,
            kv_bytes=needs.kv_bytes,
            compute_bytes=needs.compute_bytes,
            runtime_bytes=needs.runtime_bytes,
            host_compute_bytes=needs.host_compute_bytes,
            memory_bytes=memory_bytes,
            file_limit_bytes=limit,
            basis=basis,
        )
