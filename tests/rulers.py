"""Pages as a real browser shows them: what a reader would measure with a ruler."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from edgeprune.prove.browser import find_browser, run_browser

needs_browser = pytest.mark.skipif(find_browser() is None, reason="no Chromium on this machine")

# What a reader would measure with a ruler, as an attribute of the page that the browser prints.
RULER = """<script>
const found = {errors: window.failed || 0, width: innerWidth,
  dark: matchMedia('(prefers-color-scheme: dark)').matches, scroll: document.documentElement.scrollWidth, seen: [],
  small: [], pale: [], headings: [...document.querySelectorAll("h1,h2,h3")].map(h => h.tagName)};
const light = c => { const v = c.match(/[\\d.]+/g).slice(0, 3).map(x => x / 255)
  .map(x => x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4);
  return .2126 * v[0] + .7152 * v[1] + .0722 * v[2]; };
const paper = light(getComputedStyle(document.body).backgroundColor);
for (const svg of document.querySelectorAll("svg")) {
  const box = svg.getBoundingClientRect();
  if (box.width) {
    found.seen.push(svg.getAttribute("aria-label"));
    for (const t of svg.querySelectorAll("text")) {
      const size = parseFloat(getComputedStyle(t).fontSize) * box.width / svg.viewBox.baseVal.width;
      if (size < 10) found.small.push(t.textContent);
    }
  }
}
for (const e of document.querySelectorAll("p, td, th, dd, dt, h1, h2, pre, figcaption, summary, svg text")) {
  if (!e.getBoundingClientRect().width) continue;
  const ink = light(getComputedStyle(e)[e.closest("svg") ? "fill" : "color"]);
  const ratio = (Math.max(ink, paper) + .05) / (Math.min(ink, paper) + .05);
  if (ratio < 4.5) found.pale.push([e.textContent.slice(0, 30), ratio]);
}
parent.postMessage(encodeURIComponent(JSON.stringify(found)), "*");
</script>"""
OUTER = """<!doctype html><html><body><script>
onmessage = event => document.body.setAttribute("data-found", event.data);
</script><iframe src="page.html" style="width: {width}px; height: 3000px; border: 0"></iframe></body></html>"""
WATCH = "<script>addEventListener('error', () => window.failed = (window.failed || 0) + 1, true)</script>"


def looked_at(content: str, folder: Path, width: int, dark: bool = False) -> dict[str, Any]:
    """What ``RULER`` finds on the page in a window of ``width`` pixels, and what the browser says of errors.

    The page stands in a frame, since a window has 500 pixels at least; what is in a frame takes it for the screen.
    """
    program = find_browser()
    assert program is not None
    allowed = content.replace("default-src 'none';", "default-src 'none'; script-src 'unsafe-inline';")
    page, outer = folder / "page.html", folder / "outer.html"
    page.write_text(allowed.replace("<head>", f"<head>{WATCH}").replace("</body>", f"{RULER}</body>"), "utf-8")
    outer.write_text(OUTER.format(width=width), "utf-8")
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    options = ("--enable-logging=stderr", "--dump-dom", "--virtual-time-budget=3000", "--window-size=1400,900")
    done = run_browser(program, outer, scheme, *options)
    (told,) = re.findall(r'data-found="([^"]*)"', done.stdout)
    found: dict[str, Any] = json.loads(unquote(told))
    found["console"] = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return found
