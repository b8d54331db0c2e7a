"""One model for several devices: what each of its files is, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from edgeprune.files import check_keys
from edgeprune.prove import figures
from edgeprune.prove.report import EVALUATION, Report

FAMILY = "family.json"


@dataclass(frozen=True)
class Member:
    """One file of a family.

    Attributes:
        folder: of its report below the family's: that of the run, which is the device's name, or where it is
            published that of the file.
        report: what was measured about it.
        beside: whether the GGUF lies beside the folder, where it is published, and not in it.
    """

    folder: str
    report: Report
    beside: bool = False

    @property
    def file(self) -> str:
        """Path of the GGUF from the family's folder."""
        name = str(self.report.build["path"])
        return name if self.beside else f"{self.folder}/{name}"

    def to_json(self) -> dict[str, Any]:
        report, plan = self.report, self.report.plan
        return {
            "folder": self.folder,
            "file": self.file,
            "nbytes": report.build["nbytes"],
            "experts": plan["experts"],
            "kept": plan["kept"],
            "width": plan.get("width", 0),
            "shipped": report.shipped,
            "needed_bytes": report.needed_bytes,
            "context": report.launch.context,
            "quality": report.quality,
            "verdict": report.verdict,
            "launch_line": report.launch.command(self.file),
        }


@dataclass(frozen=True)
class Family:
    """Files of one model, largest first.

    Attributes:
        model: name of the source.
        failures: device and cause, for those that did not come out as promised.
    """

    model: str
    members: tuple[Member, ...]
    failures: tuple[tuple[str, str], ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "members": [member.to_json() for member in self.members],
            "failures": [{"target": target, "cause": cause} for target, cause in self.failures],
        }

    @property
    def on_one_text(self) -> bool:
        """Whether all were made and measured with the same text, so that their figures can be compared."""
        texts = {(report.made_from.get("text"), report.made_from.get(EVALUATION)) for report in self._reports}
        return len(texts) == 1

    @property
    def nested(self) -> bool:
        """Whether experts were dropped, and those of a smaller file are all among those of a larger one."""
        kept = [_kept(report.plan) for report in self._reports]
        layers = {layer for own in kept for layer in own}
        everyone = set(range(max((int(report.plan["experts"]) for report in self._reports), default=0)))
        return bool(layers) and all(
            small.get(layer, everyone) <= large.get(layer, everyone)
            for large, small in pairwise(kept)
            for layer in layers
        )

    @property
    def _reports(self) -> list[Report]:
        return [member.report for member in self.members]

    @property
    def presets(self) -> list[Mapping[str, Any]]:
        """The stock presets that were measured beside any of them, each once."""
        found = {rival["preset"]: rival for member in self.members for rival in member.report.to_json()["baselines"]}
        return list(found.values())

    def curve(self, width: int = figures.WIDTH) -> str:
        """File size against divergence, as SVG: the files, the presets, and the candidates at every size."""
        candidates = [point for member in self.members for point in member.report.curve]
        shipped = {
            member.folder: (member.report.build["nbytes"], member.report.quality["kl_mean"])
            for member in self.members
        }
        return figures.curve(candidates, self.presets, shipped, width)


def _kept(plan: Mapping[str, Any]) -> dict[str, set[int]]:
    """Experts that stay, by layer; of layers that are not in it, all."""
    return {layer: set(ids) for layer, ids in plan["keep"].items()}


def make_family(members: Sequence[Member], failures: Sequence[tuple[str, str]]) -> Family:
    ordered = sorted(members, key=lambda member: -int(member.report.build["nbytes"]))
    model = str(ordered[0].report.source["name"]) if ordered else ""
    return Family(model, tuple(ordered), tuple(failures))


def member_folders(value: Any, where: str) -> list[str]:
    """Names of the run directories that a family's file lists.

    Raises:
        BadFile: it is none.
    """
    check_keys(where, value, {"model", "members", "failures"}, set())
    folders = []
    for member in value["members"] if isinstance(value["members"], list) else []:
        check_keys(where, member, {"folder"}, set(member) if isinstance(member, dict) else set())
        folders.append(str(member["folder"]))
    return folders
