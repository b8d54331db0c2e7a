"""Healing: the fit against its own equations, and whole models that answer more like the original for it."""

from __future__ import annotations

import subprocess
import tracemalloc
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import architectures
import families
import numpy as np
import numpy.typing as npt
import pytest
import torch
import toys
from observed import LAUNCH, Toy, collected, token_windows
from runs import Ear, read
from safetensors.torch import load_file, save_file

from edgeprune import pipeline
from edgeprune.build.builder import build
from edgeprune.build.healer import LayerHealer, joins_the_stream
from edgeprune.build.staged import heal_layers, write_prefix
from edgeprune.build.store import Store
from edgeprune.decide.candidates import priced
from edgeprune.decide.mended import HealingText, expert_bits
from edgeprune.decide.plan import Plan, Prediction
from edgeprune.errors import BadFile
from edgeprune.measure import calibration, llama
from edgeprune.measure.channels import Channels
from edgeprune.measure.equations import Equations
from edgeprune.measure.refit import RIDGES, Healed, Share, judges, refit, residual
from edgeprune.measure.statistics import Statistics
from edgeprune.model import ggml
from edgeprune.model.architecture import read_architecture
from edgeprune.model.checkpoint import SINGLE
from edgeprune.model.convert import convert
from edgeprune.model.gguf import GgufFile, TensorShape
from edgeprune.pipeline import Settings
from edgeprune.stages.healing import changed_layers, groups

pytest_plugins = ("demo_fixtures",)
Floats = npt.NDArray[np.float32]

# The fit.


def layer(
    experts: int = 4, tokens: int = 400, used: int = 2, hidden: int = 6
) -> tuple[list[Floats], list[Share], Floats]:
    """Down projections, shares and a target that other projections would give, with a little noise."""
    random, width = np.random.default_rng(0), 5
    ids = np.argsort(random.random((tokens, experts)), axis=1)[:, :used]
    shares = []
    for expert in range(experts):
        rows = np.flatnonzero((ids == expert).any(axis=1))
        shares.append(Share(rows, random.standard_normal((len(rows), hidden)).astype(np.float32)))
    start = [random.standard_normal((width, hidden)).astype(np.float32) for _ in range(experts)]
    wanted = [matrix + 0.5 * random.standard_normal(matrix.shape).astype(np.float32) for matrix in start]
    target = answers(wanted, shares, tokens)
    return start, shares, target + 0.05 * random.standard_normal(target.shape).astype(np.float32)


def answers(matrices: Sequence[Floats], shares: Sequence[Share], tokens: int) -> Floats:
    """What the layer answers, float32 [tokens, D]."""
    nothing = np.zeros((tokens, len(matrices[0])), np.float32)
    with ThreadPoolExecutor(2) as pool:
        return -residual(matrices.__getitem__, shares, nothing, pool)


def matrices(found: Healed, experts: int = 4) -> list[Floats]:
    return [found.matrix(expert) for expert in range(experts)]


def held_out(tokens: int) -> npt.NDArray[np.bool_]:
    return np.arange(tokens) % 8 == 7


def joint(start: Sequence[Floats], shares: Sequence[Share], target: Floats, ridge: float) -> Floats:
    """The minimum in one piece: all experts' hidden values side by side, [D, E * F]."""
    hidden = start[0].shape[1]
    wide = np.zeros((len(target), hidden * len(shares)))
    pull = np.zeros(wide.shape[1])
    for expert, share in enumerate(shares):
        columns = slice(expert * hidden, (expert + 1) * hidden)
        wide[share.tokens, columns] = share.hidden
        pull[columns] = ridge * np.square(share.hidden).sum() / hidden
    old = np.concatenate(start, axis=1)
    left = wide.T @ wide + np.diag(pull)
    return np.linalg.solve(left, wide.T @ target + pull[:, None] * old.T).T.astype(np.float32)


def test_the_fit_is_the_minimum_of_the_whole_problem() -> None:
    start, shares, target = layer()
    found = refit(start.__getitem__, shares, target, held_out(len(target)))
    assert found.ridge in RIDGES
    exact = joint(start, shares, target, found.ridge)
    np.testing.assert_allclose(np.concatenate(matrices(found), axis=1), exact, atol=0.02 * np.abs(exact).max())
    assert found.after < 0.1 * found.before


