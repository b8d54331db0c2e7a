"""What the user sees while the pipeline works: progress on stderr, results on stdout."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import click

from edgeprune.pipeline import Progress
from edgeprune.units import format_seconds

_PATIENCE_SECONDS = 0.3
_REFRESH_SECONDS = 0.1


class Console:
    """A ``Listener`` for people: one line a stage, with an estimate of the time left, on a terminal; plain
    lines for remarks and silence about progress when stderr is none."""

    def __init__(self) -> None:
        self.interactive = sys.stderr.isatty()

    def say(self, text: str) -> None:
        click.echo(text, err=True)

    @contextmanager
    def progress(self, title: str) -> Iterator[Progress]:
        started = time.monotonic()
        shown = 0.0

        def update(done: int, total: int) -> None:
            nonlocal shown
            now = time.monotonic()
            if not self.interactive or now - started < _PATIENCE_SECONDS or now - shown < _REFRESH_SECONDS:
                return
            shown = now
            share = done / total if total else 0.0
            left = (now - started) * (1 - share) / share if share > 0 else 0.0
            click.echo(f"\r\x1b[K{title} {100 * share:3.0f} %, {format_seconds(left)} left", err=True, nl=False)

        if self.interactive:
            click.echo(f"\r\x1b[K{title} ...", err=True, nl=False)
        try:
            yield update
        finally:
            if self.interactive:
                click.echo("\r\x1b[K", err=True, nl=False)
        if self.interactive:
            click.echo(f"{title}: {format_seconds(time.monotonic() - started)}", err=True)
