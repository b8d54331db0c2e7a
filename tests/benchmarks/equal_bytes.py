"""Files of equal bytes: llama.cpp presets, and below the smallest REAP and then a preset, against edgeprune.

    python tests/benchmarks/equal_bytes.py MODEL --text CALIBRATION.txt --eval-text HELDOUT.txt

For each preset: build it with llama.cpp's own quantizer, let the solver choose within exactly its bytes, build that
plan without and with healing, and measure all against the source, in one run and with one importance matrix, on the
half of the held-out text that nothing is chosen with. For shares of the smallest preset's bytes the rival is REAP
in one shot with as many experts as that preset leaves room for. What `fit` ships is never worse than the preset;
this program reports the plan before that choice.
A curve of all of it is written to equal-bytes.svg in the run directory.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import words

from edgeprune import pipeline
from edgeprune.cli.console import Console
from edgeprune.decide.candidates import priced
from edgeprune.decide.plan import Plan
from edgeprune.files import write_text
from edgeprune.measure import child
from edgeprune.measure.text import REPORTING
from edgeprune.model.layout import layout
from edgeprune.pipeline import Run
from edgeprune.units import format_bytes

PRESETS = "Q6_K,Q5_K_M,Q4_K_M,IQ4_XS,Q3_K_M,IQ3_XXS,Q2_K,IQ2_S,IQ2_XXS,IQ1_M,IQ1_S"
# These are held to "never above the preset" alone: near the source's own rounding there is nothing to win.
NEAR_LOSSLESS = ("Q6_K", "Q5_K_M")

_TICK = 5  # MiB between two numbers of the curve's axis


@dataclass(frozen=True)
class Row:
    """One size: its name and bytes, mean divergence of the rival, of the plan without and with healing, the plan's
    prediction, experts and bits per weight, and how long it took to build it either way."""

    size: str
    nbytes: int
    rival: float
    plain: float
    healed: float
    predicted: float
    kept: str
    bits: float
    seconds: tuple[float, float]

    @property
    def ratio(self) -> float:
        return self.healed / self.rival


@dataclass(frozen=True)
class Flat:
    """A preset's file: bytes, mean divergence, and the GGML type of every tensor."""

    nbytes: int
    nats: float
    types: dict[str, str]


def preset(run: Run, model: Run, name: str) -> Flat:
    """``name`` of the source of ``model``, measured against that of ``run``."""
    path = run.folder.scratch / f"{name}.gguf"
    run.folder.scratch.mkdir(parents=True, exist_ok=True)
    made = child.call(
        "edgeprune.build.preset:quantize",
        {
            "model": str(model.source),
            "statistics": model.statistics_file,
            "output": str(path),
            "preset": name,
            "expected_bytes": 0,
        },
    )
    nats = run.quality(path, f"quality of {name}", REPORTING)["all"]["kl_mean"]
    path.unlink()
    return Flat(made["nbytes"], nats, made["types"])


def chosen(run: Run, nbytes: int) -> Plan:
    """What edgeprune chooses for a file of at most ``nbytes``."""
    limited = Run(replace(run.settings, file_bytes=nbytes), run.listener)
    limited.__dict__.update({k: v for k, v in run.__dict__.items() if k in ("source", "file", "architecture")})
    return limited.best_plan()


def built(run: Run, plan: Plan, heal: bool) -> tuple[float, float]:
    """Mean divergence of the file for ``plan``, and the seconds that it took to build it."""
    output, started = run.folder.scratch / "plan.gguf", time.perf_counter()
    build = run.construct(replace(plan, heal=plan.heal and heal), output)
    seconds = time.perf_counter() - started
    assert build.nbytes <= plan.predicted.file_bytes
    nats = run.quality(output, "quality of the plan", REPORTING)["all"]["kl_mean"]
    output.unlink()
    return nats, seconds


def row(run: Run, size: str, nbytes: int, rival: float) -> Row:
    plan = chosen(run, nbytes)
    run.teacher(run.healing_tokens(plan))  # once for all sizes of so much text, so it is in no row's seconds
    assert plan.predicted.file_bytes <= nbytes
    (plain, plain_seconds), (healed, healed_seconds) = built(run, plan, False), built(run, plan, True)
    weights = sum(int(np.prod(t.kept_shape(plan.kept, plan.width), dtype=np.int64)) for t in run.architecture.tensors)
    bits = 8 * plan.predicted.file_bytes / weights
    kept = f"{plan.kept}, {plan.width} channels" if plan.width else str(plan.kept)
    return Row(size, nbytes, rival, plain, healed, plan.predicted.nats, kept, bits, (plain_seconds, healed_seconds))


def reaped(run: Run, flat: Flat, name: str, nbytes: int) -> Flat:
    """REAP in one shot, then the preset ``name`` of what is left, in at most ``nbytes``."""
    architecture = run.architecture
    counts = (n for n in range(architecture.experts, 0, -1) if architecture.count_allowed(n))
    fitting = (n for n in counts if layout(run.file, architecture, n, flat.types, []).nbytes <= nbytes)
    kept = next(fitting)
    anywhere = Run(replace(run.settings, file_bytes=1 << 60), run.listener)
    problem = replace(anywhere.unmeasured({}, frozenset()), ranked=run.ranked("reap", [kept]), drop_nats={kept: 0.0})
    found = priced(problem, kept, {})
    assert found is not None
    path = run.folder.path / f"reap-{kept}.gguf"
    plan = found.plan.to_json()
    child.call("edgeprune.build.builder:build", {"model": str(run.source), "plan": plan, "output": str(path)})
    settings = replace(run.settings, source=str(path), output=str(run.folder.path / f"reap-{kept}"))
    with pipeline.opened(settings, run.listener) as pruned:
        made = preset(run, pruned, name)
    path.unlink()
    assert made.nbytes <= nbytes
    return made


