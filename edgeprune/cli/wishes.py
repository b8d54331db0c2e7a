"""Options of `verify` for what a fit does not measure."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from edgeprune.stages.deepening import Wishes


class _Depths(click.ParamType[tuple[int, ...]]):
    """Numbers of tokens separated by commas, or ``none``."""

    name = "depths"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        parts = [] if value == "none" else value.split(",")
        if not all(part.strip().isdecimal() for part in parts):
            self.fail(f"'{value}' is not of the form 0,2048,8192", param, ctx)
        return tuple(map(int, parts))


DEEPER = (
    click.option(
        "--depths",
        type=_Depths(),
        metavar="N,N",
        help="Measure speed with N tokens in the context; 'none' for nowhere.  [default: quarters of the context; "
        "a minute at most to fill it]",
    ),
    click.option(
        "--loops",
        type=click.IntRange(1),
        metavar="N",
        help="Let original and built file answer N questions at length and count who repeats himself. "
        "Costs at most 2,048 decoded tokens a question.",
    ),
    click.option(
        "--task",
        "tasks",
        multiple=True,
        metavar="FILE[:FORMAT]",
        help="Ask both the questions in FILE, JSON lines of hellaswag, arc, mmlu or gsm8k or MMLU's CSV; repeatable. "
        "Costs twice reading them; gsm8k 640 decoded tokens a question.",
    ),
    click.option(
        "--questions",
        type=click.IntRange(1),
        default=200,
        show_default=True,
        metavar="N",
        help="Most questions of each file, spread over it.",
    ),
    click.option(
        "--slices",
        is_flag=True,
        help="Measure on shipped code, other languages, structured text, JSON and tool calls, too, and count who "
        "finishes JSON under a grammar. Costs two passes over 8,192 tokens and 4,608 decoded ones.",
    ),
    click.option(
        "--kld-base",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        metavar="FILE",
        help="Compare the built file with log-probabilities that llama-perplexity has written, too.",
    ),
    click.option(
        "--write-kld-base",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Write those of the original on the held-out text, for llama-perplexity --kl-divergence.",
    ),
)


def wishes(options: dict[str, Any]) -> Wishes:
    """What the options ask for."""
    from edgeprune.stages.deepening import Wishes

    return Wishes(
        depths=options["depths"],
        loops=options["loops"] or 0,
        tasks=options["tasks"],
        questions=options["questions"],
        slices=options["slices"],
        base=options["kld_base"],
        write_base=options["write_kld_base"],
    )
