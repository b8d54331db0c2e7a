"""The commands: each parses its options, calls the pipeline and prints the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgeprune.cli.options import (
    CHOICE,
    COMMON,
    MIX,
    MTP,
    SIZES,
    SPLIT,
    TARGET,
    TEXT,
    Fractions,
    settings_of,
    show_result,
    with_options,
)
from edgeprune.cli.wishes import DEEPER, wishes
from edgeprune.errors import UsageError


@click.command()
@click.argument("source")
@with_options(TARGET, CHOICE, MTP, SPLIT, MIX, TEXT, COMMON)
@click.option("--devices", metavar="P,P", help="A family: one file for each of these profiles, measured once.")
@click.option("--file-sizes", type=SIZES, metavar="S,S", help="A family of these sizes, for example 9MB,7MB,5MB.")
def fit(source: str, **options: Any) -> None:
    """Do everything: measure SOURCE, decide, build the GGUF, prove it, write the report.

    SOURCE is 'demo', a folder with a Hugging Face checkpoint, a GGUF file of any MoE model (any part of a split
    one), or one of these on the Hub: ORG/NAME, ORG/NAME:FILE, ORG/NAME:Q4_K_M, with @REVISION if need be.

    \b
    edgeprune fit demo --device auto
    edgeprune fit demo --file-size 5MB -o small
    edgeprune fit demo --file-sizes 9MB,7MB,5MB -o family
    """
    from edgeprune import pipeline
    from edgeprune.cli import show
    from edgeprune.cli.console import Console

    if options["devices"] or options["file_sizes"]:
        from edgeprune.family import fit_family

        devices = [name.strip() for name in (options["devices"] or "").split(",") if name.strip()]
        settings = settings_of(source, options)
        family, folder = fit_family(settings, devices, options["file_sizes"] or (), Console())
        show_result(family.to_json(), show.family(family, folder), options["as_json"])
        return
    report, folder = pipeline.fit(settings_of(source, options), Console())
    show_result(report.to_json(), show.report(report, folder), options["as_json"])


@click.command()
@click.argument("model")
@click.option("--tokenizer", is_flag=True, help="Fetch the tokenizer of a checkpoint on the Hub, to look at it too.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def inspect(model: str, tokenizer: bool, as_json: bool) -> None:
    """What MODEL is, what its parts weigh, and which profiles it fits. Reads headers only, also over the network.

    \b
    edgeprune inspect model.gguf
    edgeprune inspect ORG/NAME:Q4_K_M
    """
    from edgeprune.cli import show
    from edgeprune.cli.console import Console
    from edgeprune.inspection import inspect_model

    found = inspect_model(model, Console(), tokenizer=tokenizer)
    show_result(found.to_json(), show.inspection(found), as_json)
    if found.refusal is not None:
        raise found.refusal


@click.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def profiles(name: str | None, as_json: bool) -> None:
    """List the device profiles, or show the one called NAME ('auto' probes this machine)."""
    from edgeprune.cli import show
    from edgeprune.device.probe import this_machine
    from edgeprune.device.profile import find_profile, known_profiles
    from edgeprune.measure import child

    if name == "auto":
        found = [this_machine(child.call("edgeprune.measure.llama:backend_devices", {}))]
    else:
        found = [find_profile(each) for each in ([name] if name else known_profiles())]
    lines = show.profile(found[0]) if name else show.profile_list(found)
    show_result([profile.to_json() for profile in found], lines, as_json)


@click.command()
@click.argument("checkpoint")
@click.argument("output", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--type", "base", type=click.Choice(["auto", "f32", "f16", "bf16", "q8_0"]), default="auto", show_default=True
)
@with_options(MTP)
def convert(checkpoint: str, output: Path, base: str, mtp: str) -> None:
    """Convert a Hugging Face CHECKPOINT, a folder, ORG/NAME on the Hub, or 'demo', to the GGUF file OUTPUT."""
    from edgeprune.cli.console import Console
    from edgeprune.model.checkpoint import Checkpoint, open_checkpoint
    from edgeprune.model.convert import check_output, check_place
    from edgeprune.model.download import Aim
    from edgeprune.model.headers import Header
    from edgeprune.settings import KEEP
    from edgeprune.stages.converting import Scrutiny, convert_checked
    from edgeprune.stages.source import found_at, hub_short_name

    console = Console()
    scrutiny = Scrutiny(console, base, mtp == KEEP)
    hint = "give a folder, ORG/NAME on the Hub, or `demo`"

    def look(model: Checkpoint | Header) -> None:
        if not isinstance(model, Checkpoint):
            raise UsageError(f"{checkpoint} is a GGUF, which needs no conversion", hint=hint)
        scrutiny(model)

    check_place(output)  # before anything is downloaded
    folder = found_at(checkpoint, console, Aim(output, base, scrutiny.mtp, look))
    if not folder.is_dir():
        raise UsageError(f"{checkpoint} is no folder with a checkpoint", hint=hint)
    check_output(folder, output)
    if not scrutiny.done:
        scrutiny(open_checkpoint(folder))
    convert_checked(folder, output, console, base=base, name=hub_short_name(checkpoint), mtp=scrutiny.mtp)
    click.echo(str(output))


@click.command()
@click.argument("source")
@with_options(MTP, TEXT, COMMON)
@click.option(
    "--merge",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Join the statistics in FILE and the others given, instead of measuring; repeatable.",
)
def calibrate(source: str, merge: tuple[Path, ...], **options: Any) -> None:
    """Run SOURCE over the calibration text once and save the statistics and the imatrix.

    \b
    edgeprune calibrate demo --text code=a.py -o a
    edgeprune calibrate demo --merge a/statistics.safetensors --merge b/statistics.safetensors -o c
    """
    from edgeprune import pipeline
    from edgeprune.cli import show
    from edgeprune.cli.console import Console

    ignored = [name for name in ("text", "eval_text", "self_answers", "tokens") if merge and options.get(name)]
    if ignored:
        option = "--self" if ignored[0] == "self_answers" else f"--{ignored[0].replace('_', '-')}"
        raise UsageError(
            f"--merge joins what was measured before, and {option} says what to measure",
            hint="calibrate on that text in a folder of its own, then merge both",
        )
    settings = settings_of(source, options)
    with pipeline.opened(settings, Console()) as run:
        statistics = run.merge(merge) if merge else run.statistics
        lines = show.statistics(statistics, run.folder.path)
    value = {"tokens": statistics.tokens, "domains": statistics.domains, "folder": str(settings.folder)}
    show_result(value, lines, options["as_json"])


@click.command()
@click.argument("source")
@with_options(TARGET, CHOICE, MTP, SPLIT, MIX, TEXT, COMMON)
def plan(source: str, **options: Any) -> None:
    """Choose experts and types for SOURCE within the budget; print and save plan.json.

    \b
    edgeprune plan demo --file-size 5MB -o small
    """
    from edgeprune import pipeline
    from edgeprune.cli import show
    from edgeprune.cli.console import Console

    settings = settings_of(source, options)
    settings.check()
    with pipeline.opened(settings, Console()) as run:
        chosen = run.plan()
        lines = show.plan(chosen, run)
    show_result(chosen.to_json(), lines, options["as_json"])


@click.command()
@click.argument("source")
@with_options(TARGET, CHOICE, MTP, SPLIT, MIX, TEXT, COMMON)
def build(source: str, **options: Any) -> None:
    """Build the file that plan.json in the run directory describes, making the plan first if need be."""
    from edgeprune import pipeline
    from edgeprune.cli.console import Console

    settings = settings_of(source, options)
    settings.check()
    with pipeline.opened(settings, Console()) as run:
        made = run.build(run.best_plan())
    show_result(made.to_json(), [f"{made.path}  {made.nbytes:,} bytes  sha256 {made.sha256}"], options["as_json"])


@click.command()
@click.argument("source")
@with_options(TARGET, CHOICE, MTP, SPLIT, MIX, TEXT, DEEPER, COMMON)
def verify(source: str, **options: Any) -> None:
    """Measure the built file against the plan's predictions and the stock presets; write the report.

    What is measured on request stays in the report as long as the file is the same.

    \b
    edgeprune verify demo --file-size 5MB -o small --loops 20
    """
    from edgeprune import pipeline
    from edgeprune.cli import deeper, show
    from edgeprune.cli.console import Console

    report, folder = pipeline.verify(settings_of(source, options), Console(), wishes(options))
    show_result(report.to_json(), [*show.report(report, folder), *deeper.lines(report.deeper)], options["as_json"])


@click.command()
@click.argument("model")
@click.option(
    "--keep",
    "fractions",
    type=Fractions(),
    default="0.9,0.75,0.5",
    show_default=True,
    help="Shares of experts to keep.",
)
@click.option(
    "--methods", metavar="M,M", help="Which to compare, merge:ream too; all scores without gradients by default."
)
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="Draws of random methods.")
@with_options(MIX, MTP, TEXT, COMMON)
def compare(model: str, fractions: tuple[float, ...], methods: str | None, seeds: int, **options: Any) -> None:
    """Compare methods of choosing experts on held-out text of MODEL, without writing a file.

    \b
    edgeprune compare demo --keep 0.75,0.5 --methods replay,reap,random
    """
    from edgeprune import pipeline
    from edgeprune.cli import show
    from edgeprune.cli.console import Console

    settings = settings_of(model, options)
    names = None if methods is None else tuple(name.strip() for name in methods.split(",") if name.strip())
    if names is not None and not names:
        raise UsageError("--methods names none", hint="leave it out to compare all that need no gradients")
    found, folder = pipeline.compare(settings, Console(), fractions, names, seeds)
    show_result(found.to_json(), show.comparison(found, folder), options["as_json"])


# What `edgeprune --help` says of each: click cuts the first sentence of the help off at less than a line.
_SHORT = {
    fit: "Do everything: measure, decide, build, prove.",
    inspect: "What a model is, and which profiles it fits.",
    profiles: "List the device profiles, or probe this machine.",
    convert: "Make a GGUF of a Hugging Face checkpoint.",
    calibrate: "Measure a model on text, once.",
    plan: "Choose experts and types within a budget.",
    build: "Write the file that the plan describes.",
    verify: "Measure the built file, write the report.",
    compare: "Hold methods of choosing experts side by side.",
}
for _command, _words in _SHORT.items():
    _command.short_help = _words
COMMANDS = [fit, inspect, profiles, convert, calibrate, plan, build, verify, compare]
