"""The report's pictures as SVG: each has a title for screen readers and takes its colours from the page, so that
light and dark both work. All are drawn to a width: letters that shrink with a picture cannot be read on a phone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from edgeprune.model import ggml
from edgeprune.units import format_bytes

WIDTH, NARROW = 720, 360
_CROSSED = 10.0  # cells of at least this width have room for a cross


def svg(height: int, title: str, body: Sequence[str], width: int = WIDTH) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{''.join(body)}</svg>"
    )


def text(x: float, y: float, content: str, anchor: str = "start", css: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{css}">{escape(content)}</text>'


def budget_bars(budget: Mapping[str, Any], weights: Mapping[str, int], file_bytes: int, width: int = WIDTH) -> str:
    """One bar per pool: what is reserved, what the runtime takes, the weights, and what stays free.

    Where the size of the file was the limit, no pool has one: the bars are of the file, and of what it takes.

    Args:
        weights: bytes by pool.
        file_bytes: of the file that is shipped.
    """
    title, limit = "Memory budget of the device and what the model takes of it", budget["file_limit_bytes"]
    bars = []
    if limit is not None:
        title = "Size of the file within its limit, and memory that the model takes"
        bars.append((f"FILE at most {limit:,} bytes", limit, [("file", file_bytes)]))
    for pool in budget["pools"]:
        parts = [(line["name"], line["nbytes"]) for line in pool["lines"]]
        parts.append(("weights", weights.get(pool["pool"], 0)))
        total = pool["total_bytes"] if limit is None else sum(count for _, count in parts)
        bars.append(
            (f"{pool['pool'].upper()} {format_bytes(total)}{'' if limit is None else ' taken'}", total, parts)
        )
    body, y = [], 18
    for name, total, parts in bars:
        used = sum(count for _, count in parts)
        if total > used:
            parts.append(("free", total - used))
        body.append(text(0, y, name, css="label"))
        x = 0.0
        for index, (label, count) in enumerate(parts):
            length = width * count / max(total, used, 1)
            css = "free" if label == "free" else f"c{index % 6}"
            tip = f"{label}: {format_bytes(count)}"
            body.append(
                f'<rect x="{x:.1f}" y="{y + 8}" width="{max(length, 0.5):.1f}" height="26" class="{css}">'
                f"<title>{escape(tip)}</title></rect>"
            )
            x += length
        y += 52
        legend_x = 0.0
        for index, (label, count) in enumerate(parts):
            content = f"{label} {format_bytes(count)}"
            length = 28 + 7.4 * len(content)
            if legend_x and legend_x + length > width:
                legend_x, y = 0.0, y + 20
            css = "free" if label == "free" else f"c{index % 6}"
            body.append(f'<rect x="{legend_x:.1f}" y="{y - 10}" width="12" height="12" class="{css}"/>')
            body.append(text(legend_x + 17, y, content))
            legend_x += length
        y += 34
    return svg(y - 10, title, body, width)


def curve(
    points: Sequence[Mapping[str, Any]],
    presets: Sequence[Mapping[str, Any]],
    shipped: Mapping[str, tuple[int, float]],
    width: int = WIDTH,
) -> str:
    """File size against KL divergence: candidates (predicted), presets and shipped files (measured), which a line
    joins where there are several.

    Args:
        shipped: bytes and nats per token by label.
    """
    marks = [
        (p["file_bytes"], p["nats"], f"F={p['width']}" if p.get("width") else f"K={p['kept']}", "c1") for p in points
    ]
    marks += [(p["nbytes"], p["quality"]["kl_mean"], p["preset"], "c3") for p in presets]
    marks += [(nbytes, nats, label, "c4") for label, (nbytes, nats) in shipped.items()]
    marks = [mark for mark in marks if math.isfinite(mark[1])]
    if not marks:
        return ""
    least = min((nats for _, nats, _, _ in marks if nats > 0), default=1e-4)
    floor = max(least / 3, 1e-6)  # below it is rounding
    sizes = [size for size, _, _, _ in marks]
    low, high = min(sizes) * 0.96, max(sizes) * 1.04
    bottom = math.log10(floor)
    top = math.log10(max(max(nats for _, nats, _, _ in marks), floor * 10)) + 0.15
    wide = width >= WIDTH
    ticks = {nats: f"{nats:g}" for nats in _decades(bottom, top)}
    left = max(64 if wide else 48, max(map(len, ticks.values()), default=0) * 7.4 + 8)
    right, upper, lower = width - (70 if wide else 24), 16, 270

    def place(size: float, nats: float) -> tuple[float, float]:
        x = left + (right - left) * (size - low) / (high - low)
        y = lower - (lower - upper) * (math.log10(max(nats, floor)) - bottom) / (top - bottom)
        return x, y

    body = [f'<line x1="{left}" y1="{lower}" x2="{right}" y2="{lower}" class="axis"/>']
    for nats, label in ticks.items():
        y = place(low, nats)[1]
        body.append(f'<line x1="{left}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}" class="grid"/>')
        body.append(text(left - 6, y + 4, label, "end"))
    for share in (0.0, 0.5, 1.0):
        x = left + (right - left) * share
        anchor = ("start", "middle", "end")[int(share * 2)]
        body.append(text(x, lower + 18, format_bytes(low + (high - low) * share), anchor))
    axes = ["file size; vertical: KL divergence, nats per token, logarithmic"]
    for line, words in enumerate(axes if wide else axes[0].split("; ")):
        body.append(text(left if wide else 4, lower + 38 + 18 * line, words))
    places = [place(size, nats) for size, nats, _, _ in marks]
    if len(shipped) > 1:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in sorted(place(*mark[:2]) for mark in marks if mark[3] == "c4"))
        body.append(f'<polyline points="{path}" class="line s4"/>')
    # What lies below the axis is drawn on it, and says so.
    names = [f"{label} \u2193" if nats < floor else label for _, nats, label, _ in marks]
    labels = _labels(places, names, (left, upper, width, lower))
    for (size, nats, own, css), label, (x, y), spot in zip(marks, names, places, labels, strict=True):
        tip = f"{own}: {format_bytes(size)}, {nats:.4g} nats per token{', below the axis' if label != own else ''}"
        radius = 7 if css == "c4" else 5
        body.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" class="{css}"><title>{escape(tip)}</title></circle>'
        )
        if spot is not None:
            body.append(text(*spot, label, "middle", "small"))
    legend = [("c1", "candidates, predicted"), ("c3", "stock presets, measured"), ("c4", "shipped, measured")]
    drawn = {css for _, _, _, css in marks}
    for index, (css, label) in enumerate(pair for pair in legend if pair[0] in drawn):
        x, y = (left + 6 + index * 210, lower + 56) if wide else (10, lower + 76 + index * 20)
        body.append(f'<circle cx="{x}" cy="{y}" r="5" class="{css}"/>')
        body.append(text(x + 11, y + 4, label))
    return svg(lower + (70 if wide else 126), "File size against KL divergence", body, width)


def _decades(bottom: float, top: float) -> list[float]:
    """Powers of ten between two logarithms; 2 and 5 times them, too, where there are few."""
    steps = (1, 2, 5) if top - bottom < 2.5 else (1,)
    found = [step * 10.0**power for power in range(math.floor(bottom), math.floor(top) + 1) for step in steps]
    return [value for value in found if bottom <= math.log10(value) <= top]


def _labels(
    places: Sequence[tuple[float, float]], labels: Sequence[str], frame: tuple[float, float, float, float]
) -> list[tuple[float, float] | None]:
    """Where each point's label is centred so that it covers no point and no other label; None where there is no room.

    Args:
        frame: left, top, right and bottom of where labels may be.
    """
    taken = [(x - 7, y - 7, x + 7, y + 7) for x, y in places]
    spots: list[tuple[float, float] | None] = [None] * len(places)
    for index in reversed(range(len(places))):  # the last point is the shipped file, which must have its label
        (x, y), half = places[index], 3.4 * len(labels[index])
        for dx, dy in ((0, -11), (0, 20), (half + 10, 4), (-half - 10, 4), (0, -24), (0, 33)):
            box = (x + dx - half, y + dy - 10, x + dx + half, y + dy + 3)
            inside = frame[0] < box[0] and frame[1] <= box[1] and box[2] <= frame[2] and box[3] <= frame[3]
            if inside and not any(_overlap(box, other) for other in taken):
                spots[index] = (x + dx, y + dy)
                taken.append(box)
                break
    return spots


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def keep_map(importance: Mapping[str, Sequence[float]], keep: Mapping[str, Sequence[int]], width: int = WIDTH) -> str:
    """Layers by experts: a stronger colour is more important; a dropped expert is crossed out, or where there is no
    room for that, a short mark in another colour. Only wide cells say what they are when they are pointed at."""
    layers = sorted(importance, key=int)
    experts = len(next(iter(importance.values())))
    left = 60
    size = min(26.0, (width - left) / experts)
    height = max(size, 8.0)
    every = math.ceil(13 / height)  # layers whose name has room
    body = []
    for row, layer in enumerate(layers):
        scores = importance[layer]
        most = max(max(scores), 1e-12)
        kept = set(keep.get(layer, range(experts)))
        y = row * height + 4
        if row % every == 0:
            body.append(text(left - 8, y + max(height * 0.7, 8), f"layer {layer}", "end", "small"))
        for expert, score in enumerate(scores):
            shade = 0.12 + 0.88 * score / most
            tip = f"layer {layer}, expert {expert}: importance {score:.4g}, "
            tip = tip + ("kept" if expert in kept else "dropped") if width >= WIDTH else ""
            body.append(_expert(left + expert * size, y, size, height, shade, expert in kept, tip))
    return svg(int(len(layers) * height + 10), "Experts by layer: importance, and which were kept", body, width)


def _expert(x: float, y: float, size: float, height: float, shade: float, kept: bool, tip: str) -> str:
    gap = 1.0 if size >= _CROSSED else 0.4
    css, tall = "c0", height - gap
    if not kept and size < _CROSSED:
        css, tall, shade = "c4", height * 0.3, 1.0
    title = f"<title>{escape(tip)}</title>" if tip else ""
    cell = (
        f'<rect x="{x:.1f}" y="{y + height - gap - tall:.1f}" width="{size - gap:.1f}" height="{tall:.1f}" '
        f'class="{css}" fill-opacity="{shade:.2f}">{title}</rect>'
    )
    if kept or size < _CROSSED:
        return cell
    right, bottom = x + size - 3, y + size - 3
    return cell + (
        f'<path d="M{x + 2:.1f} {y + 2:.1f} L{right:.1f} {bottom:.1f} '
        f'M{right:.1f} {y + 2:.1f} L{x + 2:.1f} {bottom:.1f}" class="cross"/>'
    )


def type_map(types: Sequence[tuple[str, str]], width: int = WIDTH) -> str:
    """Layers by kind of tensor, each cell with its GGML type; ``types`` are pairs of tensor and type."""
    rows: dict[str, dict[str, str]] = {}
    for name, kind in types:
        layer, part = name.split(".", 2)[1:] if name.startswith("blk.") else ("", name)
        rows.setdefault(layer, {})[part.removesuffix(".weight")] = kind
    layered = sorted((layer for layer in rows if layer), key=int)
    kinds = list(dict.fromkeys(kind for layer in layered for kind in rows[layer]))
    left, height = 60, 20
    cell = (width - left) / max(1, len(kinds))
    names = [kind.removeprefix("ffn_").removeprefix("attn_") for kind in kinds]
    lines = math.ceil(max((_length(name) for name in names), default=0) / cell)  # names take turns in so many lines
    top = 10 + 16 * max(1, lines)
    body = []
    for index, name in enumerate(names):
        half = _length(name) / 2
        x = min(max(left + (index + 0.5) * cell, half), width - half)
        body.append(text(x, 14 + 16 * (index % max(1, lines)), name, "middle", "small"))
    for row, layer in enumerate(layered):
        y = top + row * height
        body.append(text(left - 8, y + 14, f"layer {layer}", "end", "small"))
        for column, kind in enumerate(kinds):
            if kind in rows[layer]:
                body.append(_type_cell(left + column * cell, y, cell, height, rows[layer][kind]))
    y = top + len(layered) * height + 8
    for name, kind in rows.get("", {}).items():
        body.append(_type_cell(left, y, width - left, height, kind, f"{name}: "))
        y += height
    return svg(y + 6, "GGML type of every tensor", body, width)


def _length(words: str) -> float:
    """About how wide ``words`` are in small letters."""
    return 6.4 * len(words) + 4


def _type_cell(x: float, y: float, width: float, height: float, kind: str, prefix: str = "") -> str:
    bits = ggml.BY_NAME[kind].bits_per_weight
    shade = min(0.5, 0.06 + 0.09 * math.log2(max(bits, 1.0)))  # letters stay readable on the darkest
    words = prefix + kind
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width - 1:.1f}" height="{height - 1:.1f}" class="c1" '
        f'fill-opacity="{shade:.2f}"><title>{escape(words)}, {bits:.4g} bits per weight</title></rect>'
        + (text(x + width / 2, y + height * 0.7, words, "middle", "cell") if _length(words) <= width + 4 else "")
    )


def bars(title: str, unit: str, values: Mapping[str, float], width: int = WIDTH) -> str:
    """One bar a name, its value behind it, as long as the value is of the largest."""
    values = {name: value for name, value in values.items() if math.isfinite(value)}
    if not values:
        return ""
    left = min(max(map(len, values)) * 7.4 + 12, width * 0.42)
    room, most = width - left - 84, max(*values.values(), 1e-12)
    body = []
    for row, (name, value) in enumerate(values.items()):
        y, length = 4 + row * 24, max(room * max(value, 0) / most, 0.5)
        tip = escape(f"{name}: {value:.4g} {unit}")
        body.append(text(left - 8, y + 14, _shortened(name, left - 12), "end"))
        body.append(
            f'<rect x="{left:.1f}" y="{y}" width="{length:.1f}" height="18" class="c0"><title>{tip}</title></rect>'
        )
        body.append(text(left + length + 6, y + 14, f"{value:.4g}"))
    body.append(text(left, 20 + len(values) * 24, unit, css="small"))
    return svg(28 + len(values) * 24, title, body, width)


def intervals(
    title: str, rows: Sequence[tuple[str, Sequence[tuple[float, float, float]]]], width: int = WIDTH
) -> str:
    """Shares with their confidence intervals, of the original and of the built file, one pair a name.

    Args:
        rows: name, and (share, low, high) of both.
    """
    if not rows:
        return ""
    names = ("original", "built file")
    left, right = (190, width - 24) if width >= WIDTH else (12, width - 16)
    step = 40 if width >= WIDTH else 58
    body, bottom = [], 8 + len(rows) * step
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        x = left + (right - left) * share
        body.append(f'<line x1="{x:.1f}" y1="4" x2="{x:.1f}" y2="{bottom}" class="grid"/>')
        anchor = "start" if share == 0 else "end" if share == 1 else "middle"
        body.append(text(x, bottom + 16, f"{100 * share:.0f} %", anchor, "small"))
    for row, (name, pair) in enumerate(rows):
        y = 8 + row * step
        if width >= WIDTH:
            body.append(text(left - 12, y + 20, _shortened(name, left - 16), "end"))
        else:
            body.append(text(left, y + 14, _shortened(name, right - left)))
            y += 20
        for line, (who, (share, low, high)) in enumerate(zip(names, pair, strict=True)):
            middle, css = y + 9 + 14 * line, ("0", "4")[line]
            a, b, c = (left + (right - left) * value for value in (low, high, share))
            tip = escape(f"{name}, {who}: {100 * share:.1f} % ({100 * low:.1f} to {100 * high:.1f})")
            body.append(
                f'<line x1="{a:.1f}" y1="{middle}" x2="{b:.1f}" y2="{middle}" class="line s{css}"/>'
                f'<circle cx="{c:.1f}" cy="{middle}" r="5" class="c{css}"><title>{tip}</title></circle>'
            )
    for index, (who, css) in enumerate(zip(names, ("c0", "c4"), strict=True)):
        x = left + 6 + index * 110
        body.append(f'<circle cx="{x}" cy="{bottom + 36}" r="5" class="{css}"/>')
        body.append(text(x + 11, bottom + 40, who))
    return svg(bottom + 50, title, body, width)


def _shortened(words: str, room: float) -> str:
    most = max(4, int(room / 7))
    return words if len(words) <= most else words[: most - 1] + "\u2026"
