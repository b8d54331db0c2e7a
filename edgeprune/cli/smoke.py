"""Devices, and smoke tests on them."""

from __future__ import annotations

import click


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
    runner = machine.runner.server or f"llama-cpp-python of {machine.runner.python or 'this Python'}"
    rows = [("reached by", machine.address), ("profile", machine.profile), ("runs models with", runner)]
    if machine.folder:
        rows.append(("folder", machine.folder))
    click.echo("\n".join([machine.name, *([machine.summary] if machine.summary else []), "", *table(rows)]))
