"""A headless browser of this machine, which turns pictures into PNG files; where there is none, they stay SVG."""

from __future__ import annotations

import base64
import os
import re
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
    # A superuser, in a container for instance, has no sandbox to use; what is opened is our own.
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


# Draws the picture on a canvas of its very size, which a screenshot of a window is not, and leaves it in the page.
_CANVAS = """<!doctype html><html><body><script>
const image = new Image();
image.onload = () => {{
  const canvas = document.createElement("canvas");
  canvas.width = {width}; canvas.height = {height};
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  document.body.setAttribute("data-png", canvas.toDataURL("image/png"));
}};
image.src = "data:image/svg+xml;base64,{picture}";
</script></body></html>"""
_DRAWN = re.compile(r'data-png="data:image/png;base64,([A-Za-z0-9+/=]+)"')


def rasterised(program: str, picture: str, width: int, height: int) -> bytes:
    """``picture``, an SVG file's text, as a PNG of ``width`` x ``height`` pixels.

    Raises:
        EdgepruneError: the browser does not draw it.
    """
    encoded = base64.b64encode(picture.encode()).decode()
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "picture.html"
        page.write_text(_CANVAS.format(width=width, height=height, picture=encoded), encoding="utf-8")
        done = run_browser(program, page, "--dump-dom", "--virtual-time-budget=5000")
    found = _DRAWN.search(done.stdout)
    if found is None:
        raise EdgepruneError(f"{program} does not draw a picture", hint="the SVG files are there all the same")
    return base64.b64decode(found[1])


def _may_sandbox() -> bool:
    return not hasattr(os, "geteuid") or os.geteuid() != 0
