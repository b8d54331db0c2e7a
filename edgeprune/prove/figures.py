"""The report's pictures as inline SVG: each has a title for screen readers and takes its colours from the
page, so that light and dark both work."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from edgeprune.model import ggml
from edgeprune.units import format_bytes

WIDTH = 720


def svg(height: int, title: str, body: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{''.join(body)}</svg>"
    )


def text(x: float, y: float, content: str, anchor: str = "start", css: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{css}">{escape(content)}</text>'


def budget_bars(budget: Mapping[str, Any], weights: Mapping[str, int]) -> str:
    """One bar per pool: what is reserved, what the runtime takes, the weights, and what stays free."""
    body, y = [], 18
    for pool in budget["pools"]:
        name, total = pool["pool"], pool["total_bytes"]
        parts = [(line["name"], line["nbytes"]) for line in pool["lines"]]
        parts.append(("weights", weights.get(name, 0)))
        used = sum(count for _, count in parts)
        parts.append(("free", max(0, total - used)))
        body.append(text(0, y, f"{name.upper()} {format_bytes(total)}", css="label"))
        x = 0.0
        for index, (label, count) in enumerate(parts):
            width = WIDTH * count / max(total, used)
            css = "free" if label == "free" else f"c{index % 6}"
            tip = f"{label}: {format_bytes(count)}"
            body.append(
                f'<rect x="{x:.1f}" y="{y + 8}" width="{max(width, 0.5):.1f}" height="26" class="{css}">'
                f"<title>{escape(tip)}</title></rect>"
            )
            x += width
        y += 52
        legend_x = 0
        for index, (label, count) in enumerate(parts):
            content = f"{label} {format_bytes(count)}"
            length = 22 + 7 * len(content)
            if legend_x and legend_x + length > WIDTH:
                legend_x, y = 0, y + 20
            css = "free" if label == "free" else f"c{index % 6}"
            body.append(f'<rect x="{legend_x}" y="{y - 10}" width="12" height="12" class="{css}"/>')
            body.append(text(legend_x + 17, y, content))
            legend_x += length
        y += 34
    return svg(y - 10, "Memory budget of the device and what the model takes of it", body)


def curve(
    points: Sequence[Mapping[str, Any]],
    presets: Sequence[Mapping[str, Any]],
    shipped: Mapping[str, tuple[int, float]],
) -> str:
    """File size against KL divergence: candidates (predicted), presets and shipped files (measured).

    Args:
        shipped: bytes and nats per token by label.
    """
    marks = [(p["file_bytes"], p["nats"], f"K={p['kept']}", "c1") for p in points]
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
    left, right, upper, lower = 64, WIDTH - 70, 16, 270

    def place(size: float, nats: float) -> tuple[float, float]:
        x = left + (right - left) * (size - low) / (high - low)
        y = lower - (lower - upper) * (math.log10(max(nats, floor)) - bottom) / (top - bottom)
        return x, y

    body = [f'<line x1="{left}" y1="{lower}" x2="{right}" y2="{lower}" class="axis"/>']
    for power in range(math.ceil(bottom), math.floor(top) + 1):
        y = place(low, 10.0**power)[1]
        body.append(f'<line x1="{left}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}" class="grid"/>')
        body.append(text(left - 6, y + 4, f"{10.0**power:g}", "end"))
    for share in (0.0, 0.5, 1.0):
        x = left + (right - left) * share
        anchor = ("start", "middle", "end")[int(share * 2)]
        body.append(text(x, lower + 18, format_bytes(low + (high - low) * share), anchor))
    body.append(text(left, lower + 38, "file size; vertical: KL divergence, nats per token, logarithmic"))
    places = [place(size, nats) for size, nats, _, _ in marks]
    labels = _labels(places, [label for _, _, label, _ in marks], (left, upper, WIDTH, lower))
    for (size, nats, label, css), (x, y), spot in zip(marks, places, labels, strict=True):
        tip = f"{label}: {format_bytes(size)}, {nats:.4g} nats per token"
        radius = 7 if css == "c4" else 5
        body.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" class="{css}"><title>{escape(tip)}</title></circle>'
        )
        if spot is not None:
            body.append(text(*spot, label, "middle", "small"))
    legend = [("c1", "candidates, predicted"), ("c3", "stock presets, measured"), ("c4", "shipped, measured")]
    drawn = {css for _, _, _, css in marks}
    for index, (css, label) in enumerate(pair for pair in legend if pair[0] in drawn):
        body.append(f'<circle cx="{left + 6 + index * 210}" cy="{lower + 56}" r="5" class="{css}"/>')
        body.append(text(left + 17 + index * 210, lower + 60, label))
    return svg(lower + 70, "File size against KL divergence", body)


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


def keep_map(importance: Mapping[str, Sequence[float]], keep: Mapping[str, Sequence[int]]) -> str:
    """Layers by experts: darker is more important, a cross marks a dropped expert."""
    layers = sorted(importance, key=int)
    experts = len(next(iter(importance.values())))
    left = 60
    size = min(26.0, (WIDTH - left) / experts)
    body = []
    for row, layer in enumerate(layers):
        scores = importance[layer]
        most = max(max(scores), 1e-12)
        kept = set(keep.get(layer, range(experts)))
        y = row * size + 4
        body.append(text(left - 8, y + size * 0.7, f"layer {layer}", "end", "small"))
        for expert, score in enumerate(scores):
            x = left + expert * size
            state = "kept" if expert in kept else "dropped"
            tip = f"layer {layer}, expert {expert}: importance {score:.4g}, {state}"
            shade = 0.12 + 0.88 * score / most
            body.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{size - 1:.1f}" height="{size - 1:.1f}" '
                f'class="c0" fill-opacity="{shade:.2f}"><title>{escape(tip)}</title></rect>'
            )
            if expert not in kept:
                body.append(
                    f'<path d="M{x + 2:.1f} {y + 2:.1f} L{x + size - 3:.1f} {y + size - 3:.1f} '
                    f'M{x + size - 3:.1f} {y + 2:.1f} L{x + 2:.1f} {y + size - 3:.1f}" class="cross"/>'
                )
    return svg(int(len(layers) * size + 10), "Experts by layer: importance, and which were kept", body)


def type_map(types: Sequence[tuple[str, str]]) -> str:
    """Layers by kind of tensor, each cell with its GGML type; ``types`` are pairs of tensor and type."""
    rows: dict[str, dict[str, str]] = {}
    for name, kind in types:
        layer, part = name.split(".", 2)[1:] if name.startswith("blk.") else ("", name)
        rows.setdefault(layer, {})[part.removesuffix(".weight")] = kind
    layered = sorted((layer for layer in rows if layer), key=int)
    kinds = list(dict.fromkeys(kind for layer in layered for kind in rows[layer]))
    left, height, top = 60, 20, 26
    width = (WIDTH - left) / max(1, len(kinds))
    body = [
        text(left + (i + 0.5) * width, 14, kind.removeprefix("ffn_").removeprefix("attn_"), "middle", "small")
        for i, kind in enumerate(kinds)
    ]
    for row, layer in enumerate(layered):
        y = top + row * height
        body.append(text(left - 8, y + 14, f"layer {layer}", "end", "small"))
        for column, kind in enumerate(kinds):
            if kind in rows[layer]:
                body.append(_type_cell(left + column * width, y, width, height, rows[layer][kind]))
    y = top + len(layered) * height + 8
    outer = rows.get("", {})
    for index, (name, kind) in enumerate(outer.items()):
        body.append(_type_cell(left + index * 2 * width, y, 2 * width, height, f"{kind}", f"{name}: "))
    return svg(y + height + 6, "GGML type of every tensor", body)


def _type_cell(x: float, y: float, width: float, height: float, kind: str, prefix: str = "") -> str:
    bits = ggml.BY_NAME[kind].bits_per_weight
    shade = min(1.0, 0.08 + math.log2(max(bits, 1.0)) / 5)
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width - 1:.1f}" height="{height - 1:.1f}" class="c1" '
        f'fill-opacity="{shade:.2f}"><title>{escape(prefix + kind)}, {bits:.4g} bits per weight</title></rect>'
        + text(x + width / 2, y + height * 0.7, prefix + kind, "middle", "cell")
    )
