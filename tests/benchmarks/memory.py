"""Predicted against measured peak memory, for plans of several sizes and contexts.

    python tests/benchmarks/memory.py MODEL [--memory 60MiB,80MiB] [--contexts 512,2048]

For each budget and context: the plan, its file, and a run of llama.cpp that fills the whole context in a
child process. Prints the ratio of predicted to measured.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from edgeprune import pipeline
from edgeprune.cli.console import Console
from edgeprune.pipeline import Run, Settings
from edgeprune.units import format_bytes, parse_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", action="append", default=[])
    parser.add_argument("--memory", default="80MiB,75MiB")
    parser.add_argument("--contexts", default="512,2048")
    parser.add_argument("-o", "--output", default="runs/benchmark-memory")
    arguments = parser.parse_args()
    base = Settings(source=arguments.model, texts=tuple(arguments.text), memory_bytes=1, output=arguments.output)
    print(f"| memory | context | file | predicted peak | measured peak | predicted / measured |\n|{'---|' * 6}")
    with pipeline.opened(base, Console()):
        for amount in arguments.memory.split(","):
            for context in map(int, arguments.contexts.split(",")):
                run = Run(replace(base, memory_bytes=parse_bytes(amount), context=context), Console())
                plan = run.plan()
                build = run.build(plan)
                measured = run.speed(plan, build)["peak_bytes"]
                predicted = sum(plan.predicted.pool_bytes.values())
                print(
                    f"| {amount} | {context} | {format_bytes(build.nbytes)} | {format_bytes(predicted)} "
                    f"| {format_bytes(measured)} | {predicted / measured:.3f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
