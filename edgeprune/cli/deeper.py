"""What `verify` measured on request, as lines of text for people."""

from __future__ import annotations

from edgeprune.cli.show import table
from edgeprune.prove.deeper import Deeper
from edgeprune.prove.paired import Paired, wilson
from edgeprune.units import format_seconds


def lines(found: Deeper) -> list[str]:
    """Everything that was measured, each kind under a title of its own."""
    return [*_speeds(found), *_loops(found)]


def share(hits: int, count: int) -> str:
    """A share with its 95 % confidence interval."""
    low, high = wilson(hits, count)
    return f"{100 * hits / max(1, count):.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def change(found: Paired) -> str:
    """How much the share changed, in percentage points with the 95 % confidence interval."""
    difference, low, high = found.difference
    return f"{100 * difference:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def _rate(three: tuple[float, float, float]) -> str:
    return f"{three[0]:,.1f} ({three[1]:,.1f} to {three[2]:,.1f})"


def _speeds(found: Deeper) -> list[str]:
    if not found.speeds:
        return []
    rows = [
        (
            f"{speed.depth:,}",
            _rate(speed.prefill),
            _rate(speed.decode),
            "-" if speed.first_token_seconds is None else format_seconds(speed.first_token_seconds),
        )
        for speed in found.speeds
    ]
    header = ("tokens in the context", "prefill per second", "decode per second", "first token after as many")
    return ["", "speed by depth: median (least to most)", *table(rows, header)]


def _loops(found: Deeper) -> list[str]:
    if not found.loops:
        return []
    rows = [
        (
            probe.mode,
            share(probe.looping.original, probe.looping.count),
            share(probe.looping.candidate, probe.looping.count),
            change(probe.looping),
            f"{probe.looping.p_value:.2g}",
            f"{100 * probe.repeated[0]:.1f} % -> {100 * probe.repeated[1]:.1f} %",
        )
        for probe in found.loops
    ]
    first = found.loops[0]
    title = f"loops in {first.looping.count} generations of at most {first.length} tokens, 95 % intervals"
    header = ("", "original", "built file", "points", "p", "repeated runs of 4 tokens")
    return ["", title, *table(rows, header)]
