"""The picture of a comparison: share of experts kept against KL divergence, one line a method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from edgeprune.prove.comparison import Row
from edgeprune.prove.figures import WIDTH, svg, text

_COLOURS = 6
_DASHES = ("", "6 3", "2 3", "8 3 2 3")
_TITLE = "Share of experts kept against KL divergence, one line a method"
_LEFT, _TOP = 56, 16


class _Frame:
    """Where a number of experts and a divergence are in the picture."""

    def __init__(self, rows: Sequence[Row], height: float, right: float) -> None:
        self.right = right
        self.counts = sorted({row.kept for row in rows})
        values = [row.quality["kl_mean"] for row in rows]
        self.floor = max(min(values), 1e-6)
        self.bottom, self.top = math.log10(self.floor) - 0.1, math.log10(max(*values, self.floor * 10)) + 0.1
        self.lower = _TOP + height

    def place(self, kept: int, nats: float) -> tuple[float, float]:
        first, last = self.counts[0], self.counts[-1]
        share = 0.5 if first == last else (kept - first) / (last - first)
        depth = (math.log10(max(nats, self.floor)) - self.bottom) / (self.top - self.bottom)
        return _LEFT + (self.right - _LEFT) * share, self.lower - (self.lower - _TOP) * depth


def _axes(frame: _Frame, experts: int) -> list[str]:
    lower = frame.lower
    body = [f'<line x1="{_LEFT}" y1="{lower}" x2="{frame.right}" y2="{lower}" class="axis"/>']
    powers = range(math.floor(frame.bottom), math.floor(frame.top) + 1)
    for nats in (step * 10.0**power for power in powers for step in (1, 2, 5)):
        if not frame.bottom <= math.log10(nats) <= frame.top:
            continue
        y = frame.place(frame.counts[0], nats)[1]
        body.append(f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{frame.right}" y2="{y:.1f}" class="grid"/>')
        body.append(text(_LEFT - 6, y + 4, f"{nats:g}", "end"))
    for kept in frame.counts:
        body.append(text(frame.place(kept, frame.floor)[0], lower + 18, f"{100 * kept / experts:.0f} %", "middle"))
    body.append(text(_LEFT, lower + 38, "share of experts kept; vertical:"))
    return [*body, text(_LEFT, lower + 56, "KL divergence, nats per token, logarithmic")]


def _line(points: Sequence[tuple[float, float]], number: int) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dash = _DASHES[number // _COLOURS % len(_DASHES)]
    return f'<polyline points="{path}" class="line s{number % _COLOURS}" stroke-dasharray="{dash}"/>'


def methods_in_order(rows: Sequence[Row]) -> list[str]:
    """Methods from best to worst where the fewest experts are kept."""
    return list(dict.fromkeys(row.method for row in sorted(rows, key=lambda r: (r.kept, r.quality["kl_mean"]))))


def method_lines(rows: Sequence[Row], experts: int, width: int = WIDTH) -> str:
    """The picture as SVG; the legend is in the order of the lines where the fewest experts are kept, beside them
    where there is room and else below."""
    methods = methods_in_order(rows)
    beside = width >= WIDTH
    frame = _Frame(rows, max(284, 17 * len(methods)) if beside else 284, width - (170 if beside else 20))
    body = _axes(frame, experts)
    below = frame.lower + 74
    step = (frame.lower - _TOP) / len(methods)
    for number, method in enumerate(methods):
        own = sorted((row for row in rows if row.method == method), key=lambda row: row.kept)
        points = [frame.place(row.kept, row.quality["kl_mean"]) for row in own]
        body.append(_line(points, number))
        for (x, y), row in zip(points, own, strict=True):
            what = f"{row.width} channels each" if row.width else f"{row.kept} of {experts} kept"
            tip = f"{method}, {what}: {row.quality['kl_mean']:.4g} nats per token"
            circle = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" class="c{number % _COLOURS}">'
            body.append(f"{circle}<title>{escape(tip)}</title></circle>")
        left, y = (frame.right + 16, _TOP + (number + 0.5) * step) if beside else _below(number, below, width)
        body.append(_line([(left, y), (left + 24, y)], number))
        body.append(text(left + 30, y + 4, method, css="small"))
    height = below - 8 if beside else _below(len(methods) - 1, below, width)[1] + 12
    return svg(int(height), _TITLE, body, width)


def _below(number: int, top: float, width: int) -> tuple[float, float]:
    """Where a line of the legend begins that stands below the picture, in two columns."""
    return 8.0 + number % 2 * width / 2, top + number // 2 * 17
