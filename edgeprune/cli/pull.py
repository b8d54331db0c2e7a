"""``edgeprune pull``: of a repository on the Hugging Face Hub the file that fits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeprune.cli.options import SIZE, show_result
from edgeprune.errors import DoesNotFit, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from edgeprune.cli.console import Console
    from edgeprune.device.profile import Profile
    from edgeprune.share.pulling import Pulled, Target, Verdict


@click.command(short_help="Fetch the file that fits from the Hub.")
@click.argument("repository", metavar="ORG/NAME")
@click.option("--device", metavar="PROFILE", help="Device profile, a profile file, or 'auto', the default.")
@click.option("--memory", type=SIZE, help="Usable memory instead of a device, for example 9.5GiB.")
@click.option("--context", type=click.IntRange(16), help="Context in tokens; the profile's by default.")
@click.option("--kv-type", type=click.Choice(["f16", "q8_0", "q4_0"]), help="Type of the KV cache.")
@click.option(
    "-o", "--output", metavar="DIR", type=click.Path(path_type=Path), help="Folder; the Hub's cache by default."
)
@click.option("--revision", metavar="REVISION", help="Branch, tag or commit; the main branch by default.")
@click.option("--dry-run", is_flag=True, help="Say what fits, and fetch nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def pull(repository: str, **options: Any) -> None:
    """Choose the best GGUF of ORG/NAME that fits a device, fetch it, and say how to run it.

    Repositories of `edgeprune publish` say what each file needs; of others names and sizes are looked at.

    \b
    edgeprune pull me/demo-GGUF --device auto
    """
    from edgeprune.cli.console import Console
    from edgeprune.share.hub import Hub
    from edgeprune.share.origin import is_repository
    from edgeprune.share.pulling import Target, candidates, choose, download

    if not is_repository(repository):
        raise UsageError(f"'{repository}' is not a repository on the Hub", hint="write organisation/name")
    console = Console()
    profile = _named(options)
    hub = Hub(quiet=not console.interactive)
    remote = hub.look(repository, options["revision"])
    if remote.exists and not remote.branch:
        raise UsageError(f"{repository} has no revision '{options['revision']}'")
    found = candidates(hub, repository, remote, console)
    target = Target(profile or _probed(options, console), options["memory"], options["context"], options["kv_type"])
    verdicts = [target.judge(each) for each in found]
    chosen = choose(verdicts, target.profile, repository, console.say)
    value: dict[str, Any] = {"files": [verdict.to_json() for verdict in verdicts], "chosen": chosen.candidate.name}
    lines = [*_table(verdicts, chosen), ""]
    if options["dry_run"]:
        show_result(value, lines[:-1], options["as_json"])
        return

    def fetch(verdict: Verdict) -> Path:
        return download(hub, repository, remote, verdict, options["output"], console)

    pulled, failed = _fetched(fetch, verdicts, chosen, target, repository, console)
    value |= {"chosen": pulled.verdict.candidate.name, "failed": [each.candidate.name for each in failed]}
    value |= {"path": str(pulled.path), "launch_line": pulled.launch_line}
    lines = [*_table(verdicts, pulled.verdict, failed), "", f"file    {pulled.path}", ""]
    show_result(value, [*lines, f"run it:  {pulled.launch_line}"], options["as_json"])


def _fetched(
    fetch: Callable[[Verdict], Path],
    verdicts: Sequence[Verdict],
    chosen: Verdict,
    target: Target,
    repository: str,
    console: Console,
) -> tuple[Pulled, list[Verdict]]:
    """The chosen file, or the next smaller one for which llama.cpp finds room; and those for which it did not."""
    from edgeprune.share.pulling import Pulled, choose, placed

    failed: list[Verdict] = []
    while True:
        path = fetch(chosen)
        try:
            return Pulled(path, chosen, placed(path, target, chosen)), failed
        except DoesNotFit as error:
            failed.append(chosen)
            smaller = [each for each in verdicts if each.candidate.nbytes < chosen.candidate.nbytes]
            if not any(verdict.fits for verdict in smaller):
                raise
            chosen = choose(smaller, target.profile, repository)
            console.say(f"{error.cause}; it stays there, and {chosen.candidate.name} is tried, which is smaller")


def _named(options: dict[str, Any]) -> Profile | None:
    """The profile that was asked for; None where this machine is to be looked at, which takes a while."""
    from edgeprune.device.profile import find_profile

    device = options["device"]
    if device is not None and options["memory"] is not None:
        raise UsageError("--device and --memory say two things", hint="give one of them")
    return None if device in (None, "auto") else find_profile(device)


def _probed(options: dict[str, Any], console: Console) -> Profile:
    from edgeprune.device.probe import this_machine
    from edgeprune.measure import child
    from edgeprune.units import format_bytes

    profile = this_machine(child.call("edgeprune.measure.llama:backend_devices", {}))
    if options["memory"] is not None:
        return replace(profile, name=f"{format_bytes(options['memory'])} of memory")
    for line in profile.why:
        console.say(f"auto: {line}")
    return profile


def _table(verdicts: Sequence[Verdict], chosen: Verdict, failed: Sequence[Verdict] = ()) -> list[str]:
    from edgeprune.cli.show import table
    from edgeprune.units import format_bytes

    rows = []
    for verdict in sorted(verdicts, key=lambda verdict: -verdict.candidate.nbytes):
        nats = verdict.candidate.nats
        state = "fits" if verdict.fits else f"short of {format_bytes(verdict.short_bytes)}"
        state = "too large after all" if verdict in failed else state
        mark = "chosen" if verdict is chosen else state
        size = f"{verdict.candidate.nbytes:,} bytes"
        rows.append((verdict.candidate.name, size, "-" if nats is None else f"{nats:.5f}", mark))
    return table(rows, ("", "size", "KL mean", ""))
