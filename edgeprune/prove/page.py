"""The report as one self-contained HTML page: no network, no scripts, light and dark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgeprune.prove import figures
from edgeprune.prove.report import Report
from edgeprune.units import format_bytes

_TEMPLATE = Path(__file__).resolve().parent / "report.html.j2"


def _weights(report: Report) -> dict[str, int]:
    """Weights by pool: what the pool takes in all, less its other lines."""
    taken = report.plan["predicted"]["pool_bytes"]
    return {
        pool["pool"]: taken.get(pool["pool"], 0) - sum(line["nbytes"] for line in pool["lines"])
        for pool in report.budget["pools"]
    }


def render(report: Report) -> str:
    """The page as HTML text."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["bytes"] = format_bytes
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    chosen = {"file_bytes": report.build["nbytes"], "kl_mean": report.quality["kl_mean"]}
    rivals: list[dict[str, Any]] = report.to_json()["baselines"]
    rows = [
        {"name": "shipped", "nbytes": report.build["nbytes"], **report.quality},
        *({"name": rival["preset"], "nbytes": rival["nbytes"], **rival["quality"]} for rival in rivals),
    ]
    return template.render(
        report=report,
        rows=rows,
        budget_bars=figures.budget_bars(report.budget, _weights(report)),
        curve=figures.curve(report.curve, rivals, chosen),
        keep_map=figures.keep_map(report.importance, report.plan["keep"]) if report.importance else "",
        type_map=figures.type_map(report.types),
    )
