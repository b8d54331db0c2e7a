"""Dropping experts with and without healing, weights otherwise untouched, on any MoE checkpoint or GGUF.

    python tests/benchmarks/healing.py MODEL --text CALIBRATION.txt --eval-text HELDOUT.txt --keep 28,24,16

For each number of experts: REAP one-shot, measured by masking the router, and the methods named, as files with healed
experts in the source's own types; then each way of merging, without and with healing. All against the source on
held-out text, domain by domain.
"""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import product
from pathlib import Path

import words

from edgeprune import pipeline
from edgeprune.cli.console import Console
from edgeprune.decide.candidates import priced
from edgeprune.decide.keep import keep_set
from edgeprune.decide.plan import DROP, Plan
from edgeprune.files import digest
from edgeprune.pipeline import Run

MERGER = "reap"  # what prices a plan whose experts are chosen by the way they are merged
Row = dict[str, dict[str, float]]


def masked(run: Run, method: str, kept: int) -> Row:
    """Quality by domain of keeping the best ``kept`` experts, without healing."""
    keep = keep_set(run.ranked(method, [kept]), run.architecture, kept)
    mask = {str(layer): list(ids) for layer, ids in keep.items()}
    found = run.divergence(run.source, "held_out", [mask], f"{method}, K={kept}")[0]
    return {"all": found["all"], **found["domains"]}


def plan_of(run: Run, method: str, kept: int, reduce: str) -> Plan:
    """The plan that drops or merges experts and changes no type."""
    problem = run.unmeasured({}, frozenset())
    ranked = run.ranked(method, [kept])
    found = priced(replace(problem, ranked=ranked, drop_nats={kept: 0.0}, method=method, heal=True), kept, {})
    assert found is not None
    statistics = digest(run.statistics.made_from)
    made_from = {**found.plan.made_from, "healing": run.healing, "statistics": statistics}
    return run.merging(replace(found.plan, made_from=made_from), reduce)


def built(run: Run, method: str, kept: int, reduce: str, *, heal: bool) -> tuple[Row, float]:
    """Quality by domain of the file, and the seconds it took to make."""
    if heal:
        run.teacher(run.healing_tokens(dropping=True))
    plan = replace(plan_of(run, method, kept, reduce), heal=heal)
    started = time.perf_counter()
    build = run.build(plan)
    seconds = time.perf_counter() - started
    found = run.quality(Path(build.path), f"{method}, {reduce}, K={kept}")
    return {"all": found["all"], **found["domains"]}, seconds


def main() -> None:
    parser = words.parser(__doc__, "runs/benchmark-healing")
    words.healing_options(parser)
    parser.add_argument("--keep", default="28,24,16")
    parser.add_argument("--methods", default="replay,reap")
    parser.add_argument("--reduce", default="dern,ream,hc-smoe,m-smoe", help="ways of merging, beside dropping")
    arguments = parser.parse_args()
    settings = words.settings(arguments, device="auto")
    with pipeline.opened(settings, Console()) as run:
        for kept in map(int, arguments.keep.split(",")):
            base = masked(run, "reap", kept)
            domains = list(base)
            print(f"\nK={kept} | " + " | ".join(domains) + f"\n{'---|' * (len(domains) + 1)}")
            print("reap | " + " | ".join(f"{base[name]['kl_mean']:.4f}" for name in domains))
            kinds = [(method, DROP) for method in arguments.methods.split(",") if method]
            kinds += [(MERGER, reduce) for reduce in arguments.reduce.split(",") if reduce]
            for heal, (method, reduce) in product((False, True), kinds):
                if reduce == DROP and not heal:
                    continue  # masked, above
                own, seconds = built(run, method, kept, reduce, heal=heal)
                cells = (
                    f"{own[name]['kl_mean']:.4f} ({own[name]['kl_mean'] / base[name]['kl_mean']:.3f})"
                    for name in domains
                )
                print(
                    f"{method if reduce == DROP else reduce}{', healed' if heal else ''} | "
                    + " | ".join(cells)
                    + f" | {seconds:.0f} s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
