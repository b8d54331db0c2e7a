"""The report as one self-contained HTML page: no network, no scripts, light and dark, wide and narrow."""

from __future__ import annotations

from urllib.parse import quote

from edgeprune.prove.comparison import Comparison
from edgeprune.prove.family import Family
from edgeprune.prove.figures import NARROW, WIDTH
from edgeprune.prove.lines import method_lines
from edgeprune.prove.pictures import pictures
from edgeprune.prove.report import Report
from edgeprune.prove.tables import comparison_tables, facts, family_tables, methods_table, tables
from edgeprune.prove.templates import template


def render_family(family: Family) -> str:
    """The page of a family as HTML text."""
    return template("family.html.j2").render(
        family=family,
        tables=family_tables(family),
        links={member.folder: f"{quote(member.folder)}/report.html" for member in family.members},
        picture=[family.curve(width) for width in (WIDTH, NARROW)],
        **family.to_json(),
    )


def render_comparison(comparison: Comparison) -> str:
    """The page of a comparison as HTML text."""
    return template("compare.html.j2").render(
        comparison=comparison,
        tables=comparison_tables(comparison),
        picture=[method_lines(comparison.rows, comparison.experts, width) for width in (WIDTH, NARROW)],
    )


def render(report: Report) -> str:
    """The page as HTML text."""
    wide, narrow = pictures(report), pictures(report, NARROW)
    return template("report.html.j2").render(
        report=report,
        facts=facts(report),
        tables=tables(report),
        methods=methods_table(report.comparison) if report.comparison else None,
        pictures={name: (drawn, narrow[name]) if drawn else None for name, drawn in wide.items()},
    )
