"""Routers that no toy of transformers has, by value: what is collected and scored, against everything written out.

Only the residual stream before and after each block is taken from llama.cpp; norm, router, choice, coefficients and
experts are computed here from the weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import toys
from observed import LAUNCH, TOKENS, token_windows

from edgeprune.decide.evidence import Evidence
from edgeprune.decide.scores import SCORES
from edgeprune.measure import llama
from edgeprune.measure.arena import Arena
from edgeprune.measure.collector import Collector
from edgeprune.measure.replay import LayerExperts
from edgeprune.measure.statistics import FORWARD, RATIO_BINS, LayerStatistics
from edgeprune.measure.weights import LayerWeights
from edgeprune.model.architecture import read_architecture
from edgeprune.model.gguf import GgufFile

Doubles = npt.NDArray[np.float64]
GROUPED = {"experts": 16, "used": 3, "groups": 4, "groups_used": 2, "layers": 3}
NORMS = {"gpt-oss": "post_attention_norm"}
# Not shown: gpt-oss has an activation of its own, and experts of Llama 4 have an input of their own.
UNKNOWN = {"gpt-oss": {"gate_slope", "up_slope"}, "llama4": {"angle_sum"}}


def sigmoid(values: Doubles) -> Doubles:
    return 1 / (1 + np.exp(-values))


def softmax(values: Doubles) -> Doubles:
    spread = np.exp(values - values.max(axis=1, keepdims=True))
    result: Doubles = spread / spread.sum(axis=1, keepdims=True)
    return result


def angle(before: Doubles, after: Doubles) -> Doubles:
    product = (before * after).sum(axis=-1)
    result: Doubles = 1 - product / (np.linalg.norm(before, axis=-1) * np.linalg.norm(after, axis=-1))
    return result


def chosen_by_groups(scores: Doubles, groups: int, groups_used: int, used: int) -> npt.NDArray[np.intp]:
    """DeepSeek-V3: the groups whose two best experts are best together, and the best experts in them."""
    ids = []
    for row in scores:
        parts = row.reshape(groups, -1)
        best = np.argsort([-np.sort(part)[-2:].sum() for part in parts])[:groups_used]
        opened = np.isin(np.arange(len(row)) // parts.shape[1], best)
        ids.append(np.argsort(np.where(opened, -row, np.inf))[:used])
    return np.array(ids)


class Written:
    """One layer of a model, token by token."""

    def __init__(self, model: Path, arch: str, layer: int, h: Doubles, after: Doubles) -> None:
        self.file, self.arch, self.h, self.after = GgufFile(model), arch, h, after
        self.architecture = read_architecture(self.file)
        self.layer, self.experts, used = layer, self.architecture.experts, self.architecture.used
        norm = self._tensor(f"{NORMS.get(arch, 'ffn_norm')}.weight")
        self.x = h / np.sqrt(np.square(h).mean(axis=1, keepdims=True) + 1e-6) * norm
        self.z = self.x @ self._tensor("ffn_gate_inp.weight").T
        self.factors_in = np.ones((len(h), used))
        if arch == "deepseek2":
            p = sigmoid(self.z)
            scores = p + self._tensor("exp_probs_b.bias")
            self.ids = chosen_by_groups(scores, self.architecture.groups, self.architecture.groups_used, used)
            self.p = np.take_along_axis(p, self.ids, axis=1)
            self.gates = 2.5 * self.p / self.p.sum(axis=1, keepdims=True)
        elif arch == "gpt-oss":
            self.z = self.z + self._tensor("ffn_gate_inp.bias")
            self.ids = np.argsort(-self.z, axis=1)[:, :used]
            self.p = np.take_along_axis(softmax(self.z), self.ids, axis=1)
            self.gates = softmax(np.take_along_axis(self.z, self.ids, axis=1))
        else:
            self.ids = np.argsort(-self.z, axis=1)[:, :used]
            self.p = self.gates = self.factors_in = sigmoid(np.take_along_axis(self.z, self.ids, axis=1))
        self.inside = arch == "llama4"
        self.factors = np.ones_like(self.gates) if self.inside else self.gates
        self._experts()

    def _tensor(self, name: str) -> Doubles:
        info = self.file.tensors[f"blk.{self.layer}.{name}"]
        values = np.frombuffer(self.file.raw(info.name), np.float32)
        return values.reshape(tuple(reversed(info.shape))).astype(np.float64)

    def _experts(self) -> None:
        loaded = LayerExperts(self.file, self.architecture, self.layer)
        (tokens, used), own = self.ids.shape, loaded[0]
        self.inputs = self.factors_in[:, :, None] * self.x[:, None]
        self.gate, self.up, self.a = (np.zeros((tokens, used, own.up.shape[0])) for _ in range(3))
        self.f = np.zeros((tokens, used, self.x.shape[1]))
        self.down = np.zeros((self.experts, *own.down.shape))
        for e in range(self.experts):
            own, at = loaded[e], np.nonzero(self.ids == e)
            self.down[e] = own.down
            assert own.gate is not None
            self.gate[at] = self.inputs[at] @ own.gate.T.astype(np.float64) + own.gate_bias
            self.up[at] = self.inputs[at] @ own.up.T.astype(np.float64) + own.up_bias
            if self.arch == "gpt-oss":
                gate, up = np.minimum(self.gate[at], 7), np.clip(self.up[at], -7, 7)
                self.a[at] = gate * sigmoid(1.702 * gate) * (up + 1)
            else:
                self.a[at] = self.gate[at] * sigmoid(self.gate[at]) * self.up[at]
            self.f[at] = self.a[at] @ self.down[e].T + own.down_bias

    # By expert.

    def each(self, values: Any) -> Doubles:
        """Sums of one number, or one row, per slot."""
        values = np.broadcast_to(values, (*self.ids.shape, *np.shape(values)[2:]))
        return np.array([values[self.ids == e].sum(axis=0) for e in range(self.experts)])

    def most(self, values: Doubles) -> Doubles:
        nothing = np.zeros((1, *values.shape[2:]))
        return np.array([np.concatenate([nothing, values[self.ids == e]]).max(axis=0) for e in range(self.experts)])

    @cached_property
    def y(self) -> Doubles:
        summed: Doubles = (self.factors[:, :, None] * self.f).sum(axis=1)
        return summed

    @cached_property
    def turn(self) -> Doubles:
        return np.maximum(angle(self.h, self.h + self.y), 0)

    def accumulators(self) -> dict[str, Any]:
        g, norm, h_norm = self.gates, np.linalg.norm(self.f, axis=2), np.linalg.norm(self.h, axis=1)
        factors, tokens = self.factors, len(self.h)
        wide = factors[:, :, None]
        gated = factors * norm
        used = np.zeros((tokens, self.experts))
        np.put_along_axis(used, self.ids, 1.0, axis=1)
        first = np.eye(self.experts)[self.z.argmax(axis=1)]
        ordered = -np.sort(-g, axis=1)
        bins = np.minimum(ordered[:, 1:] / ordered[:, :1] * RATIO_BINS, RATIO_BINS - 1).astype(int)
        s = sigmoid(self.gate)
        return {
            "tokens": tokens,
            "routed": self.each(1.0 + 0 * g),
            "prob_sum": self.each(self.p),
            "share_sum": self.each(g / g.sum(axis=1, keepdims=True)),
            "gate_sum": self.each(g),
            "gate_square": self.each(g**2),
            "factor_sum": self.each(factors),
            "norm_sum": self.each(norm),
            "norm_square": self.each(norm**2),
            "gated_norm_sum": self.each(gated),
            "gated_square": self.each(gated**2),
            "norm_max": self.most(norm),
            "peak": self.most(np.abs(self.f).max(axis=2)),
            "angle_sum": self.each(gated * angle(self.x[:, None] + 0 * self.f, self.f)),
            "turn_sum": self.each(gated * self.turn[:, None]),
            "turn_tokens": tokens,
            "token_turn": self.turn.sum(),
            "token_full_turn": angle(self.h, self.after).sum(),
            "token_ratio": (np.linalg.norm(self.y, axis=1) ** 2 / h_norm**2).sum(),
            "turn_histogram": np.histogram(self.turn, bins=RATIO_BINS, range=(0, 2))[0],
            "top_logit_sum": (first * self.z).sum(axis=0),
            "chosen_logit_sum": (used * self.z).sum(axis=0),
            "ratio_histogram": np.array([np.bincount(column, minlength=RATIO_BINS) for column in bins.T]),
            "together": used.T @ used,
            "logit_gram": self.z.T @ self.z,
            "logit_sum": self.z.sum(axis=0),
            "output_sum": self.each(self.f),
            "gated_output_sum": self.each(wide * self.f),
            "output_square": self.each(self.f**2),
            "hidden_square": self.each(self.a**2),
            "hidden_abs": self.each(np.abs(self.a)),
            "gated_hidden_square": self.each((wide * self.a) ** 2),
            "gated_hidden_max": self.most(np.abs(wide * self.a)),
            "scaled_hidden_square": self.each((wide * self.a / h_norm[:, None, None]) ** 2),
            "gate_square_sum": self.each(self.gate**2),
            "up_square_sum": self.each(self.up**2),
            "gate_slope": self.each((wide * s * (1 + self.gate * (1 - s)) * self.up) ** 2),
            "up_slope": self.each((wide * self.gate * s) ** 2),
            "input_square": self.each(self.inputs**2),
            "gated_input_square": self.each((wide * self.inputs) ** 2),
        }

    # Scores, from what the experts really contribute.

    def scores(self) -> dict[str, Doubles]:
        contribution = np.linalg.norm(self.factors[:, :, None] * self.f, axis=2)
        phi = np.square(self.factors[:, :, None] * self.a)
        columns = np.square(self.down).sum(axis=1)
        count = np.maximum(self.each(1.0 + 0 * self.gates), 1)
        deviation = [np.sqrt(self.f[self.ids == e].var(axis=0).sum()) if (self.ids == e).any() else 0.0
                     for e in range(self.experts)]  # fmt: skip
        return {
            "reap": self.each(contribution) / count,
            "easy-ep": self.each(contribution * self.turn[:, None]),
            "camera": (columns * (0.1 * self.each(phi) + 0.9 * self.most(phi))).sum(axis=1),
            "mone": np.array(deviation) * self.each(self.factors) / count,
            "soft-frequency": self.each(self.gates),
        }

    def weights(self) -> LayerWeights:
        nothing = np.zeros(self.experts)
        return LayerWeights(nothing, nothing, nothing, np.square(self.down).sum(axis=1), nothing[:, None])


class Router:
    """One model, measured over one window and written out."""

    def __init__(self, model: Path, folder: Path) -> None:
        architecture = read_architecture(GgufFile(model))
        self.arch = architecture.arch
        weights = frozenset(tensor.name for tensor in architecture.tensors if tensor.quantisable)
        inside = self.arch == "llama4"
        collector = Collector(architecture.experts, Arena(folder), gates_input=inside, weights=weights)
        streams: dict[str, Doubles] = {}

        def observer(node: llama.Node, ask: bool) -> bool:
            kept = node.name.startswith(("ffn_inp-", "l_out-"))
            if kept and not ask:
                streams[node.name] = node.read()[0, 0].astype(np.float64)
            return collector(node, ask) or kept

        (tokens,) = token_windows(architecture.vocabulary, 1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(llama, "FLASH_ATTENTION_ON", 0)
            opened = llama.Session(model, LAUNCH, observer)
        with contextlib.closing(opened):
            opened.run(tokens)
        self.seen: dict[int, LayerStatistics] = collector.layers()
        self.written = {
            layer: Written(model, self.arch, layer, streams[f"ffn_inp-{layer}"], streams[f"l_out-{layer}"])
            for layer in architecture.moe_layers
        }


@pytest.fixture(scope="module", params=["grouped", "gpt-oss", "llama4"])
def router(
    request: pytest.FixtureRequest, synthetic: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Router:
    """Sigmoid with groups and a selection bias; softmax over the chosen, with biases; coefficients of the inputs."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "grouped":
        return Router(toys.synthetic_gguf(folder / "grouped.gguf", "deepseek2", **GROUPED), folder)
    return Router(synthetic(request.param), folder)


def test_every_accumulator_equals_what_is_written_out(router: Router) -> None:
    assert sorted(router.seen) == sorted(router.written)
    for layer, written in router.written.items():
        sums, wanted = router.seen[layer], written.accumulators()
        assert set(FORWARD) - set(sums.arrays) == UNKNOWN.get(router.arch, set())
        assert sums.total("routed").sum() == TOKENS * written.architecture.used
        for name in sums.arrays:
            got, want = sums[name][0], np.asarray(wanted[name], np.float64)
            assert got.shape == want.shape, name
            scale = np.abs(want).max() or 1.0
            np.testing.assert_allclose(got, want, rtol=5e-4, atol=5e-5 * scale, err_msg=f"layer {layer}, {name}")


def test_scores_are_of_what_experts_really_contribute(router: Router) -> None:
    for layer, written in router.written.items():
        evidence = Evidence(layer, router.seen[layer], weights=written.weights())
        for method, want in written.scores().items():
            got = SCORES[method].score(evidence)
            np.testing.assert_allclose(got, want, rtol=1e-3, atol=5e-4 * want.max(), err_msg=method)
