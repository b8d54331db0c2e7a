"""One model for several sizes: measured once, keep-sets within each other, one page, one repository."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hub_server import Command, HubServer, value
from rulers import looked_at, needs_browser
from runs import Ear, Fit, read, settings

from edgeprune import pipeline
from edgeprune.decide.plan import FAMILY
from edgeprune.errors import BrokenPromise, UsageError
from edgeprune.family import _no_worse, _to_choose, fit_family, members_of
from edgeprune.prove.family import Member, make_family, member_folders
from edgeprune.prove.page import render_family
from edgeprune.prove.report import Report
from edgeprune.settings import Settings

pytest_plugins = ("demo_fixtures", "publish_fixtures")
# huggingface_hub gives a file to its HTTP library in a way that the library no longer likes.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


def wishes(fit: Fit, folder: Path, **changes: Any) -> Settings:
    return settings(fit, folder, file_bytes=None, baselines=False, **changes)


@dataclass(frozen=True)
class Made:
    """A family on the disk, and what was said while it was made."""

    folder: Path
    ear: Ear

    @property
    def runs(self) -> list[tuple[Path, Report]]:
        """Run directories and reports in the order of the family's file."""
        folders = [self.folder / name for name in member_folders(read(self.folder / "family.json"), "family.json")]
        return [(folder, Report.from_json(read(folder / "report.json"))) for folder in folders]


