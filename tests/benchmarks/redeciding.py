"""Deciding again from saved measurements, for another budget: the wall time of `edgeprune plan`, and its stages.

    python tests/benchmarks/redeciding.py [MODEL --text CALIBRATION.txt --eval-text HELDOUT.txt]

For a small model (the demo by default), which is measured first, and for one of the shape of Qwen3-30B-A3B with
made-up measurements, whose file has a hole instead of weights. The wall time is that of the whole command in a
process of its own; the stages are those of the same command once more, in a process that looks at its clock.
``--scores`` also times every published score on the large one.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import synthetic

EDGEPRUNE = [sys.executable, "-m", "edgeprune"]
IMPORTS = ("edgeprune.cli", "edgeprune.cli.show", "edgeprune.pipeline", "scipy.optimize")
RESERVOIR = 8192
METHODS = ("replay", "reap")


class Clock:
    """Seconds by stage; what a stage does for another one counts there."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner = [0.0]

    def around(self, owner: Any, name: str, stage: str) -> None:
        """Count the time of the function ``name`` of ``owner``."""
        plain = owner.__dict__[name]
        function = plain.__func__ if isinstance(plain, classmethod) else plain
        counted = self._counted(function, stage)
        setattr(owner, name, classmethod(counted) if isinstance(plain, classmethod) else counted)

    def _counted(self, function: Callable[..., Any], stage: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            self._inner.append(0.0)
            started = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                spent = time.perf_counter() - started
                self.seconds[stage] = self.seconds.get(stage, 0.0) + spent - self._inner.pop()
                self._inner[-1] += spent

        return call


def stages(words: list[str]) -> None:
    """Run the command with ``words`` in this process and print the seconds of each stage."""
    started = time.perf_counter()
    for module in IMPORTS:
        importlib.import_module(module)
    clock = Clock()
    clock.seconds["imports"] = time.perf_counter() - started
    from edgeprune import cli
    from edgeprune.decide import candidates
    from edgeprune.measure import memory
    from edgeprune.measure.sensitivity import Sensitivity
    from edgeprune.measure.statistics import Statistics
    from edgeprune.model.gguf import GgufFile
    from edgeprune.stages import deciding, measuring, source

    for owner, name, stage in (
        (GgufFile, "__init__", "header of the model"),
        (GgufFile, "fingerprint", "fingerprint"),
        (source, "this_machine", "memory of this machine"),
        (memory, "price", "pricing by llama.cpp"),
        (Statistics, "load", "loading statistics"),
        (measuring, "super_experts", "loading statistics"),
        (measuring.MeasureStages, "evidence", "loading statistics"),
        (Sensitivity, "from_json", "loading sensitivities"),
        (measuring, "rankings", "ranking by scores"),
        (candidates, "solve", "solver"),
        (candidates, "_layout", "exact sizes"),
        (deciding, "layout", "exact sizes"),
        (source, "layout", "exact sizes"),
    ):
        clock.around(owner, name, stage)
    sys.argv = ["edgeprune", *words]
    begun = time.perf_counter()
    try:
        cli.main()
    except SystemExit as end:
        if end.code:
            raise
    clock.seconds["the rest"] = time.perf_counter() - begun - sum(clock.seconds.values()) + clock.seconds["imports"]
    for stage, seconds in clock.seconds.items():
        print(f"  {stage:<24} {seconds:7.3f}", file=sys.stderr)


def redecided(title: str, command: list[str], budgets: list[list[str]]) -> None:
    """Print the wall time of the command at each of the budgets, and its stages at the last."""
    for budget in budgets:
        started = time.perf_counter()
        subprocess.run([*EDGEPRUNE, *command, *budget], check=True, capture_output=True)
        click.echo(f"{title}, {' '.join(budget)}: {time.perf_counter() - started:.2f} s")
    again = [re.sub(r"\d+(?=[GM]iB)", lambda match: str(int(match[0]) + 1), word) for word in budgets[-1]]
    words = [sys.executable, __file__, "--stages", "--", *command, *again]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    click.echo("\n".join(line for line in done.stderr.splitlines() if line.startswith("  ")))


def small(model: str, texts: list[str], folder: Path) -> None:
    command = ["plan", model, *texts, "-o", str(folder)]
    click.echo(f"measuring {model} ...", err=True)
    first, *limits = ("5MiB", "4MiB", "6MiB", "8MiB") if model == "demo" else ("24MiB", "20MiB", "16MiB", "30MiB")
    subprocess.run([*EDGEPRUNE, *command, "--file-size", first], check=True, stdout=subprocess.DEVNULL)
    redecided(
        Path(model).name,
        command,
        [["--file-size", limit] for limit in limits] + [["--memory", "74MiB" if model == "demo" else "90MiB"]],
    )


def large(size: synthetic.Size, folder: Path, scores: bool) -> None:
    from edgeprune.cli.console import Console
    from edgeprune.decide.protection import super_experts
    from edgeprune.files import digest, to_json, write_text
    from edgeprune.pipeline import Run, Settings
    from edgeprune.stages.measuring import tools

    model = synthetic.shadow(folder / "large.gguf", size)
    time.sleep(4)  # only the fingerprint of a file that has settled is remembered
    settings = Settings(str(model), file_bytes=1 << 40, output=str(folder / "run"))
    run = Run(settings, Console())
    started = time.perf_counter()
    fingerprint = run.fingerprint
    click.echo(f"first look at {run.file.size / 2**30:.0f} GiB: {time.perf_counter() - started:.0f} s, once per file")
    with run.folder.locked(settings.owner):
        merged = {"model": fingerprint, "merged": ["made up"], "tools": tools()}
        made = synthetic.statistics(run.architecture, size, RESERVOIR, merged)
        made.save(run.folder.statistics)
        sensitivity_from = {
            "model": fingerprint,
            "statistics": digest(merged),
            "tokens": settings.sensitivity_tokens,
            "window": settings.sensitivity_window,
        }
        costs = synthetic.sensitivity(run.architecture, METHODS, sensitivity_from)
        write_text(run.folder.sensitivity, to_json(costs.to_json()))
        protected = super_experts(made.layers, size.layers)
        ranked = {
            "made_from": {
                "statistics": digest(merged),
                "method": "replay",
                "mixture": "pooled",
                "stops": sorted(set(run.architecture.allowed_counts()) - {size.experts}, reverse=True),
                "protected": {str(layer): list(ids) for layer, ids in protected.items()},
            },
            "orders": {str(layer): list(range(size.experts)) for layer in run.architecture.moe_layers},
            "errors": {},
            "reasons": {},
        }
        write_text(run.folder.path / "rankings.json", to_json({"replay": ranked}))
        _ = run.statistics  # writes the imatrix beside it
    title = f"{size.layers} layers of {size.experts} experts"
    command = ["plan", str(model), "-o", str(run.folder.path)]
    for method in METHODS:
        budgets = [["--file-size", "14GiB"], ["--file-size", "9GiB"], ["--memory", "16GiB"]]
        redecided(f"{title}, {method}", [*command, "--method", method], budgets)
    if scores:
        time_scores(run)


def time_scores(run: Any) -> None:
    from edgeprune.decide.keep import rankings
    from edgeprune.decide.scores import SCORES
    from edgeprune.measure.weights import LayerWeights

    random = np.random.default_rng(0)
    shape = run.architecture.experts, run.architecture.expert_width
    each = random.lognormal(0, 1, shape[0])
    rows = random.standard_normal((shape[0], run.architecture.width))
    weights = LayerWeights(each, each**2 + each, np.full(shape[0], 1e6), random.lognormal(0, 1, shape), rows)
    run.__dict__["_weights"] = lambda: dict.fromkeys(run.architecture.moe_layers, weights)
    total = 0.0
    for method in SCORES:
        started = time.perf_counter()
        rankings(run.evidence(method), method, 1)
        seconds = time.perf_counter() - started
        total += seconds
        click.echo(f"  {method:<16} {seconds:7.3f}")
    click.echo(f"  {'all scores':<16} {total:7.3f}")


@click.command()
@click.argument("model", default="demo")
@click.option("--text", help="Calibration text of the small model.")
@click.option("--eval-text", help="Held-out text of the small model.")
@click.option("--scores", is_flag=True, help="Time every published score on the large model.")
@click.option("--only", type=click.Choice(["small", "large"]), help="One of the two.")
def main(model: str, text: str | None, eval_text: str | None, scores: bool, only: str | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder  # the fingerprint of the hole is of no use to anybody
        if only != "large":
            texts = ["--text", text] if text else []
            texts += ["--eval-text", eval_text] if eval_text else []
            small(model, texts, Path(folder) / "small")
        if only != "small":
            large(synthetic.Size(), Path(folder), scores)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--stages"]:
        stages(sys.argv[3:])
    else:
        main()
