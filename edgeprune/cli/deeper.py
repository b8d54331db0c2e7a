"""What `verify` measured on request, as lines of text for people."""

from __future__ import annotations

from edgeprune.cli.show import table
from edgeprune.prove.deeper import Deeper
from edgeprune.prove.paired import Paired, exact_interval
from edgeprune.prove.report import rate
from edgeprune.units import format_seconds


def lines(found: Deeper) -> list[str]:
    """Everything that was measured, each kind under a title of its own."""
    return [*_speeds(found), *_loops(found), *_tasks(found), *_slices(found), *_bases(found)]


def share(hits: int, count: int) -> str:
    """A share with its 95 % confidence interval."""
    low, high = exact_interval(hits, count)
    return f"{100 * hits / max(1, count):.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def change(found: Paired) -> str:
    """How much the share changed, in percentage points with the 95 % confidence interval."""
    difference, low, high = found.difference
    return f"{100 * difference:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def _rate(three: tuple[float, float, float]) -> str:
    middle, least, most = map(rate, three)
    return f"{middle} ({least} to {most})"


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


def _tasks(found: Deeper) -> list[str]:
    if not found.tasks:
        return []
    rows = [
        (
            f"{task.name} ({task.form})",
            f"{task.right.count:,} of {task.total:,}",
            share(task.right.original, task.right.count),
            share(task.right.candidate, task.right.count),
            change(task.right),
            f"{task.right.p_value:.2g}",
            f"{task.right.needed():,}",
        )
        for task in found.tasks
    ]
    header = ("", "asked", "original", "built file", "points", "p", "to see 1 point")
    return ["", "questions answered rightly, 95 % intervals", *table(rows, header)]


def _bases(found: Deeper) -> list[str]:
    lines = []
    for base in found.bases:
        q = base.quality
        lines.append(
            f"against {base.name}: KL mean {q['kl_mean']:.5f}, 99.9 % {q['kl_999']:.4f}, max {q['kl_max']:.3f}, "
            f"same top token {100 * q['same_top']:.1f} %"
        )
    return ["", *lines] if lines else []


def _slices(found: Deeper) -> list[str]:
    rows = [
        (
            one.name,
            f"{one.quality['kl_mean']:.5f}",
            f"{one.quality['kl_999']:.4f}",
            f"{100 * one.quality['same_top']:.1f} %",
            f"{one.quality['perplexity']:,.2f}",
            f"{one.quality['reference_perplexity']:,.2f}",
        )
        for one in found.slices
    ]
    lines = table(rows, ("slice", "KL mean", "KL 99.9 %", "same top token", "perplexity", "of the source"))
    if (objects := found.objects) is not None:
        shares = [share(hits, objects.count) for hits in (objects.original, objects.candidate)]
        lines.append(f"JSON under a grammar brought to its end: original {shares[0]}, built file {shares[1]}")
    return ["", *lines] if rows or found.objects is not None else []
