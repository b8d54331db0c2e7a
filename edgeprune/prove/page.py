"""The report as one self-contained HTML page: no network, no scripts, light and dark."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.prove import figures
from edgeprune.prove.comparison import Comparison
from edgeprune.prove.family import Family
from edgeprune.prove.lines import method_lines, methods_in_order
from edgeprune.prove.report import Report
from edgeprune.units import format_bytes

if TYPE_CHECKING:
    from jinja2 import Template

_TEMPLATES = Path(__file__).resolve().parent


def _weights(report: Report) -> dict[str, int]:
    """Weights by pool: what the pool takes in all, less its other lines."""
    taken = report.plan["predicted"]["pool_bytes"]
    return {
        pool["pool"]: taken.get(pool["pool"], 0) - sum(line["nbytes"] for line in pool["lines"])
        for pool in report.budget["pools"]
    }


def _template(name: str) -> Template:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["bytes"] = format_bytes
    return environment.get_template(name)


def standalone(picture: str) -> str:
    """One of the pictures as an SVG file of its own, which brings its colours along."""
    opened = '<svg xmlns="http://www.w3.org/2000/svg" '
    style = _template("style.html.j2").render()
    paper = '<rect width="100%" height="100%" style="fill: var(--paper)"/>'
    start, end = picture.removeprefix("<svg ").split(">", 1)
    return f"{opened}{start}>{style}{paper}{end}\n"


def render_family(family: Family) -> str:
    """The page of a family as HTML text."""
    return _template("family.html.j2").render(
        family=family, presets=family.presets, curve=family.curve(), **family.to_json()
    )


def render_comparison(comparison: Comparison) -> str:
    """The page of a comparison as HTML text."""
    domains = comparison.text["domains"]
    return _template("compare.html.j2").render(
        comparison=comparison,
        domains=domains if len(domains) > 1 else [],  # of a single one the mean is all there is to say
        picture=method_lines(comparison.rows, comparison.experts),
    )


def _by_method(comparison: Comparison) -> tuple[list[int], list[tuple[str, list[float | None]]]]:
    """Numbers of experts, largest first, and each method's divergence at them, methods in the legend's order."""
    counts = sorted({row.kept for row in comparison.rows}, reverse=True)
    found = {(row.method, row.kept): row.quality["kl_mean"] for row in comparison.rows}
    methods = methods_in_order(comparison.rows)
    return counts, [(method, [found.get((method, kept)) for kept in counts]) for method in methods]


def render(report: Report) -> str:
    """The page as HTML text."""
    template = _template("report.html.j2")
    shipped = {"shipped": (report.build["nbytes"], report.quality["kl_mean"])}
    rivals: list[dict[str, Any]] = report.to_json()["baselines"]
    rows = [
        {"name": "shipped", "nbytes": report.build["nbytes"], **report.quality},
        *({"name": rival["preset"], "nbytes": rival["nbytes"], **rival["quality"]} for rival in rivals),
    ]
    compared = report.comparison
    return template.render(
        report=report,
        rows=rows,
        budget_bars=figures.budget_bars(report.budget, _weights(report)),
        curve=figures.curve(report.curve, rivals, shipped),
        keep_map=figures.keep_map(report.importance, report.plan["keep"]) if report.importance else "",
        type_map=figures.type_map(report.types),
        methods=_by_method(compared) if compared else None,
        picture=method_lines(compared.rows, compared.experts) if compared else "",
    )
