"""The proof: quality, memory and speed of the built file, and the stock presets beside it."""

from __future__ import annotations

import contextlib
import math
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from edgeprune import __version__
from edgeprune.build.builder import Build
from edgeprune.decide.plan import DROP, PRESET, SOLVER, Plan, folded
from edgeprune.device.machine import AUTO
from edgeprune.errors import BadFile, DoesNotFit, EdgepruneError
from edgeprune.files import digest, file_digest, read_json, to_json, write_text
from edgeprune.measure import child
from edgeprune.measure.cost import LARGE, SMALL
from edgeprune.measure.launch import Launch, generated_tokens, prompt_tokens
from edgeprune.measure.sensitivity import RIPPLES
from edgeprune.measure.text import HELD_OUT, REPORTING
from edgeprune.model.ggml import tensor_bytes
from edgeprune.model.headers import DEFAULT_ALIGNMENT, align
from edgeprune.model.tokenizer import DIFFERENCES_KEY
from edgeprune.prove import baseline
from edgeprune.prove.comparison import Comparison
from edgeprune.prove.deeper import NOTHING
from edgeprune.prove.page import render
from edgeprune.prove.provenance import UNKNOWN, Provenance
from edgeprune.prove.report import EVALUATION, KEPT, Baseline, Report, disturbance, nats_in_words, promises
from edgeprune.share.card import Sheet, model_card
from edgeprune.share.origin import Origin
from edgeprune.stages.choosing import ChooseStages
from edgeprune.stages.comparing import saved

# Context of the speed measurement when the device is another machine.
_FOREIGN_CONTEXT = 2048


