"""The plan: chosen, loaded, priced anew, and built."""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.build.builder import Build, describe
from edgeprune.decide.candidates import Candidate, allowed_types, candidates, priced
from edgeprune.decide.keep import check_method, check_room, fewest_kept, keep_set
from edgeprune.decide.narrowing import MOST_RANKING_SECONDS, check_narrowing, ranking_seconds, widths_to_try
from edgeprune.decide.plan import DROP, USER, Plan
from edgeprune.decide.problem import Problem
from edgeprune.decide.solver import prepare
from edgeprune.device.profile import Profile
from edgeprune.errors import BadFile, DoesNotFit, Unsupported, UsageError
from edgeprune.files import digest, read_json, to_json, write_text
from edgeprune.measure import child
from edgeprune.measure.distortion import candidate_types
from edgeprune.measure.sensitivity import Sensitivity
from edgeprune.model.headers import Header
from edgeprune.model.layout import layout
from edgeprune.model.parts import stem
from edgeprune.rundir import changed_fields
from edgeprune.settings import KEEP
from edgeprune.stages.measuring import tools
from edgeprune.stages.training import TrainStages
from edgeprune.units import format_bytes

# How much the memory of a process varies from run to run; no reason to make another plan.
_JITTER_BYTES = 8 << 20


def profile_digest(profile: Profile, *, local: bool | None = None) -> str:
    """Of the device that a plan is for; ``local``: it is this machine, as a profile called ``auto`` says.

    The free memory and bandwidth of this machine vary from run to run, so they are left out.
    """
    local = profile.name == "auto" if local is None else local
    return digest([profile.ram.total_bytes, profile.backend] if local else profile.to_json())