def test_experts_of_fewer_tokens_than_channels_are_fitted_too() -> None:
    start, shares, target = layer(hidden=150, tokens=1_200)
    shares[1] = shares[1].of(np.arange(1_200) % 8 == 0)
    assert len(shares[1].tokens) < 150 < len(shares[2].tokens)
    found = refit(start.__getitem__, shares, target, held_out(1_200))
    assert found.ridge is not None
    exact = joint(start, shares, target, found.ridge)
    np.testing.assert_allclose(np.concatenate(matrices(found), axis=1), exact, atol=0.1 * np.abs(exact).max())


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("hidden", [6, 250], ids=["fewer channels", "fewer tokens"])
@pytest.mark.parametrize("place", [0, 7], ids=["fitted", "judging"])
def test_values_that_are_no_numbers_leave_the_matrices_as_they_are(hidden: int, place: int) -> None:
    start, shares, target = layer(hidden=hidden)
    target[place] = np.nan
    found = refit(start.__getitem__, shares, target, held_out(len(target)))
    assert found.ridge is None and all(map(np.array_equal, matrices(found), start))
    start, shares, target = layer(hidden=hidden)
    shares[1].hidden[:] = np.inf
    found = refit(start.__getitem__, shares, target, held_out(len(target)))
    assert found.ridge is None and all(map(np.array_equal, matrices(found), start))


@pytest.mark.parametrize("channels", [10, 200], ids=["fewer channels", "fewer tokens"])
def test_each_step_is_the_ridge_regression_of_what_is_left(channels: int) -> None:
    random, ridge = np.random.default_rng(0), 0.3
    hidden = random.standard_normal((60, channels), np.float32)
    wanted, other = random.standard_normal((2, 60, 3), np.float32)
    equations = Equations(np.arange(60), hidden, held_out(60))
    solver = equations.solver(ridge)
    assert solver is not None
    rest, solution = wanted.copy(), np.zeros((equations.unknowns, 3), np.float32)
    equations.step(rest, solution, *solver)
    rest -= other  # as other experts have moved meanwhile
    equations.step(rest, solution, *solver)
    fitted, pull = hidden[~held_out(60)].astype(np.float64), solver[1]
    assert pull == pytest.approx(ridge * np.square(fitted).sum() / channels)
    exact = np.linalg.solve(fitted.T @ fitted + pull * np.eye(channels), fitted.T @ (wanted - other)[~held_out(60)])
    np.testing.assert_allclose(equations.change(solution).T, exact, atol=1e-4 * np.abs(exact).max())
    np.testing.assert_allclose(rest, wanted - other - hidden @ exact, atol=1e-3)


