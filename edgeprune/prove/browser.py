"""A headless browser of this machine, which turns pictures into PNG files; where there is none, they stay SVG."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from edgeprune.errors import EdgepruneError

# Those that are built on Chromium and share its command line.
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
_PATIENCE_SECONDS = 60.0
# It is not to look for updates, nor for anything else, in any network.
_QUIET = (
    "--headless=new",
    "--disable-gpu",
    "--hide-scrollbars",
    "--no-first-run",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--host-resolver-rules=MAP * ~NOTFOUND",
)


def find_browser() -> str | None:
    """The program, or None."""
    return next((found for name in _NAMES if (found := shutil.which(name))), None)


def run_browser(program: str, page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Open the file ``page`` with a fresh profile and ``options``, and wait for the end.

    Raises:
        EdgepruneError: it fails, or does not end.
    """
    # A superuser, in a container for instance, has no sandbox to use; what is opened is our own, without scripts.
    sandbox = () if _may_sandbox() else ("--no-sandbox",)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [program, *_QUIET, *sandbox, f"--user-data-dir={profile}", *options, page.resolve().as_uri()]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=_PATIENCE_SECONDS, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise EdgepruneError(f"{program} does not draw {page.name}: {error}"[:300]) from error
    if done.returncode:
        raise EdgepruneError(f"{program} does not draw {page.name}: exit code {done.returncode}")
    return done


def screenshot(program: str, page: Path, output: Path, width: int, height: int, *options: str) -> None:
    """A PNG of the first ``width`` x ``height`` CSS pixels of ``page``.

    Raises:
        EdgepruneError: there is none in the end.
    """
    run_browser(program, page, f"--screenshot={output.resolve()}", f"--window-size={width},{height}", *options)
    if not output.is_file():
        raise EdgepruneError(f"{program} drew no {output.name}")


def _may_sandbox() -> bool:
    return not hasattr(os, "geteuid") or os.geteuid() != 0