@pytest.fixture(scope="module")
def made(tiny_fit: Fit, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The tiny model for 500, 400 and 10 kB, of which the last cannot be, and the first was finished before. Do not
    change it."""
    folder, ear = tmp_path_factory.mktemp("family") / "tiny", Ear()
    tiny_fit.copy(folder / "file-500kB")
    with pytest.raises(BrokenPromise) as error:
        fit_family(wishes(tiny_fit, folder), [], [500_000, 400_000, 10_000], ear)
    assert error.value.cause == "1 of 3 targets were not met" and error.value.exit_code == 3
    assert "family.html" in error.value.hint
    ((target, cause),) = error.value.rows
    assert target == "file-10kB" and "does not fit" in cause
    return Made(folder, ear)


def test_every_size_that_can_be_is_a_finished_run(made: Made) -> None:
    assert [folder.name for folder, _ in made.runs] == ["file-500kB", "file-400kB"]
    for (folder, report), limit in zip(made.runs, (500_000, 400_000), strict=True):
        assert (folder / report.build["path"]).stat().st_size == report.build["nbytes"] <= limit


def test_the_model_is_measured_once(made: Made) -> None:
    assert not any("calibrat" in stage or "rank" in stage for stage in made.ear.stages), made.ear.stages
    assert not any("doing it again" in line for line in made.ear.said[made.ear.said.index("file-400kB:") :])
    (first, _), (second, _) = made.runs
    for name in ("source.gguf", "statistics.safetensors", "imatrix.gguf"):
        assert (first / name).samefile(second / name)


def test_experts_of_the_smaller_are_among_those_of_the_larger(made: Made) -> None:
    (_, large), (_, small) = made.runs
    assert small.plan["kept"] < large.plan["kept"] < 8
    for layer, ids in small.plan["keep"].items():
        assert set(ids) < set(large.plan["keep"][layer])


def test_a_larger_target_that_measures_worse_takes_the_plan_of_the_smaller(tiny_fit: Fit, tmp_path: Path) -> None:
    ear = Ear()
    small = wishes(tiny_fit, tmp_path / "file-400kB")
    large = wishes(tiny_fit, tmp_path / "file-500kB", keep=2)  # needlessly few
    runs = [replace(large, file_bytes=500_000), replace(small, file_bytes=400_000)]
    members = []
    for run in runs:
        tiny_fit.copy(run.folder)
        report, folder = pipeline.fit(run, ear)
        members.append(Member(folder.name, report))
    worse, better = members
    assert worse.report.plan["kept"] == 2 and worse.report.quality["kl_mean"] > better.report.quality["kl_mean"]
    smaller = replace(better, report=replace(better.report, build={**better.report.build, "nbytes": 1}))
    nats = _to_choose(members, tmp_path, runs, ear)
    assert nats["file-500kB"] > nats["file-400kB"] > 0
    # What the reports say is not looked at.
    praised = replace(worse, report=replace(worse.report, quality={**worse.report.quality, "kl_mean": 0.0}))
    praised = replace(praised, report=replace(praised.report, build={**praised.report.build, "nbytes": 1}))
    assert _no_worse(better, [better, praised], nats, tmp_path, runs, ear) is better

    taken = _no_worse(worse, [worse, smaller], nats, tmp_path, runs, ear)

    assert any("measures worse than the smaller" in line for line in ear.said)
    for part in ("keep", "types", "kept", "width"):
        assert taken.report.plan[part] == better.report.plan[part], part
    assert taken.report.plan["origin"] == FAMILY and Path(taken.report.build["path"]).name in {
        path.name for path in runs[0].folder.glob("*.gguf")
    }
    again, _ = pipeline.fit(runs[0], ear)
    assert again.plan == taken.report.plan
    nats = _to_choose([taken, better], tmp_path, runs, ear)
    assert _no_worse(better, [taken, better], nats, tmp_path, runs, ear) is better


def test_the_page_and_its_numbers_compare_them(made: Made) -> None:
    page = (made.folder / "family.html").read_text(encoding="utf-8")
    told = read(made.folder / "family.json")
    assert [failure["target"] for failure in told["failures"]] == ["file-10kB"] and "file-10kB: " in page
    for member, (folder, report) in zip(told["members"], made.runs, strict=True):
        assert member["quality"] == report.quality and member["file"] == f"{folder.name}/{report.build['path']}"
        figure = f"{report.quality['kl_mean']:.5f}"
        assert all(wanted in page for wanted in (f"{folder.name}/report.html", member["launch_line"], figure))
    drawn = make_family([Member(folder.name, report) for folder, report in made.runs], []).curve()
    points = sum(len(report.curve) for _, report in made.runs)
    # Two files, the candidates of both sizes, and the legend.
    assert drawn.count("<circle") == 2 + points + 2 and drawn.count("<polyline") == 1 and points > 2
    assert drawn in page


def test_the_page_says_what_its_files_have_in_common_only_where_they_have_it(made: Made) -> None:
    (_, large), (_, small) = made.runs
    first, experts = next(iter(small.plan["keep"])), set(range(small.plan["experts"]))
    foreign = sorted(experts - set(large.plan["keep"][first]))[:1] + small.plan["keep"][first][1:]
    apart = replace(small, plan={**small.plan, "keep": {**small.plan["keep"], first: sorted(foreign)}})
    other = replace(small, made_from={**small.made_from, "evaluation": "of another text"})
    whole = replace(large, plan={**large.plan, "keep": {}})

    def said(*reports: Report) -> tuple[bool, bool]:
        page = render_family(make_family([Member(str(n), one) for n, one in enumerate(reports)], []))
        assert ("cannot be compared" in page) is not ("with the same calibration and held-out text" in page)
        return "cannot be compared" not in page, "those that a smaller file keeps" in page

    assert said(large, small) == said(whole, small) == (True, True)
    assert said(large, apart) == (True, False)
    assert said(large, other) == (False, True)
    assert said(whole, replace(small, plan={**small.plan, "keep": {}})) == (True, False)  # nothing was dropped
    assert said(large, replace(small, plan={**small.plan, "keep": {}})) == (True, False)


@needs_browser
@pytest.mark.parametrize("width", [375, 1280])
def test_the_page_is_no_wider_than_a_phone(made: Made, tmp_path: Path, width: int) -> None:
    found = looked_at((made.folder / "family.html").read_text(encoding="utf-8"), tmp_path, width)
    assert found["scroll"] <= width == found["width"]
    assert found["small"] == found["pale"] == found["console"] == []


def test_a_family_is_published_as_one(made: Made, far: HubServer, command: Command) -> None:
    done = value(command("publish", made.folder, "me/tiny-GGUF", "--license", "mit", "--dry-run", "--json"))
    models = [row["nbytes"] for row in done["files"] if row["path"].endswith(".gguf") and "/" not in row["path"]]
    assert models == [report.build["nbytes"] for _, report in made.runs]
    paths = {row["path"] for row in done["files"]}
    assert {"family.html", "curve.svg"} <= paths and "(family.html)" in done["card"]
    command("publish", made.folder, "me/tiny-GGUF", "--license", "mit", "--yes")
    page = far.repositories["me/tiny-GGUF"].files["family.html"].content.decode()
    links = re.findall(r'href="([^"]+)"', page)
    assert len(links) == 2 and set(links) <= paths  # the reports of the published files
    assert all(f"llama-server -m {path} " in page for path in paths if path.endswith(".gguf") and "/" not in path)


def test_a_list_that_leads_elsewhere_is_not_followed(tmp_path: Path, command: Command) -> None:
    (tmp_path / "family").mkdir()
    text = '{"model": "x", "failures": [], "members": [{"folder": "../../secret"}]}'
    (tmp_path / "family" / "family.json").write_text(text)
    done = command("publish", tmp_path / "family", "me/tiny-GGUF", "--dry-run")
    assert str(done.exception).startswith(f"{tmp_path / 'family' / 'secret'} is not a run directory")


@pytest.mark.parametrize(
    ("devices", "sizes", "changes"),
    [
        ([], [500_000], {}),
        ([], [500_000, 500_000], {}),
        (["cpu-8gb", "cpu-8gb"], [], {}),
        (["cpu-8gb", "cpu-9gb"], [], {}),
        (["cpu-8gb"], [500_000], {"file_bytes": 400_000}),
    ],
    ids=["one", "the same size", "the same device", "unknown device", "also a single one"],
)
def test_targets_that_make_no_family(
    devices: list[str], sizes: list[int], changes: dict[str, int], tmp_path: Path
) -> None:
    with pytest.raises(UsageError):
        members_of(Settings("demo", output=str(tmp_path / "family"), **changes), devices, sizes)  # type: ignore[arg-type]


def test_a_folder_of_somebody_else_is_left_alone(tiny_fit: Fit, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    for folder in (tmp_path, tiny_fit.folder):
        with pytest.raises(UsageError):
            fit_family(wishes(tiny_fit, folder), [], [500_000, 400_000], Ear())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis"]


def test_the_command_line_takes_lists(command: Command) -> None:
    done = command("fit", "demo", "--file-sizes", "5MB,5MB")
    assert isinstance(done.exception, UsageError) and "file-5MB, file-5MB" in str(done.exception)
    done = command("fit", "demo", "--devices", "cpu-8gb, cpu-9gb")
    assert isinstance(done.exception, UsageError) and "cpu-9gb" in str(done.exception)
