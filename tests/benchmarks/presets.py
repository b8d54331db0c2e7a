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
from dataclasses import replace
from pathlib import Path

from edgeprune import pipeline
from edgeprune.cli.console import Console
from edgeprune.measure import child
from edgeprune.pipeline import Run, Settings
from edgeprune.units import format_bytes

PRESETS = "Q4_K_M,Q3_K_M,IQ3_XXS,Q2_K,IQ2_XS,IQ1_M"


def compare(run: Run, preset: str, settings: Settings) -> tuple[int, dict[str, float], dict[str, float], float, int]:
    """(bytes of the preset, its quality, the plan's quality, predicted nats, kept experts)."""
    scratch = run.folder.scratch
    scratch.mkdir(parents=True, exist_ok=True)
    path = scratch / f"{preset}.gguf"
    made = child.call(
        "edgeprune.build.preset:quantize",
        {
            "model": str(run.source),
            "output": str(path),
            "preset": preset,
            "statistics": str(run.folder.statistics),
            "expected_bytes": 0,
        },
    )
    flat = run.quality(path, f"quality of {preset}")["all"]
    path.unlink()
    limited = Run(replace(settings, file_bytes=made["nbytes"]), run.listener)
    limited.__dict__.update({k: v for k, v in run.__dict__.items() if k in ("source", "file", "architecture")})
    plan = limited.candidates()[0].plan
    output = scratch / f"plan-{preset}.gguf"
    build = child.call(
        "edgeprune.build.builder:build",
        {
            "model": str(run.source),
            "plan": plan.to_json(),
            "output": str(output),
            "statistics": str(run.folder.statistics),
        },
    )
    assert build["nbytes"] == plan.predicted.file_bytes <= made["nbytes"]
    ours = run.quality(output, "quality of the plan")["all"]
    output.unlink()
    return made["nbytes"], flat, ours, plan.predicted.nats, plan.kept


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
    print(f"| size of | bytes | preset KL | plan KL | ratio | predicted | K |\n|{'---|' * 7}")
    ratios = []
    with pipeline.opened(settings, Console()) as run:
        _ = run.statistics, run.sensitivity
        for preset in arguments.presets.split(","):
            nbytes, flat, ours, predicted, kept = compare(run, preset, settings)
            ratios.append(ours["kl_mean"] / flat["kl_mean"])
            print(
                f"| {preset} | {format_bytes(nbytes)} | {flat['kl_mean']:.5f} | {ours['kl_mean']:.5f} "
                f"| {ratios[-1]:.2f} | {predicted:.5f} | {kept} |",
                flush=True,
            )
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    print(f"\ngeometric mean of the ratios {mean:.2f}; {sum(r <= 0.8 for r in ratios)} of {len(ratios)} at most 0.8")
    print(f"folder: {Path(arguments.output).resolve()}")


if __name__ == "__main__":
    main()
