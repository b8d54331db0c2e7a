"""The page in a real browser: no error, no network, nothing wider than the screen, every picture with its data."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rulers import looked_at, needs_browser
from runs import Fit, run_edgeprune

from edgeprune.prove.browser import find_browser, rasterised
from edgeprune.prove.deeper import Deeper, Loops, Named, Speed, Task
from edgeprune.prove.page import render
from edgeprune.prove.paired import Paired
from edgeprune.prove.pictures import pictures
from edgeprune.prove.report import Report
from edgeprune.prove.tables import ranges
from edgeprune.share.card import Sheet, model_card
from edgeprune.share.origin import Origin

pytest_plugins = ("demo_fixtures",)


@pytest.fixture(scope="module")
def full(tiny_fit: Fit) -> Report:
    """The report of a fit with everything in it that can be asked for, and a large model's maps."""
    right = Paired(120, 12, 6, 62)
    loops = tuple(
        Loops(mode, 512, Paired(1, 1, 4, 34), (0.11, 0.19), (0.08, 0.02, 0.15), "and so on and so on and so on")
        for mode in ("greedy", "sampled")
    )
    deeper = Deeper(
        speeds=(
            Speed(0, (900.0, 870.0, 910.0), (41.0, 40.1, 41.2), None),
            Speed(8192, *[(400.0, 1.0, 4e4)] * 2, 20.5),
        ),
        loops=loops,
        tasks=(Task("hellaswag_val.jsonl", "hellaswag", 10042, right), Task("a" * 70, "mmlu", 200, right)),
        bases=(Named("wiki.kld", dict(tiny_fit.report.quality)),),
        slices=tuple(Named(name, dict(tiny_fit.report.quality)) for name in ("code", "json")),
        objects=Paired(9, 2, 0, 1),
    )
    importance = {str(layer): [((layer * 37 + e * 11) % 97) / 97 for e in range(128)] for layer in range(48)}
    keep = {str(layer): [e for e in range(128) if (layer + e) % 4] for layer in range(48)}
    plan = {**tiny_fit.report.plan, "keep": keep, "kept": 96, "experts": 128}
    domains = {name: dict(tiny_fit.report.quality) for name in ("code", "languages", "a domain with a long name")}
    return replace(tiny_fit.report, deeper=deeper, importance=importance, plan=plan, domains=domains)


def test_the_card_has_what_was_measured_on_request(full: Report, tiny_fit: Fit) -> None:
    card = model_card([Sheet(full)], Origin())
    for wanted in (
        "8,192 tokens",
        "hellaswag\\_val.jsonl (hellaswag)",
        "| greedy |",
        "| code |",
        "| wiki.kld |",
        "under a grammar",
    ):
        assert wanted in card
    assert "known answers" not in model_card([Sheet(tiny_fit.report)], Origin())


@needs_browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280], ids=["phone", "desktop"])
def test_the_page_is_readable_on_every_screen(full: Report, tmp_path: Path, width: int, dark: bool) -> None:
    found = looked_at(render(full), tmp_path, width, dark)
    assert found["width"] == width and found["dark"] == dark
    assert found["console"] == [] and found["errors"] == 0
    assert found["scroll"] <= width, "something is wider than the screen"
    assert found["small"] == [], "letters that nobody can read"
    assert found["pale"] == [], "letters with less contrast than 4.5 to 1"
    wanted = [drawing for drawing in pictures(full).values() if drawing]
    assert len(found["seen"]) == len(wanted) == len(set(found["seen"]))
    assert found["headings"][0] == "H1" and set(found["headings"][1:]) == {"H2"}


@needs_browser
def test_a_page_that_reached_for_the_network_would_be_noticed(full: Report, tmp_path: Path) -> None:
    page = render(full).replace("</main>", '<img src="http://127.0.0.1:9/x.png" alt=""></main>')
    found = looked_at(page, tmp_path, 1280)
    assert any("Content Security Policy" in line for line in found["console"])


def test_every_picture_has_its_data(full: Report) -> None:
    found = pictures(full)
    assert {name for name, drawing in found.items() if not drawing} <= {"methods"}
    assert found["experts"].count("<rect") == 48 * 128
    assert found["experts"].count(", dropped</title>") == 48 * 32
    assert found["domains"].count("<rect") == len(full.domains)
    assert found["questions"].count("<circle") == found["loops"].count("<circle") == 2 * 2 + 2
    assert "hellaswag_val.jsonl, original: 66.0 % (59.0 to 72.5)" in found["questions"]
    assert found["types"].count(" bits per weight</title>") == len(full.types)


def test_numbers_are_told_in_ranges() -> None:
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert (ranges([]), ranges([3])) == ("", "3")


def test_the_report_command_writes_the_page_again_and_its_pictures(tiny_fit: Fit, tmp_path: Path) -> None:
    folder = tiny_fit.copy(tmp_path / "run")
    page = (folder / "report.html").read_bytes()
    (folder / "report.html").unlink()
    done = run_edgeprune("report", folder, "--pictures", tmp_path / "pictures", "--json")
    assert done.returncode == 0, done.stderr
    assert (folder / "report.html").read_bytes() == page
    names = {name for name, drawing in pictures(tiny_fit.report).items() if drawing}
    made = json.loads(done.stdout)["pictures"]
    assert {Path(path).stem for path in made} == names
    for name in names:
        root = ElementTree.parse(tmp_path / "pictures" / f"{name}.svg").getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        if find_browser() is not None:
            png = (tmp_path / "pictures" / f"{name}.png").read_bytes()
            assert png.startswith(b"\x89PNG")
            assert struct.unpack(">2I", png[16:24]) == (2 * int(root.attrib["width"]), 2 * int(root.attrib["height"]))


@needs_browser
def test_pictures_are_drawn_to_their_last_line() -> None:
    program = find_browser()
    assert program is not None
    blank = '<svg xmlns="http://www.w3.org/2000/svg" width="300" height="40" viewBox="0 0 300 40">{}</svg>'
    line = '<rect x="299" y="39" width="1" height="1" fill="red"/>'
    empty, marked = (rasterised(program, blank.format(mark), 600, 80) for mark in ("", line))
    assert empty != marked
    assert struct.unpack(">2I", marked[16:24]) == (600, 80)


@pytest.mark.parametrize("content", ["[]", "{}", '{"promises": 3}', "nothing"])
def test_a_report_that_is_none_is_explained(tmp_path: Path, content: str) -> None:
    (tmp_path / "report.json").write_text(content, encoding="utf-8")
    done = run_edgeprune("report", tmp_path)
    assert done.returncode == 1 and "report.json" in done.stderr and "Traceback" not in done.stderr


def test_a_folder_without_a_report_is_explained(tmp_path: Path) -> None:
    done = run_edgeprune("report", tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: no report in {tmp_path}\nhint: name a folder that ")
