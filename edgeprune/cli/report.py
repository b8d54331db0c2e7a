"""The `report` command: the page of a finished run again, and its pictures as files."""

from __future__ import annotations

from pathlib import Path

import click

from edgeprune.errors import BadFile, UsageError


@click.command(short_help="Show a finished run again, with pictures as files.")
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--pictures",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Write every picture of the page to DIR: SVG, and PNG where a Chromium is installed.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def report(folder: Path, pictures: Path | None, as_json: bool) -> None:
    """Print the outcome of the run in FOLDER, and write its report.html anew from report.json. Measures nothing.

    \b
    edgeprune report runs/demo-auto --pictures pictures
    """
    from jinja2 import TemplateError

    from edgeprune.cli import deeper, show
    from edgeprune.files import read_json, to_json, write_text
    from edgeprune.prove.page import render
    from edgeprune.prove.pictures import write_pictures
    from edgeprune.prove.report import Report

    path = folder / "report.json"
    if not path.is_file():
        raise UsageError(f"no report in {folder}", hint="name a folder that `edgeprune fit` or `verify` wrote to")
    try:
        found = Report.from_json(read_json(path))
        page = render(found)
    except (AttributeError, TypeError, KeyError, ValueError, TemplateError) as error:
        raise BadFile(f"{path} is no report: {error}"[:300], hint="`edgeprune verify` writes it anew") from error
    write_text(folder / "report.html", page)
    made = write_pictures(found, pictures) if pictures else []
    if as_json:
        click.echo(to_json({"report": found.to_json(), "pictures": [str(one) for one in made]}), nl=False)
    else:
        click.echo("\n".join([*show.report(found, folder), *deeper.lines(found.deeper), *map(str, made)]))
