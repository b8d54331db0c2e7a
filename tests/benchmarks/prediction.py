"""Predicted against measured KL divergence over a ladder of file sizes.

    python tests/benchmarks/prediction.py MODEL --text CALIBRATION.txt --eval-text HELDOUT.txt [--heal]

For each size the solver's best plan is built, as ``fit`` would, and measured on held-out text; the last lines are the
largest deviation above 2.5 bits per weight and the rank correlation over all sizes (Spearman).
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import words

from edgeprune import pipeline
from edgeprune.cli.console import Console
from edgeprune.decide.plan import Plan
from edgeprune.pipeline import Run
from edgeprune.units import format_bytes


def measured(run: Run, plan: Plan) -> float:
    """Mean divergence of the file for ``plan``, nats per token."""
    output = run.folder.scratch / "plan.gguf"
    run.construct(plan, output)
    nats = float(run.quality(output, "quality of the plan")["all"]["kl_mean"])
    output.unlink()
    return nats


def main() -> None:
    from scipy.stats import spearmanr

    parser = words.parser(__doc__, "runs/benchmark-prediction")
    parser.add_argument("--heal", action="store_true", help="compensate the down projections, as fit does by default")
    parser.add_argument("--bits", default="1.9,2.1,2.3,2.6,2.9,3.2,3.6,4.0,4.5,5.2,6.0,7.0", help="per weight")
    arguments = parser.parse_args()
    method = "reap" if arguments.heal else "replay"
    settings = words.settings(arguments, file_bytes=1 << 40, heal=arguments.heal, method=method)
    print("| bits per weight | bytes | K | predicted | measured | predicted / measured | seconds |", flush=True)
    print(f"|{'---|' * 7}", flush=True)
    rows = []
    with pipeline.opened(settings, Console()) as run:
        weights = sum(int(np.prod(t.shape, dtype=np.int64)) for t in run.architecture.tensors)
        for bits in map(float, arguments.bits.split(",")):
            started = time.perf_counter()
            limited = Run(replace(run.settings, file_bytes=int(bits * weights / 8)), run.listener)
            kept = ("source", "file", "architecture", "statistics", "sensitivity")
            limited.__dict__.update({k: v for k, v in run.__dict__.items() if k in kept})
            plan = limited.candidates()[0].plan
            rows.append((bits, plan.predicted.nats, measured(limited, plan)))
            seconds = time.perf_counter() - started
            ratio = rows[-1][1] / rows[-1][2]
            print(
                f"| {bits:.2f} | {format_bytes(plan.predicted.file_bytes)} | {plan.kept} | {rows[-1][1]:.6f} "
                f"| {rows[-1][2]:.6f} | {ratio:.2f} | {seconds:.0f} |",
                flush=True,
            )
    above = [predicted / found for bits, predicted, found in rows if bits > 2.5]
    order = spearmanr([row[1] for row in rows], [row[2] for row in rows]).statistic
    print(f"\nabove 2.5 bits per weight: {min(above):.2f} to {max(above):.2f} of what was measured")
    print(f"rank correlation over {len(rows)} sizes: {order:.3f}")
    print(f"folder: {Path(arguments.output).resolve()}")


if __name__ == "__main__":
    main()
