"""Experts that are merged instead of dropped: who goes into whom, and the merged weights."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from edgeprune.decide.evidence import Evidence
from edgeprune.decide.groups import grouped
from edgeprune.decide.keep import Order, keep_set
from edgeprune.decide.plan import DERN, DROP, Merges, Plan
from edgeprune.files import digest
from edgeprune.measure import child
from edgeprune.stages.healing import HealStages


@dataclass
class MergeStages(HealStages):
    """Plans that merge, and what their experts become."""

    def merging(self, plan: Plan, reduce: str) -> Plan:
        """``plan`` with the experts that it would drop merged by ``reduce``.

        DERN keeps what its own score ranks first; the others keep the centres of their groups.
        """
        if reduce == DROP or not plan.keep:
            return plan
        if reduce == DERN:
            ranked: Mapping[int, Order] = self.ranked("dern", [plan.kept])
            keep = keep_set(dict(ranked), self.architecture, plan.kept)
            return replace(plan, keep=keep, reduce=reduce, method=reduce)
        keep, merges = {}, Merges()
        for layer in self.architecture.moe_layers:
            evidence = Evidence(layer, self.statistics.layers[layer])
            alone = self.protected.get(layer, ())
            found = grouped(reduce, evidence, plan.kept, alone, max(self.architecture.groups, 1))
            keep[layer] = tuple(group.centre for group in found)
            own = {expert: group.centre for group in found for expert in group.members if expert != group.centre}
            merges[layer] = dict(sorted(own.items()))
        return replace(plan, keep=keep, reduce=reduce, method=reduce, merge=merges)

    def merged(self, plan: Plan) -> str:
        """Folder with the merged experts of ``plan``, or "" if it merges none."""
        if plan.reduce == DROP:
            return ""
        request = [plan.reduce, sorted(plan.keep.items()), sorted(plan.merge.items()), self.fingerprint]
        name = digest([str(part) for part in (*request, digest(self.statistics.made_from))])
        folder = self.folder.path / f"merged-{name[:16]}"
        for other in self.folder.path.glob("merged-*"):
            if other != folder:
                shutil.rmtree(other)
        with self.listener.progress(f"merging experts: {plan.reduce}") as progress:
            arguments = {
                "model": str(self.source),
                "plan": plan.to_json(),
                "store": str(folder),
                "statistics": self.statistics_file,
            }
            child.call("edgeprune.build.merging:merge_layers", arguments, progress)
        return str(folder)

    def remove_merged(self, folder: str) -> None:
        """Delete what ``merged`` made, which is as large as the source's experts."""
        if folder:
            shutil.rmtree(Path(folder), ignore_errors=True)