@dataclass
class Run(ChooseStages):
    """All stages of one run; the last of them is the proof."""

    def baselines(self, plan: Plan, *, choosing: bool) -> list[tuple[Baseline, dict[str, str]]]:
        """Stock presets of at most the plan's bytes, built with the same imatrix and measured.

        Args:
            choosing: whether one of them may be shipped.

        Returns:
            each with the GGML type that it gives every tensor.
        """
        statistics = self.statistics_file
        sizes = child.call("edgeprune.build.preset:sizes", {"model": str(self.source), "statistics": statistics})
        limit = plan.predicted.file_bytes
        # llama-quantize keeps blocks that predict further tokens; where the plan leaves them out they do not count.
        gone = self.architecture.left_out
        share = sum(tensor.nbytes for tensor in gone) / (self.architecture.nbytes + sum(t.nbytes for t in gone))
        sizes = {name: int(nbytes * (1 - share)) for name, nbytes in sizes.items()}
        names = baseline.contenders(sizes, limit, self.file.data_offset)
        self.folder.scratch.mkdir(parents=True, exist_ok=True)
        results: list[tuple[Baseline, dict[str, str]]] = []
        for name in names:
            if len(results) == baseline.MEASURED:
                break
            path = self.folder.scratch / f"{name}.gguf"
            try:
                with self.listener.progress(f"stock preset {name}") as progress:
                    made = child.call(
                        "edgeprune.build.preset:quantize",
                        {
                            "model": str(self.source),
                            "output": str(path),
                            "preset": name,
                            "statistics": statistics,
                            "expected_bytes": int(sizes[name] / (1 - share)),
                        },
                        progress,
                    )
            except EdgepruneError as error:  # the plan is built and proven; a missing rival is no reason to lose it
                self.listener.say(f"stock preset {name} is left out: {error.cause}")
                continue
            # Presets that differ in name alone, as some do for small models, are one.
            made["nbytes"] -= sum(
                align(tensor_bytes(made["types"][tensor.name], tensor.shape), DEFAULT_ALIGNMENT) for tensor in gone
            )
            if made["nbytes"] <= limit and all(made["types"] != types for _, types in results):
                nats = self.nats_to_choose(path, f"{name}, to choose") if choosing else None
                quality = self.quality(path, f"quality of {name}", REPORTING)
                results.append((Baseline(name, made["nbytes"], quality["all"], nats), made["types"]))
            path.unlink(missing_ok=True)
        return results

    def quality(self, model: Path, title: str, part: str = HELD_OUT) -> dict[str, Any]:
        """``{"all": ..., "domains": ...}`` of ``model`` against the source on a part of the held-out text."""
        return self.divergence(model, part, title=title)[0]

    def verify(self, plan: Plan, build: Build) -> Report:
        """Measure the build, hold the flat presets against it, ship the better, write the report.

        One half of the held-out text says which is the better, the other what the report says of it.
        """
        free = plan.origin == SOLVER and self.settings.keep is None and not self.settings.types and not self.width
        rivals = self.baselines(plan, choosing=free) if self.settings.baselines else []
        if free and rivals:
            winner = min(rivals, key=lambda pair: _nats(pair[0]))
            own = self.nats_to_choose(Path(build.path), "the plan, to choose")
            # "not <": a divergence that is not a number loses against any preset.
            flat = self._as_plan(plan, *winner) if not own <= _nats(winner[0]) else None
            if flat is not None:
                plan = flat
                build = self.build(plan)
                plan.save(self.folder.plan)
        measured = self.quality(Path(build.path), "quality of what is shipped", REPORTING)
        if measured["undivided"]:
            self.listener.say(f"held-out text {_apart(measured)}; a longer text, or --eval-text, has two halves")
        shipped = plan.origin.removeprefix(PRESET) if plan.origin.startswith(PRESET) else "plan"
        bad = self.not_finite(Path(build.path), "look for NaN in what is shipped")
        speed = self.speed(plan, build)
        report = self._report(plan, build, measured, [rival for rival, _ in rivals], shipped, speed, bad)
        self.save_report(report)
        return report

    def _as_plan(self, plan: Plan, rival: Baseline, types: Mapping[str, str]) -> Plan | None:
        """The preset as a plan of ours, or None if its bytes and our records exceed the limit."""
        own = {tensor.name: tensor.type for tensor in self.architecture.tensors}
        changed = {name: kind for name, kind in types.items() if own.get(name, kind) != kind}
        flat = replace(
            plan,
            kept=plan.experts,
            keep={},
            types=changed,
            method="all experts kept",
            origin=f"{PRESET}{rival.preset}",
            heal=False,
            train=False,
            reduce=DROP,
            merge={},
            width=0,
            narrowing="",
            channels="",
        )
        with contextlib.suppress(DoesNotFit, BadFile):
            flat.check(self.architecture)
            return self.repriced(flat, placed=False)
        return None

    def launch_here(self, launch: Launch) -> Launch:
        """The plan's settings for a measurement on this machine, which may not have the memory of the device."""
        foreign = self.settings.device not in (None, "auto")
        context = min(launch.context, _FOREIGN_CONTEXT) if foreign else launch.context
        return replace(launch, threads=0, context=context)

    def speed(self, plan: Plan, build: Build) -> dict[str, Any]:
        """Prefill and decode speed and peak memory with the plan's launch settings, on this machine."""
        launch = self.launch_here(plan.launch)
        with self.listener.progress("speed and memory"):
            value: dict[str, Any] = child.call(
                "edgeprune.measure.benchmark:benchmark",
                {
                    "model": build.path,
                    "launch": launch.to_json(),
                    "prompt_tokens": prompt_tokens(launch.context),
                    "generated_tokens": generated_tokens(launch.context),
                },
                as_user=True,
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
        not_finite: str,
    ) -> Report:
        on_device = self.settings.device in (None, AUTO)
        lines = promises(
            plan.to_json(),
            build.nbytes,
            measured["all"],
            speed,
            self.budget.to_json(),
            on_device=on_device,
            not_finite=not_finite,
        )

        importance = {
            str(layer): [float(value) for value in sums.total("gated_square")]
            for layer, sums in self.statistics.layers.items()
        }
        known = self._known_of(build)
        report = Report(
            title=f"{self.architecture.name} for {self.profile.name}",
            verdict="",
            shipped=shipped,
            promises=lines,
            quality=dict(measured["all"]),
            domains=dict(measured["domains"]),
            baselines=rivals,
            budget=self.budget.to_json(),
            plan=plan.to_json(),
            folded=folded(plan, self.architecture),
            types=[(t.name, plan.types.get(t.name, t.type)) for t in self.architecture.tensors if t.quantisable],
            curve=self._curve(plan),
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
                "tokenizer_differences": [str(line) for line in self.file.get(DIFFERENCES_KEY, [])],
            },
            launch_line=plan.launch.command(Path(build.path).name),
            conditions=self._conditions(plan, on_device, speed, measured),
            made_from={
                "plan": plan.digest,
                "build": build.sha256,
                "text": self.text_digest,
                EVALUATION: digest(self.measured_on(REPORTING)),
            },
            deeper=known.deeper if known else NOTHING,
            provenance=self._provenance(plan, build, speed, known),
        )
        return replace(report, verdict=verdict_of(report)).beside(saved(self))

    def _known_of(self, build: Build) -> Report | None:
        """The last report in the folder, if it is of the same file."""
        with contextlib.suppress(BadFile, AttributeError, TypeError, KeyError):
            known = Report.from_json(read_json(self.folder.report))
            if known.made_from["build"] == build.sha256:
                return known
        return None

    def _provenance(self, plan: Plan, build: Build, speed: Mapping[str, Any], known: Report | None) -> Provenance:
        """Commands, digests and versions."""
        made_from = plan.made_from
        inputs = {"source": self.fingerprint}
        inputs |= {f"text {text.domain}": file_digest(Path(text.path)) for text in self.texts}
        settings = {"statistics": "settings of the statistics", "sensitivity": "settings of the sensitivities"}
        inputs |= {name: made_from[key] for key, name in settings.items() if made_from.get(key)}
        inputs |= {"device": made_from["device"]} if made_from.get("device") else {}
        outputs = {Path(build.path).name: build.sha256}  # a model of 20 GB is not read for this again
        for path in (self.folder.plan, self.folder.imatrix):
            if path.is_file():
                outputs[path.name] = file_digest(path)
        libraries = ("llama-cpp-python", "gguf", "numpy", "scipy", "torch", "transformers")
        versions = {"edgeprune": __version__, **{name: version(name) for name in libraries}}
        versions |= {"ggml": str(speed["ggml"]), "Python": platform.python_version()}
        versions |= {"system": platform.platform(), "processors": "; ".join(speed["processors"])}
        commands = (known.provenance if known else UNKNOWN).after(self.settings.command)
        return Provenance(commands, inputs, outputs, versions)

    def _healing(self, plan: Plan) -> str:
        """What healing did to the layers' outputs, in a line; "" where there was none."""
        if not plan.heal:
            return ""
        found = [own for own in read_json(self.folder.healing).values() if "ridge" in own]
        if not found:
            return "no layer could be healed"
        before, after = (sum(own[name] for own in found) / len(found) for name in ("before", "after"))
        fitted = sum(own["ridge"] is not None for own in found)
        return (
            f"{fitted} of {len(found)} layers fitted anew; squared error of a layer's answer {before:.3g} before, "
            f"{after:.3g} after, of its energy"
        )

    def _conditions(
        self, plan: Plan, on_device: bool, speed: Mapping[str, Any], measured: Mapping[str, Any]
    ) -> dict[str, str]:
        tokens = f"{measured['all']['tokens']:,} tokens in windows of at most {self.settings.window}"
        tokens += f"; {_apart(measured)}"
        where = "" if on_device else f", another machine than {self.profile.name}"
        where = ", the device itself" if self.settings.device == AUTO else where
        return {
            "measured on": f"{platform.system()} {platform.machine()}{where}",
            "held-out text": tokens,
            "calibration text": f"{self.statistics.tokens:,} tokens in {len(self.statistics.domains)} domains",
            "speed": "; ".join(part for part in ("median of 3 repeats", disturbance(speed["others"])) if part),
            **self._additivity(plan),
            **({"training": trained} if (trained := self.training_in_words(plan)) else {}),
            **({"healing": healed} if (healed := self._healing(plan)) else {}),
            "memory": f"predicted for {plan.launch.context:,} tokens of context, measured with "
            f"{speed['filled_tokens']:,} in a context of {speed['context']:,}",
        }

    def _curve(self, plan: Plan) -> list[dict[str, Any]]:
        """The candidates, with nats per token of those whose file was built and measured to choose from."""
        path, measured = self.folder.path / "candidates.json", self.tried_nats(plan)
        rows: list[dict[str, Any]] = read_json(path) if path.is_file() else []
        places = [(row["kept"], row.get("width", 0)) for row in rows]
        return [
            {**row, "measured": measured[place]} if measured.get(place) is not None else row
            for row, place in zip(rows, places, strict=True)
        ]

    def _additivity(self, plan: Plan) -> dict[str, str]:
        """How far errors add up, which the prediction reckons with; nothing where no type was chosen by it."""
        known = self.sensitivity if plan.types and self.folder.sensitivity.is_file() else None
        if known is None or known.additivity is None:
            return {}
        power = f"{known.linearity:.2f} (median)" if known.linearity is not None else "unknown"
        return {
            "prediction": f"squared errors of {RIPPLES[-1]:.0%} in all products at once cost {known.additivity:.2f} "
            f"of the sum of what they cost one by one; any change costs {known.unrest:.1e} nats per token; from "
            f"squared errors of {SMALL:.0%} to {LARGE:.0%}, cost grows with their power {power}"
            + (self._mended() if plan.heal else "")
        }

    def _mended(self) -> str:
        """What the trial of healing found."""
        shares = [own.many for by_type in self.sensitivity.mended.values() for own in by_type.values()]
        if not shares:
            return ""
        return (
            f"; healed for a trial, experts kept {min(shares):.2f} to {max(shares):.2f} of the error at their output "
            "that coarser gate and up projections made"
        )

    def save_report(self, report: Report) -> None:
        """Write report.json, report.html and the model card."""
        write_text(self.folder.report, to_json(report.to_json()))
        write_text(self.folder.page, render(report))
        write_text(self.folder.card, model_card([Sheet(report)], Origin()))

    def show(self, comparison: Comparison) -> None:
        """Put ``comparison`` into the report in the folder, if there is one of the same model and text."""
        with contextlib.suppress(BadFile, AttributeError, TypeError, KeyError):
            report = Report.from_json(read_json(self.folder.report)).beside(comparison)
            if report.comparison is not None:
                self.save_report(report)
                self.listener.say(f"{self.folder.page} shows it too")

    def clear_scratch(self) -> None:
        """Delete what can be made again: reference log-probabilities, tokens kept for healing, halves of sweeps."""
        shutil.rmtree(self.folder.scratch, ignore_errors=True)


