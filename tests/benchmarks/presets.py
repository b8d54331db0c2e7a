"""Plans against stock llama.cpp presets at equal file sizes, on any MoE checkpoint or GGUF.

    python tests/benchmarks/presets.py MODEL --text CALIBRATION.txt --eval-text HELDOUT.txt

For each preset: build it with llama.cpp's own quantizer, let the solver choose types within exactly its
bytes, build that plan, and measure both against the source on the held-out text in the same run. Both
sides use the same importance matrix. The shipped file is never the worse of the two; this program
reports the solver's own plan, before that choice.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

from edgeprune import pipeline
from edgeprune.cli.console import Console
from edgeprune.measure import child
from edgeprune.pipeline import Run, Settings
from edgeprune.units import format_bytes

PRESETS = "Q4_K_M,Q3_K_M,IQ3_XXS,Q2_K,IQ2_XS,IQ1_M"


@dataclass(frozen=True)
class Row:
    """One size: bytes of the preset, mean divergence of the preset, of the plan without and with healing, the plan's
    prediction and experts, and how long it took to build it either way."""

    nbytes: int
    preset: float
    plain: float
    healed: float
    predicted: float
    kept: int
    plain_seconds: float
    healed_seconds: float


def compare(run: Run, preset: str, settings: Settings) -> Row:
    """Build the preset and the plan for its bytes, and measure them."""
    scratch = run.folder.scratch
    scratch.mkdir(parents=True, exist_ok=True)
    path = scratch / f"{preset}.gguf"
    common = {"model": str(run.source), "statistics": str(run.folder.statistics)}
    made = child.call(
        "edgeprune.build.preset:quantize", {**common, "output": str(path), "preset": preset, "expected_bytes": 0}
    )
    flat = run.quality(path, f"quality of {preset}")["all"]["kl_mean"]
    path.unlink()
    limited = Run(replace(settings, file_bytes=made["nbytes"]), run.listener)
    limited.__dict__.update({k: v for k, v in run.__dict__.items() if k in ("source", "file", "architecture")})
    plan = limited.candidates()[0].plan
    found, seconds = [], []
    for heal in (False, True):
        output, started = scratch / f"plan-{preset}.gguf", time.perf_counter()
        store = run.healed(plan) if heal else ""
        arguments = {**common, "plan": plan.to_json(), "output": str(output), "store": store}
        build = child.call("edgeprune.build.builder:build", arguments)
        seconds.append(time.perf_counter() - started)
        assert build["nbytes"] == plan.predicted.file_bytes <= made["nbytes"]
        found.append(run.quality(output, "quality of the plan")["all"]["kl_mean"])
        output.unlink()
    return Row(made["nbytes"], flat, *found, plan.predicted.nats, plan.kept, *seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", action="append", default=[])
    parser.add_argument("--eval-text", action="append", default=[])
    parser.add_argument("--presets", default=PRESETS)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--calibration-tokens", type=int, default=80_000)
    parser.add_argument("--evaluation-tokens", type=int, default=10_240)
    parser.add_argument("--sensitivity-tokens", type=int, default=2_048)
    parser.add_argument("-o", "--output", default="runs/benchmark-presets")
    arguments = parser.parse_args()
    settings = Settings(
        source=arguments.model,
        file_bytes=1,
        texts=tuple(arguments.text),
        evaluation_texts=tuple(arguments.eval_text),
        window=arguments.window,
        calibration_tokens=arguments.calibration_tokens,
        evaluation_tokens=arguments.evaluation_tokens,
        sensitivity_tokens=arguments.sensitivity_tokens,
        output=arguments.output,
    )
    print(f"| size of | bytes | preset KL | plan KL | healed KL | ratio | predicted | K | build |\n|{'---|' * 9}")
    ratios = []
    with pipeline.opened(settings, Console()) as run:
        _ = run.statistics, run.sensitivity, run.teacher
        for preset in arguments.presets.split(","):
            row = compare(run, preset, settings)
            ratios.append(row.healed / row.preset)
            print(
                f"| {preset} | {format_bytes(row.nbytes)} | {row.preset:.5f} | {row.plain:.5f} | {row.healed:.5f} "
                f"| {ratios[-1]:.2f} | {row.predicted:.5f} | {row.kept} "
                f"| {row.plain_seconds:.0f} s, {row.healed_seconds:.0f} s |",
                flush=True,
            )
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    print(f"\ngeometric mean of the ratios {mean:.2f}; {sum(r <= 0.8 for r in ratios)} of {len(ratios)} at most 0.8")
    print(f"folder: {Path(arguments.output).resolve()}")


if __name__ == "__main__":
    main()