def test_what_a_fit_takes_follows_the_tokens_and_not_the_experts_width() -> None:
    """Nothing as large as the down projections [D, F] of all experts is held, and no F by F matrix."""
    experts, hidden, width, tokens = 8, 4_096, 1_024, 256
    random = np.random.default_rng(0)
    matrix = random.standard_normal((width, hidden), np.float32)
    shares = [
        Share(np.arange(e, tokens, experts), random.standard_normal((tokens // experts, hidden), np.float32))
        for e in range(experts)
    ]
    target = random.standard_normal((tokens, width), np.float32)
    tracemalloc.start()
    found = refit(lambda _: matrix, shares, target, held_out(tokens))
    found.matrix(0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.5 * experts * matrix.nbytes


def test_the_smallest_ridge_is_taken_where_there_is_little_noise() -> None:
    start, shares, target = layer(tokens=2_000)
    assert refit(start.__getitem__, shares, target, held_out(len(target))).ridge == min(RIDGES)


def test_a_fit_that_does_not_help_on_other_tokens_is_undone() -> None:
    start, shares, _ = layer(tokens=60)
    exact = answers(start, shares, 60)
    noise = 0.5 * np.random.default_rng(1).standard_normal(exact.shape).astype(np.float32)
    found = refit(start.__getitem__, shares, exact + noise, held_out(60))
    assert found.ridge is None
    assert found.after == found.before
    for new, old in zip(matrices(found), start, strict=True):
        np.testing.assert_array_equal(new, old)


def test_a_fit_that_gains_next_to_nothing_is_undone() -> None:
    """Of an error that is noise but for 1 % at most 1 % can be won, of one that is noise but for a sixth, a sixth."""
    start, shares, target = layer(tokens=8_000)
    size = np.sqrt(np.square(target - answers(start, shares, 8_000)).mean())
    noise = size * np.random.default_rng(5).standard_normal(target.shape).astype(np.float32)
    drowned = refit(start.__getitem__, shares, target + 10 * noise, held_out(8_000))
    assert (drowned.ridge, drowned.after) == (None, drowned.before)
    np.testing.assert_array_equal(drowned.matrix(0), start[0])
    heard = refit(start.__getitem__, shares, target + np.float32(5**0.5) * noise, held_out(8_000))
    assert heard.ridge is not None and heard.after < 0.9 * heard.before


def test_an_expert_that_no_token_reaches_stays_as_it_is() -> None:
    start, shares, target = layer()
    shares[2] = Share(np.zeros(0, np.intp), np.zeros((0, 6), np.float32))
    found = refit(start.__getitem__, shares, target, held_out(len(target)))
    assert found.ridge is not None
    np.testing.assert_array_equal(found.matrix(2), start[2])
    assert np.abs(found.matrix(1) - start[1]).max() > 0.1


# Stages.


@pytest.mark.parametrize(
    ("layers", "count", "expected"),
    [
        ([0, 1, 2, 3], 8, [(0, 1), (1, 2), (2, 3), (3, 4)]),
        ([0, 1, 2, 3, 4], 2, [(0, 2), (2, 5)]),
        ([1, 3, 5, 6], 2, [(1, 4), (5, 7)]),
        ([], 3, []),
    ],
)
def test_layers_are_healed_in_groups(layers: list[int], count: int, expected: list[tuple[int, int]]) -> None:
    assert groups(layers, count) == expected


def plan_for(model: Path, kept: int, types: dict[str, str]) -> Plan:
    """A plan that keeps the last experts of every layer."""
    architecture = read_architecture(GgufFile(model))
    ids = tuple(range(architecture.experts - kept, architecture.experts))
    keep = {} if kept == architecture.experts else dict.fromkeys(architecture.moe_layers, ids)
    origin = {"source": "toy", "healing": "toy"}
    counts = (architecture.experts, kept)
    return Plan(architecture.arch, *counts, keep, types, LAUNCH, "test", "user", Prediction(), origin, heal=True)


def test_only_layers_with_other_experts_are_healed(toy_gguf: Toy) -> None:
    model = toy_gguf("qwen3_moe")
    architecture = read_architecture(GgufFile(model))
    kept = toys.EXPERTS
    assert changed_layers(plan_for(model, kept, {"blk.0.attn_q.weight": "Q4_K"}), architecture) == []
    assert changed_layers(plan_for(model, kept, {"blk.1.ffn_up_exps.weight": "Q4_K"}), architecture) == [1]
    assert changed_layers(plan_for(model, kept - 2, {}), architecture) == [0, 1]


def test_the_text_to_heal_on_follows_from_experts_and_their_types(toy_gguf: Toy) -> None:
    model = toy_gguf("qwen3_moe")
    architecture = read_architecture(GgufFile(model))
    experts = [tensor.name for tensor in architecture.tensors if tensor.is_expert]

    text = HealingText(asked=1000, most=900)

    def tokens(kept: int, *types: str, narrower: bool = False) -> int:
        plan = plan_for(model, kept, dict(zip(experts, types * len(experts), strict=False)))
        return text.tokens(expert_bits(architecture, plan.types), fewer=bool(plan.keep), narrower=narrower)

    everyone = architecture.experts
    assert tokens(4, "Q4_K") == tokens(4, "Q8_0") == 900  # of 1,000, as many as the disk holds
    assert tokens(4, "IQ2_XXS") == tokens(4, "IQ2_XXS", narrower=True) == 500
    assert tokens(everyone, "Q5_K") == tokens(everyone, "Q8_0", "Q4_K", "Q4_K") == 125
    assert tokens(everyone, "Q4_K") == tokens(everyone, "Q5_K", "Q5_K", "IQ2_XXS") == 250
    assert tokens(everyone, "Q3_K") == tokens(everyone, "Q2_K", "Q2_K", "Q6_K") == 500
    assert tokens(everyone, "Q8_0", narrower=True) == tokens(everyone, "IQ2_XXS", narrower=True) == 500
    assert tokens(4, "Q8_0", narrower=True) == 900


def test_a_prefix_is_the_pruned_model_as_far_as_it_goes(toy_gguf: Toy, tmp_path: Path) -> None:
    """What its layers see is what they see in the whole pruned file, and what follows takes no room on the disk."""
    model, windows = toy_gguf("olmoe"), token_windows(toys.VOCABULARY)
    plan = plan_for(model, 6, {})
    whole, prefix = tmp_path / "whole.gguf", tmp_path / "prefix.gguf"
    build(str(model), plan.to_json(), str(whole))
    write_prefix(str(model), plan.to_json(), str(prefix), str(tmp_path / "store"), [0, 1])
    assert prefix.stat().st_size == whole.stat().st_size
    layers = slice(GgufFile(whole).tensors["blk.1.attn_q.weight"].offset, None)
    assert not any(prefix.read_bytes()[layers])
    store = Store(tmp_path / "store")
    assert "blk.0.attn_q.weight" in store and "blk.0.ffn_up_exps.weight" not in store
    seen = collected(whole, windows, tmp_path).reservoirs()[0]
    names = frozenset(name for name in GgufFile(model).tensors if name.startswith("blk.0.ffn"))
    found = collected(prefix, windows, tmp_path, weights=names, only=range(1))
    assert set(found.layers()) == {0}
    for name in ("x", "y", "ids", "gates"):
        np.testing.assert_array_equal(getattr(found.reservoirs()[0], name), getattr(seen, name))


def test_nothing_is_computed_beyond_the_layers_that_are_looked_at(toy_gguf: Toy, tmp_path: Path) -> None:
    model, windows = toy_gguf("olmoe"), token_windows(toys.VOCABULARY, 1)
    names = frozenset(name for name in GgufFile(model).tensors if "exps" in name)
    seen: list[str] = []
    only = collected(model, windows, tmp_path, weights=names, only=range(1), listener=seen.append)
    assert set(only.layers()) == {0}
    assert any(name.endswith("-0") for name in seen)
    assert not any(name.endswith("-1") for name in seen)


STATISTICS = ("teacher", "student")


def healed_toy(
    model: Path,
    folder: Path,
    kept: int,
    types: dict[str, str],
    *,
    tokens_only: bool = False,
    width: int = 0,
    channels: Path | None = None,
) -> tuple[dict[str, Any], Path, Plan]:
    """A toy model healed in one stage over two thousand random tokens; what was found, and where its tensors are."""
    folder.mkdir(exist_ok=True)
    architecture = read_architecture(GgufFile(model))
    plan, store = plan_for(model, kept, types), folder / "store"
    if channels is not None:
        plan = replace(plan, width=width, narrowing="camera", channels=Channels.load(channels).digest)
    orders = str(channels or "")
    text = folder / "text.txt"
    text.write_text("".join(toys.training_lines()[:120]), encoding="utf-8")
    common: dict[str, Any] = {
        "scratch": str(folder),
        "texts": [{"domain": "a", "path": str(text), "split": "calibration"}],
        "window": 64,
        "most_tokens": 2_048,
        "weights": [
            t.name for t in architecture.tensors if t.is_expert and not (tokens_only and t.role == "expert_down")
        ],
        "arch": architecture.arch,
        "reservoir_tokens": 2_048,
        "tokens_only": tokens_only,
    }
    teacher, student, prefix = folder / "teacher", folder / "student", folder / "prefix.gguf"
    made: dict[str, Any] = {"model": "a"}
    calibration.collect(str(model), str(teacher), experts=architecture.experts, made_from=made, **common)
    everything = [0, architecture.layers]
    write_prefix(str(model), plan.to_json(), str(prefix), str(store), everything, str(teacher), orders)
    calibration.collect(
        str(prefix), str(student), experts=kept, made_from={"model": "b"}, layers=everything, **common
    )
    files = (str(teacher), str(student))
    found = heal_layers(str(model), plan.to_json(), str(store), *files, everything, orders)
    return found, store, plan


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "olmoe"])
def test_every_layer_of_every_family_is_healed(family: str, toy_gguf: Toy, tmp_path: Path) -> None:
    model = toy_gguf(family)
    found, store, plan = healed_toy(model, tmp_path, 6, {})
    assert set(found) == {"0", "1"}
    for own in found.values():
        assert own["ridge"] in RIDGES
        assert own["after"] < 0.9 * own["before"]
    made = build(str(model), plan.to_json(), str(tmp_path / "healed.gguf"), store=str(store))
    healed, source = GgufFile(Path(made["path"])), GgufFile(model)
    for name in ("blk.0.ffn_gate_exps.weight", "blk.0.ffn_up_exps.weight", "blk.1.attn_q.weight"):
        experts = source.raw(name).reshape(toys.EXPERTS, -1)[2:] if "exps" in name else source.raw(name)
        np.testing.assert_array_equal(healed.raw(name), experts.reshape(-1))
    down = "blk.0.ffn_down_exps.weight"
    assert not np.array_equal(healed.raw(down), source.raw(down).reshape(toys.EXPERTS, -1)[2:].reshape(-1))
    with llama.session(Path(made["path"]), LAUNCH) as opened:
        assert np.isfinite(opened.run(token_windows(toys.VOCABULARY)[0])).all()


@pytest.mark.parametrize("kind", ["F32", "Q4_K"])
def test_kept_channels_answer_for_their_twins(kind: str, toy_gguf: Toy, tmp_path: Path) -> None:
    """Every channel of the second half is one of the first once more, so that nothing need be lost without them. In
    Q4_K the narrower rows of down are no rows of the source's type, and get another."""
    file, tensors = GgufFile(toy_gguf("qwen3_moe")), []
    for info in file.tensors.values():
        values = np.array(file.raw(info.name))
        if info.name.endswith(("ffn_gate_exps.weight", "ffn_up_exps.weight")):
            rows = values.view(np.float32).reshape(toys.EXPERTS, toys.EXPERT_WIDTH, -1)
            rows[:, toys.EXPERT_WIDTH // 2 :] = rows[:, : toys.EXPERT_WIDTH // 2]
        shape, name = TensorShape(info.name, info.shape, info.type), info.type
        if kind != "F32" and "_exps" in info.name:
            encoded = [
                ggml.encode(ggml.BY_NAME[kind], part.reshape(-1, info.shape[0]), None, info.name).reshape(-1)
                for part in values.view(np.float32).reshape(toys.EXPERTS, -1)
            ]
            values, name = np.concatenate(encoded), kind
        tensors.append((replace(shape, type=name), values))
    model = toys.write_gguf(tmp_path / "twins.gguf", file.entries.values(), tensors)
    half = toys.EXPERT_WIDTH // 2
    order = np.tile(np.arange(toys.EXPERT_WIDTH, dtype=np.int16), (toys.EXPERTS, 1))
    Channels({0: order, 1: order}, {}).save(tmp_path / "channels")
    architecture = read_architecture(GgufFile(model))
    downs = [tensor.name for tensor in architecture.tensors if tensor.role == "expert_down"]
    types = {} if kind == "F32" else dict.fromkeys(downs, "Q8_0")
    found, store, plan = healed_toy(model, tmp_path, toys.EXPERTS, types, width=half, channels=tmp_path / "channels")
    for own in found.values():
        assert own["ridge"] in RIDGES
        assert own["after"] < own["before"]
    assert found["0"]["after"] < 0.2 * found["0"]["before"]  # layer 1 sees what layer 0 makes before it is healed
    made = build(
        str(model), plan.to_json(), str(tmp_path / "h.gguf"), store=str(store), channels=str(tmp_path / "channels")
    )
    healed = GgufFile(Path(made["path"]))
    gate = "blk.0.ffn_gate_exps.weight"
    kept = GgufFile(model).raw(gate).reshape(toys.EXPERTS, toys.EXPERT_WIDTH, -1)[:, :half]
    np.testing.assert_array_equal(healed.raw(gate), kept.reshape(-1))
    assert healed.tensors[downs[0]].type == ("Q8_0" if types else "F32")


def test_fitted_projections_answer_as_fitted_beside_the_scales_of_experts(tmp_path: Path) -> None:
    """Gemma 4 multiplies what an expert gives by a factor of its own, here from 1/4 to 4."""
    folder = families.make_checkpoint("gemma4", tmp_path / "model")
    weights = load_file(folder / SINGLE)
    for name, weight in weights.items():
        if name.endswith("per_expert_scale"):
            weight *= 2 ** torch.linspace(-2, 2, toys.EXPERTS)
    save_file(weights, folder / SINGLE)
    model = tmp_path / "model.gguf"
    convert(folder, model, "f32")
    _, store, plan = healed_toy(model, tmp_path, 6, {})
    windows = token_windows(toys.VOCABULARY, 2)
    names = frozenset(name for name in GgufFile(model).tensors if name.startswith("blk.0.ffn"))

    def first_outputs(path: str) -> npt.NDArray[np.float32]:
        kept: npt.NDArray[np.float32] = collected(Path(path), windows, tmp_path, weights=names).reservoirs()[0].y
        return kept

    wanted = first_outputs(str(model))
    plain = first_outputs(build(str(model), plan.to_json(), str(tmp_path / "plain.gguf"))["path"])
    healed = first_outputs(build(str(model), plan.to_json(), str(tmp_path / "healed.gguf"), store=str(store))["path"])
    assert np.square(healed - wanted).sum() < 0.95 * np.square(plain - wanted).sum()


def test_low_bits_are_answered_by_the_down_projection(toy_gguf: Toy, tmp_path: Path) -> None:
    """Gate and up in few bits and all experts kept: the fit takes up a part of their error."""
    types = {f"blk.{index}.ffn_{kind}_exps.weight": "Q2_K" for index in range(2) for kind in ("gate", "up")}
    types |= {f"blk.{index}.ffn_down_exps.weight": "Q6_K" for index in range(2)}
    model = toy_gguf("qwen3_moe")
    found, store, plan = healed_toy(model, tmp_path, toys.EXPERTS, types)
    assert all(own["after"] < own["before"] for own in found.values())
    made = build(str(model), plan.to_json(), str(tmp_path / "healed.gguf"), str(tmp_path / "teacher"), str(store))
    healed = GgufFile(Path(made["path"]))
    assert {healed.tensors[name].type for name in types} == {"Q2_K", "Q6_K"}
    for name in types:
        assert ggml.library().ggml_validate_row_data(
            ggml.BY_NAME[types[name]].id, healed.raw(name).ctypes.data, healed.raw(name).nbytes
        )


def test_experts_are_encoded_with_error_feedback(toy_gguf: Toy, tmp_path: Path) -> None:
    """Eight blocks in a row: on tokens that were not fitted, products are nearer to the source's than those of ggml's
    own encoding, which is what a build without healing writes, and by as much as is recorded."""
    model, kind = toy_gguf("qwen3_moe"), ggml.BY_NAME["Q4_0"]
    names = [f"blk.0.ffn_{part}_exps.weight" for part in ("gate", "up", "down")]
    found, store, plan = healed_toy(model, tmp_path, 6, dict.fromkeys(names, kind.name))
    assert set(found["0"]["feedback"]) == set(names)
    assert found["1"]["feedback"] == {}  # as in the source
    assert all(own["after"] < own["before"] for own in found["0"]["feedback"].values())
    plain = build(str(model), plan.to_json(), str(tmp_path / "plain.gguf"), str(tmp_path / "teacher"))
    healed = build(str(model), plan.to_json(), str(tmp_path / "h.gguf"), str(tmp_path / "teacher"), str(store))
    assert plain["nbytes"] == healed["nbytes"]
    tokens = Statistics.load(tmp_path / "student").reservoirs[0]
    judged = judges(len(tokens), 256)
    source, width = GgufFile(model), tokens.x.shape[1]
    exact = ggml.decode(ggml.BY_NAME[source.tensors[names[0]].type], source.raw(names[0]), width)
    matrices = exact.reshape(toys.EXPERTS, -1, width)[2:]
    errors = []
    for path in (plain["path"], healed["path"]):
        rows = ggml.decode(kind, GgufFile(Path(path)).raw(names[0]), width).reshape(matrices.shape)
        errors.append(0.0)
        for expert, lost in enumerate(rows - matrices):
            own = tokens.x[judged & (tokens.ids == expert).any(axis=1)]
            errors[-1] += float(np.square(own @ lost.T).sum())
    recorded = found["0"]["feedback"][names[0]]
    assert errors[1] < 0.95 * errors[0]
    assert errors[1] / errors[0] == pytest.approx(recorded["after"] / recorded["before"], rel=0.05)


def test_layers_lean_towards_the_originals_residual_stream(toy_gguf: Toy, tmp_path: Path) -> None:
    """Passes that look at tokens alone keep the stream; half of what it lost is asked of the next layer."""
    model = toy_gguf("qwen3_moe")
    plain, _, _ = healed_toy(model, tmp_path / "plain", 6, {})
    leaning, _, _ = healed_toy(model, tmp_path / "leaning", 6, {}, tokens_only=True)
    kept = [Statistics.load(tmp_path / "leaning" / name).reservoirs for name in ("teacher", "student")]
    for reservoirs in kept:
        for tokens in reservoirs.values():
            assert tokens.stream is not None
            np.testing.assert_allclose(np.linalg.norm(tokens.stream, axis=1), tokens.residual, rtol=2e-3)
    teacher, student = (own[1].stream for own in kept)
    assert teacher is not None and student is not None and np.abs(teacher - student).max() > 1e-3
    assert Statistics.load(tmp_path / "plain" / "teacher").reservoirs[1].stream is None
    # Nothing is lost before the first layer, so its target is the same; the second has more to put right.
    assert leaning["0"]["before"] == pytest.approx(plain["0"]["before"], rel=1e-5)
    assert leaning["1"]["before"] != pytest.approx(plain["1"]["before"], rel=1e-3)


def test_a_layer_knows_how_healing_it_moves_the_stream_behind_it(toy_gguf: Toy, tmp_path: Path) -> None:
    """What is foretold for layers of the same group is what these see once it is built, but for what attention makes
    of it; and the next layer asks for less."""
    model = toy_gguf("qwen3_moe")
    found, store, plan = healed_toy(model, tmp_path, 6, {}, tokens_only=True)
    file = GgufFile(model)
    architecture, teacher, before = read_architecture(file), *(Statistics.load(tmp_path / n) for n in STATISTICS)
    first = LayerHealer(file, architecture, 0, plan, teacher.reservoirs[0], before)
    first.heal(Store(tmp_path / "again"))
    assert first.moved is not None
    write_prefix(str(model), plan.to_json(), str(tmp_path / "next.gguf"), str(store), [1, 2], "")
    calibration.collect(
        str(tmp_path / "next.gguf"),
        str(tmp_path / "after"),
        scratch=str(tmp_path),
        texts=[{"domain": "a", "path": str(tmp_path / "text.txt"), "split": "calibration"}],
        window=64,
        most_tokens=2_048,
        weights=[t.name for t in architecture.tensors if t.role == "expert_gate"],
        experts=6,
        arch=architecture.arch,
        made_from={"model": "c"},
        reservoir_tokens=2_048,
        layers=[1, 2],
        tokens_only=True,
    )
    streams = [Statistics.load(path).reservoirs[1].stream for path in (tmp_path / "after", tmp_path / "student")]
    assert streams[0] is not None and streams[1] is not None
    moved = streams[0] - streams[1]
    assert np.square(moved - first.moved).sum() < 0.2 * np.square(moved).sum()
    alone = LayerHealer(file, architecture, 1, plan, teacher.reservoirs[1], before)
    behind = LayerHealer(file, architecture, 1, plan, teacher.reservoirs[1], before, None, first.moved)
    asked = [own.heal(Store(tmp_path / name)) for own, name in ((alone, "alone"), (behind, "behind"))]
    assert asked[1]["before"] < asked[0]["before"]
    assert found["1"]["before"] == pytest.approx(asked[1]["before"])


@pytest.mark.parametrize(
    ("arch", "values", "expected"),
    [
        ("qwen3moe", {}, True),
        ("granitemoe", {}, True),
        ("granitemoe", {"residual_scale": 1.0}, True),
        ("granitemoe", {"residual_scale": 0.22}, False),
        ("gemma4", {}, False),
    ],
)
def test_layers_lean_only_where_the_experts_output_joins_the_stream_as_it_is(
    arch: str, values: dict[str, float], expected: bool, tmp_path: Path
) -> None:
    metadata = {key: ("f32", value) for key, value in values.items()}
    file = GgufFile(architectures.toy(tmp_path / "toy.gguf", arch, **metadata))
    assert joins_the_stream(file, read_architecture(file), 1) is expected


@pytest.mark.parametrize(
    ("tokens", "held_out", "runs"), [(8, 1, 1), (100, 12, 12), (1_700, 208, 8), (4_100, 512, 8), (40_960, 5_120, 20)]
)
def test_tokens_from_everywhere_judge_however_few_there_are(tokens: int, held_out: int, runs: int) -> None:
    found = judges(tokens, 256)
    assert found.sum() == held_out
    assert np.count_nonzero(np.diff(found.astype(int), prepend=0) == 1) == runs


def test_tokens_of_another_text_are_refused(toy_gguf: Toy, tmp_path: Path) -> None:
    model = toy_gguf("qwen3_moe")
    _, store, plan = healed_toy(model, tmp_path, 6, {})
    short = Statistics.load(tmp_path / "teacher")
    kept = {number: tokens.rows(np.arange(100)) for number, tokens in short.reservoirs.items()}
    Statistics(short.domains, short.tokens, short.window, short.layers, short.moments, short.made_from, kept).save(
        tmp_path / "short"
    )
    with pytest.raises(BadFile, match="over different tokens"):
        heal_layers(
            str(model), plan.to_json(), str(store), str(tmp_path / "short"), str(tmp_path / "student"), [0, 2]
        )


# The whole run.


def processes_started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows with every child process from now on."""
    started: list[Any] = []

    class Counted(subprocess.Popen[bytes]):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            started.append(self.args)

    monkeypatch.setattr(subprocess, "Popen", Counted)
    return started


def test_a_healed_model_is_nearer_to_the_original(
    tmp_path: Path, own_home: Path, one_core: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The demo with six of eight experts: on held-out text, against the same experts unhealed."""
    folder = tmp_path / "run"
    settings = Settings(
        "demo",
        file_bytes=20_000_000,
        window=128,
        calibration_tokens=2_048,
        healing_tokens=8_192,
        heal_stages=2,
        evaluation_tokens=2_048,
        output=str(folder),
    )
    with pipeline.opened(settings, Ear()) as run:
        problem = replace(run.unmeasured({}, frozenset()), ranked=run.ranked("reap"), heal=True)
        found = priced(problem, 6, {})
        assert found is not None and found.plan.heal
        plain = run.divergence(run.source, "held_out", [{str(k): list(v) for k, v in found.plan.keep.items()}])[0]
        # Killed while it deleted what is healed: what is missing is healed again.
        started = processes_started(monkeypatch)
        down = Store(Path(run.healed(found.plan))).folder / "blk.1.ffn_down_exps.weight.tensor"
        # The source observed, and each of two groups of layers; one process has encoded both.
        assert len(started) == 1 + 2 + 1
        before = down.read_bytes()
        down.unlink()
        run.healed(found.plan)
        assert down.read_bytes() == before
        made = run.build(found.plan)
        healed = run.quality(Path(made.path), "quality")
    assert healed["all"]["kl_mean"] < 0.7 * plain["all"]["kl_mean"]
    record = read(folder / "healing.json")
    assert set(record) == {"0", "1", "2", "3"}
    assert all(own["after"] <= own["before"] for own in record.values())
    assert sum(own["after"] < own["before"] for own in record.values()) >= 2
    assert not list(folder.glob("healed-*"))  # the finished tensors are in the file now
    assert GgufFile(Path(made.path)).get("edgeprune.healed") is True
