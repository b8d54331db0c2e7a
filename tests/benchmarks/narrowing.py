"""Narrowing experts against dropping some of them at equal bytes, weights otherwise untouched, on any MoE model.

    python tests/benchmarks/narrowing.py MODEL --text CALIBRATION.txt --eval-text HELDOUT.txt --widths 0.75,0.5

For each width F' of F: the number of experts of the same bytes, K / E = F' / F, chosen by REAP, and every score of
neurons; unhealed by masking, and as files with healed experts in the source's own types. All against the source on
held-out text.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import words

from edgeprune import pipeline
from edgeprune.cli.console import Console
from edgeprune.decide.candidates import priced
from edgeprune.decide.keep import keep_set
from edgeprune.decide.narrowing import asked_width
from edgeprune.decide.plan import Plan
from edgeprune.pipeline import Run


def dropped(run: Run, kept: int) -> tuple[Plan, dict[str, Any]]:
    """The plan that keeps REAP's ``kept`` experts, and its quality unhealed."""
    ranked = run.ranked("reap", [kept])
    mask = {str(layer): list(ids) for layer, ids in keep_set(ranked, run.architecture, kept).items()}
    found = run.divergence(run.source, "held_out", [mask], f"reap, K={kept}")[0]
    problem = replace(run.unmeasured({}, frozenset()), ranked=ranked, drop_nats={kept: 0.0}, method="reap")
    return _plan(run, problem, kept), found["all"]


def narrowed(run: Run, narrowing: str, width: int) -> tuple[Plan, dict[str, Any]]:
    """The same of keeping ``width`` channels of every expert."""
    experts, mask = run.architecture.experts, run.narrowed(width, narrowing)
    title = f"{narrowing}, F'={width}"
    found = run.divergence(run.source, "held_out", [None], title, [mask])[0]
    problem = run.unmeasured({}, frozenset())
    problem = replace(
        problem,
        drop_nats={experts: 0.0},
        width=width,
        narrowing=narrowing,
        channels=run.channels_digest(narrowing),
    )
    return _plan(run, problem, experts), found["all"]


def _plan(run: Run, problem: Any, kept: int) -> Plan:
    found = priced(replace(problem, heal=True), kept, {})
    assert found is not None
    return replace(found.plan, made_from={**found.plan.made_from, "healing": run.healing})


def healed(run: Run, plan: Plan) -> tuple[dict[str, Any], int, float]:
    """Quality and bytes of the healed file, and the seconds it took to make."""
    run.teacher(run.healing_tokens(plan))
    started = time.perf_counter()
    build = run.build(plan)
    seconds = time.perf_counter() - started
    return run.quality(Path(build.path), "healed")["all"], build.nbytes, seconds


def show(name: str, plan: Plan, before: dict[str, Any], after: tuple[dict[str, Any], int, float]) -> None:
    quality, nbytes, seconds = after
    tails = f"{before['kl_99']:.2f} | {quality['kl_99']:.3f}"
    print(
        f"| {name} | {nbytes / 2**20:.2f} MiB | {before['kl_mean']:.4f} | {quality['kl_mean']:.4f} | {tails} |"
        f" {seconds:.0f} s |",
        flush=True,
    )


def main() -> None:
    parser = words.parser(__doc__, "runs/benchmark-narrowing")
    words.healing_options(parser)
    parser.add_argument("--widths", default="0.75,0.5")
    parser.add_argument("--narrowings", default="ziplm,camera,energy,tenp")
    parser.add_argument("--reservoir", type=int, default=8_192)
    arguments = parser.parse_args()
    settings = words.settings(arguments, device="auto", reservoir_tokens=arguments.reservoir)
    with pipeline.opened(settings, Console()) as run:
        print("| | file | unhealed | healed | 99 % | healed 99 % | built in |\n|---|---|---|---|---|---|---|")
        architecture = run.architecture
        for asked in map(float, arguments.widths.split(",")):
            width = asked_width(asked, architecture)
            kept = round(architecture.experts * width / architecture.expert_width)
            if architecture.count_allowed(kept):
                plan, before = dropped(run, kept)
                show(f"REAP, K={kept} of {architecture.experts}", plan, before, healed(run, plan))
            for name in filter(None, arguments.narrowings.split(",")):
                plan, before = narrowed(run, name, width)
                title = f"{name}, F'={width} of {architecture.expert_width}"
                show(title, plan, before, healed(run, plan))


if __name__ == "__main__":
    main()
