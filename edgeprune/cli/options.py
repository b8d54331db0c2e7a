"""Options that commands share, and what they come to."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edgeprune.units import parse_bytes, parse_seconds

if TYPE_CHECKING:
    from edgeprune.pipeline import Settings

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")


class Parsed(click.ParamType[T]):
    """What ``parse`` makes of a word: a number with a unit, as a rule."""

    def __init__(self, name: str, parse: Callable[[str], T]) -> None:
        self.name, self._parse = name, parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> T:
        return self._parse(value) if isinstance(value, str) else value


SIZE = Parsed("size", parse_bytes)
SIZES = Parsed("sizes", lambda word: tuple(parse_bytes(part) for part in word.split(",")))
TIME = Parsed("time", parse_seconds)


class Fractions(click.ParamType[tuple[float, ...]]):
    """Numbers separated by commas."""

    name = "fractions"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(float(part) for part in value.split(","))
        except ValueError:
            self.fail(f"'{value}' is not of the form 0.9,0.75,0.5", param, ctx)


TARGET = (
    click.option("--device", metavar="PROFILE", help="Device profile, a profile file, or 'auto' for this machine."),
    click.option("--memory", type=SIZE, help="Usable memory instead of a device, for example 9.5GiB."),
    click.option("--file-size", type=SIZE, help="Most bytes of the GGUF instead of a device, for example 12MB."),
    click.option("--context", type=click.IntRange(16), help="Context in tokens; the profile's by default."),
    click.option("--kv-type", type=click.Choice(["f16", "q8_0", "q4_0"]), help="Type of the KV cache."),
)
CHOICE = (
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
        type=TIME,
        help="Most time to encode a file here, as 30m; healing and files that are tried come on top.",
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
MTP = (
    click.option(
        "--mtp",
        type=click.Choice(["drop", "keep"]),
        default="drop",
        show_default=True,
        help="Blocks that predict further tokens, which llama-server uses with --spec-type draft-mtp alone.",
    ),
)
SPLIT = (
    click.option(
        "--split", type=SIZE, metavar="SIZE", help="Write parts of at most this size, as 4GB, not one file."
    ),
)
MIX = (
    click.option(
        "--mix",
        type=click.Choice(["pooled", "balanced", "coverage"]),
        default="pooled",
        show_default=True,
        help="Domains added up; each with the same say; or each keeping its best.",
    ),
)
TEXT = (
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
COMMON = (
    click.option("-o", "--output", metavar="DIR", help="Run directory; runs/MODEL-DEVICE by default."),
    click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
)


def with_options(*groups: tuple[Callable[[F], F], ...]) -> Callable[[F], F]:
    """A decorator that gives a command the options of all ``groups``."""
    options = [option for group in groups for option in group]

    def decorate(function: F) -> F:
        return functools.reduce(lambda inner, option: option(inner), reversed(options), function)

    return decorate


def settings_of(source: str, options: dict[str, Any]) -> Settings:
    """The settings of a run on ``source``; ``options`` are those of a command, whichever of the groups it has."""
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


def show_result(value: Any, lines: list[str], as_json: bool) -> None:
    """Print a result: as ``lines`` for people, or ``value`` as JSON for programs."""
    from edgeprune.files import to_json

    click.echo(to_json(value), nl=False) if as_json else click.echo("\n".join(lines))
