"""The whole flow over a run directory: source, measure, decide, build, prove.

Every stage looks at what its file was made from, does nothing when that is unchanged, and says which
field changed when it is not. A run that was killed therefore goes on where it was.
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from edgeprune import __version__
from edgeprune.build.builder import Build, describe
from edgeprune.decide.candidates import (
    Candidate,
    Problem,
    allowed_types,
    candidates,
    priced,
)
from edgeprune.decide.keep import keep_set, rankings
from edgeprune.decide.plan import Plan, folded
from edgeprune.device.budget import Budget, make_budget
from edgeprune.device.probe import this_machine
from edgeprune.device.profile import Profile, find_profile
from edgeprune.errors import BadFile, BrokenPromise, DoesNotFit, EdgepruneError, UsageError
from edgeprune.files import digest, file_digest, read_json, to_json, write_text
from edgeprune.measure import child, memory
from edgeprune.measure.launch import Launch
from edgeprune.measure.sensitivity import Sensitivity, responses, site_settings, sites_to_measure
from edgeprune.measure.statistics import Statistics, write_imatrix
from edgeprune.measure.text import TextFile, parse_texts, shipped_texts, texts_digest
from edgeprune.model.architecture import Architecture, read_architecture
from edgeprune.model.checkpoint import open_checkpoint
from edgeprune.model.convert import SOURCE_KEY
from edgeprune.model.gguf import GgufFile
from edgeprune.model.layout import layout
from edgeprune.prove import baseline
from edgeprune.prove.page import render
from edgeprune.prove.report import Baseline, Report, promises
from edgeprune.rundir import RunFolder, changed_fields
from edgeprune.share.card import model_card
from edgeprune.units import format_bytes

DEMO = Path(__file__).resolve().parent / "demo"
Progress = Callable[[int, int], None]


class Listener(Protocol):
    """Who hears what the pipeline does."""

    def say(self, text: str) -> None:
        """A line worth reading."""

    def progress(self, title: str) -> contextlib.AbstractContextManager[Progress]:
        """A stage that takes a while; the context gives a callback for steps done and steps in all."""


@dataclass(frozen=True)
class Settings:
    """What the user asked for.

    Attributes:
        source: ``demo``, a checkpoint folder or a GGUF file.
        device: profile name, profile file or ``auto``; None with ``memory_bytes`` or ``file_bytes``.
        memory_bytes: usable memory instead of a device's.
        file_bytes: most bytes of the file.
        context, kv_type: of the launch; None for the profile's.
        texts, evaluation_texts: ``FILE`` or ``NAME=FILE``; empty for the shipped text.
        keep: forced number of experts, or None.
        types: forced GGML types, or empty.
        method: expert score.
        output: run directory, or None for the default.
        window: tokens per calibration window.
        calibration_tokens, evaluation_tokens, sensitivity_tokens: how much text is used.
        baselines: whether stock presets are built and measured beside the plan.
    """

    source: str
    device: str | None = None
    memory_bytes: int | None = None
    file_bytes: int | None = None
    context: int | None = None
    kv_type: str | None = None
    texts: tuple[str, ...] = ()
    evaluation_texts: tuple[str, ...] = ()
    keep: int | None = None
    types: tuple[str, ...] = ()
    method: str = "reap"
    output: str | None = None
    window: int = 512
    calibration_tokens: int = 24_576
    evaluation_tokens: int = 8_192
    sensitivity_tokens: int = 2_048
    baselines: bool = True

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

    @property
    def target(self) -> str:
        """Short name of the device or limit, for folders and titles."""
        if self.file_bytes is not None:
            return f"file-{format_bytes(self.file_bytes).replace(' ', '')}"
        if self.memory_bytes is not None:
            return f"memory-{format_bytes(self.memory_bytes).replace(' ', '')}"
        return Path(self.device or "auto").stem

    @property
    def folder(self) -> Path:
        """The run directory."""
        if self.output is not None:
            return Path(self.output)
        return Path("runs") / f"{Path(self.source).resolve().stem if self.source != 'demo' else 'demo'}-{self.target}"


@dataclass
class Run:
    """One model, one target, one folder; each method is a stage."""

    settings: Settings
    listener: Listener
    folder: RunFolder = field(init=False)

    def __post_init__(self) -> None:
        self.folder = RunFolder(self.settings.folder)

    # -- source ------------------------------------------------------------------------------------

    @cached_property
    def source(self) -> Path:
        """The source as a GGUF: the file itself, or the converted checkpoint."""
        name = self.settings.source
        path = DEMO if name == "demo" else Path(name)
        if path.is_file():
            return path
        if not path.is_dir():
            raise UsageError(f"no model at {name}", hint="give `demo`, a checkpoint folder or a GGUF file")
        return self._converted(path)

    def _converted(self, checkpoint: Path) -> Path:
        output = self.folder.source
        origin = open_checkpoint(checkpoint).fingerprint()
        if output.is_file():
            with contextlib.suppress(EdgepruneError):
                old = str(GgufFile(output).get(SOURCE_KEY, ""))
                if old == origin:
                    return output
                self._changed("the checkpoint", {"content": old}, {"content": origin})
        with self.listener.progress("convert") as progress:
            child.call(
                "edgeprune.model.convert:convert_task",
                {"folder": str(checkpoint.resolve()), "output": str(output), "name": self._name(checkpoint)},
                progress,
            )
        return output

    def _name(self, checkpoint: Path) -> str:
        return "edgeprune-demo" if checkpoint == DEMO else checkpoint.resolve().name

    def _changed(self, what: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
        for line in changed_fields(old, new):
            self.listener.say(f"{what} changed: {line}; doing it again")

    @cached_property
    def file(self) -> GgufFile:
        return GgufFile(self.source)

    @cached_property
    def architecture(self) -> Architecture:
        return read_architecture(self.file)

    @cached_property
    def fingerprint(self) -> str:
        return self.file.fingerprint()

    # -- device ------------------------------------------------------------------------------------

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
        whole = layout(self.file, self.architecture, self.architecture.experts, {}, [])
        needs = memory.price(whole, replace(self.launch, threads=0), self.architecture)
        other = self.profile.backend != "cpu" and needs.backends == ("CPU",)
        basis = f"KV cache and compute buffers as llama.cpp's {' and '.join(needs.backends)} backend allocates them"
        if other:
            basis += f" (this build has no {self.profile.backend} backend; its compute buffers may differ)"
        return make_budget(
            self.profile,
            kv_bytes=needs.kv_bytes,
            compute_bytes=needs.compute_bytes,
            runtime_bytes=needs.runtime_bytes,
            memory_bytes=self.settings.memory_bytes,
            file_limit_bytes=self.settings.file_bytes,
            basis=basis,
        )

    # -- measure -----------------------------------------------------------------------------------

    @cached_property
    def texts(self) -> list[TextFile]:
        """Calibration and held-out text."""
        if self.settings.evaluation_texts:
            chosen = parse_texts(self.settings.texts, "calibration") or [
                replace(text, split="calibration") for text in shipped_texts()
            ]
            return chosen + parse_texts(self.settings.evaluation_texts, "held_out")
        return parse_texts(self.settings.texts) or shipped_texts()

    def _text_arguments(self, split: str, tokens: int) -> dict[str, Any]:
        return {
            "texts": [text.to_json() for text in self.texts],
            "split": split,
            "window": self.settings.window,
            "most_tokens": tokens,
        }

    @cached_property
    def statistics(self) -> Statistics:
        """One pass over the calibration text, or what an earlier run left of it."""
        made_from = {
            "model": self.fingerprint,
            "text": texts_digest(self.texts),
            "tokens": self.settings.calibration_tokens,
            "window": self.settings.window,
        }
        path = self.folder.statistics
        if path.is_file():
            with contextlib.suppress(BadFile):
                found = Statistics.load(path)
                if found.made_from == made_from:
                    return found
                self._changed("calibration", found.made_from, made_from)
        arguments = self._text_arguments("calibration", self.settings.calibration_tokens)
        del arguments["split"]
        # The output product of a tied model multiplies with the embedding matrix.
        weights = [tensor.name for tensor in self.architecture.tensors if tensor.quantisable]
        with self.listener.progress("calibrate") as progress:
            child.call(
                "edgeprune.measure.tasks:collect",
                {
                    "model": str(self.source),
                    "output": str(path),
                    "weights": weights,
                    "experts": self.architecture.experts,
                    "arch": self.architecture.arch,
                    "made_from": made_from,
                    **arguments,
                },
                progress,
            )
        measured = Statistics.load(path)
        self._check_layers(measured)
        write_imatrix(measured, self.folder.imatrix)
        return measured

    def _check_layers(self, measured: Statistics) -> None:
        unseen = [layer for layer in self.architecture.moe_layers if layer not in measured.layers]
        if unseen and not self.architecture.obstacle:
            raise EdgepruneError(f"llama.cpp's graph showed no routing in layer {unseen[0]} of {self.source}")

    def _reference(self, split: str, tokens: int) -> Path:
        """The source's log-probabilities over the ``split``, kept in the scratch folder."""
        arguments = self._text_arguments(split, tokens)
        key = digest({"model": self.fingerprint, "text": texts_digest(self.texts), **arguments})
        path = self.folder.scratch / f"{split}-{key[:16]}.logprobs"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            with self.listener.progress(f"reference ({split.replace('_', '-')} text)") as progress:
                child.call(
                    "edgeprune.measure.tasks:reference",
                    {"model": str(self.source), "output": str(path), **arguments},
                    progress,
                )
        return path

    @cached_property
    def sensitivity(self) -> Sensitivity:
        """Distortion of every tensor, cost of every error, cost of every number of experts."""
        made_from = {
            "model": self.fingerprint,
            "statistics": digest(self.statistics.made_from),
            "tokens": self.settings.sensitivity_tokens,
        }
        found: Sensitivity | None = None
        if self.folder.sensitivity.is_file():
            with contextlib.suppress(BadFile, KeyError, TypeError):
                found = Sensitivity.from_json(read_json(self.folder.sensitivity))
                if found.made_from != made_from:
                    self._changed("sensitivity", found.made_from, made_from)
                    found = None
        if found is None:
            found = Sensitivity(self._responses(), self._distortions(), {}, made_from)
            write_text(self.folder.sensitivity, to_json(found.to_json()))
        return found

    def _distortions(self) -> dict[str, dict[str, list[float]]]:
        with self.listener.progress("distortion of each type") as progress:
            measured: dict[str, dict[str, list[float]]] = child.call(
                "edgeprune.measure.distortion:measure",
                {"model": str(self.source), "statistics": str(self.folder.statistics)},
                progress,
            )
        return measured

    def _responses(self) -> dict[str, Any]:
        reference = self._reference("calibration", self.settings.sensitivity_tokens)
        sites = sites_to_measure(self.architecture)
        with self.listener.progress("sensitivity of each tensor") as progress:
            costs = child.call(
                "edgeprune.measure.tasks:disturb",
                {
                    "model": str(self.source),
                    "reference": str(reference),
                    "sites": site_settings(sites),
                    **self._text_arguments("calibration", self.settings.sensitivity_tokens),
                },
                progress,
            )
        return responses(self.architecture, sites, costs)

    def drop_nats(self, counts: Sequence[int]) -> dict[int, float]:
        """Nats per token of keeping each of ``counts`` experts, measured by masking the router."""
        method = self.settings.method
        known = dict(self.sensitivity.drops.get(method, {}))
        known[self.architecture.experts] = 0.0
        missing = [kept for kept in counts if kept not in known]
        if missing:
            ranked = rankings(self.statistics, self.architecture, method)
            masks = [
                {str(layer): list(ids) for layer, ids in keep_set(ranked, self.architecture, kept).items()}
                for kept in missing
            ]
            measured = self.divergence(
                self.source, "calibration", self.settings.sensitivity_tokens, masks, "dropping experts"
            )
            known.update({k: row["all"]["kl_mean"] for k, row in zip(missing, measured, strict=True)})
            self.sensitivity.drops[method] = known
            write_text(self.folder.sensitivity, to_json(self.sensitivity.to_json()))
        return known

    def divergence(
        self,
        model: Path,
        split: str,
        tokens: int,
        masks: Sequence[Mapping[str, Sequence[int]] | None] = (None,),
        title: str = "quality",
    ) -> list[dict[str, Any]]:
        """Quality of ``model`` against the source over the ``split``, once for each router mask."""
        reference = self._reference(split, tokens)
        with self.listener.progress(title) as progress:
            result: list[dict[str, Any]] = child.call(
                "edgeprune.measure.tasks:divergence",
                {
                    "model": str(model),
                    "reference": str(reference),
                    "masks": list(masks),
                    "experts": self.architecture.experts,
                    **self._text_arguments(split, tokens),
                },
                progress,
            )
        return result

    # -- decide ------------------------------------------------------------------------------------

    def _counts(self) -> list[int]:
        keep = self.settings.keep
        if keep is None:
            return list(self.architecture.allowed_counts())
        if not self.architecture.count_allowed(keep):
            reason = self.architecture.obstacle or (
                f"the router uses {self.architecture.used} of {self.architecture.experts} experts"
                f" in {self.architecture.groups} group(s)"
            )
            raise UsageError(f"--keep {keep} is not possible: {reason}")
        return [keep]

    def _made_from(self) -> dict[str, Any]:
        profile = self.profile
        local = self.settings.device in (None, "auto")
        return {
            "source": self.fingerprint,
            "statistics": digest(self.statistics.made_from),
            "sensitivity": digest(self.sensitivity.made_from),
            # The free memory and bandwidth of this machine vary from run to run.
            "device": digest(profile.ram.total_bytes if local else profile.to_json()),
            "memory": self.settings.memory_bytes,
            "file_size": self.settings.file_bytes,
            "context": self.launch.context,
            "kv_type": self.launch.kv_type,
            "keep": self.settings.keep,
            "types": sorted(self.settings.types),
            "method": self.settings.method,
        }

    def problem(self, counts: Sequence[int]) -> Problem:
        """Everything that candidates are chosen from."""
        return Problem(
            file=self.file,
            architecture=self.architecture,
            sensitivity=self.sensitivity,
            ranked=rankings(self.statistics, self.architecture, self.settings.method)
            if len(counts) > 1 or counts[0] != self.architecture.experts
            else {},
            drop_nats=self.drop_nats(counts),
            types=allowed_types(self.profile, self.settings.types),
            budget=self.budget,
            profile=self.profile,
            launch=self.launch,
            method=self.settings.method,
            made_from=self._made_from(),
        )

    def candidates(self) -> list[Candidate]:
        """The best plan for each allowed number of experts, best first.

        Raises:
            DoesNotFit: no plan fits.
        """
        self._fail_early()
        counts = self._counts()
        problem = self.problem(counts)
        with self.listener.progress("solve") as progress:
            return candidates(problem, counts, forced_types=bool(self.settings.types), progress=progress)

    def _fail_early(self) -> None:
        """Refuse a budget without room for any weights before anything is measured.

        Raises:
            DoesNotFit: the pools are used up before the first weight.
        """
        if self.budget.weights_bytes <= 0:
            raise DoesNotFit(
                f"{self.architecture.name} does not fit {self.profile.name}: nothing is left for weights",
                rows=self.budget.rows(),
                hint="shorten the context with --context, or choose a quantised cache with --kv-type q8_0",
            )

    def plan(self) -> Plan:
        """The plan in the folder if it is still right, else the best candidate, saved."""
        self._fail_early()
        made_from = self._made_from()
        if self.folder.plan.is_file():
            found = Plan.load(self.folder.plan)
            if found.made_from == made_from:
                return self._obeyed(found)
            self._changed("plan", found.made_from, made_from)
        found_candidates = self.candidates()
        self._save_curve(found_candidates)
        best = found_candidates[0].plan
        best.save(self.folder.plan)
        return best

    def _save_curve(self, found: Sequence[Candidate]) -> None:
        rows = [
            {
                "kept": c.plan.kept,
                "file_bytes": c.plan.predicted.file_bytes,
                "nats": c.plan.predicted.nats,
                "nats_drop": c.plan.predicted.nats_drop,
                "nats_quant": c.plan.predicted.nats_quant,
                "decode_per_s": c.plan.predicted.decode_per_s,
            }
            for c in found
        ]
        write_text(self.folder.path / "candidates.json", to_json(rows))

    def _obeyed(self, plan: Plan) -> Plan:
        """A loaded plan, priced anew if a person has edited it."""
        plan.check(self.architecture)
        stored = read_json(self.folder.plan).get("digest")
        if stored == plan.digest:
            return plan
        self.listener.say("plan.json was edited by hand; it is obeyed, and its predictions are made anew")
        return self.repriced(plan)

    def repriced(self, plan: Plan) -> Plan:
        """``plan`` with predictions made from its kept experts and types.

        Raises:
            DoesNotFit: it exceeds the budget.
        """
        known = {**self.sensitivity.drops.get(plan.method, {}), plan.experts: 0.0}
        if plan.kept not in known:
            known[plan.kept] = 0.0
        problem = replace(self.problem([plan.experts]), drop_nats=known)
        changed = {name: kind for name, kind in plan.types.items() if kind != self.architecture.tensor(name).type}
        measured = self.sensitivity.distortions
        costed = {name: kind for name, kind in changed.items() if kind in measured.get(name, {})}
        if costed != changed:
            name = next(iter(changed.keys() - costed.keys()))
            raise BadFile(f"the plan gives {name} {changed[name]}, which is no smaller than what it has")
        edited = replace(plan, types=changed)
        made = layout(self.file, self.architecture, plan.kept, changed, edited.records())
        whole = priced(replace(problem, ranked=self._ranked_like(plan)), plan.kept, changed)
        if whole is None:
            raise DoesNotFit(
                f"the plan needs a file of {format_bytes(made.nbytes)}, more than the budget allows",
                rows=self.budget.rows(),
            )
        return replace(edited, launch=whole.plan.launch, predicted=whole.plan.predicted)

    def _ranked_like(self, plan: Plan) -> dict[int, Any]:
        """A ranking that leads to the plan's own kept experts."""
        import numpy as np

        ranked = {}
        for layer, ids in plan.keep.items():
            rest = [expert for expert in range(plan.experts) if expert not in set(ids)]
            ranked[layer] = np.array([*ids, *rest])
        return ranked

    # -- build -------------------------------------------------------------------------------------

    def build(self, plan: Plan) -> Build:
        """The planned file, or the one in the folder if it is exactly that."""
        output = self.folder.path / describe(self.architecture, plan)
        found = self._built(output, plan)
        if found is not None:
            return found
        with self.listener.progress("build") as progress:
            value = child.call(
                "edgeprune.build.builder:build",
                {
                    "model": str(self.source),
                    "plan": plan.to_json(),
                    "output": str(output),
                    "statistics": str(self.folder.statistics) if plan.types else "",
                },
                progress,
            )
        for other in self.folder.path.glob("*bpw.gguf"):
            if other != output and GgufFile(other).get("edgeprune.plan_digest"):
                other.unlink()
        return Build(**value)

    def _built(self, output: Path, plan: Plan) -> Build | None:
        if not output.is_file() or output.stat().st_size != plan.predicted.file_bytes:
            return None
        with contextlib.suppress(EdgepruneError):
            if GgufFile(output).get("edgeprune.plan_digest") == plan.digest:
                return Build(str(output), output.stat().st_size, file_digest(output), plan.digest)
        return None

    # -- prove -------------------------------------------------------------------------------------

    def baselines(self, plan: Plan) -> list[tuple[Baseline, dict[str, str]]]:
        """Stock presets of at most the plan's bytes, built with the same imatrix and measured.

        Returns:
            each with the GGML type that it gives every tensor.
        """
        statistics = str(self.folder.statistics)
        sizes = child.call("edgeprune.build.preset:sizes", {"model": str(self.source), "statistics": statistics})
        limit = plan.predicted.file_bytes
        names = baseline.contenders(sizes, limit, self.file.data_offset)
        self.folder.scratch.mkdir(parents=True, exist_ok=True)
        results = []
        for name in names:
            path = self.folder.scratch / f"{name}.gguf"
            with self.listener.progress(f"stock preset {name}") as progress:
                made = child.call(
                    "edgeprune.build.preset:quantize",
                    {
                        "model": str(self.source),
                        "output": str(path),
                        "preset": name,
                        "statistics": statistics,
                    },
                    progress,
                )
            if made["nbytes"] <= limit:
                quality = self.quality(path, f"quality of {name}")
                results.append((Baseline(name, made["nbytes"], quality["all"]), made["types"]))
            path.unlink(missing_ok=True)
        return results

    def quality(self, model: Path, title: str) -> dict[str, Any]:
        """``{"all": ..., "domains": ...}`` of ``model`` against the source on the held-out text."""
        return self.divergence(model, "held_out", self.settings.evaluation_tokens, title=title)[0]

    def verify(self, plan: Plan, build: Build) -> Report:
        """Measure the build, hold the flat presets against it, ship the better, write the report."""
        measured = self.quality(Path(build.path), "quality of the plan")
        rivals = self.baselines(plan) if self.settings.baselines else []
        shipped = "plan"
        winner = min(rivals, key=lambda pair: pair[0].quality["kl_mean"], default=None)
        if winner is not None and winner[0].quality["kl_mean"] < measured["all"]["kl_mean"]:
            flat = self._as_plan(plan, *winner)
            if flat is not None:
                shipped, plan = winner[0].preset, flat
                plan.save(self.folder.plan)
                build = self.build(plan)
                measured = self.quality(Path(build.path), "quality of the shipped preset")
        speed = self.speed(plan, build)
        report = self._report(plan, build, measured, [rival for rival, _ in rivals], shipped, speed)
        self.save_report(report)
        return report

    def _as_plan(self, plan: Plan, rival: Baseline, types: Mapping[str, str]) -> Plan | None:
        """The preset as a plan of ours, or None if its bytes and our records exceed the limit."""
        own = {tensor.name: tensor.type for tensor in self.architecture.tensors}
        changed = {name: kind for name, kind in types.items() if own[name] != kind}
        flat = replace(
            plan,
            kept=plan.experts,
            keep={},
            types=changed,
            method="all experts kept",
            origin=f"stock preset {rival.preset}",
        )
        with contextlib.suppress(DoesNotFit, BadFile):
            return self.repriced(flat)
        return None

    def speed(self, plan: Plan, build: Build) -> dict[str, Any]:
        """Prefill and decode speed and peak memory with the plan's launch settings, on this machine."""
        context = plan.launch.context
        generated = min(48, max(1, context // 8))
        prompt = max(1, min(512, context - generated - 1))
        with self.listener.progress("speed and memory"):
            value: dict[str, Any] = child.call(
                "edgeprune.measure.tasks:benchmark",
                {
                    "model": build.path,
                    "launch": replace(plan.launch, threads=0).to_json(),
                    "prompt_tokens": prompt,
                    "generated_tokens": generated,
                },
            )
        return value

    def _report(
        self,
        plan: Plan,
        build: Build,
        measured: Mapping[str, Any],
        rivals: list[Baseline],
        shipped: str,
        speed: Mapping[str, Any],
    ) -> Report:
        on_device = self.settings.device in (None, "auto")
        lines = promises(
            plan.to_json(), build.nbytes, measured["all"], speed, self.budget.to_json(), on_device=on_device
        )
        from edgeprune.decide.scores import SCORES

        score = SCORES[self.settings.method]
        importance = {
            str(layer): [float(value) for value in score(sums, layer)]
            for layer, sums in self.statistics.layers.items()
        }
        curve_path = self.folder.path / "candidates.json"
        report = Report(
            title=f"{self.architecture.name} on {self.profile.name}",
            verdict="",
            shipped=shipped,
            promises=lines,
            quality=dict(measured["all"]),
            domains=dict(measured["domains"]),
            baselines=rivals,
            budget=self.budget.to_json(),
            plan=plan.to_json(),
            folded=folded(plan, self.architecture),
            curve=read_json(curve_path) if curve_path.is_file() else [],
            importance=importance,
            build={**build.to_json(), "path": Path(build.path).name},
            source={
                "name": self.architecture.name,
                "nbytes": self.file.size,
                "arch": self.architecture.arch,
                "layers": self.architecture.layers,
                "experts": self.architecture.experts,
                "used": self.architecture.used,
                "parameters": self.architecture.parameters,
            },
            launch_line=plan.launch.command(Path(build.path).name),
            conditions=self._conditions(on_device, speed),
            made_from={"plan": plan.digest, "build": build.sha256, "text": texts_digest(self.texts)},
        )
        return replace(report, verdict=_verdict(report))

    def _conditions(self, on_device: bool, speed: Mapping[str, Any]) -> dict[str, str]:
        from importlib.metadata import version

        tokens = f"{self.settings.evaluation_tokens:,} tokens at most, windows of {self.settings.window}"
        where = "this device" if on_device else f"another machine than {self.profile.name}"
        return {
            "measured on": f"{platform.system()} {platform.machine()}, {where}",
            "edgeprune": __version__,
            "llama-cpp-python": version("llama-cpp-python"),
            "held-out text": tokens,
            "calibration text": f"{self.statistics.tokens:,} tokens in {len(self.statistics.domains)} domains",
            "speed": "median of 3 repeats",
        }

    def save_report(self, report: Report) -> None:
        """Write report.json, report.html and the model card."""
        write_text(self.folder.report, to_json(report.to_json()))
        write_text(self.folder.page, render(report))
        write_text(self.folder.card, model_card(report))

    def clear_scratch(self) -> None:
        """Delete the reference log-probabilities; they can be made again."""
        for path in self.folder.scratch.glob("*"):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.scratch.rmdir()


def _verdict(report: Report) -> str:
    """One line that says what was reached."""
    if report.broken:
        return "A promise was broken: " + ", ".join(promise.name for promise in report.broken)
    kl = report.quality["kl_mean"]
    moved = (
        "bit for bit the source's weights"
        if not report.plan["types"] and not report.plan["keep"]
        else (f"{kl:.4g} nats per token from the source")
    )
    if not report.baselines:
        beside = "no stock preset is this small" if report.plan["types"] else "no stock preset was measured"
        return f"All promises kept; {moved}; {beside}."
    best = min(report.baselines, key=lambda rival: float(rival.quality["kl_mean"]))
    if report.shipped != "plan":
        return f"All promises kept; {moved}; the stock preset {best.preset} was best and is shipped."
    ratio = kl / best.quality["kl_mean"] if best.quality["kl_mean"] else 1.0
    return f"All promises kept; {moved}, {ratio:.2f} of the best stock preset of at most this size ({best.preset})."


@contextlib.contextmanager
def opened(settings: Settings, listener: Listener) -> Iterator[Run]:
    """A run whose folder is locked for the time of the block."""
    run = Run(settings, listener)
    with run.folder.locked():
        yield run


def fit(settings: Settings, listener: Listener) -> tuple[Report, Path]:
    """The main job: source, measure, decide, build, prove; the report and the folder.

    Raises:
        DoesNotFit: no plan meets the budget.
        BrokenPromise: the built file is not what was promised; the report is written all the same.
        EdgepruneError: whatever is wrong with the input or the machine.
    """
    settings.check()
    with opened(settings, listener) as run:
        plan = run.plan()
        build = run.build(plan)
        report = run.verify(plan, build)
        run.clear_scratch()
        raise_if_broken(report, run.folder.page)
        return report, run.folder.path


def raise_if_broken(report: Report, page: Path) -> None:
    """Raise for a report with a broken promise.

    Raises:
        BrokenPromise: lists the broken lines.
    """
    if report.broken:
        raise BrokenPromise(
            f"{report.title}: {len(report.broken)} promise(s) broken",
            rows=[(p.name, f"predicted {p.predicted}, measured {p.measured}") for p in report.broken],
            hint=f"see {page}",
        )
