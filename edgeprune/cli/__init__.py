"""The command line. A command is parse, call, print; nothing heavy is imported before it is known."""

from __future__ import annotations

import os
import sys

import click

from edgeprune import __version__
from edgeprune.cli.commands import COMMANDS
from edgeprune.errors import EdgepruneError


@click.group(commands=COMMANDS, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="edgeprune")
def edgeprune() -> None:
    """Fit a Mixture-of-Experts model to a device: the best GGUF that runs there, with proof.

    \b
    edgeprune fit demo --device auto            a small model that ships with edgeprune
    edgeprune fit model.gguf --device cpu-16gb  any MoE GGUF, for a class of hardware
    edgeprune fit ./checkpoint --memory 9.5GiB  a Hugging Face checkpoint, for a memory size
    """


def main() -> None:
    """Entry point: run a command and turn an explained failure into its message and exit code."""
    try:
        code = edgeprune.main(standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("stopped; the same command goes on where it was", err=True)
        code = 130
    except KeyboardInterrupt:
        click.echo("\nstopped; the same command goes on where it was", err=True)
        code = 130
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except EdgepruneError as error:
        if os.environ.get("EDGEPRUNE_DEBUG"):
            raise
        click.echo(f"error: {error}", err=True)
        code = error.exit_code
    except BrokenPipeError:
        code = 0
    sys.stdout.flush() if not sys.stdout.closed else None
    sys.exit(code or 0)
