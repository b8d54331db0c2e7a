"""Predicted against measured speed, for six plans of a model: other sizes, other types, other numbers of experts.

    python tests/benchmarks/latency.py [MODEL] [--shares 0.9,0.55,0.35,0.25,0.17] [--threads N]

The shares are sizes of the file in those of the source; the last plan keeps half of the experts, at the last size
but one. With one thread, the default, processor time is counted, and the best of many short runs counts, because
other programs take the caches away; with more threads the machine has to be one's own. Prints the ratio of
predicted to measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from edgeprune import pipeline
from edgeprune.build.builder import Build
from edgeprune.cli.console import Console
from edgeprune.decide.latency import speed
from edgeprune.decide.plan import Plan
from edgeprune.measure import child
from edgeprune.measure.rates import kernel_rates
from edgeprune.pipeline import Run, Settings
from edgeprune.units import format_bytes

PROMPT, GENERATED, REPEATS, CONTEXT = 256, 8, 40, 512


def plans(base: Settings, shares: list[float]) -> Iterator[tuple[Run, Plan, Build]]:
    """The plans, built one after the other."""
    whole = Run(base, Console())
    size, experts = whole.source.stat().st_size, whole.architecture.experts
    wishes: list[tuple[float, int | None]] = [(share, None) for share in shares]
    if whole.architecture.count_allowed(experts // 2):
        wishes.append((shares[-2:][0], experts // 2))
    for share, keep in wishes:
        run = Run(replace(base, file_bytes=int(share * size), keep=keep), Console())
        plan = run.plan()
        yield run, plan, run.build(plan)


def measured(build: Build, plan: Plan, threads: int) -> dict[str, Any]:
    launch = replace(plan.launch, threads=threads, context=CONTEXT)
    value: dict[str, Any] = child.call(
        "edgeprune.measure.benchmark:benchmark",
        {
            "model": build.path,
            "launch": launch.to_json(),
            "prompt_tokens": PROMPT,
            "generated_tokens": GENERATED,
            "repeats": REPEATS,
            "processor_time": threads == 1,
        },
        as_user=True,
    )
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--text", action="append", default=[])
    parser.add_argument("--shares", default="0.9,0.55,0.35,0.25,0.17")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-o", "--output", default="runs/benchmark-latency")
    arguments = parser.parse_args()
    base = Settings(
        source=arguments.model,
        texts=tuple(arguments.text),
        file_bytes=1 << 40,  # no limit: every size has its own
        output=arguments.output,
        heal=False,
        baselines=False,
    )
    head = ("file", "K", "decode predicted", "measured", "ratio", "prefill predicted", "measured", "ratio")
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    with pipeline.opened(base, Console()):
        shares = [float(share) for share in arguments.shares.split(",")]
        for run, plan, build in plans(base, shares):
            predicted = speed(
                run.architecture,
                plan.kept,
                plan.types,
                kernel_rates(),
                prompt_tokens=PROMPT,
                threads=arguments.threads,
                bandwidth=run.profile.ram.bandwidth_bytes_per_s,
            )
            assert predicted is not None
            found = measured(build, plan, arguments.threads)
            decode, prefill = found["best"]["decode_per_s"], found["best"]["prefill_per_s"]
            print(
                f"| {format_bytes(build.nbytes)} | {plan.kept} "
                f"| {predicted.decode_per_s:,.0f} | {decode:,.0f} | {predicted.decode_per_s / decode:.2f} "
                f"| {predicted.prefill_per_s:,.0f} | {prefill:,.0f} | {predicted.prefill_per_s / prefill:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
