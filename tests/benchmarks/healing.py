"""Dropping experts with and without healing, weights otherwise untouched, on any MoE checkpoint or GGUF.

    python tests/benchmarks/healing.py MODEL --text CALIBRATION.txt --eval-text HELDOUT.txt --keep 28,24,16

For each number of experts: REAP one-shot, measured by masking the router, and the methods named, as files with healed
experts in the source's own types; then each way of merging, without and with healing. All against the source on
held-out text, domain by domain.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
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


@dataclass(frozen=True)
class Way:
    """How a file comes to fewer experts: who chooses them, what becomes of the others, what is done for those that
    stay."""

    method: str
    reduce: str
    heal: bool
    train: bool = False

    def __str__(self) -> str:
        name = self.method if self.reduce == DROP else self.reduce
        return name + ", trained" * self.train + ", healed" * self.heal


def ways(methods: str, reductions: str, *, train: bool) -> Iterator[Way]:
    """All that are asked for by names that are separated by commas."""
    dropping, merging = ([name for name in names.split(",") if name] for names in (methods, reductions))
    for heal in (False, True):  # dropped and nothing else is measured by masking
        yield from (
            Way(method, DROP, heal, trained)
            for method in dropping
            for trained in sorted({False, train})
            if heal or trained
        )
        yield from (Way(MERGER, reduce, heal) for reduce in merging)


def plan_of(run: Run, way: Way, kept: int) -> Plan:
    """The plan that drops or merges experts and changes no type."""
    problem = run.unmeasured({}, frozenset())
    ranked = run.ranked(way.method, [kept])
    found = priced(replace(problem, ranked=ranked, drop_nats={kept: 0.0}, method=way.method, heal=True), kept, {})
    assert found is not None
    statistics = digest(run.statistics.made_from)
    made_from = {**found.plan.made_from, "healing": run.healing, "statistics": statistics}
    plan = run.merging(replace(found.plan, made_from=made_from), way.reduce)
    return replace(plan, heal=way.heal, train=way.train)


def built(run: Run, way: Way, kept: int) -> tuple[Row, float]:
    """Quality by domain of the file, and the seconds it took to make."""
    plan = plan_of(run, way, kept)
    if way.heal:
        run.teacher(run.healing_tokens(plan))
    started = time.perf_counter()
    build = run.build(plan)
    seconds = time.perf_counter() - started
    found = run.quality(Path(build.path), f"{way}, K={kept}")
    return {"all": found["all"], **found["domains"]}, seconds


def main() -> None:
    parser = words.parser(__doc__, "runs/benchmark-healing")
    words.healing_options(parser)
    parser.add_argument("--keep", default="28,24,16")
    parser.add_argument("--methods", default="replay,reap")
    parser.add_argument("--reduce", default="dern,ream,hc-smoe,m-smoe", help="ways of merging, beside dropping")
    parser.add_argument("--train", action="store_true", help="also train; MODEL is a Hugging Face checkpoint")
    arguments = parser.parse_args()
    settings = words.settings(arguments, device="auto", train=arguments.train)
    with pipeline.opened(settings, Console()) as run:
        for kept in map(int, arguments.keep.split(",")):
            base = masked(run, "reap", kept)
            domains = list(base)
            print(f"\nK={kept} | " + " | ".join(domains) + f"\n{'---|' * (len(domains) + 1)}")
            print("reap | " + " | ".join(f"{base[name]['kl_mean']:.4f}" for name in domains), flush=True)
            for way in ways(arguments.methods, arguments.reduce, train=arguments.train):
                own, seconds = built(run, way, kept)
                cells = (
                    f"{own[name]['kl_mean']:.4f} ({own[name]['kl_mean'] / base[name]['kl_mean']:.3f})"
                    for name in domains
                )
                print(f"{way} | " + " | ".join(cells) + f" | {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