def printed(row: Row) -> str:
    return (
        f"| {row.size} | {format_bytes(row.nbytes)} | {row.rival:.5f} | {row.plain:.5f} | {row.healed:.5f} "
        f"| {row.ratio:.2f} | {row.predicted:.5f} | {row.kept} | {row.bits:.2f} "
        f"| {row.seconds[0]:.1f} s, {row.seconds[1]:.1f} s |"
    )


def curve(rows: Sequence[Row]) -> str:
    """File size against divergence, both sides, as an SVG of its own that is readable on light and dark ground."""
    width, height, left, right, top, bottom = 720, 400, 70, 40, 20, 50
    sizes = [row.nbytes / 2**20 for row in rows]
    nats = [value for row in rows for value in (row.rival, row.healed)]
    low, high = math.floor(math.log10(min(nats))), math.ceil(math.log10(max(nats)))

    def place(size: float, value: float) -> tuple[float, float]:
        across = (size - min(sizes)) / (max(sizes) - min(sizes))
        up = (math.log10(value) - low) / (high - low)
        return left + across * (width - left - right), height - bottom - up * (height - top - bottom)

    body = [f'<rect width="{width}" height="{height}" fill="#fff"/>']
    for power in range(low, high + 1):
        y = place(min(sizes), 10.0**power)[1]
        body.append(f'<path d="M{left} {y:.1f}H{width - right}" stroke="#ddd"/>')
        body.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{10.0**power:g}</text>')
    lines = (("#b3541e", "stock preset (REAP first below the smallest)", "rival"), ("#1b6ca8", "edgeprune", "healed"))
    for number, (colour, label, name) in enumerate(lines):
        points = [place(row.nbytes / 2**20, getattr(row, name)) for row in rows]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        body.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        body += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>' for x, y in points]
        body.append(f'<text x="{width - right}" y="{top + 16 + 18 * number}" text-anchor="end" fill="{colour}">')
        body.append(f"{label}</text>")
    for number, row in enumerate(rows):  # of neighbours one is written higher, which leaves room for both
        x, y = place(row.nbytes / 2**20, row.rival)
        body.append(f'<text x="{x + 2:.1f}" y="{y - (22, 8)[number % 2]:.1f}" font-size="10">{row.size}</text>')
    for size in range(math.ceil(min(sizes) / _TICK) * _TICK, math.floor(max(sizes)) + 1, _TICK):
        x = place(size, 10.0**low)[0]
        body.append(f'<text x="{x:.1f}" y="{height - bottom + 18}" text-anchor="middle">{size}</text>')
    caption = "file size, MiB; vertical: mean KL divergence from the source, nats per token"
    body.append(f'<text x="{width / 2}" y="{height - 10}" text-anchor="middle">{caption}</text>')
    title = "<title>Size against divergence: stock presets and edgeprune at equal bytes</title>"
    frame = f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {frame}>{title}{"".join(body)}</svg>\n'


def main() -> None:
    parser = words.parser(__doc__, "runs/benchmark-equal-bytes")
    parser.add_argument("--presets", default=PRESETS)
    parser.add_argument("--shares", default="0.8,0.6", help="of the last preset's bytes")
    parser.add_argument("--calibration-tokens", type=int, default=80_000)
    parser.add_argument("--sensitivity-tokens", type=int, default=2_048)
    arguments = parser.parse_args()
    settings = words.settings(
        arguments,
        file_bytes=1 << 40,  # no limit: every size has its own
        calibration_tokens=arguments.calibration_tokens,
        sensitivity_tokens=arguments.sensitivity_tokens,
    )
    rows: list[Row] = []
    columns = "size of | bytes | its KL | plan | healed | ratio | predicted | K | bits per weight | build"
    print(f"| {columns} |\n|{'---|' * 10}", flush=True)
    with pipeline.opened(settings, Console()) as run:
        _ = run.statistics, run.sensitivity
        names, flat = arguments.presets.split(","), None
        for name in names:
            flat = preset(run, run, name)
            rows.append(row(run, name, flat.nbytes, flat.nats))
            print(printed(rows[-1]), flush=True)
        for share in filter(None, arguments.shares.split(",")):
            assert flat is not None
            nbytes = int(float(share) * flat.nbytes)
            rival = reaped(run, flat, names[-1], nbytes)
            rows.append(row(run, f"{float(share):.0%} of {names[-1]}", nbytes, rival.nats))
            print(printed(rows[-1]), flush=True)
        write_text(run.folder.path / "equal-bytes.svg", curve(rows))
    counted = [one.ratio for one in rows if one.size in set(names) - set(NEAR_LOSSLESS)]
    if counted:
        mean = math.exp(sum(map(math.log, counted)) / len(counted))
        print(f"\nbelow {NEAR_LOSSLESS[-1]}: geometric mean of the ratios {mean:.2f}, largest {max(counted):.2f}")
    print(f"folder: {Path(arguments.output).resolve()}")


if __name__ == "__main__":
    main()
