"""Scores of neurons against what they are defined as, and the healing of what is left."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import toys
from observed import Toy, collected, token_windows
from runs import Ear, Running, few, gone, read, run_edgeprune

from edgeprune import pipeline
from edgeprune.decide.narrowing import rank
from edgeprune.decide.neurons import NARROWINGS
from edgeprune.decide.neurons.layer import NeuronEvidence
from edgeprune.decide.neurons.ziplm import _RIDGE, removals
from edgeprune.errors import DoesNotFit
from edgeprune.measure.activation import GATED
from edgeprune.measure.channels import Channels
from edgeprune.measure.projections import neuron_projections
from edgeprune.measure.replay import LayerExperts, activation_of
from edgeprune.measure.statistics import LayerStatistics, Statistics
from edgeprune.model.architecture import read_architecture
from edgeprune.model.gguf import GgufFile

pytest_plugins = ("demo_fixtures",)
Doubles = npt.NDArray[np.float64]


# Scores.


def cost_of(removed: list[int], gram: Doubles, down: Doubles) -> float:
    """What removing columns costs in squares when all others are re-fitted, with the ridge (Schur complement)."""
    inverse = np.linalg.inv(gram)[np.ix_(removed, removed)]
    return float(np.trace(down[:, removed] @ np.linalg.inv(inverse) @ down[:, removed].T))


def test_ziplm_removes_what_the_re_fitted_others_miss_least() -> None:
    random = np.random.default_rng(0)
    hidden = random.standard_normal((40, 9)) @ random.standard_normal((9, 9))
    down = random.standard_normal((5, 9))
    plain = hidden.T @ hidden
    ridged = plain + _RIDGE * np.trace(plain) / 9 * np.eye(9)
    steps, removed = removals(plain, down.T @ down), list[int]()
    for step in range(9):
        left = [k for k in range(9) if k not in removed]
        best = min(left, key=lambda k: cost_of([*removed, k], ridged, down))
        assert steps[best] == step
        removed.append(best)


def test_ziplm_in_blocks_is_ziplm_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(1)
    hidden, down = random.standard_normal((300, 150)), random.standard_normal((20, 150))
    gram, products = hidden.T @ hidden, down.T @ down
    blocks = removals(gram, products)
    assert sorted(blocks) == list(range(150))
    monkeypatch.setattr("edgeprune.decide.neurons.ziplm._BLOCK", 1)
    np.testing.assert_array_equal(removals(gram, products), blocks)


@pytest.fixture(scope="module")
def oai(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Statistics]:
    """gpt-oss, with biases everywhere, and what a pass shows of it."""
    folder = tmp_path_factory.mktemp("oai")
    model = toys.synthetic_gguf(folder / "oai.gguf", "gpt-oss", layers=1, expert_width=64)
    collector = collected(model, token_windows(320, 4), folder)
    Statistics(["a"], 192, 48, collector.layers(), collector.moments, {"model": "a"}, collector.reservoirs()).save(
        folder / "statistics"
    )
    return model, Statistics.load(folder / "statistics")


def evidence_of(model: Path, measured: Statistics, layer: int = 0) -> NeuronEvidence:
    file = GgufFile(model)
    experts = LayerExperts(file, read_architecture(file), layer)
    return NeuronEvidence(layer, measured.layers[layer], experts, measured.reservoirs[layer])


def test_projections_are_those_of_every_token_and_neuron(oai: tuple[Path, Statistics]) -> None:
    evidence = evidence_of(*oai)
    tokens, experts = evidence.tokens, evidence.experts
    assert tokens is not None
    activation = activation_of(experts, tokens)
    assert activation is not None
    expected = np.zeros((toys.EXPERTS, 64))
    for token, slot in itertools.product(range(len(tokens)), range(toys.USED)):
        expert = int(tokens.ids[token, slot])
        own = experts[expert]
        hidden = own.hidden(tokens.x[token : token + 1], activation)[0]
        output = own.down @ hidden + own.down_bias
        for k in range(64):
            expected[expert, k] += hidden[k] * float(own.down[:, k] @ output) / np.linalg.norm(output)
    np.testing.assert_allclose(
        neuron_projections(experts, activation, tokens), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max()
    )


def test_scores_of_sums_are_their_formulas(oai: tuple[Path, Statistics]) -> None:
    model, measured = oai
    random = np.random.default_rng(2)
    empty = LayerStatistics.zeros(1, toys.EXPERTS, 8, 64)
    sums = LayerStatistics({name: random.random(array.shape) for name, array in empty.arrays.items()})
    evidence = replace(evidence_of(model, measured), sums=sums)
    columns = np.stack([np.linalg.norm(evidence.experts[e].down, axis=0) ** 2 for e in range(toys.EXPERTS)])
    total = {name: sums.total(name) for name in sums.arrays}
    expected = {
        "camera": columns * (0.1 * total["gated_hidden_square"] + 0.9 * total["gated_hidden_max"] ** 2),
        "energy": columns * total["gated_hidden_square"],
        "heapr": total["hidden_square"] * total["hidden_gradient_square"] / total["routed"][:, None],
        "mask-fisher": total["mask_gradient_square"],
    }
    for name, score in expected.items():
        np.testing.assert_allclose(NARROWINGS[name].score(evidence), score, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("narrowing", ["camera", "ziplm", "tenp"])
def test_the_best_channels_of_every_expert_are_kept(
    narrowing: str, oai: tuple[Path, Statistics], tmp_path: Path
) -> None:
    model, measured = oai
    measured.save(tmp_path / "statistics")
    digest = rank(str(model), str(tmp_path / "statistics"), narrowing, str(tmp_path / "channels"), {"a": 1})["digest"]
    found = Channels.load(tmp_path / "channels")
    assert found.digest == digest and found.made_from == {"a": 1}
    score = NARROWINGS[narrowing].score(evidence_of(model, measured))
    for expert, kept in enumerate(found.best(0, 32)):
        assert list(kept) == sorted(kept)
        assert score[expert, kept].min() >= np.delete(score[expert], kept).max()
    assert all(set(a) <= set(b) for a, b in zip(found.best(0, 32), found.best(0, 48), strict=True))


# Whole runs.


def test_killed_while_channels_are_ranked_the_same_command_makes_the_same_plan(
    tiny_checkpoint: Path, small_text: Path, tmp_path: Path
) -> None:
    words = ("plan", tiny_checkpoint, "--file-size", "500kB", "--text", small_text, "--width", "0.67", "-o")
    running = Running(*words, tmp_path / "broken")
    worker = running.wait_for("edgeprune.decide.narrowing:rank")
    assert worker is not None
    running.process.kill()
    running.end()
    assert gone(worker)
    assert not list((tmp_path / "broken").glob("plan.json"))
    shutil.copytree(tmp_path / "broken", tmp_path / "other")
    (tmp_path / "other" / "channels-ziplm.safetensors").unlink(missing_ok=True)
    for folder in ("broken", "other"):
        again = run_edgeprune(*words, tmp_path / folder)
        assert again.returncode == 0, again.stderr
        assert "8 of 8 per layer, 64 channels each" in again.stdout
    plan, other = (read(tmp_path / folder / "plan.json") for folder in ("broken", "other"))
    assert (plan["width"], plan["kept"], plan["narrowing"], plan["heal"]) == (64, 8, "ziplm", True)
    assert plan["channels"] == other["channels"] and plan["digest"] == other["digest"]
    assert plan["predicted"]["nats_drop"] > 0


def test_a_narrow_file_is_healed_and_has_the_predicted_size(
    tiny_checkpoint: Path, small_text: Path, tmp_path: Path
) -> None:
    settings = few(tiny_checkpoint, small_text, tmp_path / "run", width=0.67, healing_tokens=1_024)
    with pipeline.opened(settings, Ear()) as run:
        plan = run.best_plan()
        build = run.build(plan)
        assert all(own["after"] <= own["before"] for own in read(run.folder.healing).values())
    assert build.nbytes == plan.predicted.file_bytes <= 900_000
    assert "-F64of96-" in Path(build.path).name
    made = GgufFile(Path(build.path))
    assert read_architecture(made).expert_width == 64
    assert plan.channels in made.get("edgeprune.narrowing")


def test_a_size_that_narrower_experts_alone_reach_is_not_refused(
    tiny_checkpoint: Path, small_text: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "busy"
    shutil.copytree(tiny_checkpoint, folder)
    config = read(folder / "config.json")
    (folder / "config.json").write_text(json.dumps({**config, "num_experts_per_tok": 7}))  # of 8: hardly any to drop
    least = few(folder, small_text, tmp_path / "least", file_bytes=1)
    with pipeline.opened(least, Ear()) as run, pytest.raises(DoesNotFit) as error:
        run._fail_early()
    assert error.value.rows[0] == ("smallest plan", "K=8, 64 channels, IQ4_NL")
    with pipeline.opened(replace(least, file_bytes=400_000), Ear()) as run:
        run._fail_early()
    with pipeline.opened(replace(least, file_bytes=400_000, keep=7), Ear()) as run, pytest.raises(DoesNotFit):
        run._fail_early()


def test_widths_are_candidates_where_nothing_is_forced(
    tiny_checkpoint: Path, small_text: Path, tmp_path: Path
) -> None:
    settings = few(tiny_checkpoint, small_text, tmp_path / "run", file_bytes=700_000)
    with pipeline.opened(settings, Ear()) as run:
        found = run.candidates()
        narrow = [own for own in found if own.plan.width]
        assert {own.plan.width for own in narrow} == set(run.architecture.width_rule.worth_trying()) == {64}
        assert any(own.plan.keep for own in found) and any(not own.plan.keep and not own.plan.width for own in found)
        for own in narrow:
            own.plan.check(run.architecture)
            assert own.plan.kept == run.architecture.experts
            assert own.plan.predicted.file_bytes == own.layout.nbytes <= 700_000
            assert own.plan.predicted.nats_drop > 0


def test_a_comparison_has_rows_of_narrower_experts(tiny_checkpoint: Path, small_text: Path, tmp_path: Path) -> None:
    arguments = ("--text", small_text, "-o", tmp_path / "run", "--keep", "0.75,0.5")
    done = run_edgeprune("compare", tiny_checkpoint, *arguments, "--methods", "reap,narrow:camera")
    assert done.returncode == 0, done.stderr
    assert "narrow:camera, 64 channels" in done.stdout
    rows = {(row["method"], row["kept"]): row for row in read(tmp_path / "run" / "compare.json")["rows"]}
    assert {key: row["width"] for key, row in rows.items()} == {
        ("reap", 6): 0,
        ("reap", 4): 0,
        ("narrow:camera", 6): 64,
        ("narrow:camera", 4): 64,
    }
    assert rows["narrow:camera", 6]["quality"]["kl_mean"] > 0
    wrong = run_edgeprune("compare", tiny_checkpoint, *arguments, "--methods", "narrow:camra")
    assert wrong.returncode == 2
    assert "unknown narrowing 'camra'" in wrong.stderr and "did you mean camera" in wrong.stderr


def test_a_width_that_is_impossible_is_refused_before_anything_is_measured(
    tiny_checkpoint: Path, small_text: Path, tmp_path: Path
) -> None:
    words = ("--file-size", "500kB", "--text", small_text, "-o", tmp_path / "run")
    done = run_edgeprune("plan", tiny_checkpoint, *words, "--width", "90")
    assert done.returncode == 2, done.stderr
    assert "cannot be narrowed to 90 channels: 90 is no multiple of 32 below 96" in done.stderr
    assert not (tmp_path / "run" / "statistics.safetensors").exists()


def test_an_expert_of_channels_answers_as_a_masked_one(toy_gguf: Toy) -> None:
    """What healing starts from: the kept columns, with the kept rows and elements of biases before them."""
    file = GgufFile(toy_gguf("mixtral"))
    own = LayerExperts(file, read_architecture(file), 0)[3]
    random = np.random.default_rng(0)
    own = replace(own, up_bias=random.standard_normal(256).astype(np.float32))
    kept, x = np.arange(5, 133), random.standard_normal((7, 256)).astype(np.float32)
    mask = np.isin(np.arange(256), kept)
    few = own.of_channels(kept)
    expected = (own.hidden(x, GATED["silu"]) * mask) @ own.down.T
    np.testing.assert_allclose(few.hidden(x, GATED["silu"]) @ few.down.T, expected, atol=1e-5)
    assert own.of_channels(None) is own
