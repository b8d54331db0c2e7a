"""What healing leaves of the errors of coarser types: the trial, and what follows for other layers and texts."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from observed import Toy, text_statistics

from edgeprune.errors import BadFile
from edgeprune.measure.mending import measure, parts
from edgeprune.measure.refit import RIDGES
from edgeprune.measure.replay import LayerExperts, activation_of
from edgeprune.measure.shares import Mended, Sampled, mended
from edgeprune.measure.statistics import Statistics
from edgeprune.measure.token_weights import fit_scale
from edgeprune.model import ggml, unbiased
from edgeprune.model.architecture import read_architecture
from edgeprune.model.gguf import GgufFile

pytest_plugins = ("observed_fixtures",)


@pytest.fixture(scope="module")
def toy(toy_gguf: Toy, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A toy of eight experts and its statistics over 4,096 tokens."""
    model = toy_gguf("qwen3_moe")
    return model, text_statistics(model, tmp_path_factory.mktemp("mending"), 4_096, lines=400)


def test_a_trial_leaves_what_ridge_regressions_of_the_experts_leave(toy: tuple[Path, Path]) -> None:
    """Written out with one equation for all experts at once, without the random projection of outputs."""
    model, statistics = toy
    found = measure(str(model), str(statistics))
    architecture, measured = read_architecture(GgufFile(model)), Statistics.load(statistics)
    assert {int(layer) for layer in found} == set(architecture.moe_layers)
    tokens = measured.reservoirs[1]
    alike = -(-len(tokens) * measured.window // measured.tokens)
    judged, fitted, quarter = parts(len(tokens), alike)
    experts = LayerExperts(GgufFile(model), architecture, 1)
    activation = activation_of(experts, tokens)
    assert activation is not None
    scale = fit_scale(tokens).astype(np.float64)
    width = architecture.expert_width
    rows = np.zeros((len(tokens), architecture.experts * width))
    rough, wanted = np.zeros_like(tokens.y, np.float64), np.zeros_like(tokens.y, np.float64)
    kind, importance = ggml.BY_NAME["Q3_K"], measured.moments["blk.1.ffn_gate_exps.weight"].mean()
    for index in range(architecture.experts):
        own, (places, slot) = experts[index], np.nonzero(tokens.ids == index)
        gates = tokens.gates[places, slot][:, None] * scale[places]
        coded = [
            ggml.decode(kind, unbiased.encode(kind, matrix, importance[index]).reshape(-1), matrix.shape[1])
            for matrix in (own.gate, own.up)
            if matrix is not None
        ]
        exact = gates * own.hidden(tokens.x[places], activation)
        hidden = gates * activation(tokens.x[places] @ coded[0].T, tokens.x[places] @ coded[1].T)
        rows[places, index * width : (index + 1) * width] = hidden
        rough[places] += hidden @ own.down.T
        wanted[places] += exact @ own.down.T
    lacks = wanted - rough
    before = np.square(lacks[judged]).sum()

    def left(chosen: np.ndarray, ridge: float) -> float:
        gram = rows[chosen].T @ rows[chosen]
        each = np.diag(gram).reshape(architecture.experts, -1).mean(axis=1)
        change = np.linalg.solve(gram + np.diag(np.repeat(ridge * each, width)), rows[chosen].T @ lacks[chosen])
        return float(np.square(lacks[judged] - rows[judged] @ change).sum() / before)

    own = Mended(**found["1"]["Q3_K"])
    assert own.tokens == fitted.sum()
    # Error feedback is tried where blocks are shorter than rows, and taken if it helps.
    assert own.many <= min(left(fitted, ridge) for ridge in RIDGES) * 1.05
    assert own.few <= min(left(quarter, ridge) for ridge in RIDGES) * 1.05
    assert 0 < own.many < own.few < 1
    assert 0 < own.down <= 1


def test_more_text_leaves_less_of_every_type(toy: tuple[Path, Path]) -> None:
    for by_type in measure(*map(str, toy)).values():
        for name, values in by_type.items():
            own = Mended(**values)
            assert own.inner(own.tokens / 4) == pytest.approx(own.few), name
            assert own.inner(own.tokens) == pytest.approx(own.many), name
            shares = [own.inner(tokens) for tokens in (1, 100, 1_000, 10_000, 1e9)]
            assert shares == sorted(shares, reverse=True) and 0 <= shares[-1] <= shares[0] <= 1


@pytest.mark.parametrize(("tokens", "alike"), [(8_192, 171), (4_096, 512), (900, 512), (64, 64), (20, 512), (1, 1)])
def test_no_token_is_fitted_beside_one_that_judges(tokens: int, alike: int) -> None:
    judged, fitted, quarter = parts(tokens, alike)
    assert not (judged & fitted).any() and not (quarter & ~fitted).any()
    if tokens < 64:
        return
    assert judged.any() and fitted.sum() >= tokens / 3
    assert 0.1 < quarter.sum() / fitted.sum() < 0.45
    gap = min(alike, tokens // 16)
    for place in np.flatnonzero(np.diff(judged.astype(int))):
        assert not fitted[max(0, place - gap + 1) : place + gap].any()


def test_layers_between_take_what_their_neighbours_left() -> None:
    known = {
        0: {"Q2_K": Mended(100.0, 0.6, 0.4, 1.0), "Q4_K": Mended(100.0, 0.8, 0.6, 0.5), "Q8_0": Mended(1.0, 0, 0, 0)},
        2: {},
        4: {"Q3_K": Mended(300.0, 0.3, 0.1, 0.25)},
    }
    sampled = Sampled(known)
    assert sampled.of(0, 256) == Mended(100.0, pytest.approx(0.7), pytest.approx(0.5), 0.75)
    assert sampled.of(0, 32) == known[0]["Q8_0"]
    assert sampled.of(1, 256) == Mended(150.0, pytest.approx(0.6), pytest.approx(0.4), 0.625)
    assert sampled.of(2, 256) is None  # it was looked at, and cannot be healed
    assert sampled.of(9, 256) == sampled.of(4, 256) == sampled.of(4, 32) == known[4]["Q3_K"]
    assert sampled.tried(32) and not Sampled({4: known[4]}).tried(32)
    assert Sampled({}).of(0, 256) is Sampled({2: {}}).of(0, 256) is None


def test_a_layer_whose_activation_is_not_known_is_healed_by_nothing(toy: tuple[Path, Path], tmp_path: Path) -> None:
    model, statistics = toy
    measured = Statistics.load(statistics)
    tokens = measured.reservoirs[0]
    strange = type(tokens).__mro__[1](**{**tokens.unpacked(), "y": -tokens.y})
    measured.reservoirs = {**measured.reservoirs, 0: strange}
    measured.save(tmp_path / "strange")
    found = measure(str(model), str(tmp_path / "strange"))
    assert found["0"] == {} and found["1"]


@pytest.mark.parametrize(
    "change", [{"few": "x"}, {"few": None}, {"further": 1.0}, {"many": float("nan")}], ids=lambda change: str(change)
)
def test_a_damaged_trial_is_refused(change: dict[str, object]) -> None:
    whole = asdict(Mended(100.0, 0.5, 0.4, 1.0))
    assert mended("0", {"Q4_K": whole}) == {"Q4_K": Mended(**whole)}
    with pytest.raises(BadFile, match="layer 0"):
        mended("0", {"Q4_K": whole | change})
    with pytest.raises(BadFile, match="no type"):
        mended("0", {"Q4": whole})
