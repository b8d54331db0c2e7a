"""Whole fits: what is shipped, and that a better stock preset is."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import pytest
from runs import Ear, few

from edgeprune.decide.candidates import candidate
from edgeprune.measure.text import CHOOSING, HELD_OUT, REPORTING
from edgeprune.model.gguf import GgufFile
from edgeprune.pipeline import fit, opened

pytest_plugins = ("demo_fixtures",)


def test_a_better_stock_preset_is_shipped(tiny_checkpoint: Path, small_text: Path, tmp_path: Path) -> None:
    settings = few(tiny_checkpoint, small_text, tmp_path / "run")
    with opened(settings, Ear()) as run:
        # Keeping 2 of 8 experts ruins the model; a preset of the same bytes keeps them all.
        poor = candidate(run.problem([2]), 2)
        assert poor is not None
        report = run.verify(poor.plan, run.build(poor.plan))
    best = min(report.baselines, key=lambda rival: rival.chosen_by or 0.0)
    assert report.shipped == best.preset and best.chosen_by
    assert report.plan["origin"] == f"stock preset {best.preset}"
    assert report.plan["kept"] == 8
    assert report.quality["kl_mean"] == pytest.approx(best.quality["kl_mean"], rel=1e-6)
    built = GgufFile(tmp_path / "run" / report.build["path"])
    assert built.size == report.plan["predicted"]["file_bytes"] <= 900_000
    with opened(settings, Ear()) as run:  # chosen on one half of the held-out text, reported on the other
        halves = [run.divergence(built.path, part)[0]["all"] for part in (CHOOSING, REPORTING)]
        whole = run.divergence(built.path, HELD_OUT)[0]["all"]["tokens"]
    assert halves[0]["kl_mean"] == pytest.approx(best.chosen_by, rel=1e-6)
    assert halves[1]["kl_mean"] == pytest.approx(report.quality["kl_mean"], rel=1e-6)
    assert whole == halves[0]["tokens"] + halves[1]["tokens"]
    assert {name: built.tensors[name].type for name in report.plan["types"]} == report.plan["types"]


def test_a_forced_number_of_experts_is_shipped_and_the_better_preset_reported(
    tiny_checkpoint: Path, small_text: Path, tmp_path: Path
) -> None:
    settings = few(tiny_checkpoint, small_text, tmp_path / "run", keep=2)
    report, folder = fit(settings, ear := Ear())
    assert (report.shipped, report.plan["kept"]) == ("plan", 2)
    assert [stage for stage in ear.stages if stage.startswith(("layer", "heal"))] == [
        "healing of coarser types, for a trial",
        "heal the experts",
    ]
    assert report.plan["heal"] and 0.01 < report.plan["predicted"]["heal_seconds"] < 600
    assert all(rival.chosen_by is None for rival in report.baselines)
    assert min(rival.quality["kl_mean"] for rival in report.baselines) < report.quality["kl_mean"]
    assert "better" in report.verdict
    assert report.conditions["measured on"] == f"{platform.system()} {platform.machine()}"  # no device was named
    assert not (folder / "scratch").exists()


def test_text_that_is_too_short_for_two_halves_chooses_and_reports_and_says_so(
    tiny_checkpoint: Path, small_text: Path, tmp_path: Path
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("A short text that holds no more than thirty tokens.", encoding="utf-8")
    settings = few(
        tiny_checkpoint, small_text, tmp_path / "run", evaluation_texts=(f"tale={short}",), keep=8, baselines=False
    )
    ear = Ear()
    report, _ = fit(settings, ear)
    assert 16 <= report.quality["tokens"] < 32
    said = "too short for two halves (all domains)"
    assert said in report.conditions["held-out text"] and any(said in line for line in ear.said)


def test_a_hand_edited_keep_set_is_measured_not_believed(
    tiny_checkpoint: Path, small_text: Path, tmp_path: Path
) -> None:
    settings = few(tiny_checkpoint, small_text, tmp_path / "run", keep=4)
    with opened(settings, Ear()) as run:
        chosen = run.plan()
    path = tmp_path / "run" / "plan.json"
    edited = json.loads(path.read_text())
    layer, ids = next(iter(edited["keep"].items()))
    swapped = sorted({*ids[:-1], *(set(range(8)) - set(ids))})[:4]
    edited["keep"][layer] = swapped
    path.write_text(json.dumps(edited))
    ear = Ear()
    with opened(settings, ear) as run:
        obeyed = run.plan()
    assert list(obeyed.keep[int(layer)]) == swapped
    assert 0 < obeyed.predicted.nats_drop != chosen.predicted.nats_drop
    assert any("edited by hand" in line for line in ear.said)
    assert obeyed.origin == "user"
    again = Ear()
    with opened(settings, again) as run:
        assert run.plan() == obeyed
    assert not again.said


def test_a_model_that_fits_is_left_alone_without_measuring_types(
    tiny_checkpoint: Path, small_text: Path, tmp_path: Path
) -> None:
    settings = few(tiny_checkpoint, small_text, tmp_path / "run", memory_bytes=2 * 10**9)
    ear = Ear()
    report, folder = fit(settings, ear)
    assert report.plan["types"] == {} and report.plan["keep"] == {}
    assert report.quality["kl_mean"] < 1e-7
    assert not any("sensitivity" in stage or "distortion" in stage for stage in ear.stages)
    source, built = GgufFile(folder / "source.gguf"), GgufFile(folder / report.build["path"])
    assert all((source.raw(name) == built.raw(name)).all() for name in source.tensors)
