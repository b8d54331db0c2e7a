"""The tables of a report's page, as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from edgeprune.decide.plan import experts_in_words
from edgeprune.prove.comparison import Comparison, Row
from edgeprune.prove.family import Family
from edgeprune.prove.lines import methods_in_order
from edgeprune.prove.paired import Paired, exact_interval
from edgeprune.prove.report import DECODE, INFORMATION, MEANWHILE, Report, nats_in_words, rate
from edgeprune.units import format_bytes, format_seconds

_NONE = "\u2013"


@dataclass(frozen=True)
class Table:
    """Heads of the columns, and the rows, which the first column names; ``words``: the others are no figures."""

    heads: tuple[str, ...]
    rows: list[tuple[str, ...]]
    words: bool = False


def facts(report: Report) -> list[tuple[str, str]]:
    """What is asked first: size, divergence, agreement, memory, speed."""
    measured = {promise.name: promise.measured for promise in report.promises}
    found = [
        ("file size", format_bytes(report.build["nbytes"])),
        ("KL, nats per token", nats_in_words(report.quality["kl_mean"])),
        ("same top token", f"{100 * report.quality['same_top']:.1f} %"),
    ]
    others = f", while other programs used {measured[MEANWHILE]}" if MEANWHILE in measured else ""
    names = {"peak memory": "peak memory", DECODE: f"tokens per second{others}"}
    return found + [(label, measured[name]) for name, label in names.items() if name in measured]


def tables(report: Report) -> dict[str, Table]:
    """Every table by name."""
    rivals = [("shipped", report.build["nbytes"], report.quality)]
    rivals += [(rival.preset, rival.nbytes, rival.quality) for rival in report.baselines]
    found = {
        "promises": Table(
            ("What", "Predicted", "Measured", "Verdict"),
            [
                (
                    p.name,
                    p.predicted or _NONE,
                    p.measured,
                    "for information" if p.verdict == INFORMATION else p.verdict,
                )
                for p in report.promises
            ],
        ),
        "presets": Table(
            ("File", "Size", *_QUALITY), [(name, format_bytes(size), *_quality(q)) for name, size, q in rivals]
        ),
        "domains": Table(
            ("Domain", *_QUALITY, "Perplexity of the source"),
            [
                (name, *_quality(q), _perplexity(q["reference_perplexity"]))
                for name, q in sorted(report.domains.items())
            ],
        ),
        "candidates": Table(
            ("Experts kept", "Size", "KL predicted", "KL measured, to choose"),
            [
                (
                    experts_in_words({**row, "experts": report.plan["experts"]}),
                    format_bytes(row["file_bytes"]),
                    nats_in_words(row["nats"]),
                    nats_in_words(row["measured"]) if "measured" in row else _NONE,
                )
                for row in report.curve
            ],
        ),
        "experts": Table(
            ("Layer", "Kept"),
            [(layer, ranges(report.plan["keep"][layer])) for layer in sorted(report.plan["keep"], key=int)],
            words=True,
        ),
        "conditions": Table(("What", "Value"), _conditions(report), words=True),
        "inputs": Table(("What went in", "SHA-256"), sorted(report.provenance.inputs.items()), words=True),
        "outputs": Table(("What came out", "SHA-256"), sorted(report.provenance.outputs.items()), words=True),
        "versions": Table(("Program", "Version"), sorted(report.provenance.versions.items()), words=True),
    }
    return found | _deeper(report)


def family_tables(family: Family) -> tuple[Table, Table]:
    """Every file of a family, largest first; and the stock presets that were measured beside them."""
    files = []
    for member in family.members:
        report, needs = member.report, member.report.needed_bytes
        kept = experts_in_words(report.plan)
        memory = " + ".join(f"{format_bytes(nbytes)} {pool.upper()}" for pool, nbytes in sorted(needs.items()))
        size = format_bytes(report.build["nbytes"])
        files.append((member.folder, size, kept, memory, *_brief(report.quality)))
    presets = [
        (rival["preset"], format_bytes(rival["nbytes"]), *_brief(rival["quality"])) for rival in family.presets
    ]
    return (
        Table(("For", "Size", "Experts", "Memory", *_BRIEF), files),
        Table(("Stock preset", "Size", *_BRIEF), presets),
    )


_BRIEF = ("KL mean", "KL 99 %", "Same top token", "Perplexity")


def _brief(q: Mapping[str, Any]) -> tuple[str, ...]:
    found = _quality(q)
    return (*found[:2], *found[-2:])


_QUALITY = ("KL mean", "KL 99 %", "KL 99.9 %", "KL max", "Same top token", "Perplexity")


def _quality(q: Mapping[str, Any]) -> tuple[str, ...]:
    finest = f"{q['kl_999']:.4f}" if "kl_999" in q else _NONE  # earlier reports do not have it
    return (
        f"{q['kl_mean']:.5f}",
        f"{q['kl_99']:.4f}",
        finest,
        f"{q['kl_max']:.3f}",
        f"{100 * q['same_top']:.2f} %",
        _perplexity(q["perplexity"]),
    )


def _perplexity(value: float) -> str:
    """With no more digits than mean something."""
    return f"{value:,.3f}" if value < 1000 else f"{value:,.0f}"


def _deeper(report: Report) -> dict[str, Table]:
    deeper = report.deeper
    return {
        "speeds": Table(
            ("In the context", "Prefill per second", "Decode per second", "First token after as many"),
            [
                (
                    f"{speed.depth:,} tokens",
                    _rate(speed.prefill),
                    _rate(speed.decode),
                    _NONE if speed.first_token_seconds is None else format_seconds(speed.first_token_seconds),
                )
                for speed in deeper.speeds
            ],
        ),
        "tasks": Table(
            ("Questions", "Asked", *_PAIRED, "To see 1 point"),
            [
                (
                    f"{task.name} ({task.form})",
                    f"{task.right.count:,} of {task.total:,}",
                    *_paired(task.right),
                    f"{task.right.needed():,}",
                )
                for task in deeper.tasks
            ],
        ),
        "loops": Table(
            ("Mode", *_PAIRED, "Repeated runs", "Their change, points"),
            [
                (
                    probe.mode,
                    *_paired(probe.looping),
                    f"{100 * probe.repeated[0]:.1f} \u2192 {100 * probe.repeated[1]:.1f} %",
                    _points(*probe.change),
                )
                for probe in deeper.loops
            ],
        ),
        "bases": Table(("File", *_QUALITY), [(base.name, *_quality(base.quality)) for base in deeper.bases]),
        "slices": Table(
            ("Slice", *_QUALITY, "Perplexity of the source"),
            [
                (one.name, *_quality(one.quality), _perplexity(one.quality["reference_perplexity"]))
                for one in deeper.slices
            ],
        ),
        "objects": Table(
            ("Structured output", *_PAIRED),
            []
            if deeper.objects is None
            else [("JSON under a grammar, brought to its end", *_paired(deeper.objects))],
        ),
    }


_PAIRED = ("Original", "Built file", "Change, points", "p")


def _paired(found: Paired) -> tuple[str, ...]:
    shares = []
    for hits in (found.original, found.candidate):
        low, high = exact_interval(hits, found.count)
        shares.append(f"{100 * hits / max(1, found.count):.1f} % ({100 * low:.1f} to {100 * high:.1f})")
    return (*shares, _points(*found.difference), f"{found.p_value:.2g}")


def _points(change: float, low: float, high: float) -> str:
    return f"{100 * change:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def _rate(three: tuple[float, float, float]) -> str:
    middle, least, most = map(rate, three)
    return f"{middle} ({least} to {most})"


def _conditions(report: Report) -> list[tuple[str, ...]]:
    return [
        *((name, value) for name, value in sorted(report.conditions.items())),
        ("chosen by", str(report.plan["origin"])),
        ("proven gap of the choice of types", f"{report.plan['predicted']['gap']:.2g}"),
        ("digest of the plan", str(report.plan["digest"])),
        *([("SHA-256 of the file", str(report.build["sha256"]))] if not report.provenance.outputs else []),
    ]


def ranges(numbers: Sequence[int]) -> str:
    """Ascending ``numbers`` in a line, runs of them as ``3-7``."""
    starts = [a for before, a in pairwise([-2, *numbers]) if a != before + 1]
    ends = [a for a, after in pairwise([*numbers, -2]) if after != a + 1]
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def methods_table(comparison: Comparison) -> Table:
    """Each method's divergence by numbers of experts, largest first; methods in the legend's order."""
    counts = sorted({row.kept for row in comparison.rows}, reverse=True)
    found = {(row.method, row.kept): f"{row.quality['kl_mean']:.4f}" for row in comparison.rows}
    return Table(
        ("Method", *(f"{kept} kept" for kept in counts)),
        [
            (method, *(found.get((method, kept), _NONE) for kept in counts))
            for method in methods_in_order(comparison.rows)
        ],
    )


def comparison_tables(comparison: Comparison) -> list[tuple[int, list[Table]]]:
    """Every method at each number of experts, largest first: over all text, and by domain where there are several."""
    names = list(comparison.text["domains"])
    heads = ("Method", "KL mean", "95 % interval", "KL 99 %", "Same top token", "Perplexity")
    found = []
    for kept in sorted({row.kept for row in comparison.rows}, reverse=True):
        rows = [row for row in comparison.rows if row.kept == kept]
        tables = [Table(heads, [_compared(row) for row in rows])]
        if len(names) > 1:
            domains = [(row.method, *(f"{row.domains[name]['kl_mean']:.4f}" for name in names)) for row in rows]
            tables.append(Table(("KL mean of", *names), domains))
        found.append((kept, tables))
    return found


def _compared(row: Row) -> tuple[str, ...]:
    return (
        row.label,
        f"{row.quality['kl_mean']:.4f}",
        f"{row.low:.4f} to {row.high:.4f}",
        f"{row.quality['kl_99']:.3f}",
        f"{100 * row.quality['same_top']:.1f} %",
        f"{row.quality['perplexity']:,.2f}",
    )
