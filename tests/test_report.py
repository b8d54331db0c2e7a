"""The report, its page and the model card, of real fits: narrowed, pruned, beside presets, unchanged."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from runs import Ear, Fit, read, settings

from edgeprune import pipeline
from edgeprune.errors import BadFile, BrokenPromise
from edgeprune.files import file_digest, to_json
from edgeprune.model.architecture import read_architecture
from edgeprune.model.gguf import GgufFile
from edgeprune.prove.figures import curve
from edgeprune.prove.page import render
from edgeprune.prove.pictures import pictures
from edgeprune.prove.provenance import Provenance
from edgeprune.prove.report import MEANWHILE, Baseline, Promise, Report, promises
from edgeprune.prove.tables import facts
from edgeprune.share.card import Sheet, model_card, plain
from edgeprune.share.origin import Origin
from edgeprune.stages.proving import verdict_of

pytest_plugins = ("demo_fixtures",)

VOID = {"meta", "link", "br", "hr", "img", "input"}
SVG_NAMESPACE = "http://www.w3.org/2000/svg"


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    text: str = ""
    inside: list[Element] = field(default_factory=list)

    def all(self, tag: str) -> Iterator[Element]:
        for element in self.inside:
            if element.tag == tag:
                yield element
            yield from element.all(tag)


class Page(HTMLParser):
    """A strict reader: every element that is opened is closed, in order."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.root = Element("", {})
        self.open = [self.root]
        self.feed(content)
        self.close()
        assert self.open == [self.root], f"never closed: {[element.tag for element in self.open]}"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].inside.append(Element(tag, {name: value or "" for name, value in attrs}))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(self.open[-1].inside[-1])

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}> at {self.getpos()}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].text += data

    def figure(self, title: str, kind: str = "wide") -> Element:
        """The picture whose accessible name begins with ``title``, as drawn for a ``wide`` or a ``narrow`` screen."""
        drawn = [div for div in self.root.all("div") if div.attributes.get("class") == kind]
        found = [svg for div in drawn for svg in div.all("svg") if svg.attributes["aria-label"].startswith(title)]
        assert len(found) == 1
        assert next(found[0].all("title")).text == found[0].attributes["aria-label"]
        return found[0]

    def table(self, head: str) -> list[list[str]]:
        """The rows of the table whose first column is called ``head``, in words."""
        for table in self.root.all("table"):
            rows = [[cell.text for cell in row.inside] for row in table.all("tr")]
            if rows[0][0] == head:
                return rows[1:]
        raise AssertionError(f"no table of {head}")


@dataclass(frozen=True)
class Case:
    folder: Path
    report: Report

    @property
    def page(self) -> Page:
        return Page((self.folder / "report.html").read_text(encoding="utf-8"))

    @property
    def built(self) -> Path:
        return self.folder / str(self.report.build["path"])


