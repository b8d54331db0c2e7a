"""What healing leaves of the errors of coarser types: the trial, and what follows for other layers and texts."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from observed import Toy, text_statistics

from edgeprune.errors import BadFile
from edgeprune.measure.mending import _types, measure, parts
from edgeprune.measure.refit import RIDGES
from edgeprune.measure.replay import LayerExperts, activation_of
from edgeprune.measure.shares import Mended, mended
from edgeprune.measure.statistics import Statistics
from edgeprune.measure.token_weights import fit_scale
from edgeprune.model import ggml, unbiased
from edgeprune.model.architecture import Tensor, read_architecture
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
    judged, fitted, begun = parts(len(tokens), alike)
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
    assert (own.few_tokens, own.tokens) == (begun.sum(), fitted.sum())
    # Error feedback is tried where blocks are shorter than rows, and taken if it helps.
    assert own.many <= min(left(fitted, ridge) for ridge in RIDGES) * 1.05
    assert own.few <= min(left(begun, ridge) for ridge in RIDGES) * 1.05
    assert 0 < own.many < own.few < 1
    assert 0 < own.down <= 1


def test_more_text_leaves_less_of_every_type(toy: tuple[Path, Path]) -> None:
    for by_type in measure(*map(str, toy)).values():
        for name, values in by_type.items():
            own = Mended(**values)
            assert own.inner(own.few_tokens) == pytest.approx(own.few), name
            assert own.inner(own.tokens) == pytest.approx(own.many), name
            shares = [own.inner(tokens) for tokens in (1, 100, 1_000, 10_000, 1e9)]
            assert shares == sorted(shares, reverse=True) and 0 <= shares[-1] <= shares[0] <= 1


DAMAGE: list[dict[str, object]] = [
    {"few": "x"},
    {"few_tokens": 0.0},
    {"few": None},
    {"further": 1.0},
    {"many": float("nan")},
]


@pytest.mark.parametrize("change", DAMAGE, ids=str)
def test_a_damaged_trial_is_refused(change: dict[str, object]) -> None:
    whole = asdict(Mended(20.0, 100.0, 0.5, 0.4, 1.0))
    assert mended("0", {"Q4_K": whole}) == {"Q4_K": Mended(**whole)}
    with pytest.raises(BadFile, match="layer 0"):
        mended("0", {"Q4_K": whole | change})
    with pytest.raises(BadFile, match="no type"):
        mended("0", {"Q4": whole})


@pytest.mark.parametrize(
    ("kind", "rows", "expected"),
    [
        ("BF16", (256, 512), ["Q3_K", "Q4_0"]),
        ("Q2_K", (256, 256), ["Q3_K", "Q4_0"]),
        ("Q3_K", (256, 256), ["Q2_K", "Q4_0"]),
        ("Q4_K", (2048, 1408), ["Q3_K", "Q4_0"]),  # down in Q5_0, because its rows are no 256-blocks
        ("MXFP4", (2880, 2880), ["Q4_0"]),
        ("Q4_0", (96, 64), ["IQ4_NL"]),
    ],
)
def test_something_is_tried_of_every_source(kind: str, rows: tuple[int, int], expected: list[str]) -> None:
    first, down = (
        Tensor(name, (row, 8, 4), kind, 0, 0, role, True, True)
        for name, row, role in zip(("gate", "down"), rows, ("expert_gate", "expert_down"), strict=True)
    )
    assert [own.name for own in _types(first, down)] == expected