@dataclass
class DecideStages(TrainStages):
    """Candidates, the plan, and the file that obeys it."""

    def _counts(self) -> list[int]:
        keep = self.settings.keep
        if keep is None:
            # Narrower experts are asked for instead of fewer.
            return [self.architecture.experts] if self.width else list(self.architecture.allowed_counts())
        if not self.architecture.count_allowed(keep):
            reason = self.architecture.obstacle or (
                f"the router uses {self.architecture.used} of {self.architecture.experts} experts"
                f" in {self.architecture.groups} group(s)"
            )
            possible = [n for n in range(1, self.architecture.experts + 1) if self.architecture.count_allowed(n)]
            raise UsageError(
                f"--keep {keep} is not possible: {reason}", hint=f"choose from {possible[0]} to {possible[-1]}"
            )
        return [keep]

    def _made_from(self, *, measured: bool) -> dict[str, Any]:
        """What a plan is made from; one that changes nothing needs no measurement."""
        local = self.settings.device in (None, "auto")
        return {
            "source": self.fingerprint,
            "statistics": digest(self.statistics.made_from) if measured else None,
            "sensitivity": digest(self.sensitivity.made_from) if measured else None,
            "device": profile_digest(self.profile, local=local),
            "tools": tools(),
            "memory": self.settings.memory_bytes,
            "file_size": self.settings.file_bytes,
            "context": self.launch.context,
            "kv_type": self.launch.kv_type,
            "keep": self.settings.keep,
            "types": sorted(self.settings.types),
            "method": self.settings.method,
            "mixture": self.settings.mixture,
            "healing": self.healing if self.settings.heal else None,
            **({"training": self.training} if self.settings.train else {}),
            "limit_seconds": self.settings.limit_seconds,
            **({"mtp": self.settings.mtp} if self.settings.mtp == KEEP else {}),
            **({"reduce": self.settings.reduce} if self.settings.reduce != DROP else {}),
            **({"split": self.settings.part_bytes} if self.settings.part_bytes else {}),
            **({"width": self.width} if self.width else {}),
            **({"narrowing": self.settings.narrowing} if self.width or self._widths() else {}),
        }

    def problem(self, counts: Sequence[int]) -> Problem:
        """Everything that candidates are chosen from."""
        ranked = (
            self.ranked(self.settings.method, counts)
            if len(counts) > 1 or counts[0] != self.architecture.experts
            else {}
        )
        self.measure_mending()
        whole = Problem(
            file=self.file,
            architecture=self.architecture,
            sensitivity=self.sensitivity,
            ranked=ranked,
            drop_nats={} if self.width else self.drop_nats(counts),
            types=allowed_types(self.profile, self.settings.types),
            budget=self.budget,
            profile=self.profile,
            launch=self.launch,
            method=self.settings.method,
            made_from=self._made_from(measured=True),
            mtp=self.settings.mtp == KEEP,
            heal=self.settings.heal,
            text=self.healing_text,
            train=self.settings.train,
            limit_seconds=self.settings.limit_seconds or math.inf,
            part_bytes=self.settings.part_bytes or 0,
            rates=self.rates,
            reduced=partial(self.merging, reduce=self.settings.reduce),
            healing=self.healing_seconds,
        )
        return self.narrower(whole, self.width, self.settings.narrowing, counts) if self.width else whole

    def narrower(self, problem: Problem, width: int, narrowing: str, counts: Sequence[int]) -> Problem:
        """``problem`` with experts of ``width`` channels, chosen by the score ``narrowing``."""
        self.measure_narrow_types(width)
        sets = {kept: keep_set(problem.ranked, self.architecture, kept) for kept in counts}
        return replace(
            problem,
            drop_nats={kept: self.narrow_nats(width, narrowing, keep) for kept, keep in sets.items()},
            width=width,
            narrowing=narrowing,
            channels=self.channels_digest(narrowing),
        )

    def candidates(self) -> list[Candidate]:
        """The best plan for each allowed number of experts, best first.

        Raises:
            DoesNotFit: no plan fits.
        """
        self._fail_early()
        counts = self._roomy(self._counts())
        problem = self.problem(counts)
        narrower = self._narrower(problem)
        forced = bool(self.settings.types)
        with self.listener.progress("solve") as progress:
            return candidates(problem, counts, forced_types=forced, narrower=narrower, progress=progress)

    def _widths(self) -> tuple[int, ...]:
        """Widths of experts that are tried beside their own and beside fewer experts, if nothing is forced."""
        settings = self.settings
        free = settings.keep is None and not settings.types and not settings.width
        return widths_to_try(self.architecture, settings.narrowing) if free else ()

    def _narrower(self, problem: Problem) -> list[Problem]:
        """``problem`` with each of those widths; none where the channels cannot be ranked, which is said."""
        narrowing, everyone = self.settings.narrowing, [self.architecture.experts]
        seconds = ranking_seconds(self.architecture, narrowing)
        if seconds > MOST_RANKING_SECONDS:
            hours = f"{seconds / 3600:.0f} hours of a core"
            self.listener.say(
                f"narrower experts are not considered: {narrowing} would take {hours} to rank their channels; "
                "--narrowing energy or --width considers them"
            )
        try:
            return [self.narrower(problem, width, narrowing, everyone) for width in self._widths()]
        except (BadFile, Unsupported) as error:
            self.listener.say(f"narrower experts are not considered: {error.cause}")
            return []

    def _roomy(self, counts: list[int]) -> list[int]:
        """Those of ``counts`` that have room for all super experts.

        Raises:
            UsageError: the one that was asked for has not.
        """
        if len(counts) == 1:
            check_room(self.protected if counts[0] < self.architecture.experts else {}, self.architecture, counts[0])
            return counts
        least = fewest_kept(self.protected, self.architecture)
        if small := [kept for kept in counts if kept < least]:
            self.listener.say(f"K={', '.join(map(str, small))} not considered: super experts need {least} of a layer")
        return [kept for kept in counts if kept >= least]

    def _require_use(self, header: Header) -> None:
        """Refuse the model of this GGUF, which has no weights yet, if it cannot be fitted whatever they are."""
        if not self.settings.has_target:
            super()._require_use(header)
            return
        _ = self.profile, self.given_texts  # told, and read, once
        self._with(header)._fail_early()

    def _fail_early(self) -> None:
        """Refuse what cannot be met, whatever the measurements will say, before anything is measured.

        Raises:
            DoesNotFit: not even the fewest experts in the smallest types fit.
            UsageError: an impossible number of experts, type or score.
        """
        prepare()
        _ = self.given_texts  # a missing or broken text is found now, before a checkpoint is converted
        check_narrowing(self.settings.narrowing)
        counts, architecture = self._counts(), self.architecture
        check_method(self.settings.method)
        types = allowed_types(self.profile, self.settings.types)

        def smallest(width: int) -> Problem:
            """When every type costs nothing, the best plan is the smallest."""
            own = [tensor for tensor in architecture.tensors if tensor.quantisable]
            rows = {tensor.name: tensor.kept_shape(1, width)[0] for tensor in own}
            free = {t.name: {kind: [0.0, 0.0] for kind in candidate_types(t, rows[t.name])} for t in own}
            # What the file will say of its making takes bytes, too.
            free_choice = self.unmeasured(free, types)
            return replace(free_choice, width=width, heal=self.settings.heal, train=self.settings.train)

        narrowest = [smallest(width) for width in self._widths()[-1:]]
        forced = bool(self.settings.types)
        candidates(smallest(self.width), [min(counts)], forced_types=forced, narrower=narrowest)

    def unmeasured(self, distortions: dict[str, dict[str, list[float]]], types: frozenset[str]) -> Problem:
        """A problem without any measurement, in which every choice is free."""
        architecture = self.architecture
        return Problem(
            file=self.file,
            architecture=architecture,
            sensitivity=Sensitivity({}, distortions, {}, {}),
            ranked={layer: np.arange(architecture.experts) for layer in architecture.sliced_layers},
            drop_nats=dict.fromkeys(self._counts(), 0.0),
            types=types,
            budget=self.budget,
            profile=self.profile,
            launch=self.launch,
            method=self.settings.method,
            made_from=self._made_from(measured=False),
            width=self.width,
            narrowing=self.settings.narrowing,
            mtp=self.settings.mtp == KEEP,
        )

    def _untouched(self) -> Candidate | None:
        """The source as it is, if that fits: no other plan can be closer to it, so nothing need be measured."""
        if self.settings.types or self.width or self.architecture.experts not in self._counts():
            return None
        problem = replace(self.unmeasured({}, frozenset()), rates=self.rates)
        return priced(problem, self.architecture.experts, {})

    def plan(self) -> Plan:
        """The plan in the folder if it is still right, else the best candidate, saved."""
        self.check_training()
        self._fail_early()
        untouched = self._untouched()
        made_from = self._made_from(measured=untouched is None)
        if self.folder.plan.is_file():
            found = Plan.load(self.folder.plan)
            if found.made_from == made_from and self._still_fits(found):
                return self._obeyed(found)
            self._changed("plan", found.made_from, made_from)
            if found.made_from == made_from:
                self.listener.say("the earlier plan no longer fits into the memory that is free; planning anew")
            self._put_aside(found)
        found_candidates = self.candidates() if untouched is None else [untouched]
        if untouched is not None:
            self.check_source()
            self.listener.say("the model fits as it is: nothing is dropped and no type is changed")
        self._save_curve(found_candidates)
        best = found_candidates[0].plan
        best.save(self.folder.plan)
        return best

    def _put_aside(self, plan: Plan) -> None:
        """Keep a copy of a plan that a person has edited before another takes its place."""
        if plan.origin == USER or self._edited(plan):
            copy = self.folder.path / "plan.edited.json"
            write_text(copy, self.folder.plan.read_text(encoding="utf-8"))
            self.listener.say(f"the plan that was edited by hand is kept as {copy}")

    def _edited(self, plan: Plan) -> bool:
        """Whether the file of ``plan`` is not as it was saved."""
        return bool(read_json(self.folder.plan).get("signature") != plan.to_json()["signature"])

    def _save_curve(self, found: Sequence[Candidate]) -> None:
        rows = [
            {
                "kept": c.plan.kept,
                **({"width": c.plan.width} if c.plan.width else {}),
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
        if not self._edited(plan):
            return plan
        self.listener.say("plan.json was edited by hand; it is obeyed, and its predictions are made anew")
        obeyed = replace(self.repriced(plan, placed=True), origin=USER)
        obeyed.save(self.folder.plan)
        return obeyed

    def _still_fits(self, plan: Plan) -> bool:
        """Whether today's budget, which on this machine varies, still has room for an earlier plan."""
        taken = plan.predicted.pool_bytes
        limits = {
            pool.pool: pool.total_bytes + max(pool.total_bytes // 100, _JITTER_BYTES) for pool in self.budget.pools
        }
        return all(taken.get(pool, 0) <= limit for pool, limit in limits.items())

    def repriced(self, plan: Plan, *, placed: bool) -> Plan:
        """``plan`` with predictions made from its kept experts and types.

        Args:
            placed: the plan's launch says where the weights go; otherwise that is decided anew.

        Raises:
            DoesNotFit: it exceeds the budget.
        """
        drop = self.keep_nats([plan.keep])[0] if plan.keep else 0.0
        digest_of_channels = ""
        if plan.width:
            check_narrowing(plan.narrowing)
            self.measure_narrow_types(plan.width)
            drop = self.narrow_nats(plan.width, plan.narrowing, plan.keep)
            digest_of_channels = self.channels_digest(plan.narrowing)
        budget = self.budget_of(plan.launch)
        problem = replace(
            self.problem([plan.experts]),
            drop_nats={plan.kept: drop},
            launch=plan.launch,
            budget=budget,
            width=plan.width,
            narrowing=plan.narrowing,
            channels=digest_of_channels,
            reduced=lambda own: replace(own, keep=plan.keep, reduce=plan.reduce, merge=plan.merge),
        )
        changed = {name: kind for name, kind in plan.types.items() if kind != self.architecture.tensor(name).type}
        self.measure_types({name: [kind] for name, kind in changed.items()})
        edited = replace(plan, types=changed, channels=digest_of_channels)
        records, parts = edited.records(), self.settings.part_bytes or 0
        made = layout(self.file, self.architecture, plan.kept, changed, records, parts, width=plan.width)
        whole = priced(
            replace(problem, ranked=self._ranked_like(plan)), plan.kept, changed, placed=placed, origin=plan.origin
        )
        if whole is None:
            raise DoesNotFit(
                f"the plan needs a file of {format_bytes(made.nbytes)}, more than the budget allows",
                rows=budget.rows(),
            )
        return replace(edited, launch=whole.plan.launch, predicted=whole.plan.predicted)

    def _ranked_like(self, plan: Plan) -> dict[int, Any]:
        """A ranking that leads to the plan's own kept experts."""
        ranked = {}
        for layer, ids in plan.keep.items():
            rest = [expert for expert in range(plan.experts) if expert not in set(ids)]
            ranked[layer] = np.array([*ids, *rest])
        return ranked

    def build(self, plan: Plan) -> Build:
        """The planned file, or the one in the folder if it is exactly that."""
        if self.settings.train and not (plan.keep or plan.width):
            self.listener.say("no expert is dropped or narrowed, so nothing is trained: the closed form heals alone")
        output = self.folder.path / describe(self.architecture, plan)
        found = self._built(output, plan)
        if found is not None:
            return found
        beside = [path for path in self.file.paths if path.resolve().parent == output.resolve().parent]
        if self._is_source(output) or any(stem(path) == output.stem for path in beside):
            raise UsageError(f"the result would replace its source {output}", hint="choose another folder with -o")
        self._discard_reports()
        made = self._adopted(plan, output) or self.construct(plan, output)
        earlier = self._record()
        write_text(self.folder.build, to_json({**made.to_json(), "path": Path(made.path).name}))
        if earlier is not None:
            self._remove(earlier, made)
        return made

    def finished(self) -> tuple[Plan, Build] | None:
        """The plan in the folder and its file, if that is whole and of this source; with other settings, too, which
        are named."""
        with contextlib.suppress(BadFile):
            plan, build = Plan.load(self.folder.plan), self._record()
            if build is None or build.plan_digest != plan.digest or not build.is_whole():
                return None
            if plan.made_from.get("source") != self.fingerprint:
                return None
            plan.check(self.architecture)
            asked = self._made_from(measured=False)
            measured = {key: plan.made_from.get(key) for key in ("statistics", "sensitivity")}
            if changed := changed_fields(plan.made_from, {**asked, **measured}):
                self.listener.say(f"what is verified was built with other settings: {'; '.join(changed)}")
            return plan, build
        return None

    def construct(self, plan: Plan, output: Path) -> Build:
        """Write the file for ``plan`` as ``output``, healed if it says so."""
        merged = self.trained(plan) or self.merged(plan)
        store = self.healed(plan, merged)
        with self.listener.progress("build") as progress:
            value = child.call(
                "edgeprune.build.builder:build",
                {
                    "model": str(self.source),
                    "plan": plan.to_json(),
                    "output": str(output),
                    "statistics": self.statistics_file if plan.types else "",
                    "store": store,
                    "part_bytes": self.settings.part_bytes or 0,
                    "channels": self.channels_of(plan),
                    "merged": merged,
                },
                progress,
            )
        self.remove_merged(merged)
        if store:
            shutil.rmtree(store)
        return Build(**value)

    def trial(self, plan: Plan) -> Path:
        """Where the file for ``plan`` is while others are tried beside it; its record is beside it as JSON."""
        return self.folder.scratch / f"candidate-{plan.digest[:16]}.gguf"

    def _adopted(self, plan: Plan, output: Path) -> Build | None:
        """The file that was tried for ``plan``, moved to its place as ``output``."""
        path = self.trial(plan)
        with contextlib.suppress(BadFile, TypeError, KeyError):
            record = read_json(path.with_suffix(".json"))
            made = Build(**record["build"])
            if made.plan_digest == plan.digest and path.is_file() and made.is_whole():  # parts are made anew
                path.replace(output)
                if "healing" in record:  # what lies in the folder is of the last file that was tried
                    write_text(self.folder.healing, to_json(record["healing"]))
                return replace(made, path=str(output))
        return None

    def _remove(self, earlier: Build, made: Build) -> None:
        """Delete the file of an earlier plan, or its parts, if they still are that."""
        old = [path for path in earlier.paths if path not in made.paths and path.is_file()]
        own = not any(self._is_source(path) for path in old)
        if old and own and sum(path.stat().st_size for path in old) == earlier.nbytes:
            for path in old:
                path.unlink()
            self.listener.say(f"{old[0].name}, of an earlier plan, is replaced by {Path(made.path).name}")

    def _is_source(self, path: Path) -> bool:
        """Whether a file of the source is at ``path``."""
        return path.is_file() and any(path.samefile(own) for own in self.file.paths)

    def _record(self) -> Build | None:
        """The last file that was built in the folder."""
        with contextlib.suppress(BadFile, TypeError, KeyError):
            value = read_json(self.folder.build)
            return Build(**{**value, "path": str(self.folder.path / Path(value["path"]).name)})
        return None

    def _discard_reports(self) -> None:
        """Reports speak of the file beside them; with another file they would be wrong."""
        for path in (self.folder.report, self.folder.page, self.folder.card):
            path.unlink(missing_ok=True)

    def _built(self, output: Path, plan: Plan) -> Build | None:
        """The record of ``output`` if it is still what was built for ``plan``, to the last byte."""
        found, wanted = self._record(), self.settings.part_bytes or 0
        if found is None or stem(Path(found.path)) != output.stem or found.plan_digest != plan.digest:
            return None
        return found if found.part_bytes == wanted and found.is_whole() else None
