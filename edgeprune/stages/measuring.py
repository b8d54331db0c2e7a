"""Everything that is measured before a choice is made."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.decide.evidence import Evidence
from edgeprune.decide.healable import RIVALS
from edgeprune.decide.keep import KeepSet, Order, check_method, check_room, keep_set, protecting, rankings
from edgeprune.decide.protection import super_experts
from edgeprune.decide.scores import HEALABLE, METHODS, NAEE, SCORES
from edgeprune.errors import BadFile, EdgepruneError, NotFinite, Unsupported, UsageError
from edgeprune.files import digest, read_json, to_json, write_text
from edgeprune.measure import child
from edgeprune.measure.merging import merge
from edgeprune.measure.sensitivity import Sensitivity, responses, site_settings, sites_to_measure
from edgeprune.measure.shares import mended
from edgeprune.measure.statistics import Statistics, write_imatrix
from edgeprune.measure.text import CHOOSING, REPORTING, SHORTEST_WINDOW
from edgeprune.measure.weights import LayerWeights, load_weights
from edgeprune.settings import KEEP, LLAMA, TORCH
from edgeprune.stages.texts import TextStages

WEIGHTS_ALONE = "aimer"  # the score that needs no text

# The largest layers whose subsets are all tried.
MOST_ENUMERATED = 16
# The score of layers that cannot be replayed.
FALLBACK = "reap"
# Raised when a measurement changes its meaning, so that saved ones are made again.
FORMAT = 8
# What the halves of the held-out text do.
_HALVES = {CHOOSING: " that chooses", REPORTING: " that reports"}


def tools(engine: str = LLAMA) -> str:
    """What the measurements were made with."""
    if engine == TORCH:
        return f"format {FORMAT}, torch {version('torch')}, transformers {version('transformers')}"
    return f"format {FORMAT}, llama-cpp-python {version('llama-cpp-python')}"


@dataclass
class MeasureStages(TextStages):
    """Statistics, sensitivities, and the quality of any file against the source."""

    @cached_property
    def statistics(self) -> Statistics:
        """One pass over the calibration text, or what an earlier run left of it."""
        _ = self.given_texts  # a missing or broken text is found now, before a checkpoint is converted
        path, made_from = self.folder.statistics, self._measured_with(self.settings.engine)
        if path.is_file():
            with contextlib.suppress(BadFile):
                found = Statistics.load(path)
                own = {key: found.made_from.get(key) for key in ("model", "tools")}
                if "merged" in found.made_from and own == {key: made_from[key] for key in own}:
                    self.listener.say(f"using statistics merged from {len(found.made_from['merged'])} files")
                    return self._checked(found)
                if found.made_from == made_from:
                    return self._checked(found)
                self._changed("calibration", found.made_from, made_from)
        self._collect(path, made_from, self.settings.engine)
        self.folder.imatrix.unlink(missing_ok=True)
        return self._checked(Statistics.load(path))

    @cached_property
    def gradients(self) -> Statistics:
        """The same with what only the torch engine measures.

        Raises:
            Unsupported: the source is no checkpoint, or one that the engine cannot run; or the other statistics were
                merged, and would be of another text.
        """
        if self.settings.engine == TORCH:
            return self.statistics
        if merged := self.statistics.made_from.get("merged"):
            raise Unsupported(
                f"the statistics are merged from {len(merged)} files, and gradients would be of another text",
                hint="merge statistics measured with --engine torch, or compare in another folder with -o",
            )
        path, made_from = self.folder.gradients, self._measured_with(TORCH)
        if path.is_file():
            with contextlib.suppress(BadFile):
                found = Statistics.load(path)
                if found.made_from == made_from:
                    return found
                self._changed("gradients", found.made_from, made_from)
        self._collect(path, made_from, TORCH)
        return Statistics.load(path)

    def _measured_with(self, engine: str) -> dict[str, Any]:
        """What statistics are made from."""
        return {
            "model": self.fingerprint,
            "text": self.text_digest,
            "tokens": self.settings.calibration_tokens,
            "window": self.settings.window,
            "reservoir": self.settings.reservoir_tokens,
            "tools": tools(engine),
        }

    def _collect(self, path: Path, made_from: dict[str, Any], engine: str) -> None:
        """Write the statistics that ``engine`` measures to ``path``."""
        task, own = "collect", {"arch": self.architecture.arch}
        if engine == TORCH:
            if self.checkpoint is None:
                raise Unsupported(
                    f"{self.settings.source} is a GGUF: gradients are measured with a Hugging Face checkpoint",
                    hint="give the checkpoint's folder, or choose a method without gradients",
                )
            task, own = "collect_layerwise", {"checkpoint": str(self.checkpoint.resolve())}
        self.require_finite_source()
        arguments = self._text_arguments("calibration")
        del arguments["split"]
        with self.listener.progress("calibrate" if engine != TORCH else "calibrate, forwards and backwards") as bar:
            found = child.call(
                f"edgeprune.measure.calibration:{task}",
                {
                    "model": str(self.source),
                    "output": str(path),
                    "scratch": str(self.folder.scratch),
                    # The output product of a tied model multiplies with the embedding matrix.
                    "weights": [tensor.name for tensor in self.architecture.tensors if tensor.quantisable],
                    "experts": self.architecture.experts,
                    "made_from": made_from,
                    "reservoir_tokens": self.settings.reservoir_tokens,
                    **own,
                    **arguments,
                },
                bar,
            )
        for domain, (documents, of, tokens) in found["left_out"].items():
            self.listener.say(
                f"{documents:,} of {of:,} documents of {domain} are shorter than {SHORTEST_WINDOW} tokens and"
                f" left out ({tokens:,} tokens)"
            )
        if not found["held_out"]:
            self.listener.say("the text leaves none to judge by: give a longer one, or --eval-text")

    def merge(self, files: Sequence[Path]) -> Statistics:
        """Statistics of this model over other texts, joined as if measured in one pass; they become the folder's own.

        Raises:
            UsageError: a file that is not there, or a text that would count twice.
            BadFile: one that is damaged, of another model, or measured with other tools.
        """
        merged: list[str] = []
        for path in files:
            if not path.is_file():
                raise UsageError(f"no statistics {path}", hint="`edgeprune calibrate` makes statistics.safetensors")
            merged += self._merged_from(path, merged)
        made_from = {"model": self.fingerprint, "merged": sorted(merged), "tools": tools(self.settings.engine)}
        left_out = merge(files, self.folder.statistics, made_from, self.settings.reservoir_tokens)
        if left_out:
            self.listener.say(f"not in every file, and left out: {', '.join(left_out)}")
        self.folder.imatrix.unlink(missing_ok=True)
        return self._checked(Statistics.load(self.folder.statistics))

    def _merged_from(self, path: Path, others: Sequence[str]) -> list[str]:
        """Digests of the texts in ``path``: of its own, or those that it was merged from.

        Raises:
            UsageError: one of them is among the ``others``.
            BadFile: they were made with other tools than this engine's.
        """
        made_from = Statistics.load(path).made_from
        its, ours = str(made_from.get("tools")), tools(self.settings.engine)
        if made_from.get("model") == self.fingerprint and its != ours:
            raise BadFile(
                f"{path} was measured with other tools",
                rows=[("its tools", its), ("these tools", ours)],
                hint="measure that text again, or give the --engine that all files were measured with",
            )
        own = [str(one) for one in made_from.get("merged", [made_from.get("text")])]
        if set(own) & set(others):
            raise UsageError(
                f"{path} holds a text that another file holds too: it would count twice",
                hint="give every text once",
            )
        return own

    @property
    def statistics_file(self) -> str:
        """Path of the statistics, measured if need be."""
        _ = self.statistics
        return str(self.folder.statistics)

    def _checked(self, measured: Statistics) -> Statistics:
        """``measured``, with every MoE layer seen and the imatrix beside it."""
        unseen = [layer for layer in self.architecture.moe_layers if layer not in measured.layers]
        if unseen and not self.architecture.obstacle:
            raise EdgepruneError(f"llama.cpp's graph showed no routing in layer {unseen[0]} of {self.source}")
        if not self.folder.imatrix.is_file():
            write_imatrix(measured, self.folder.imatrix)
        return measured

    def _reference(self, part: str) -> Path:
        """The source's log-probabilities over a ``part`` of the text, kept in the scratch folder."""
        arguments = self._text_arguments(part)
        text = self._digest_of(self._texts_for(arguments["split"]))
        key = digest({"model": self.fingerprint, "text": text, **arguments})
        path = self.folder.scratch / f"{part}-{key[:16]}.logprobs"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            name = f"held-out text{_HALVES[part]}" if part in _HALVES else f"{part.replace('_', '-')} text"
            with self.listener.progress(f"reference ({name})") as progress:
                child.call(
                    "edgeprune.measure.tasks:reference",
                    {"model": str(self.source), "output": str(path), **arguments},
                    progress,
                )
        return path

    def not_finite(self, model: Path, title: str) -> str:
        """Name of a tensor of ``model`` that holds NaN or infinity, or "". Every byte of it is read."""
        with self.listener.progress(title) as progress:
            return str(child.call("edgeprune.model.soundness:look", {"model": str(model)}, progress))

    def require_finite_source(self) -> None:
        """Look at the source's values before they are measured with: what it computes may hide those that are none.

        Raises:
            NotFinite: names the tensor.
        """
        if bad := self.not_finite(self.source, "look for NaN in the model"):
            raise NotFinite(
                f"{self.source}: tensor {bad} holds NaN or infinity",
                hint="the file is damaged, or overflowed when it was made; get it again",
            )

    def check_source(self) -> None:
        """Run the source over the held-out text, which the proof needs anyway, before anything is built of it.

        Raises:
            BadFile: it holds, or computes, values that are not finite.
        """
        self.require_finite_source()
        self._reference(REPORTING)

    @cached_property
    def sensitivity(self) -> Sensitivity:
        """Distortion of every tensor, cost of every error, cost of every number of experts."""
        made_from = {
            "model": self.fingerprint,
            "statistics": digest(self.statistics.made_from),
            "tokens": self.settings.sensitivity_tokens,
            "window": self.settings.sensitivity_window,
            **({"mtp": KEEP} if self.settings.mtp == KEEP else {}),
        }
        found: Sensitivity | None = None
        if self.folder.sensitivity.is_file():
            try:
                found = Sensitivity.from_json(read_json(self.folder.sensitivity))
            except BadFile as error:
                self.listener.say(f"the sensitivity is measured anew: {error.cause}")
            if found is not None and found.made_from != made_from:
                self._changed("sensitivity", found.made_from, made_from)
                found = None
        if found is None:
            found = Sensitivity(self._responses(), {}, {}, made_from)
            write_text(self.folder.sensitivity, to_json(found.to_json()))
        if not found.distortions:
            rounding = self._rounding()
            measured = self._distortions(rounding["inputs"])
            found = replace(
                found,
                distortions=measured["errors"],
                rates=measured["rates"],
                together=rounding["together"],
                speeds={"tokens": rounding["tokens_per_s"], "products": measured["products_per_s"]},
            )
            found = replace(found, rounding=found.to_floor(measured["rounding"], rounding["floor"]))
            write_text(self.folder.sensitivity, to_json(found.to_json()))
        return found

    def measure_types(self, types: Mapping[str, Sequence[str]]) -> None:
        """Make sure that the distortion of each tensor in ``types`` is known for its types."""
        known = self.sensitivity.distortions
        missing = {name: [kind for kind in own if kind not in known.get(name, {})] for name, own in types.items()}
        if wanted := {name: own for name, own in missing.items() if own}:
            for name, errors in self._distortions({}, wanted)["errors"].items():
                known.setdefault(name, {}).update(errors)
            write_text(self.folder.sensitivity, to_json(self.sensitivity.to_json()))

    def measure_mending(self) -> None:
        """Make sure that it is known what healing leaves of the errors of types, if anything is healed."""
        known = self.sensitivity
        if not self.settings.heal or known.mended or not self.architecture.moe_layers:
            return
        with self.listener.progress("healing of coarser types, for a trial") as progress:
            found = child.call(
                "edgeprune.measure.mending:measure",
                {"model": str(self.source), "statistics": self.statistics_file},
                progress,
            )
        known.mended.update({int(layer): mended(layer, by_type) for layer, by_type in found.items()})
        write_text(self.folder.sensitivity, to_json(known.to_json()))

    def _distortions(
        self, rounding: Mapping[str, Any], wanted: Mapping[str, list[str]] | None = None
    ) -> dict[str, Any]:
        with self.listener.progress("distortion of each type") as progress:
            measured: dict[str, Any] = child.call(
                "edgeprune.measure.distortion:measure",
                {
                    "model": str(self.source),
                    "statistics": self.statistics_file,
                    "rounding": rounding,
                    "wanted": wanted,
                    "mtp": self.settings.mtp == KEEP,
                },
                progress,
            )
        return measured

    def _rounding(self) -> dict[str, Any]:
        """What rounding the inputs of products does, as a quantised file's kernels do; see ``rounding.measure``."""
        with self.listener.progress("rounding of activations") as progress:
            arguments = {
                "model": str(self.source),
                "reference": str(self._reference("sensitivity")),
                "weights": [t.name for t in self.architecture.tensors if t.quantisable],
                **self._text_arguments("sensitivity"),
            }
            found: dict[str, Any] = child.call("edgeprune.measure.rounding:measure", arguments, progress)
        return found

    def _responses(self) -> dict[str, Any]:
        reference = self._reference("sensitivity")
        sites = sites_to_measure(self.architecture)
        with self.listener.progress("sensitivity of each tensor") as progress:
            costs = child.call(
                "edgeprune.measure.tasks:disturb",
                {
                    "model": str(self.source),
                    "reference": str(reference),
                    "sites": site_settings(sites),
                    **self._text_arguments("sensitivity"),
                },
                progress,
            )
        return responses(self.architecture, sites, costs)

    # Which experts are worth keeping.

    @cached_property
    def protected(self) -> dict[int, tuple[int, ...]]:
        """Super experts by layer: never dropped, whatever a score says."""
        return super_experts(self.statistics.layers, self.architecture.layers)

    def _measured(self, method: str) -> Statistics:
        """What the score ``method`` looks at."""
        return self.gradients if SCORES[method].differentiates else self.statistics

    def evidence(self, method: str, seed: int = 0) -> Iterator[Evidence]:
        """What ``method`` may look at, layer by layer; of a reservoir, which is large, one layer's at a time."""
        weights = self._weights() if SCORES[method].weighs else {}
        measured = self._measured(method)
        for layer in self.architecture.moe_layers:
            tokens = measured.reservoirs.get(layer) if SCORES[method].samples else None
            yield Evidence(layer, measured.layers[layer], tokens, weights.get(layer), seed)

    def _weights(self) -> dict[int, LayerWeights]:
        path = self.folder.path / "weights.safetensors"
        with contextlib.suppress(BadFile):
            found = load_weights(path, self.fingerprint)
            if set(self.architecture.sliced_layers) <= found.keys():
                return found
        with self.listener.progress("weights") as progress:
            arguments: dict[str, Any] = {"model": str(self.source), "output": str(path)}
            arguments |= {"fingerprint": self.fingerprint, "mtp": self.settings.mtp == KEEP}
            child.call("edgeprune.measure.weights:weigh", arguments, progress)
        return load_weights(path, self.fingerprint)

    def ranked(self, method: str, stops: Sequence[int] = (), seed: int = 0) -> dict[int, Order]:
        """Experts of every MoE layer from most to least worth keeping, super experts first.

        Args:
            stops: further numbers of experts that will be kept, beside those that are always considered.
        """
        check_method(method)
        mixture = self.settings.mixture
        if method in SCORES:
            domains = len(self._measured(method).domains)
            order = rankings(self.evidence(method, seed), method, domains, mixture)
        elif method == HEALABLE:
            order = self._healable(stops)
        else:
            order = self._replayed(method, stops)
        return protecting({**order, **self._further()}, self.protected)

    def _further(self) -> dict[int, Order]:
        """Experts of kept blocks that predict further tokens. Text does not go through these, so nothing but their
        weights tells them apart: AIMER. What they guess is checked by the layers before, so that a poor choice costs
        speed and no quality."""
        layers = self.architecture.further_moe_layers
        if not layers:
            return {}
        weights = self._weights()
        nothing = next(iter(self.statistics.layers.values()))
        own = (Evidence(layer, nothing, None, weights[layer], 0) for layer in layers)
        return rankings(own, WEIGHTS_ALONE, len(self.statistics.domains))

    def _judged_counts(self, stops: Sequence[int]) -> list[int]:
        """Numbers of experts at which rankings are told apart: that which is asked for, or about three quarters."""
        experts = self.architecture.experts
        if self.settings.keep is not None and self.settings.keep < experts:
            return [self.settings.keep]
        possible = {*self.architecture.allowed_counts(), *stops} - {experts}
        return [min(possible, key=lambda count: abs(count - 3 * experts // 4))] if possible else []

    def _healable(self, stops: Sequence[int]) -> dict[int, Order]:
        """In every layer the order of that of several methods whose sets heal best."""
        orders = {method: self.ranked(method, stops) for method in RIVALS}
        request: dict[str, Any] = {
            "orders": {m: {str(layer): ids.tolist() for layer, ids in own.items()} for m, own in orders.items()},
            "counts": self._judged_counts(stops),
        }
        made_from = {"statistics": digest(self.statistics.made_from), "request": digest(request)}
        found = self._ranking(HEALABLE, made_from, "edgeprune.decide.healable:choose", request, "healing for a trial")
        for layer, reason in found["reasons"].items():
            self.listener.say(f"layer {layer} is ranked by {RIVALS[0]}: {reason}")
        chosen = {int(layer): np.array(ids, np.intp) for layer, ids in found["orders"].items()}
        return {**orders[RIVALS[0]], **chosen}

    def _ranking(
        self, method: str, made_from: dict[str, Any], task: str, request: dict[str, Any], title: str
    ) -> dict[str, Any]:
        """What ``task`` found, or what the folder remembers of it."""
        path = self.folder.path / "rankings.json"
        known: dict[str, Any] = {}
        with contextlib.suppress(BadFile):
            known = read_json(path)
        found: dict[str, Any] = known.get(method, {})
        if found.get("made_from") != made_from:
            with self.listener.progress(title) as progress:
                arguments = {"model": str(self.source), "statistics": self.statistics_file, **request}
                result = child.call(task, arguments, progress)
            found = {"made_from": made_from, **result}
            write_text(path, to_json({**known, method: found}))
        return found

    def _replayed(self, method: str, stops: Sequence[int]) -> dict[int, Order]:
        """The order of a method that replays the layers; of a score where a layer cannot be replayed."""
        architecture = self.architecture
        counts = {*architecture.allowed_counts(), *stops} - {architecture.experts}
        request = {
            "method": method,
            "mixture": self.settings.mixture,
            "stops": sorted(counts, reverse=True),
            "protected": {str(layer): list(ids) for layer, ids in self.protected.items()},
        }
        made_from = {"statistics": digest(self.statistics.made_from), **request}
        found = self._ranking(method, made_from, "edgeprune.decide.replaying:rank", request, "replay of every layer")
        order = {int(layer): np.array(ids, np.intp) for layer, ids in found["orders"].items()}
        if greedy := sorted({count for counts in found.get("greedy", {}).values() for count in counts}, reverse=True):
            numbers = ", ".join(map(str, greedy))
            self.listener.say(f"{method} goes down to {numbers} experts greedily: there are too many subsets to try")
        if found["reasons"]:
            score = rankings(self.evidence(FALLBACK), FALLBACK, len(self.statistics.domains), self.settings.mixture)
            for layer, reason in found["reasons"].items():
                self.listener.say(f"layer {layer} is ranked by {FALLBACK}: {reason}")
                order[int(layer)] = score[int(layer)]
        return order

    def comparable(self) -> tuple[str, ...]:
        """The methods that are compared unless some are named: without those that need gradients, which take a
        multiple of the time; enumerating subsets is for small layers, and not every graph or text shows all that a
        score needs. Of those the reason is said."""
        usable = []
        for method in METHODS:
            obstacle = self._obstacle(method)
            if not obstacle:
                usable.append(method)
            elif not (method in SCORES and SCORES[method].differentiates):
                self.listener.say(f"{method} is left out: {obstacle}")
        return tuple(usable)

    def _obstacle(self, method: str) -> str:
        """Why a method is not compared unless it is named, or ""."""
        if method == NAEE and self.architecture.experts > MOST_ENUMERATED:
            return f"{self.architecture.experts} experts have too many subsets"
        if method not in SCORES or SCORES[method].weighs:
            return ""
        if SCORES[method].differentiates:
            return "it needs gradients"
        try:
            rankings([next(self.evidence(method))], method, len(self.statistics.domains), self.settings.mixture)
        except (BadFile, Unsupported) as error:
            return error.cause
        return ""

    def drop_nats(self, counts: Sequence[int]) -> dict[int, float]:
        """Nats per token of keeping each of ``counts`` experts, measured by masking the router."""
        method = self.settings.method
        key = f"{method}, {self.settings.mixture}"
        if method == HEALABLE:  # its sets are other ones where others are judged
            key += "".join(f", judged at {count}" for count in self._judged_counts(counts))
        known = dict(self.sensitivity.drops.get(key, {}))
        known[self.architecture.experts] = 0.0
        missing = [kept for kept in counts if kept not in known]
        if missing:
            check_room(self.protected, self.architecture, min(missing))
            ranked = self.ranked(method, counts)
            sets = [keep_set(ranked, self.architecture, kept) for kept in missing]
            known.update(zip(missing, self.keep_nats(sets), strict=True))
            self.sensitivity.drops[key] = known
            write_text(self.folder.sensitivity, to_json(self.sensitivity.to_json()))
        return known

    def mask(self, keep: KeepSet) -> dict[str, list[int]]:
        """``keep`` for the child that masks the router, without blocks that text does not go through."""
        return {str(layer): list(ids) for layer, ids in keep.items() if layer < self.architecture.layers}

    def keep_nats(self, sets: Sequence[KeepSet]) -> list[float]:
        """Nats per token of keeping only the experts in each of ``sets``, measured by masking the router."""
        masks = [self.mask(keep) for keep in sets]
        measured = self.divergence(self.source, "sensitivity", masks, "dropping experts")
        return [float(row["all"]["kl_mean"]) for row in measured]

    def divergence(
        self,
        model: Path,
        part: str,
        masks: Sequence[Mapping[str, Sequence[int]] | None] = (None,),
        title: str = "quality",
        narrowed: Sequence[Mapping[str, Any] | None] | None = None,
    ) -> list[dict[str, Any]]:
        """Quality of ``model`` against the source over a ``part`` of the text, once for each router mask, and with
        what ``narrowed`` says of channels beside each."""
        reference = self._reference(part)
        with self.listener.progress(title) as progress:
            result: list[dict[str, Any]] = child.call(
                "edgeprune.measure.tasks:divergence",
                {
                    "model": str(model),
                    "reference": str(reference),
                    "masks": list(masks),
                    "narrowed": list(narrowed) if narrowed else None,
                    "experts": self.architecture.experts,
                    **self._text_arguments(part),
                },
                progress,
            )
        return result
