"""The pictures of a report by name: in the page, and as files of their own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from edgeprune.files import atomic_writer, write_text
from edgeprune.prove import figures
from edgeprune.prove.browser import find_browser, rasterised
from edgeprune.prove.figures import WIDTH
from edgeprune.prove.lines import method_lines
from edgeprune.prove.paired import Paired, exact_interval
from edgeprune.prove.report import Report
from edgeprune.prove.templates import template

_SCALE = 2  # pixels of a PNG for one of the picture
_PAPER = '<rect width="100%" height="100%" style="fill: var(--paper)"/>'


def pictures(report: Report, width: int = WIDTH) -> dict[str, str]:
    """Each picture as SVG, "" where there is nothing to draw."""
    shipped = {"shipped": (report.build["nbytes"], float(report.quality["kl_mean"]))}
    rivals: list[dict[str, Any]] = report.to_json()["baselines"]
    compared, deeper = report.comparison, report.deeper
    domains = {name: float(report.domains[name]["kl_mean"]) for name in sorted(report.domains)}
    return {
        "memory": figures.budget_bars(report.budget, _weights(report), int(report.build["nbytes"]), width),
        "curve": figures.curve(report.curve, rivals, shipped, width),
        "domains": figures.bars("KL divergence by domain", "nats per token", domains, width),
        "slices": figures.bars(
            "KL divergence by slice",
            "nats per token",
            {one.name: float(one.quality["kl_mean"]) for one in deeper.slices},
            width,
        ),
        "experts": figures.keep_map(report.importance, report.plan["keep"], width) if report.importance else "",
        "types": figures.type_map(report.types, width),
        "methods": method_lines(compared.rows, compared.experts, width) if compared else "",
        "questions": figures.intervals(
            "Questions answered rightly", [(task.name, _shares(task.right)) for task in deeper.tasks], width
        ),
        "loops": figures.intervals(
            "Generations that loop", [(probe.mode, _shares(probe.looping)) for probe in deeper.loops], width
        ),
    }


def write_pictures(report: Report, folder: Path) -> list[Path]:
    """Every picture as a file in ``folder``: an SVG, and a PNG of twice its size where the machine has a browser.

    Raises:
        EdgepruneError: the folder cannot be written to, or the browser fails.
    """
    program, made = find_browser(), []
    for name, drawn in pictures(report).items():
        if not drawn:
            continue
        width, height = map(int, re.findall(r'viewBox="0 0 (\d+) (\d+)"', drawn)[0])
        path = folder / f"{name}.svg"
        write_text(path, standalone(drawn))
        made.append(path)
        if program is not None:
            with atomic_writer(path.with_suffix(".png")) as stream:
                stream.write(rasterised(program, standalone(drawn), _SCALE * width, _SCALE * height))
            made.append(path.with_suffix(".png"))
    return made


def standalone(drawn: str) -> str:
    """One of the pictures as an SVG file of its own, which brings its colours along."""
    width, height = re.findall(r'viewBox="0 0 (\d+) (\d+)"', drawn)[0]
    style = template("picture.css.j2").render()
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
    body = drawn.removeprefix("<svg ").replace("</title>", f"</title><style>{style}</style>{_PAPER}", 1)
    return f"{head}{body}\n"


def _shares(found: Paired) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Share and interval of the original and of the built file."""
    original, candidate = (
        (hits / max(1, found.count), *exact_interval(hits, found.count)) for hits in (found.original, found.candidate)
    )
    return original, candidate


def _weights(report: Report) -> dict[str, int]:
    """Weights by pool: what the pool takes in all, less its other lines."""
    taken = report.plan["predicted"]["pool_bytes"]
    return {
        pool["pool"]: taken.get(pool["pool"], 0) - sum(line["nbytes"] for line in pool["lines"])
        for pool in report.budget["pools"]
    }
