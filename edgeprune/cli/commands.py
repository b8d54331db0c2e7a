"""The commands: each parses its options, calls the pipeline and prints the result."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edgeprune.cli.wishes import DEEPER, wishes
from edgeprune.errors import UsageError
from edgeprune.units import parse_bytes, parse_seconds

if TYPE_CHECKING:
    from edgeprune.pipeline import Settings

F = TypeVar("F", bound=Callable[..., Any])


class Size(click.ParamType[int]):
    """A number of bytes with a unit."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        return value if isinstance(value, int) else parse_bytes(value)


class _Time(click.ParamType[float]):
    """A number of seconds, minutes or hours."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        return value if isinstance(value, float) else parse_seconds(value)


_TARGET = (
    click.option("--device", metavar="PROFILE", help="Device profile, a profile file, or 'auto' for this machine."),
    click.option("--memory", type=Size(), help="Usable memory instead of a device, for example 9.5GiB."),
    click.option("--file-size", type=Size(), help="Most bytes of the GGUF instead of a device, for example 12MB."),
    click.option("--context", type=click.IntRange(16), help="Context in tokens; the profile's by default."),
    click.option("--kv-type", type=click.Choice(["f16", "q8_0", "q4_0"]), help="Type of the KV cache."),
)
_CHOICE = (
    click.option("--keep", type=click.IntRange(1), metavar="K", help="Keep exactly K experts per layer."),
    click.option(
        "--width",
        type=click.FloatRange(0, min_open=True),
        metavar="F|SHARE",
        help="Narrow all experts to F channels, or to this share of them, as 0.75; 1 narrows none.",
    ),
    click.option(
        "--narrowing",
        metavar="SCORE",
        help="How channels are ranked: ziplm, camera, energy, tenp, heapr or mask-fisher.  [default: ziplm]",
    ),
    click.option("--types", metavar="T,T", help="Use only these GGML types, for example Q4_K,Q6_K."),
    click.option(
        "--heal",
        type=click.Choice(["closed-form", "train"]),
        is_flag=False,
        flag_value="closed-form",  # a bare --heal
        default="closed-form",
        show_default=True,
        help="Fit the kept experts' down projections anew; `train` trains routers, norms and experts, too.",
    ),
    click.option("--no-heal", is_flag=True, help="Leave the kept experts as they are."),
    click.option("--heal-stages", type=click.IntRange(1), help="Most groups of layers that are healed one by one."),
    click.option(
        "--time-limit",
        type=_Time(),
        help="Most time to encode a file here, for example 30m; healing and files that are tried come on top.",
    ),
    click.option(
        "--method", help="How experts are ranked; see `compare`.  [default: reap, or replay with --no-heal]"
    ),
    click.option(
        "--reduce",
        type=click.Choice(["drop", "dern", "ream", "hc-smoe", "m-smoe"]),
        default="drop",
        show_default=True,
        help="Drop experts, or merge them into those that are kept.",
    ),
)
_MTP = (
    click.option(
        "--mtp",
        type=click.Choice(["drop", "keep"]),
        default="drop",
        show_default=True,
        help="Blocks that predict further tokens, which llama-server uses with --spec-type draft-mtp alone.",
    ),
)
_SPLIT = (
    click.option(
        "--split", type=Size(), metavar="SIZE", help="Write parts of at most this size, as 4GB, not one file."
    ),
)
_MIX = (
    click.option(
        "--mix",
        type=click.Choice(["pooled", "balanced", "coverage"]),
        default="pooled",
        show_default=True,
        help="Domains added up; each with the same say; or each keeping its best.",
    ),
)
_TEXT = (
    click.option(
        "--text", multiple=True, metavar="[NAME=]FILE", help="Calibration text, or chats as .jsonl; repeatable."
    ),
    click.option("--eval-text", multiple=True, metavar="[NAME=]FILE", help="Held-out text; repeatable."),
    click.option(
        "--self",
        "self_answers",
        type=click.IntRange(1),
        metavar="N",
        help="Calibrate on N answers of the model itself, too.",
    ),
    click.option("--tokens", type=click.IntRange(64), help="Most calibration tokens."),
    click.option(
        "--engine",
        type=click.Choice(["llama.cpp", "torch"]),
        default="llama.cpp",
        show_default=True,
        help="What measures on that text; torch runs checkpoints, layer by layer.",
    ),
)
_COMMON = (
    click.option("-o", "--output", metavar="DIR", help="Run directory; runs/MODEL-DEVICE by default."),
    click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
)


def _with(*groups: tuple[Callable[[F], F], ...]) -> Callable[[F], F]:
    options = [option for group in groups for option in group]

    def decorate(function: F) -> F:
        return functools.reduce(lambda inner, option: option(inner), reversed(options), function)

    return decorate


def _settings(source: str, options: dict[str, Any]) -> Settings:
    from edgeprune.pipeline import Settings

    types = options.get("types")
    chosen: dict[str, Any] = {
        "source": source,
        "device": options.get("device"),
        "memory_bytes": options.get("memory"),
        "file_bytes": options.get("file_size"),
        "part_bytes": options.get("split"),
        "context": options.get("context"),
        "kv_type": options.get("kv_type"),
        "texts": tuple(options.get("text") or ()),
        "evaluation_texts": tuple(options.get("eval_text") or ()),
        "self_answers": options.get("self_answers") or 0,
        "keep": options.get("keep"),
        "width": options.get("width") or 0.0,
        "types": tuple(name.strip() for name in types.split(",") if name.strip()) if types else (),
        "method": options.get("method") or ("replay" if options.get("no_heal") else "reap"),
        "reduce": options.get("reduce") or "drop",
        "mixture": options.get("mix") or "pooled",
        "engine": options.get("engine") or "llama.cpp",
        "heal": not options.get("no_heal"),
        "train": options.get("heal") == "train",
        "limit_seconds": options.get("time_limit") or 0.0,
        "mtp": options.get("mtp") or "drop",
        "heal_stages": options.get("heal_stages") or 0,
        "output": options.get("output"),
        "command": click.get_current_context().find_root().obj or "",
    }
    if options.get("narrowing"):
        chosen["narrowing"] = options["narrowing"]
    if options.get("tokens"):
        chosen["calibration_tokens"] = options["tokens"]
    return Settings(**chosen)


def _print(value: Any, lines: list[str], as_json: bool) -> None:
    from edgeprune.files import to_json

    click.echo(to_json(value), nl=False) if as_json else click.echo("\n".join(lines))


class Sizes(click.ParamType[tuple[int, ...]]):
    """Numbers of bytes with units, separated by commas."""

    name = "sizes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        return value if isinstance(value, tuple) else tuple(parse_bytes(part) for part in value.split(","))


@click.command()
@click.argument("source")
@_with(_TARGET, _CHOICE, _MTP, _SPLIT, _MIX, _TEXT, _COMMON)
@click.option("--devices", metavar="P,P", help="A family: one file for each of these profiles, measured once.")
@click.option("--file-sizes", type=Sizes(), metavar="S,S", help="A family of these sizes, for example 9MB,7MB,5MB.")
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
        settings = _settings(source, options)
        family, folder = fit_family(settings, devices, options["file_sizes"] or (), Console())
        _print(family.to_json(), show.family(family, folder), options["as_json"])
        return
    report, folder = pipeline.fit(_settings(source, options), Console())
    _print(report.to_json(), show.report(report, folder), options["as_json"])


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
    _print(found.to_json(), show.inspection(found), as_json)
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
    _print([profile.to_json() for profile in found], lines, as_json)


@click.command()
@click.argument("checkpoint")
@click.argument("output", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--type", "base", type=click.Choice(["auto", "f32", "f16", "bf16", "q8_0"]), default="auto", show_default=True
)
@_with(_MTP)
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
@_with(_MTP, _TEXT, _COMMON)
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
    settings = _settings(source, options)
    with pipeline.opened(settings, Console()) as run:
        statistics = run.merge(merge) if merge else run.statistics
        lines = show.statistics(statistics, run.folder.path)
    value = {"tokens": statistics.tokens, "domains": statistics.domains, "folder": str(settings.folder)}
    _print(value, lines, options["as_json"])


@click.command()
@click.argument("source")
@_with(_TARGET, _CHOICE, _MTP, _SPLIT, _MIX, _TEXT, _COMMON)
def plan(source: str, **options: Any) -> None:
    """Choose experts and types for SOURCE within the budget; print and save plan.json.

    \b
    edgeprune plan demo --file-size 5MB -o small
    """
    from edgeprune import pipeline
    from edgeprune.cli import show
    from edgeprune.cli.console import Console

    settings = _settings(source, options)
    settings.check()
    with pipeline.opened(settings, Console()) as run:
        chosen = run.plan()
        lines = show.plan(chosen, run)
    _print(chosen.to_json(), lines, options["as_json"])


@click.command()
@click.argument("source")
@_with(_TARGET, _CHOICE, _MTP, _SPLIT, _MIX, _TEXT, _COMMON)
def build(source: str, **options: Any) -> None:
    """Build the file that plan.json in the run directory describes, making the plan first if need be."""
    from edgeprune import pipeline
    from edgeprune.cli.console import Console

    settings = _settings(source, options)
    settings.check()
    with pipeline.opened(settings, Console()) as run:
        made = run.build(run.best_plan())
    _print(made.to_json(), [f"{made.path}  {made.nbytes:,} bytes  sha256 {made.sha256}"], options["as_json"])


@click.command()
@click.argument("source")
@_with(_TARGET, _CHOICE, _MTP, _SPLIT, _MIX, _TEXT, DEEPER, _COMMON)
def verify(source: str, **options: Any) -> None:
    """Measure the built file against the plan's predictions and the stock presets; write the report.

    What is measured on request stays in the report as long as the file is the same.

    \b
    edgeprune verify demo --file-size 5MB -o small --loops 20
    """
    from edgeprune import pipeline
    from edgeprune.cli import deeper, show
    from edgeprune.cli.console import Console

    report, folder = pipeline.verify(_settings(source, options), Console(), wishes(options))
    _print(report.to_json(), [*show.report(report, folder), *deeper.lines(report.deeper)], options["as_json"])


class _Fractions(click.ParamType[tuple[float, ...]]):
    """Numbers separated by commas."""

    name = "fractions"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(float(part) for part in value.split(","))
        except ValueError:
            self.fail(f"'{value}' is not of the form 0.9,0.75,0.5", param, ctx)


@click.command()
@click.argument("model")
@click.option(
    "--keep",
    "fractions",
    type=_Fractions(),
    default="0.9,0.75,0.5",
    show_default=True,
    help="Shares of experts to keep.",
)
@click.option(
    "--methods", metavar="M,M", help="Which to compare, merge:ream too; all scores without gradients by default."
)
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="Draws of random methods.")
@_with(_MIX, _MTP, _TEXT, _COMMON)
def compare(model: str, fractions: tuple[float, ...], methods: str | None, seeds: int, **options: Any) -> None:
    """Compare methods of choosing experts on held-out text of MODEL, without writing a file.

    \b
    edgeprune compare demo --keep 0.75,0.5 --methods replay,reap,random
    """
    from edgeprune import pipeline
    from edgeprune.cli import show
    from edgeprune.cli.console import Console

    settings = _settings(model, options)
    names = None if methods is None else tuple(name.strip() for name in methods.split(",") if name.strip())
    if names is not None and not names:
        raise UsageError("--methods names none", hint="leave it out to compare all that need no gradients")
    found, folder = pipeline.compare(settings, Console(), fractions, names, seeds)
    _print(found.to_json(), show.comparison(found, folder), options["as_json"])


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
