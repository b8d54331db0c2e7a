"""The report: predicted beside measured, each line with a verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from edgeprune.device.budget import DESKTOP, SYSTEM
from edgeprune.measure.launch import Launch
from edgeprune.measure.meanwhile import DISTURBED_SHARE
from edgeprune.prove.comparison import Comparison
from edgeprune.prove.deeper import NOTHING, Deeper
from edgeprune.prove.provenance import UNKNOWN, Provenance
from edgeprune.units import format_bytes, format_seconds

KEPT, BROKEN, INFORMATION = "kept", "broken", "information"
# Names of lines.
DECODE, MEANWHILE = "decode (tokens per second)", "meanwhile, other programs used"
FINITE = "weights and output are finite"
EVALUATION = "evaluation"  # of ``made_from``: digest of the text that the report is about, and of how much of it
# A prediction of speed or divergence is a guide, not a promise; size and memory are promises.
_MEMORY_TOLERANCE = 0.01
_LEAST_NATS = 1e-6  # below it is rounding


@dataclass(frozen=True)
class Promise:
    """One line of the report.

    Attributes:
        name: what was measured.
        predicted, measured: figures as text.
        verdict: ``kept``, ``broken`` or ``information``.
    """

    name: str
    predicted: str
    measured: str
    verdict: str


@dataclass(frozen=True)
class Baseline:
    """A stock preset, built and measured beside the plan.

    Attributes:
        preset: its name.
        nbytes: of its file.
        quality: ``Quality`` as JSON, on the part of the held-out text that the report is about.
        chosen_by: nats per token on the other part, with which the file to be shipped is chosen; None where nothing
            was to be chosen.
    """

    preset: str
    nbytes: int
    quality: dict[str, Any]
    chosen_by: float | None = None


@dataclass(frozen=True)
class Report:
    """Everything that was measured about a build.

    Attributes:
        title: name of the model and the device.
        verdict: one line.
        shipped: what is in the folder: ``plan`` or a preset's name.
        promises: predicted beside measured.
        quality: of the shipped file against the source, over all text.
        domains: the same by domain.
        baselines: presets of at most the same bytes.
        budget: ``Budget`` as JSON.
        plan: ``Plan`` as JSON.
        folded: the plan's types in a few lines.
        types: name and GGML type of every matrix of the shipped file, in file order.
        curve: candidates by number of experts: kept, bytes, predicted nats; and measured ones, on the half of the
            held-out text that chooses, where the file was built to choose from.
        importance: score by MoE layer, [layers][E].
        build: ``Build`` as JSON.
        source: name, bytes and shape of the source model.
        launch_line: the ``llama-server`` line.
        conditions: of the measurement.
        made_from: digests.
        comparison: methods of choosing experts on the same model and text, or None when nobody compared them.
        deeper: what `verify` measured on request.
        provenance: commands, digests and versions.
    """

    title: str
    verdict: str
    shipped: str
    promises: list[Promise]
    quality: dict[str, Any]
    domains: dict[str, dict[str, Any]]
    baselines: list[Baseline]
    budget: dict[str, Any]
    plan: dict[str, Any]
    folded: list[str]
    types: list[tuple[str, str]]
    curve: list[dict[str, Any]]
    importance: dict[str, list[float]]
    build: dict[str, Any]
    source: dict[str, Any]
    launch_line: str
    conditions: dict[str, str]
    made_from: dict[str, Any]
    comparison: Comparison | None = None
    deeper: Deeper = NOTHING
    provenance: Provenance = UNKNOWN

    @property
    def launch(self) -> Launch:
        """The settings that the file was measured with and is to be run with."""
        return Launch.from_json(self.plan["launch"], "the launch settings")

    @property
    def needed_bytes(self) -> dict[str, int]:
        """Memory of the model itself by pool with these settings, as predicted: without what other programs hold."""
        held = {pool["pool"]: _held(pool) for pool in self.budget["pools"]}
        return {pool: count - held.get(pool, 0) for pool, count in self.plan["predicted"]["pool_bytes"].items()}

    @property
    def broken(self) -> list[Promise]:
        """The promises that were not kept."""
        return [promise for promise in self.promises if promise.verdict == BROKEN]

    def beside(self, comparison: Comparison | None) -> Report:
        """The report with ``comparison``, or with none when that is of another model or text."""
        own = {"source": self.plan["made_from"].get("source"), "text": self.made_from["text"]}
        if comparison is not None and own != {key: comparison.made_from.get(key) for key in own}:
            comparison = None
        return replace(self, comparison=comparison)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Report:
        fields = dict(value)
        if fields.get("comparison") is not None:
            fields["comparison"] = Comparison.from_json(fields["comparison"])
        fields["deeper"] = Deeper.from_json(fields["deeper"]) if fields.get("deeper") else NOTHING
        known = fields.get("provenance")
        fields["provenance"] = Provenance.from_json(known) if known is not None else UNKNOWN
        fields["promises"] = [Promise(**row) for row in fields["promises"]]
        fields["types"] = [(name, kind) for name, kind in fields["types"]]
        fields["baselines"] = [Baseline(**row) for row in fields["baselines"]]
        return cls(**fields)


def rate(per_second: float) -> str:
    """A speed with three significant digits or so."""
    return f"{per_second:,.0f}" if per_second >= 100 else f"{per_second:.3g}"


def nats_in_words(value: float) -> str:
    """A divergence with about four significant digits and no exponent, which might break at the end of a line."""
    if 0 < abs(value) < _LEAST_NATS:
        return f"below {_LEAST_NATS:f}"
    return f"{value:.4g}" if not 0 < abs(value) < 1e-4 else f"{value:.7f}"


def disturbance(share: float | None) -> str:
    """That other programs used the ``share`` of all cores meanwhile, 0 to 1; "" where nobody knows."""
    return "" if share is None else f"other programs used {100 * share:.0f} % of the cores meanwhile"


def _held(pool: Mapping[str, Any]) -> int:
    """What the system and other programs hold of a pool of a ``Budget`` as JSON."""
    return sum(line["nbytes"] for line in pool["lines"] if line["name"] in (SYSTEM, DESKTOP))


def _part_filled(speed: Mapping[str, Any]) -> str:
    """How much of the context was filled when memory was looked at, if that is not all of it."""
    filled, context = speed["filled_tokens"], speed["context"]
    return f" with {filled:,} of {context:,} tokens" if filled < context else ""


def promises(
    plan: Mapping[str, Any],
    build_bytes: int,
    quality: Mapping[str, Any],
    speed: Mapping[str, Any],
    budget: Mapping[str, Any],
    *,
    on_device: bool,
    not_finite: str = "",
) -> list[Promise]:
    """The lines of the report.

    Args:
        plan: ``Plan`` as JSON.
        speed: result of ``benchmark.benchmark``.
        on_device: whether this machine is the device; otherwise its memory and speed only inform.
        not_finite: a tensor of the file that holds NaN or infinity, or "".
    """
    predicted = plan["predicted"]
    limit = budget["file_limit_bytes"]
    exact = build_bytes == predicted["file_bytes"] and (limit is None or build_bytes <= limit)
    lines = [
        Promise(
            "file size",
            f"{predicted['file_bytes']:,} bytes",
            f"{build_bytes:,} bytes",
            KEPT if exact else BROKEN,
        )
    ]
    here = "" if on_device else " on this machine"
    pools = {pool["pool"]: pool for pool in budget["pools"]}
    memory, reserve = predicted["pool_bytes"]["ram"], _held(pools["ram"])
    within = speed["peak_bytes"] <= (memory - reserve) * (1 + _MEMORY_TOLERANCE)
    fits = speed["peak_bytes"] + reserve <= pools["ram"]["total_bytes"]
    # Resident memory is the whole of it only where everything is in one pool that the CPU computes in.
    whole = limit is None and on_device and len(budget["pools"]) == 1 and not plan["launch"]["gpu_layers"]
    # What is promised is the whole context; with less of it, only too much is sure.
    filled, part = speed["filled_tokens"] >= speed["context"], _part_filled(speed)
    verdict = (BROKEN if not (within and fits) else KEPT if filled else INFORMATION) if whole else INFORMATION
    peak = format_bytes(speed["peak_bytes"]) + part
    lines.append(Promise("peak memory", format_bytes(memory - reserve), peak, verdict))
    if "vram" in predicted["pool_bytes"] and speed["device_bytes"]:
        promised = predicted["pool_bytes"]["vram"] - _held(pools["vram"])
        kept = speed["device_bytes"] <= promised * (1 + _MEMORY_TOLERANCE)  # allocated at once, whatever is filled
        verdict = (KEPT if kept else BROKEN) if on_device else INFORMATION
        lines.append(
            Promise("memory of the GPU", format_bytes(promised), format_bytes(speed["device_bytes"]), verdict)
        )
    wrong = [f"tensor {not_finite}"] if not_finite else []
    wrong += [] if speed["finite"] else ["output"]
    verdict = BROKEN if wrong else KEPT
    lines.append(Promise(FINITE, "yes", f"no: {', '.join(wrong)}" if wrong else "yes", verdict))
    lines.append(
        Promise(
            "KL divergence from the source (nats per token)",
            nats_in_words(predicted["nats"]),
            nats_in_words(quality["kl_mean"]),
            INFORMATION if math.isfinite(quality["kl_mean"]) else BROKEN,
        )
    )
    lines.append(
        Promise(
            DECODE,
            rate(predicted["decode_per_s"]),
            rate(speed["decode_per_s"]) + here,
            INFORMATION,
        )
    )
    expected = rate(predicted["prefill_per_s"]) if predicted.get("prefill_per_s") else ""
    prefill = rate(speed["prefill_per_s"]) + here
    lines.append(Promise("prefill (tokens per second)", expected, prefill, INFORMATION))
    first = f"first token after {speed['prompt_tokens']} tokens"
    lines.append(Promise(first, "", format_seconds(speed["first_token_seconds"]) + here, INFORMATION))
    if (share := speed["others"]) is not None and share >= DISTURBED_SHARE:
        lines.append(Promise(MEANWHILE, "", f"{100 * share:.0f} % of the cores", INFORMATION))
    return lines
