"""Results as lines of text for people."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune.decide.plan import Plan, experts_in_words, folded
from edgeprune.device.profile import Profile
from edgeprune.inspection import Inspection
from edgeprune.measure.statistics import Statistics
from edgeprune.prove.comparison import Comparison
from edgeprune.prove.family import Family
from edgeprune.prove.report import DECODE, INFORMATION, MEANWHILE, Report
from edgeprune.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from edgeprune.pipeline import Run


def table(rows: Sequence[Sequence[str]], header: Sequence[str] = ()) -> list[str]:
    """Rows as aligned columns: the first to the left, the others to the right."""
    everything = [list(header), *map(list, rows)] if header else [list(row) for row in rows]
    widths = [max(len(row[column]) for row in everything) for column in range(len(everything[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in everything
    ]


def family(found: Family, folder: Path) -> list[str]:
    """What came out for every target, on one screen."""
    rows = []
    for member in found.members:
        row = member.to_json()
        quality = row["quality"]
        rows.append(
            (
                member.folder,
                format_bytes(row["nbytes"]),
                experts_in_words(row),
                " + ".join(format_bytes(nbytes) for nbytes in row["needed_bytes"].values()),
                f"{quality['kl_mean']:.5f}",
                f"{100 * quality['same_top']:.1f} %",
            )
        )
    lines = [f"{found.model} in several sizes", ""]
    lines += table(rows, ("", "size", "experts", "memory", "KL mean", "same top token"))
    return [*lines, "", f"report  {folder / 'family.html'}", f"publish it:  edgeprune publish {folder} ORG/NAME"]


# A summary is read on one screen: lines of types have no more columns, and there are no more of them.
_COLUMNS, _TYPE_LINES = 110, 12
_FACT = 60  # characters of a fact that stands on the right
_LAYERS = re.compile(r"\[([0-9,-]+)\]")


def type_lines(folded: Sequence[str]) -> list[str]:
    """What ``decide.plan.folded`` says of the types, for one screen: how many layers where their numbers are too long
    for a line, and kinds of tensors of a single type together where there are many."""
    lines = [line if len(line) <= _COLUMNS else _LAYERS.sub(_counted, line) for line in folded]
    if len(lines) <= _TYPE_LINES:
        return lines
    alike: dict[str, list[str]] = {}
    mixed = []
    for line in lines:
        kind, _, rest = line.partition(" ")
        words = rest.split()
        if len(words) == 1:
            alike.setdefault(words[0], []).append(kind)
        else:
            mixed.append(line)
    for name, kinds in alike.items():
        mixed += textwrap.wrap(f"{name} for all of {', '.join(kinds)}", _COLUMNS, subsequent_indent="  ")
    return mixed


def _counted(found: re.Match[str]) -> str:
    """How many layers stand in brackets."""
    spans = [span.partition("-") for span in found[1].split(",")]
    return f" x{sum(int(last or first) - int(first) + 1 for first, _, last in spans)}"


def report(found: Report, folder: Path) -> list[str]:
    """The outcome of a fit on one screen."""
    lines = [found.title, "", found.verdict, ""]
    others = next((f"  while other programs used {p.measured}" for p in found.promises if p.name == MEANWHILE), "")
    promised = table(
        [
            (p.name, p.predicted or "-", p.measured, "" if p.verdict == INFORMATION else p.verdict)
            for p in found.promises
            if p.name != MEANWHILE
        ],
        ("", "predicted", "measured", ""),
    )
    lines += [line + others if line.startswith(DECODE) else line for line in promised]
    rows = [("shipped", found.build["nbytes"], found.quality)]
    rows += [(rival.preset, rival.nbytes, rival.quality) for rival in found.baselines]
    lines += ["", "against the source on held-out text:"]
    lines += table(
        [
            (
                name,
                format_bytes(nbytes),
                f"{q['kl_mean']:.5f}",
                f"{q['kl_99']:.4f}",
                f"{100 * q['same_top']:.1f} %",
            )
            for name, nbytes, q in rows
        ],
        ("", "size", "KL mean", "KL 99 %", "same top token"),
    )
    lines += ["", f"experts kept: {experts_in_words(found.plan, ' per layer')}", *type_lines(found.folded)]
    lines += ["", f"file    {folder / found.build['path']}", f"report  {folder / 'report.html'}"]
    return [*lines, f"run it:  {found.launch.command(str(folder / found.build['path']))}"]


def plan(chosen: Plan, run: Run) -> list[str]:
    """A plan, its budget and the candidates it was chosen from."""
    from edgeprune.files import read_json

    predicted = chosen.predicted
    lines = ["budget", *table(run.budget.rows()), run.budget.basis, ""]
    path = run.folder.path / "candidates.json"
    if path.is_file():
        rows = [
            (
                f"K={row['kept']}" + (f", F={row['width']}" if row.get("width") else ""),
                format_bytes(row["file_bytes"]),
                f"{row['nats']:.4g}",
                f"{row['nats_drop']:.4g}",
                f"{row['nats_quant']:.4g}",
                f"{row['decode_per_s']:.3g}",
            )
            for row in read_json(path)
        ]
        lines += table(rows, ("candidates", "file", "nats/token", "experts", "types", "tokens/s"))
    lines += [
        "",
        f"chosen: {experts_in_words(chosen.to_json(), ' per layer')} ({_chosen_by(chosen)}), "
        f"{format_bytes(predicted.file_bytes)}, {predicted.nats:.4g} nats per token predicted",
        f"encoding takes {format_seconds(predicted.encode_seconds)} here"
        + (", the experts are trained for as long as it takes" if chosen.train else "")
        + (_healing_in_words(predicted.heal_seconds) if chosen.heal else ""),
        *type_lines(folded(chosen, run.architecture)),
        "",
        f"plan    {run.folder.plan}",
        f"run it:  {chosen.launch.command('FILE')}",
    ]
    return lines


def _healing_in_words(seconds: float) -> str:
    return (
        f", healing the experts about {format_seconds(seconds)} more" if seconds else ", then the experts are healed"
    )


def _chosen_by(plan: Plan) -> str:
    return f"{plan.method}; channels by {plan.narrowing}" if plan.width else plan.method


def comparison(found: Comparison, folder: Path) -> list[str]:
    """Methods by number of experts, best first."""
    lines = [f"{found.model}: KL divergence on {found.text['tokens']:,} held-out tokens, nats per token"]
    for kept in sorted({row.kept for row in found.rows}, reverse=True):
        rows = [
            (
                row.label,
                f"{row.quality['kl_mean']:.4f}",
                f"{row.low:.4f}-{row.high:.4f}",
                f"{row.quality['kl_99']:.3f}",
                f"{100 * row.quality['same_top']:.1f} %",
                f"{row.quality['perplexity']:,.2f}",
            )
            for row in found.rows
            if row.kept == kept
        ]
        title = f"K={kept} of {found.experts}"
        lines += ["", *table(rows, (title, "KL mean", "95 % interval", "KL 99 %", "same top token", "perplexity"))]
    return [*lines, "", f"saved in {folder}: compare.json, compare.html"]


# Fewer do not tell experts apart.
_TOKENS_PER_EXPERT = 200


def statistics(found: Statistics, folder: Path) -> list[str]:
    """What a calibration pass saw."""
    rows = []
    for layer, sums in sorted(found.layers.items()):
        routed = sums.total("routed")
        unused = int((routed == 0).sum())
        share = routed.max() / routed.sum()
        rows.append((f"layer {layer}", f"{unused}", f"{100 * share:.1f} %"))
    domains = "domain" if len(found.domains) == 1 else "domains"
    each = min(sums.total("routed").mean() for sums in found.layers.values())
    thin = []
    if each < _TOKENS_PER_EXPERT:
        wanted = round(found.tokens * _TOKENS_PER_EXPERT / each) if each else 0
        thin = [
            f"little text: {each:,.0f} tokens per expert on average, where {_TOKENS_PER_EXPERT} are the least"
            f" to judge one by; {wanted:,} tokens in all give that"
        ]
    return [
        f"{found.tokens:,} tokens in {len(found.domains)} {domains}: {', '.join(found.domains)}",
        *table(rows, ("", "experts never used", "busiest expert")),
        *thin,
        "",
        f"saved in {folder}: statistics.safetensors, imatrix.gguf",
    ]


def profile_list(found: Sequence[Profile]) -> list[str]:
    """All profiles, a line each."""
    width = max(len(profile.name) for profile in found)
    return [
        f"{profile.name:<{width}}  {format_bytes(profile.usable_bytes):>9} usable  {profile.summary}"
        for profile in found
    ]


def profile(found: Profile) -> list[str]:
    """One profile in full."""
    rows = [
        ("RAM", format_bytes(found.ram.total_bytes)),
        ("  reserve", format_bytes(found.ram.reserve_bytes)),
    ]
    if found.working_set_bytes:
        rows.append(("  GPU may use", format_bytes(found.working_set_bytes)))
    rows.append(("  bandwidth", f"{found.ram.bandwidth_bytes_per_s / 1e9:.1f} GB/s"))
    if found.vram is not None:
        rows.append(("VRAM", format_bytes(found.vram.total_bytes)))
        rows.append(("  reserve", format_bytes(found.vram.reserve_bytes)))
        rows.append(("  bandwidth", f"{found.vram.bandwidth_bytes_per_s / 1e9:.1f} GB/s"))
    rows += [
        ("usable for a model", format_bytes(found.usable_bytes)),
        ("backend", found.backend),
        ("threads", str(found.threads)),
        ("context", f"{found.context} tokens"),
        ("KV cache type", found.kv_type),
        ("types avoided", ", ".join(found.avoid) or "none"),
    ]
    return [found.name, found.summary, "", *table(rows), *(f"- {line}" for line in found.why)]


def _facts(facts: Sequence[tuple[str, str]]) -> list[str]:
    """Labels and figures; a text that is too long for a line goes on below itself and widens no column."""
    label_width = max(len(label) for label, _ in facts)
    room = _COLUMNS - label_width - 2
    width = max((len(figure) for _, figure in facts if len(figure) <= _FACT), default=0)
    lines = []
    for label, figure in facts:
        first, *more = [figure.rjust(width)] if len(figure) <= _FACT else textwrap.wrap(figure, room)
        lines.append(f"{label:<{label_width}}  {first}")
        lines += [f"{'':<{label_width}}  {part}" for part in more]
    return lines


def inspection(found: Inspection) -> list[str]:
    """A model's shape, weights and fit."""
    lines = _facts(found.facts)
    lines += [
        "",
        *table(
            [(role, format_bytes(n), f"{100 * n / max(1, found.nbytes):.1f} %") for role, n in found.roles.items()],
            ("weights", "size", "share"),
        ),
    ]
    lines += [
        "",
        *table(
            [(f.profile, format_bytes(f.usable_bytes), format_bytes(f.beside_bytes), f.verdict) for f in found.fits],
            ("profile", "usable", "KV cache, buffers", "fits"),
        ),
    ]
    return lines
