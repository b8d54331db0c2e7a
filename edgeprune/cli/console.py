"""What the user sees while the pipeline works: progress on stderr, results on stdout."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import click

from edgeprune.pipeline import Progress
from edgeprune.units import format_seconds

_PATIENCE_SECONDS = 0.3
_REFRESH_SECONDS = 0.1
# What is left is not told from less than this: the first steps also wait for what is done once.
_TELLING_SHARE, _TELLING_SECONDS = 0.03, 10.0
# Where nobody sees a line change: what takes no longer than this needs no word, and what takes long has one a minute.
PLAIN_SECONDS, PLAIN_AGAIN_SECONDS = 2.0, 60.0


class Console:
    """A ``Listener`` for people: one line a stage, with an estimate of the time left, on a terminal; plain lines that
    stay, one a stage and one a minute, where stderr is none, and of those none with ``EDGEPRUNE_QUIET`` set.

    Args:
        plain_seconds, plain_again_seconds: when a stage has its first plain line, and when the next.
    """

    def __init__(
        self, plain_seconds: float = PLAIN_SECONDS, plain_again_seconds: float = PLAIN_AGAIN_SECONDS
    ) -> None:
        self.interactive = sys.stderr.isatty()
        self._quiet = bool(os.environ.get("EDGEPRUNE_QUIET"))
        self._plain_seconds, self._plain_again_seconds = plain_seconds, plain_again_seconds

    def say(self, text: str) -> None:
        click.echo(text, err=True)

    @contextmanager
    def progress(self, title: str) -> Iterator[Progress]:
        stage = _Stage(title)
        if self.interactive:
            click.echo(f"\r\x1b[K{title} ...", err=True, nl=False)
            try:
                yield stage.redraw
            finally:
                click.echo("\r\x1b[K", err=True, nl=False)
            click.echo(f"{title}: {format_seconds(stage.seconds)}", err=True)
        elif self._quiet:
            yield stage.note
        else:
            with self._told(stage):
                yield stage.note

    @contextmanager
    def _told(self, stage: _Stage) -> Iterator[None]:
        """A block whose ``stage`` is told in plain lines while it lasts, also when it reports no steps."""
        ended = threading.Event()

        def tell() -> None:
            if ended.wait(self._plain_seconds):
                return
            click.echo(f"{stage.title} ...", err=True)
            while not ended.wait(self._plain_again_seconds):
                click.echo(stage.line, err=True)

        teller = threading.Thread(target=tell, daemon=True)
        teller.start()
        try:
            yield
        finally:
            ended.set()
            teller.join()


class _Stage:
    """How far a stage has come."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._started, self._shown, self._share = time.monotonic(), 0.0, 0.0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    @property
    def line(self) -> str:
        """How far it is and how long it will take, or how long it has taken where nobody knows."""
        seconds = self.seconds
        if self._share <= 0 or (self._share < _TELLING_SHARE and seconds < _TELLING_SECONDS):
            return f"{self.title}: {format_seconds(seconds)} so far"
        left = seconds * (1 - self._share) / self._share
        return f"{self.title} {100 * self._share:3.0f} %, {format_seconds(left)} left"

    def note(self, done: int, total: int) -> None:
        """Take in that ``done`` of ``total`` steps are done."""
        self._share = done / total if total else 0.0

    def redraw(self, done: int, total: int) -> None:
        """The same, and draw the line anew."""
        self.note(done, total)
        now = self.seconds
        if now >= _PATIENCE_SECONDS and now - self._shown >= _REFRESH_SECONDS:
            self._shown = now
            click.echo(f"\r\x1b[K{self.line}", err=True, nl=False)
