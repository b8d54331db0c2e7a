"""The command line. A command is parse, call, print; nothing heavy is imported before it is known."""

from __future__ import annotations

import os
import re
import shlex
import sys

import click

from edgeprune import __version__
from edgeprune.cli.commands import COMMANDS
from edgeprune.cli.publish import publish
from edgeprune.cli.pull import pull
from edgeprune.cli.report import report
from edgeprune.cli.smoke import devices, smoke
from edgeprune.errors import EdgepruneError, system_cause


@click.group(
    commands=[*COMMANDS, report, smoke, devices, publish, pull],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="edgeprune")
def edgeprune() -> None:
    """Fit a Mixture-of-Experts model to a device: the best GGUF that runs there, with proof.

    \b
    edgeprune fit demo --device auto            a small model that ships with edgeprune
    edgeprune fit model.gguf --device cpu-16gb  any MoE GGUF, for a class of hardware
    edgeprune fit ./checkpoint --memory 9.5GiB  a Hugging Face checkpoint, for a memory size
    edgeprune inspect ORG/NAME:Q4_K_M           a model on the Hub: what it is, and what it fits
    """


# A checkpoint in the cache of the Hub, which people know as ORG/NAME.
_CACHED = re.compile(r"\S*[/\\]models--([^/\\\s]+?)--([^/\\\s]+)[/\\]snapshots[/\\][0-9a-f]{40}")


def main() -> None:
    """Entry point: run a command and turn an explained failure into its message and exit code."""
    code = 0
    try:
        words = sys.argv[1:]
        code = edgeprune.main(words, standalone_mode=False, obj=shlex.join(["edgeprune", *words])) or 0
    except (click.exceptions.Abort, KeyboardInterrupt):
        click.echo("stopped; the same command goes on where it was", err=True)
        code = 130
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (EdgepruneError, OSError) as error:
        if os.environ.get("EDGEPRUNE_DEBUG"):
            raise
        cause = error if isinstance(error, EdgepruneError) else system_cause(error)
        text = _CACHED.sub(r"\1/\2", str(cause))
        click.echo(f"error: {text}", err=True)
        code = error.exit_code if isinstance(error, EdgepruneError) else 1
    sys.exit(code)
