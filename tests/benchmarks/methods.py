"""Methods of choosing experts side by side, at several numbers of experts.

    python tests/benchmarks/methods.py MODEL --text CALIBRATION.txt --eval-text HELDOUT.txt --keep 28,24,20,16,12

Prints the KL divergence from the whole model in nats per token on the held-out text, measured by masking the router,
and for each number of experts how replay stands to the best published score and to REAP.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from edgeprune import pipeline
from edgeprune.cli.console import Console
from edgeprune.settings import Settings

OURS, REAP, RANDOM = "replay", "reap", "random"


@click.command()
@click.argument("model")
@click.option("--text", multiple=True, required=True, help="Calibration text.")
@click.option("--eval-text", multiple=True, required=True, help="Held-out text.")
@click.option("--keep", default="28,24,20,16,12", show_default=True, help="Numbers of experts to keep.")
@click.option("--window", default=256, show_default=True, help="Tokens per window.")
@click.option("--methods", help="Which methods; all by default.")
@click.option("-o", "--output", help="Run directory; a temporary one by default.")
def main(
    model: str,
    text: tuple[str, ...],
    eval_text: tuple[str, ...],
    keep: str,
    window: int,
    methods: str | None,
    output: str | None,
) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        settings = Settings(
            str(Path(model).resolve()),
            device="auto",
            texts=text,
            evaluation_texts=eval_text,
            window=window,
            evaluation_tokens=10_240,
            output=output or str(Path(scratch) / "run"),
        )
        with pipeline.opened(settings, Console()) as run:
            experts = run.architecture.experts
            wanted = methods.split(",") if methods else run.comparable()
        counts = [int(count) for count in keep.split(",")]
        found, _ = pipeline.compare(settings, Console(), [count / experts for count in counts], wanted, 3)
    kl = {(row.method, row.kept): row.quality["kl_mean"] for row in found.rows}
    click.echo("| method | " + " | ".join(f"K={count}" for count in counts) + " |")
    click.echo("|---" * (len(counts) + 1) + "|")
    for method in sorted(wanted, key=lambda name: kl[name, counts[len(counts) // 2]]):
        click.echo(f"| {method} | " + " | ".join(f"{kl[method, count]:.4f}" for count in counts) + " |")
    published = [name for name in wanted if name not in (OURS, RANDOM, "naee")]
    if OURS in wanted and published:
        for count in counts:
            best = min(published, key=lambda name: kl[name, count])
            against = f"{kl[OURS, count] / kl[best, count]:.2f} of the best published ({best})"
            reap = f", {kl[OURS, count] / kl[REAP, count]:.2f} of REAP" if REAP in published else ""
            click.echo(f"K={count}: replay at {against}{reap}")


if __name__ == "__main__":
    main()
