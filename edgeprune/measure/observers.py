"""Eval-callback observers: collect statistics, mask the router, disturb a weight's output.

Routing is observed, never recomputed: which experts a token went to comes from the ids that the expert
matrix product was given, and the effective weights from the last weight tensor of the layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeprune.measure.llama import Node
from edgeprune.measure.statistics import Doubles, InputMoments, LayerStatistics

# In the order in which the graph builds them; the last one present is what multiplies the output.
_WEIGHTS = re.compile(r"ffn_moe_weights(?:_softmax|_norm|_scaled)?-(\d+)")
_OUTPUT = re.compile(r"ffn_moe_(weighted|down|down_scaled|down_biased)-(\d+)")
_LOGITS = re.compile(r"ffn_moe_(?:logits|probs_biased)-(\d+)")
_DOWN = re.compile(r"blk\.(\d+)\.ffn_down_exps\.weight")
# Of wider products (the logits of a big vocabulary) a few rows stand for the energy of all.
_WIDEST_OUTPUT_READ = 1 << 15
_ROWS_OF_WIDE_OUTPUT = 32
MASKED_LOGIT = -1.0e9  # finite: llama.cpp's kernels handle -inf, its checks do not


def weight_name(node: Node) -> str:
    """Name of the weight that a matrix product multiplies with; copies on a GPU are called ``DEV#name#0``."""
    source = node.source(0)
    if source is None:
        return ""
    parts = source.name.split("#")
    return parts[1] if len(parts) > 1 else parts[0]


class Collector:
    """Collects ``LayerStatistics`` and ``InputMoments`` while the model runs.

    Args:
        weights: names of the weights whose inputs are wanted.
        experts: routed experts per layer (E).
        domains: number of domains; ``domain`` is the index of the current one.
        gates_input: the router weights multiply the expert's input (Llama 4), so that the expert's
            output is its whole contribution.
    """

    def __init__(self, weights: set[str], experts: int, domains: int, *, gates_input: bool) -> None:
        self.weights, self.experts, self.domains = weights, experts, domains
        self.domain = 0
        self.layers: dict[int, LayerStatistics] = {}
        self.moments: dict[str, InputMoments] = {}
        self._output_kinds = ("down", "down_scaled", "down_biased") if gates_input else ("weighted",)
        self._ids: dict[int, npt.NDArray[np.int32]] = {}
        self._gates: dict[int, npt.NDArray[np.float32]] = {}
        self._last_input: tuple[int, npt.NDArray[np.float64]] | None = None

    def __call__(self, node: Node, ask: bool) -> bool:
        op = node.op
        if op in ("MUL_MAT", "MUL_MAT_ID") and weight_name(node) in self.weights:
            if not ask:
                self._product(node, weight_name(node), op)
            return True
        name = node.name
        if not name.startswith("ffn_moe_"):
            return False
        if match := _WEIGHTS.fullmatch(name):
            if not ask:
                self._gates[int(match[1])] = node.read()
            return True
        if (match := _OUTPUT.fullmatch(name)) and match[1] in self._output_kinds:
            if not ask:
                self._output(int(match[2]), node.read())
            return True
        return False

    def _product(self, node: Node, weight: str, op: str) -> None:
        matrices = max(1, node.source(0).shape[2]) if op == "MUL_MAT_ID" else 1  # type: ignore[union-attr]
        inputs = node.source(1)
        assert inputs is not None
        if op == "MUL_MAT":
            self._dense(weight, node, inputs.read())
            return
        ids_node = node.source(2)
        assert ids_node is not None
        ids = np.ascontiguousarray(ids_node.read()[0, 0])  # [T, k]
        if match := _DOWN.fullmatch(weight):
            self._ids[int(match[1])] = ids
        # Gate and up read the same input: its sums are computed once.
        last = self._last_input
        if last is not None and last[0] == inputs.pointer:
            self._add(weight, last[1], _counts(ids, matrices), _expert_energy(node, ids, matrices))
            self._last_input = None
            return
        sums = _expert_square_sums(inputs.read()[0], ids, matrices)
        self._add(weight, sums, _counts(ids, matrices), _expert_energy(node, ids, matrices))
        self._last_input = (inputs.pointer, sums) if match is None else None

    def _dense(self, weight: str, node: Node, inputs: npt.NDArray[np.float32]) -> None:
        source = node.source(0)
        assert source is not None
        batched = source.shape[2] > 1 and inputs.shape[1] == source.shape[2]
        squares = np.square(inputs, dtype=np.float32)
        if batched:  # one matrix per head (MLA): [1, heads, T, width]
            sums = squares.sum(axis=(0, 2), dtype=np.float64)
        else:
            sums = squares.reshape(-1, inputs.shape[3]).sum(axis=0, dtype=np.float64)[None]
        rows = inputs.size // inputs.shape[3] // len(sums)
        if batched or node.shape[0] <= _WIDEST_OUTPUT_READ:
            squared = np.square(node.read(), dtype=np.float32)
            energy = squared.sum(axis=(0, 2, 3), dtype=np.float64) if batched else squared.sum(dtype=np.float64)[None]
        else:
            sample = node.read_rows(_ROWS_OF_WIDE_OUTPUT)
            energy = np.square(sample).sum(dtype=np.float64)[None] * (rows / len(sample))
        self._add(weight, sums, np.full(len(sums), float(rows)), energy)

    def _add(self, weight: str, sums: Doubles, counts: Doubles, energy: Doubles) -> None:
        moment = self.moments.get(weight)
        if moment is None:
            self.moments[weight] = InputMoments(sums.copy(), counts.copy(), energy.copy())
        else:
            moment.square_sum += sums
            moment.count += counts
            moment.output_square += energy

    def _output(self, layer: int, output: npt.NDArray[np.float32]) -> None:
        """Norms of the experts' contributions, ``output`` [1, T, k, D]."""
        ids, weights = self._ids.pop(layer, None), self._gates.pop(layer, None)
        if ids is None or weights is None:
            return
        gates = np.abs(np.asarray(weights, np.float64).reshape(ids.shape))
        gated = np.sqrt(np.einsum("tkd,tkd->tk", output[0], output[0], dtype=np.float64))
        norms = gated if "down" in self._output_kinds else np.divide(
            gated, gates, out=np.zeros_like(gated), where=gates > 0
        )  # fmt: skip
        layer_sums = self.layers.setdefault(layer, LayerStatistics.zeros(self.domains, self.experts))
        flat = ids.reshape(-1)
        columns = {
            "routed": np.ones_like(gated),
            "gate_sum": gates,
            "gate_square": gates**2,
            "norm_sum": norms,
            "gated_norm_sum": gated,
            "gated_square": gated**2,
        }
        for name, values in columns.items():
            sums = np.bincount(flat, weights=values.reshape(-1), minlength=self.experts)
            getattr(layer_sums, name)[self.domain] += sums