@pytest.fixture(scope="module", params=["narrowed", "pruned", "beside presets", "unchanged"])
def case(request: pytest.FixtureRequest, tiny_fit: Fit, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A finished fit: to 500 kB experts are dropped, or narrowed on request, to 700 kB there are presets, and 20 MB
    hold all of it."""
    if request.param == "pruned":
        return Case(tiny_fit.folder, tiny_fit.report)
    folder = tiny_fit.copy(tmp_path_factory.mktemp("report") / "run")
    changes: dict[str, Any] = {
        "narrowed": {"width": 64.0},
        "beside presets": {"file_bytes": 700_000},
        "unchanged": {"file_bytes": 20_000_000},
    }
    report, _ = pipeline.fit(settings(tiny_fit, folder, **changes[request.param]), Ear())
    return Case(folder, report)


def test_cases_are_what_they_are_called(case: Case, request: pytest.FixtureRequest) -> None:
    plan, name = case.report.plan, request.node.callspec.params["case"]
    assert bool(plan["keep"]) == (name == "pruned")
    assert bool(plan["width"]) == (name == "narrowed")
    assert bool(plan["types"]) == (name != "unchanged")
    assert bool(case.report.baselines) == (name not in ("narrowed", "pruned"))
    assert not case.report.broken


def test_the_report_survives_json_and_renders_the_same_page_and_card(case: Case) -> None:
    value = read(case.folder / "report.json")
    again = Report.from_json(value)
    assert json.loads(to_json(again.to_json())) == value
    assert render(again) == (case.folder / "report.html").read_text(encoding="utf-8")
    assert model_card([Sheet(again)], Origin()) == (case.folder / "README.md").read_text(encoding="utf-8")


def test_the_report_speaks_of_the_file_beside_it(case: Case) -> None:
    build, report = case.report.build, case.report
    assert build["nbytes"] == case.built.stat().st_size == report.plan["predicted"]["file_bytes"]
    assert build["sha256"] == file_digest(case.built) == report.made_from["build"]
    assert build["plan_digest"] == report.plan["digest"] == GgufFile(case.built).get("edgeprune.plan_digest")
    assert report.launch_line.startswith(f"llama-server -m {case.built.name} -c ")
    assert set(report.domains) == {"small"}
    assert report.quality["tokens"] == sum(row["tokens"] for row in report.domains.values()) > 0
    for rival in report.baselines:  # never worse than the stock presets of at most these bytes
        assert rival.nbytes <= 700_000 or report.shipped == "plan"
        assert report.quality["kl_mean"] <= rival.quality["kl_mean"]


def test_the_page_is_well_formed_and_has_its_parts(case: Case) -> None:
    root = case.page.root
    assert [element.text for element in root.all("h1")] == [case.report.title]
    assert next(root.all("title")).text == case.report.title
    headings = [element.text for element in root.all("h2")]
    wanted = ["Run it", "Predicted and measured", "Beside the stock presets", "Memory", "By domain", "Types"]
    assert [heading for heading in headings if heading in wanted] == wanted
    (html,) = root.all("html")
    assert html.attributes["lang"] == "en"
    page = case.page
    assert [row[0] for row in page.table("What")] == [promise.name for promise in case.report.promises]
    assert [row[0] for row in page.table("File")] == ["shipped", *(rival.preset for rival in case.report.baselines)]
    assert [row[0] for row in page.table("Domain")] == sorted(case.report.domains)
    for name in ("Experts kept", "Domain"):
        assert all(len(row) == len(page.table(name)[0]) for row in page.table(name))
    run_it = next(root.all("pre")).text
    assert run_it == case.report.launch_line


def test_the_page_needs_nothing_but_itself(case: Case) -> None:
    content = (case.folder / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r"https?://[^\s\"'<]*", content.replace(SVG_NAMESPACE, ""))
    assert "@import" not in content and "url(" not in content
    root = case.page.root
    for tag in ("script", "link", "img", "iframe", "object", "form", "base"):
        assert list(root.all(tag)) == []
    elements = [root, *(element for tag in ("a", "svg", "rect", "path", "use") for element in root.all(tag))]
    for element in elements:
        assert not {name for name in element.attributes if name.startswith("on") or name in ("href", "src")}


def numbers(svg: Element) -> Iterator[tuple[str, str, float]]:
    """Tag, attribute and value of everything that places a mark."""
    for tag in ("rect", "circle", "line", "text"):
        for element in svg.all(tag):
            for name in ("x", "y", "cx", "cy", "x1", "x2", "y1", "y2", "width", "height", "fill-opacity"):
                if name in element.attributes:
                    yield tag, name, float(element.attributes[name])


def test_every_mark_is_inside_its_picture(case: Case) -> None:
    pictures = list(case.page.root.all("svg"))
    assert len(pictures) >= 6
    for svg in pictures:
        left, top, width, height = map(float, svg.attributes["viewbox"].split())
        assert (left, top) == (0, 0) and width in (360, 720) and height > 0
        for tag, name, value in numbers(svg):
            most = {"fill-opacity": 1.0}.get(name, width if "x" in name or name == "width" else height)
            assert math.isfinite(value) and -0.5 <= value <= most + 0.5, (svg.attributes["aria-label"], tag, name)


def test_the_bars_of_a_size_that_was_asked_for_are_of_the_file_and_of_what_it_takes(case: Case) -> None:
    """There is no budget of memory then, and so nothing in it that could be free."""
    svg = case.page.figure("Size of the file within its limit, and memory that the model takes")
    tips = [next(rect.all("title")).text for rect in svg.all("rect") if rect.inside]
    pools, limit = case.report.budget["pools"], case.report.budget["file_limit_bytes"]
    names = [line["name"] for pool in pools for line in pool["lines"]]
    free = ["free"] if case.report.build["nbytes"] < limit else []
    assert [tip.partition(": ")[0] for tip in tips] == ["file", *free, *names, "weights"]
    words = [words.text for words in svg.all("text")]
    assert f"FILE at most {limit:,} bytes" in words and any(word.endswith(" taken") for word in words)


def test_the_memory_bar_of_a_device_shows_every_line_of_its_budget(case: Case) -> None:
    budget = {**case.report.budget, "file_limit_bytes": None}
    root = Page(pictures(replace(case.report, budget=budget))["memory"]).root
    tips = [next(rect.all("title")).text for rect in root.all("rect") if rect.inside]
    names = [line["name"] for pool in budget["pools"] for line in pool["lines"]]
    assert [tip.partition(": ")[0] for tip in tips if not tip.startswith(("weights: ", "free: "))] == names
    assert sum(tip.startswith("weights: ") for tip in tips) == len(budget["pools"])


def test_the_curve_has_a_point_for_every_candidate_preset_and_the_shipped_file(case: Case) -> None:
    svg = case.page.figure("File size against KL divergence")
    tips = [next(circle.all("title")).text for circle in svg.all("circle") if circle.inside]
    report = case.report
    assert len(tips) == len(report.curve) + len(report.baselines) + 1
    for rival in report.baselines:
        assert any(tip.startswith(f"{rival.preset}: ") for tip in tips)
    assert tips[-1].startswith("shipped: ") and f"{report.quality['kl_mean']:.4g} nats" in tips[-1]


def test_the_map_of_experts_crosses_out_the_dropped_ones(case: Case) -> None:
    report = case.report
    svg = case.page.figure("Experts by layer")
    cells = [next(rect.all("title")).text for rect in svg.all("rect")]
    layers, experts = len(report.importance), report.plan["experts"]
    assert len(cells) == layers * experts
    dropped = {
        (int(layer), expert)
        for layer, ids in report.plan["keep"].items()
        for expert in set(range(experts)) - set(ids)
    }
    assert len(dropped) == (layers * (experts - report.plan["kept"]))
    for layer, expert in dropped:
        assert any(cell.startswith(f"layer {layer}, expert {expert}:") and cell.endswith("dropped") for cell in cells)
    assert sum(cell.endswith("dropped") for cell in cells) == len(list(svg.all("path"))) == len(dropped)


def test_the_map_of_types_has_a_cell_for_every_changed_tensor(case: Case) -> None:
    svg = case.page.figure("GGML type")
    cells = [next(rect.all("title")).text for rect in svg.all("rect")]
    types = case.report.plan["types"]
    assert len(cells) >= len(types)
    assert {kind for kind in types.values()} <= {cell.split(",")[0].rpartition(": ")[2] for cell in cells}


def test_the_types_are_told_in_full(case: Case) -> None:
    architecture = read_architecture(GgufFile(case.built))
    text = "\n".join(case.report.folded)
    for tensor in architecture.tensors:
        if tensor.quantisable:
            kind = tensor.name.split(".", 2)[2] if tensor.layer >= 0 else tensor.name
            (line,) = (line for line in case.report.folded if line.split()[0] == kind.removesuffix(".weight"))
            assert tensor.type in line, text


def test_a_hostile_name_is_shown_and_not_obeyed(case: Case) -> None:
    name = '<script>alert("1")</script><img src=x onerror=alert(1)>'
    report = replace(
        case.report,
        title=name,
        verdict=name,
        folded=[name],
        launch_line=name,
        source={**case.report.source, "name": name, "arch": name},
        domains={name: next(iter(case.report.domains.values()))},
        conditions={name: name},
        provenance=Provenance((name,), {name: name}, {name: name}, {name: name}),
    )
    root = Page(render(report)).root
    assert list(root.all("script")) == list(root.all("img")) == []
    assert next(root.all("h1")).text == name


def test_the_card_tells_what_the_tokenizer_does_otherwise(case: Case) -> None:
    source = {**case.report.source, "tokenizer_differences": ["llama.cpp cuts *some* words otherwise"]}
    told = replace(case.report, source=source)
    assert "- Tokenizer: llama.cpp cuts \\*some\\* words otherwise" in model_card([Sheet(told)], Origin())
    assert "- Tokenizer:" not in model_card([Sheet(case.report)], Origin())


def test_the_card_has_metadata_that_the_hub_reads(case: Case) -> None:
    text = (case.folder / "README.md").read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    metadata = yaml.safe_load(front)
    assert metadata["library_name"] == "gguf"
    assert metadata["pipeline_tag"] == "text-generation"
    assert "base_model" not in metadata and "base_model_relation" not in metadata  # the source names none
    assert {"gguf", "mixture-of-experts"} <= set(metadata["tags"])
    report = case.report
    for wanted in (
        f"# {report.title}",
        plain(report.verdict),
        report.launch_line,
        report.build["sha256"],
        *report.folded,
    ):
        assert wanted in body
    assert body.count("\n| stock ") == len(report.baselines)
    experts = "all 8 experts per layer"
    if report.plan["keep"]:
        experts = "6 of 8 experts per layer, chosen by reap"
    elif report.plan["width"]:
        experts += ", each narrowed to 64 channels, chosen by ziplm"
    assert f"- Kept: {experts}\n" in body


def test_how_it_was_made_can_be_repeated_and_checked(tiny_fit: Fit, small_text: Path) -> None:
    """The command, what went in and came out, and the versions: in the report, on its page and in the card."""
    made, folder = tiny_fit.report.provenance, tiny_fit.folder
    assert made.commands == (shlex.join(["edgeprune", "fit", *tiny_fit.arguments, "-o", str(folder)]),)
    assert made.inputs["text small"] == file_digest(small_text)
    assert made.inputs["source"] == tiny_fit.report.plan["made_from"]["source"]
    assert set(made.outputs) == {tiny_fit.report.build["path"], "plan.json", "imatrix.gguf"}
    assert all(file_digest(folder / name) == digest for name, digest in made.outputs.items())
    assert {"edgeprune", "llama-cpp-python", "ggml", "gguf"} <= set(made.versions)
    assert re.match(r"CPU: \w", made.versions["processors"])
    page = Case(folder, tiny_fit.report).page
    assert sorted(map(list, made.inputs.items())) == page.table("What went in")
    assert sorted(map(list, made.versions.items())) == page.table("Program")
    assert any(made.commands[0] in pre.text for pre in page.root.all("pre"))
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert made.commands[0] in card and made.outputs["plan.json"] in card and made.versions["ggml"] in card
    old = {key: value for key, value in tiny_fit.report.to_json().items() if key != "provenance"}
    assert "What went in" not in render(Report.from_json(old))  # of an earlier version


@pytest.mark.parametrize(
    ("typed", "shared"),
    [
        ("edgeprune fit demo --file-size 4MB -o small", "edgeprune fit demo --file-size 4MB -o small"),
        ("edgeprune fit /home/me/m.gguf --text t=/home/me/a.txt", "edgeprune fit m.gguf --text t=a.txt"),
        ("edgeprune fit '~/my models/m' -o ../runs/x/", "edgeprune fit m -o x"),
        ("edgeprune fit ORG/NAME:Q4_K_M --device cpu-16gb", "edgeprune fit ORG/NAME:Q4_K_M --device cpu-16gb"),
        ("edgeprune fit 'C:\\me\\m.gguf' --text=/x/y.txt", "edgeprune fit m.gguf --text=y.txt"),
        ("edgeprune fit 'unbalanced", "edgeprune fit ''\"'\"'unbalanced'"),
    ],
)
def test_folders_of_this_machine_are_not_published(typed: str, shared: str) -> None:
    assert Provenance((typed,)).shared().commands == (shared,)


@pytest.mark.parametrize("value", [{}, {"commands": "fit"}, {"inputs": {"a": 1}}, {"versions": ["a"]}])
def test_a_damaged_provenance_is_refused(value: dict[str, Any]) -> None:
    whole = Provenance(("edgeprune fit",)).to_json()
    assert Provenance.from_json(json.loads(json.dumps(whole))) == Provenance(("edgeprune fit",))
    with pytest.raises(BadFile):
        Provenance.from_json({**whole, **value} if value else {})


# Verdicts.

GIB = 2**30
PLAN: dict[str, Any] = {
    "predicted": {"file_bytes": 1000, "pool_bytes": {"ram": 5 * GIB}, "nats": 0.1, "decode_per_s": 20.0},
    "launch": {"gpu_layers": 0},
}
QUALITY = {"kl_mean": 0.12}
SPEED = {"peak_bytes": 3 * GIB, "finite": True, "decode_per_s": 18.0, "prefill_per_s": 200.0}
SPEED |= {
    "filled_tokens": 4096,
    "context": 4096,
    "device_bytes": 0,
    "prompt_tokens": 512,
    "first_token_seconds": 2.56,
    "others": None,
}
# 8 GiB, of which the system takes 2: 6 are there for the model, and the plan promises to need 3 of them.
BUDGET: dict[str, Any] = {
    "pools": [
        {
            "pool": "ram",
            "total_bytes": 8 * GIB,
            "lines": [{"name": "system and applications", "nbytes": 2 * GIB}, {"name": "KV cache", "nbytes": GIB}],
            "weights_bytes": 5 * GIB,
        }
    ],
    "file_limit_bytes": None,
}

# A card of 4 GiB, of which the desktop takes 1.
CARD = {**PLAN, "predicted": {**PLAN["predicted"], "pool_bytes": {"ram": 5 * GIB, "vram": 4 * GIB}}}
HELD = [{"name": "desktop and driver", "nbytes": GIB}]
VRAM = {"pool": "vram", "total_bytes": 4 * GIB, "lines": HELD, "weights_bytes": 3 * GIB}
WITH_CARD = {**BUDGET, "pools": [*BUDGET["pools"], VRAM]}


@pytest.mark.parametrize(
    ("changes", "name", "verdict"),
    [
        ({}, "file size", "kept"),
        ({"build_bytes": 1001}, "file size", "broken"),
        ({"build_bytes": 999}, "file size", "broken"),
        ({"budget": {**BUDGET, "file_limit_bytes": 999}}, "file size", "broken"),
        ({}, "peak memory", "kept"),
        ({"speed": {**SPEED, "peak_bytes": int(3.02 * GIB)}}, "peak memory", "kept"),
        ({"speed": {**SPEED, "peak_bytes": int(3.2 * GIB)}}, "peak memory", "broken"),
        ({"speed": {**SPEED, "peak_bytes": int(3.2 * GIB)}, "on_device": False}, "peak memory", "information"),
        ({"speed": {**SPEED, "filled_tokens": 512}}, "peak memory", "information"),
        ({"speed": {**SPEED, "filled_tokens": 512, "peak_bytes": int(3.2 * GIB)}}, "peak memory", "broken"),
        (
            {"plan": {**PLAN, "launch": {"gpu_layers": -1}}, "speed": {**SPEED, "peak_bytes": 9 * GIB}},
            "peak memory",
            "information",
        ),
        (
            {"plan": CARD, "budget": WITH_CARD, "speed": {**SPEED, "device_bytes": 3 * GIB}},
            "memory of the GPU",
            "kept",
        ),
        (
            {"plan": CARD, "budget": WITH_CARD, "speed": {**SPEED, "device_bytes": 4 * GIB}},
            "memory of the GPU",
            "broken",
        ),
        ({"speed": {**SPEED, "finite": False}}, "weights and output are finite", "broken"),
        ({}, "weights and output are finite", "kept"),
        ({"not_finite": "blk.0.attn_norm.weight"}, "weights and output are finite", "broken"),
        ({"quality": {"kl_mean": 9.0}}, "KL divergence from the source (nats per token)", "information"),
        ({"speed": {**SPEED, "decode_per_s": 1.0}}, "decode (tokens per second)", "information"),
    ],
    ids=[
        "exact size",
        "a byte too many",
        "a byte too few",
        "beyond the limit of the file",
        "memory as promised",
        "memory within a hundredth",
        "memory beyond it",
        "memory of another machine",
        "memory of a context that was not filled in time",
        "memory beyond it already before the context is full",
        "memory that a GPU shares",
        "memory of a graphics card as promised",
        "memory of a graphics card beyond it",
        "output that is not finite",
        "finite",
        "a weight that is not finite",
        "divergence is a prediction",
        "speed is a prediction",
    ],
)
def test_verdicts(changes: dict[str, Any], name: str, verdict: str) -> None:
    arguments: dict[str, Any] = {"build_bytes": 1000, "quality": QUALITY, "speed": SPEED, "budget": BUDGET}
    arguments |= {"plan": PLAN, "on_device": True, **changes}
    (line,) = (line for line in promises(**arguments) if line.name == name)
    assert line.verdict == verdict


@pytest.mark.parametrize(
    ("share", "said"),
    [(None, None), (0.04, None), (0.43, "43 % of the cores")],
)
def test_speeds_that_other_programs_spoiled_say_so(share: float | None, said: str | None) -> None:
    arguments: dict[str, Any] = {"build_bytes": 1000, "quality": QUALITY, "speed": {**SPEED, "others": share}}
    lines = promises(**arguments, budget=BUDGET, plan=PLAN, on_device=True)
    measured = {line.name: line.measured for line in lines}
    assert measured.get("meanwhile, other programs used") == said and measured["decode (tokens per second)"] == "18"


@pytest.mark.parametrize(
    ("preset", "chosen_by", "said"),
    [
        (0.4, 0.3, "0.50 of the best stock preset of at most this size (IQ3_S)."),
        (0.1, 0.3, "chosen on other text, while the stock preset IQ3_S is better on this one: 0.1."),
        (0.1, None, "as asked; the stock preset IQ3_S would be better: 0.1."),
    ],
)
def test_the_verdict_tells_a_worse_choice_from_a_wish(
    tiny_fit: Fit, preset: float, chosen_by: float | None, said: str
) -> None:
    """What was best on the half that chooses need not be on the half that reports, and is not made up."""
    quality = {**tiny_fit.report.quality, "kl_mean": 0.2}
    rival = Baseline("IQ3_S", 1000, {**quality, "kl_mean": preset}, chosen_by)
    found = verdict_of(replace(tiny_fit.report, quality=quality, baselines=[rival]))
    assert found.startswith("All promises kept; 0.2 nats per token") and found.endswith(said)


def test_a_hardly_moved_model_is_told_in_figures_that_can_be_read(tiny_fit: Fit) -> None:
    plan = {**tiny_fit.report.plan, "keep": {}, "types": {}, "width": 0}
    rival = Baseline("Q8_0", 1000, {**tiny_fit.report.quality, "kl_mean": 0.1}, 0.1)

    def said(kl: float, **changes: Any) -> str:
        return verdict_of(replace(tiny_fit.report, quality={**rival.quality, "kl_mean": kl}, **changes))

    assert said(5e-9, plan=plan, baselines=[rival]).endswith("measurement is below 0.000001 nats.")
    assert "kept; 0.0000512 nats per token" in said(5.12e-5) and "kept; below 0.000001 nats" in said(5e-9)


def test_the_tile_of_the_speed_says_what_disturbed_it(tiny_fit: Fit) -> None:
    quiet = replace(tiny_fit.report, promises=[p for p in tiny_fit.report.promises if p.name != MEANWHILE])
    busy = replace(quiet, promises=[*quiet.promises, Promise(MEANWHILE, "", "76 % of the cores", "information")])
    assert "tokens per second" in dict(facts(quiet))
    assert "<dt>tokens per second, while other programs used 76 % of the cores</dt>" in render(busy)


def test_what_lies_below_the_axis_of_the_curve_says_so() -> None:
    drawn = curve([], [], {"this file": (1000, 0.0), "smaller": (500, 0.1)})
    assert ">this file \u2193</text>" in drawn and "0 nats per token, below the axis<" in drawn
    assert ">smaller</text>" in drawn


def test_a_broken_promise_is_an_error_that_names_the_figures(tiny_fit: Fit) -> None:
    pipeline.raise_if_broken(tiny_fit.report, Path("report.html"))
    broken = replace(tiny_fit.report, promises=[Promise("file size", "10 bytes", "11 bytes", "broken")])
    with pytest.raises(BrokenPromise) as error:
        pipeline.raise_if_broken(broken, Path("report.html"))
    assert error.value.rows == (("file size", "predicted 10 bytes, measured 11 bytes"),)
    assert error.value.exit_code == 3 and "report.html" in error.value.hint
