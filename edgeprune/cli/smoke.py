"""Devices, and smoke tests on them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgeprune.cli.options import SIZE

if TYPE_CHECKING:
    from edgeprune.prove.smoke.report import SmokeReport


@click.command(short_help="List the devices that can be reached.")
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def devices(name: str | None, as_json: bool) -> None:
    """List the devices that smoke tests can be run on, or show the one called NAME.

    \b
    edgeprune devices
    edgeprune devices local
    """
    from edgeprune.cli.show import table
    from edgeprune.device.machine import find_machine, known_machines
    from edgeprune.files import to_json

    found = [find_machine(each) for each in ([name] if name else known_machines())]
    if as_json:
        click.echo(to_json([machine.to_json() for machine in found]), nl=False)
        return
    if name is None:
        width = max(len(machine.name) for machine in found)
        reached = max(len(machine.address) for machine in found)
        for each in found:
            click.echo(f"{each.name:<{width}}  {each.address:<{reached}}  {each.profile}  {each.summary}".rstrip())
        return
    (machine,) = found
    rows = [("reached by", machine.address), ("profile", machine.profile), ("runs models with", machine.runner.words)]
    if machine.folder:
        rows.append(("folder", machine.folder))
    click.echo("\n".join([machine.name, *([machine.summary] if machine.summary else []), "", *table(rows)]))


def _plan_of(plan: Path | None, run: Path | None) -> Path | None:
    from edgeprune.errors import UsageError
    from edgeprune.rundir import RunFolder

    if plan is not None and run is not None:
        raise UsageError("--plan and --run both say where the plan is", hint="give one of them")
    return RunFolder(run).plan if run is not None else plan


_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command(short_help="Run a GGUF on a device and check what was promised.")
@click.argument("file", type=_FILE)
@click.option("--device", default="local", show_default=True, metavar="NAME", help="A device, or a device file.")
@click.option("--profile", metavar="NAME", help="Profile to hold it against; by default what the device claims.")
@click.option("--plan", type=_FILE, help="The file's plan; plan.json beside it by default.")
@click.option("--run", type=click.Path(file_okay=False, path_type=Path), help="The run directory with the plan.")
@click.option(
    "--context", type=click.IntRange(128), help="Context in tokens; by default the plan's, or the profile's."
)
@click.option(
    "--min-decode",
    type=click.FloatRange(0),
    metavar="N",
    help="Tokens per second that must be reached; 0 for any.  [default: half of what the plan predicts, where it "
    "predicts for this device]",
)
@click.option(
    "--memory", type=SIZE, metavar="SIZE", help="Most memory it may take, if that is less than the device has."
)
@click.option("--baseline", type=_FILE, help="An earlier report, the source model's say: its right answers count.")
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Folder of the reports; the device's own by default.",
)
@click.option("--remove", is_flag=True, help="Delete the file from the device afterwards.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def smoke(
    file: Path,
    device: str,
    profile: str | None,
    plan: Path | None,
    run: Path | None,
    context: int | None,
    min_decode: float | None,
    memory: int | None,
    baseline: Path | None,
    output: Path | None,
    remove: bool,
    as_json: bool,
) -> None:
    """Send FILE to a device, run it there, and check memory, speed, answers and the whole context.

    \b
    edgeprune smoke runs/demo-auto/edgeprune-demo-8.13bpw.gguf
    edgeprune smoke model.gguf --device pi --min-decode 5
    """
    from edgeprune.cli.console import Console
    from edgeprune.errors import BrokenPromise
    from edgeprune.files import to_json
    from edgeprune.stages.smoke import Wish, smoke

    wish = Wish(
        file,
        device,
        profile,
        _plan_of(plan, run),
        context,
        least_decode_per_s=min_decode,
        most_bytes=memory,
        baseline=baseline,
        output=output,
        remove=remove,
    )
    report, saved = smoke(wish, Console())
    click.echo(to_json(report.to_json()), nl=False) if as_json else click.echo("\n".join(_lines(report, saved)))
    if report.broken:
        log = [("log", line) for line in report.measured["log"]]
        count = "a promise was" if len(report.broken) == 1 else f"{len(report.broken)} promises were"
        raise BrokenPromise(
            f"{count} broken on {report.device}",
            rows=[*(("broken", check.line) for check in report.broken), *log],
            hint=f"the report is {saved}",
        )


def _lines(report: SmokeReport, saved: Path) -> list[str]:
    from edgeprune.cli.show import table
    from edgeprune.prove.smoke.report import INFORMATION

    rows = [
        (
            check.name,
            check.promised or "-",
            check.measured or "-",
            "" if check.verdict == INFORMATION else check.verdict,
        )
        for check in report.checks
    ]
    return [
        f"{report.file['name']} on {report.device} ({report.profile}), {report.engine}",
        "",
        *table(rows, ("", "promised", "measured", "")),
        "",
        f"report  {saved}",
    ]