def _expert_energy(node: Node, ids: npt.NDArray[np.int32], matrices: int) -> Doubles:
    """Sum of squared outputs per expert, float64 [matrices], of the product ``node`` [1, T, k, rows]."""
    output = node.read()[0]
    squares = np.einsum("tkd,tkd->tk", output, output)
    energy = np.bincount(ids.reshape(-1), weights=squares.reshape(-1), minlength=matrices)
    return energy.astype(np.float64)


def _counts(ids: npt.NDArray[np.int32], matrices: int) -> npt.NDArray[np.float64]:
    return np.bincount(ids.reshape(-1), minlength=matrices).astype(np.float64)


def _expert_square_sums(
    inputs: npt.NDArray[np.float32], ids: npt.NDArray[np.int32], matrices: int
) -> npt.NDArray[np.float64]:
    """Sum of squared inputs per expert, float64 [matrices, width].

    Args:
        inputs: [T, 1, width] when every chosen expert reads the token, [T, k, width] when each reads its own.
        ids: chosen experts [T, k].
    """
    tokens, slots = ids.shape
    if inputs.shape[1] == 1:
        chosen = np.zeros((matrices, tokens), np.float32)
        for slot in range(slots):
            chosen[ids[:, slot], np.arange(tokens)] += 1
        return (chosen @ np.square(inputs[:, 0])).astype(np.float64)
    flat = ids.reshape(-1)
    order = np.argsort(flat, kind="stable")
    squares = np.square(inputs.reshape(tokens * slots, -1)[order])
    present, starts = np.unique(flat[order], return_index=True)
    sums = np.zeros((matrices, inputs.shape[2]))
    sums[present] = np.add.reduceat(squares, starts, axis=0, dtype=np.float64)
    return sums


class RouterMask:
    """Takes experts out of the router's choice, which equals dropping them from the file.

    Written before the softmax or sigmoid, the mask also leaves the sum of a softmax right, so that
    routers that do not renormalise are covered. Where a selection bias is added later, the biased
    scores are masked as well.

    Args:
        keep: kept expert ids by layer; layers that are absent stay whole.
        experts: routed experts per layer (E).
    """

    def __init__(self, keep: Mapping[int, list[int]], experts: int) -> None:
        self._dropped = {layer: np.setdiff1d(np.arange(experts), np.asarray(ids)) for layer, ids in keep.items()}

    def __call__(self, node: Node, ask: bool) -> bool:
        match = _LOGITS.fullmatch(node.name)
        if match is None:
            return False
        dropped = self._dropped.get(int(match[1]))
        if dropped is None or not len(dropped):
            return False
        if not ask:
            scores = np.array(node.read())
            scores[..., dropped] = MASKED_LOGIT
            node.write(scores)
        return True


class Disturbance:
    """Adds Gaussian noise of a given relative size to the output of one weight.

    Args:
        weight: whose product, or (for the embeddings) whose rows are disturbed.
        lookup: disturb the row lookup (embedding) instead of the matrix product.
        relative_square: E|error|^2 / |output|^2 of each output row.
        seed: of the noise.
    """

    def __init__(self, weight: str, *, lookup: bool, relative_square: float, seed: int) -> None:
        self.weight = weight
        self.ops = ("GET_ROWS",) if lookup else ("MUL_MAT", "MUL_MAT_ID")
        self.scale = float(np.sqrt(relative_square))
        self.random = np.random.default_rng(seed)
        self.touched = 0

    def __call__(self, node: Node, ask: bool) -> bool:
        if node.op not in self.ops or weight_name(node) != self.weight:
            return False
        if not ask:
            output: npt.NDArray[Any] = np.array(node.read())
            width = output.shape[-1]
            norms = np.sqrt(np.square(output).sum(axis=-1, keepdims=True) / width)
            noise = self.random.standard_normal(output.shape, dtype=np.float32)
            node.write(output + noise * norms * np.float32(self.scale))
            self.touched += 1
        return True
