"""``edgeprune publish``: finished runs to a repository on the Hugging Face Hub."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeprune.cli.options import SIZE, show_result
from edgeprune.errors import EdgepruneError, UsageError

if TYPE_CHECKING:
    from edgeprune.cli.console import Console
    from edgeprune.share.hub import Hub
    from edgeprune.share.publishing import Publication, Publisher, Wishes
    from edgeprune.share.release import Run


@click.command(short_help="Send finished runs to the Hugging Face Hub.")
@click.argument("directories", nargs=-1, required=True, metavar="DIR...", type=click.Path(path_type=Path))
@click.argument("repository", metavar="ORG/NAME")
@click.option("--dry-run", is_flag=True, help="Show the files and the card, and send nothing.")
@click.option("--yes", is_flag=True, help="Do not ask before sending.")
@click.option("--private", is_flag=True, help="Make the repository private, if it is made now.")
@click.option(
    "--create-pr", is_flag=True, help="Send a pull request, or go on with yours of the same files if one is open."
)
@click.option("--revision", metavar="BRANCH", help="Branch to send to; made if it is not there.")
@click.option("--license", "licence", metavar="ID", help="Licence of the source, which you have read.")
@click.option("--license-name", metavar="NAME", help="Of a licence that is not on the Hub's list.")
@click.option("--license-link", metavar="URL", help="Where that licence can be read.")
@click.option("--base-model", "base_models", multiple=True, metavar="ORG/NAME", help="The source on the Hub.")
@click.option("--max-file-size", type=SIZE, help="Split larger files.  [default: 50GB, the Hub's limit]")
@click.option("--force", is_flag=True, help="Despite broken promises, licences that ask, an edited card.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def publish(directories: tuple[Path, ...], repository: str, **options: Any) -> None:
    """Send the run directories DIR... to the repository ORG/NAME on the Hugging Face Hub.

    Several directories, of one model for several devices, or the folder of a family become one repository. What is
    there already is not sent again, and files of earlier publications stay.

    \b
    edgeprune publish runs/demo-auto me/demo-GGUF --dry-run
    """
    from edgeprune.cli.console import Console
    from edgeprune.rundir import RunFolder
    from edgeprune.share.publishing import Publisher

    console = Console()
    wishes = _wishes(options)
    folders = [RunFolder(folder) for directory in directories for folder in _runs_in(directory)]
    with _locked(folders) as runs:
        hub = _hub(console, dry_run=options["dry_run"])
        publisher = Publisher(repository, wishes, console, hub)
        publisher.open(runs)
        planned = publisher.planned()
        lines = _summary(planned, publisher)
        if options["dry_run"]:
            show_result(planned.to_json(), [*lines, "", planned.card], options["as_json"])
            return
        for path in sorted(planned.replaced) if options["yes"] else ():
            if path.endswith(".gguf"):
                console.say(f"{path} there is another file, and is replaced")
        _ask(lines, yes=options["yes"])
        address = publisher.send(folders[0].scratch / "parts")
    value = {**planned.to_json(), "address": address}
    show_result(value, [address or f"{repository} holds all of it already"], options["as_json"])


def _runs_in(directory: Path) -> list[Path]:
    """The directory itself, or if it is a family's, its runs."""
    from edgeprune.files import read_json
    from edgeprune.prove.family import FAMILY, member_folders

    listed = directory / FAMILY
    if not listed.is_file():
        return [directory]
    names = member_folders(read_json(listed), str(listed))
    return [directory / Path(name).name for name in names]


def _wishes(options: dict[str, Any]) -> Wishes:
    from edgeprune.share.origin import make_licence
    from edgeprune.share.publishing import Wishes
    from edgeprune.share.release import LARGEST_FILE

    licence = None
    if options["licence"] is not None:
        licence = make_licence(options["licence"], options["license_name"], options["license_link"])
        if licence is None:
            raise UsageError(f"'{options['licence']}' is not the name of a licence", hint="for example apache-2.0")
    elif options["license_name"] or options["license_link"]:
        raise UsageError("--license-name and --license-link go with --license", hint="`--license other`, for example")
    return Wishes(
        base_models=options["base_models"],
        licence=licence,
        revision=options["revision"],
        private=options["private"],
        create_pr=options["create_pr"],
        force=options["force"],
        largest_file=options["max_file_size"] or LARGEST_FILE,
    )


@contextlib.contextmanager
def _locked(folders: Sequence[Any]) -> Iterator[list[Run]]:
    """The runs in ``folders``, which nobody else changes meanwhile."""
    from edgeprune.share.release import Run

    with contextlib.ExitStack() as stack:
        runs = []
        for folder in {folder.path.resolve(): folder for folder in folders}.values():
            owner = folder.owner()
            stack.enter_context(folder.locked(owner))
            runs.append(Run(folder.path, folder.plan, folder.build, folder.report, folder.imatrix, owner))
        yield runs


def _hub(console: Console, *, dry_run: bool) -> Hub | None:
    """The Hub, if there is a token that it takes; without one a dry run goes on alone."""
    from edgeprune.share.hub import Hub

    hub = Hub(quiet=not console.interactive)
    try:
        _ = hub.user
    except EdgepruneError as error:
        if not dry_run:
            raise
        console.say(f"not compared with the Hub: {error.cause}")
        return None
    return hub


def _summary(publication: Publication, publisher: Publisher) -> list[str]:
    from edgeprune.cli.show import table
    from edgeprune.units import format_bytes

    rows = [(u.path, f"{u.nbytes:,} bytes", _state(u.path, publication)) for u in publication.uploads]
    rows += [(path, "", "is deleted") for path in publication.gone]
    total = sum(upload.nbytes for upload in publication.to_send)
    kind = "private" if (publisher.remote.private or publisher.wishes.private) else "public"
    state = "" if publisher.remote.exists else ", to be made"
    licence, bases = publisher.origin.licence, ", ".join(publisher.origin.base_models)
    head = f"{publication.repository} ({kind}{state}): {total:,} bytes ({format_bytes(total)}) to send"
    given = ", as given by --license" if publisher.origin.licence_given else ""
    return [head, f"licence {licence or 'none'}{given}; base model {bases or 'none'}", "", *table(rows)]


def _state(path: str, publication: Publication) -> str:
    """What becomes of the file at ``path``; pages and records are ours, and made anew each time."""
    if path in publication.there:
        return "there already"
    if path not in publication.replaced:
        return ""
    return "replaces another file" if path.endswith(".gguf") else "replaces the one there"


def _ask(lines: Sequence[str], *, yes: bool) -> None:
    """Let the user decide.

    Raises:
        UsageError: there is nobody to ask.
    """
    if yes:
        return
    click.echo("\n".join(lines), err=True)
    if not sys.stdin.isatty():
        raise UsageError("nothing was sent: nobody can be asked here", hint="`--yes` sends what is listed above")
    if not click.confirm("send it?", err=True):
        raise EdgepruneError("nothing was sent, as you said")