def _apart(measured: Mapping[str, Any]) -> str:
    """What of the reported text was used to choose a file, in words."""
    undivided, domains = measured["undivided"], measured["domains"]
    if not undivided:
        return "nothing was chosen with them"
    names = "all domains" if len(undivided) == len(domains) else ", ".join(undivided)
    return f"too short for two halves ({names}), so that a file was chosen and is reported on the same tokens"


def _nats(rival: Baseline) -> float:
    """What the preset is chosen by."""
    nats = rival.chosen_by
    return nats if nats is not None and math.isfinite(nats) else math.inf


def verdict_of(report: Report) -> str:
    """One line that says what was reached."""
    if report.broken:
        return "A promise was broken: " + ", ".join(promise.name for promise in report.broken)
    kl = report.quality["kl_mean"]
    unchanged = not (report.plan["types"] or report.plan["keep"] or report.plan.get("width"))
    moved = (
        "bit for bit the source's weights" if unchanged else (f"{nats_in_words(kl)} nats per token from the source")
    )
    kept = "All promises kept" if any(line.verdict == KEPT for line in report.promises) else "Measured"
    if not report.baselines:
        return f"{kept}; {moved}; no stock preset of at most this size was measured."
    if unchanged:
        rounding = f"the rounding of the measurement is {nats_in_words(kl)} nats"
        return f"{kept}; {moved}: nothing had to be dropped or quantised; {rounding}."
    best = min(report.baselines, key=lambda rival: float(rival.quality["kl_mean"]))
    if report.shipped != "plan":
        return f"{kept}; {moved}; the stock preset {report.shipped} was best and is shipped."
    flat = float(best.quality["kl_mean"])
    beside = f"{kl / flat:.2f} of the best stock preset of at most this size ({best.preset})" if flat else best.preset
    if kl > flat and best.chosen_by is not None:
        return (
            f"{kept}; {moved}; chosen on other text, while the stock preset {best.preset} is better on this one: "
            f"{nats_in_words(flat)}."
        )
    if kl > flat:
        return f"{kept}; {moved}, as asked; the stock preset {best.preset} would be better: {nats_in_words(flat)}."
    return f"{kept}; {moved}, {beside}."
