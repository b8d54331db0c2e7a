"""One layer's experts replayed on kept tokens: what each would answer, in a space of few dimensions.

Outputs are compressed by a random projection, which keeps distances (Johnson and Lindenstrauss): a sum of squared
errors over thousands of tokens is off by a percent or so in 48 dimensions. The replay proves itself: with all
experts kept it must give what llama.cpp computed.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgeprune.device.probe import cores
from edgeprune.measure.activation import GATED, UNGATED, Activation
from edgeprune.measure.reservoir import Reservoir
from edgeprune.measure.weights import expert_matrix, layer_tensors
from edgeprune.model import ggml
from edgeprune.model.architecture import Architecture, Tensor
from edgeprune.model.gguf import GgufFile

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.integer]
DIMENSIONS = 48
_TRIED_TOKENS = 8  # for finding the activation; that all tokens fit is proven afterwards
_ROWS = 1024  # of a matrix product: enough for its full speed, in little memory
# Largest relative error of a replayed layer's output that is taken for rounding.
_TOLERANCE = 1e-2
# llama.cpp rounds the input of a product with a quantised weight too, mostly to eight bits: each of two products adds
# about 0.7 % to an expert's output. The wrong activation is off by 15 % and more.
_QUANTISED_TOLERANCE = 3e-2


@dataclass(frozen=True)
class Expert:
    """One expert's weights with their scales: gate (or None) and up float32 [F, D], down float32 [D, F], and their
    biases or 0."""

    gate: Floats | None
    up: Floats
    down: Floats
    gate_bias: Floats | float
    up_bias: Floats | float
    down_bias: Floats | float

    def hidden(self, x: Floats, activation: Activation) -> Floats:
        """Input of the down projection, float32 [N, F], for ``x`` [N, D]."""
        gate = None if self.gate is None else x @ self.gate.T + self.gate_bias
        return activation(gate, x @ self.up.T + self.up_bias)

    def of_channels(self, channels: npt.NDArray[np.intp] | None) -> Expert:
        """The expert with these channels alone, int [F'], or with all."""
        if channels is None:
            return self
        gate = None if self.gate is None else self.gate[channels]
        gate_bias, up_bias = (
            bias[channels] if isinstance(bias, np.ndarray) else bias for bias in (self.gate_bias, self.up_bias)
        )
        return Expert(gate, self.up[channels], self.down[:, channels], gate_bias, up_bias, self.down_bias)


class LayerExperts:
    """The experts of one layer of a GGUF, decoded one at a time."""

    def __init__(self, file: GgufFile, architecture: Architecture, layer: int) -> None:
        self._file, self._layer = file, layer
        self._tensors = layer_tensors(architecture, layer)
        vectors = ("exps.bias", "exps.scale")
        self._vectors = {t.name: t for t in architecture.tensors if t.layer == layer and t.name.endswith(vectors)}
        self.count = architecture.experts

    def _vector(self, name: str) -> Floats | None:
        tensor: Tensor | None = self._vectors.get(f"blk.{self._layer}.ffn_{name}")
        if tensor is None:
            return None
        rows: Floats = ggml.decode(ggml.BY_NAME[tensor.type], self._file.raw(tensor.name), tensor.shape[0])
        return rows

    def bias(self, kind: str, expert: int) -> Floats | float:
        """What is added to the product with the expert's gate, up or down matrix, float32 [rows], or 0."""
        rows = self._vector(f"{kind}_exps.bias")
        return 0.0 if rows is None else rows[expert]

    def scale(self, kind: str, expert: int) -> np.float32:
        """What llama.cpp multiplies the product with the expert's gate, up or down matrix by, before its bias."""
        joint = kind == "gate" and "expert_gate_up" in self._tensors  # then llama.cpp takes the one of up for both
        rows = self._vector(f"{'up' if joint else kind}_exps.scale")
        return np.float32(1 if rows is None else rows.reshape(-1)[expert])

    def __getitem__(self, expert: int) -> Expert:
        tensors = self._tensors
        gate: Floats | None = None
        if "expert_gate_up" in tensors:
            both = expert_matrix(self._file, tensors["expert_gate_up"], expert)
            gate, up = both[: len(both) // 2], both[len(both) // 2 :]
        else:
            up = expert_matrix(self._file, tensors["expert_up"], expert)
            if "expert_gate" in tensors:
                gate = expert_matrix(self._file, tensors["expert_gate"], expert)
        kinds = ("gate", "up", "down")
        biases = (self.bias(kind, expert) for kind in kinds)
        gate = None if gate is None else gate * self.scale("gate", expert)
        return Expert(gate, up * self.scale("up", expert), self.down(expert), *biases)

    def down(self, expert: int) -> Floats:
        """The expert's down projection with its scale, float32 [D, F]."""
        return expert_matrix(self._file, self._tensors["expert_down"], expert) * self.scale("down", expert)

    def release(self, expert: int) -> None:
        """Give the mapped pages of an expert back: all together are gigabytes."""
        for tensor in self._tensors.values():
            if tensor.is_expert:
                self._file.release(tensor.name, expert, self.count)

    @property
    def tolerance(self) -> float:
        """Largest relative error of the layer's output that is taken for rounding."""
        kinds = {ggml.BY_NAME[tensor.type] for tensor in self._tensors.values() if tensor.is_expert}
        return _TOLERANCE if all(kind.is_float for kind in kinds) else _QUANTISED_TOLERANCE

    def activations(self) -> dict[str, Activation]:
        """Those that the layer may have, most common first."""
        gated = "expert_gate" in self._tensors or "expert_gate_up" in self._tensors
        return GATED if gated else UNGATED


def projection(width: int) -> Floats:
    """Random projection float32 [DIMENSIONS, width] with E|Pv|^2 = |v|^2, always the same."""
    random = np.random.default_rng(width)
    drawn: Floats = random.standard_normal((DIMENSIONS, width), np.float32) / np.float32(np.sqrt(DIMENSIONS))
    return drawn


def activation_of(experts: LayerExperts, tokens: Reservoir) -> Activation | None:
    """The activation with which the experts reproduce the captured outputs, or None when none does.

    Looks at a few tokens whose first choice is the most common one.
    """
    first = int(np.bincount(tokens.ids[:, 0]).argmax())
    rows = np.flatnonzero(tokens.ids[:, 0] == first)[:_TRIED_TOKENS]
    small = tokens.rows(rows)
    candidates = experts.activations()
    replayed = {name: np.zeros_like(small.y) for name in candidates}
    for expert in np.unique(small.ids).tolist():
        own = experts[expert]
        token, slot = np.nonzero(small.ids == expert)
        for name, activation in candidates.items():
            output = own.hidden(small.x[token], activation) @ own.down.T + own.down_bias
            replayed[name][token] += small.gates[token, slot][:, None] * output
        experts.release(expert)
    fitting = (candidates[name] for name, y in replayed.items() if relative_error(y, small.y) < experts.tolerance)
    return next(fitting, None)


def relative_error(replayed: Floats, captured: Floats) -> float:
    """Root of the squared difference over the squared captured output, over all tokens."""
    difference = float(np.square(replayed - captured, dtype=np.float64).sum())
    energy = float(np.square(captured, dtype=np.float64).sum())
    return float(np.sqrt(difference / energy)) if energy > 0 else 0.0


def outputs(
    experts: LayerExperts,
    activation: Activation,
    x: Floats,
    wanted: Ids,
    known: tuple[Ids, Floats] | None = None,
) -> Floats:
    """Projected outputs of each token's ``wanted`` experts, float32 [R, m, DIMENSIONS], before any coefficient.

    Args:
        x: inputs [R, D].
        wanted: expert ids [R, m]; -1 for none, whose output is 0.
        known: ids and outputs that an earlier call gave for the same tokens; these are not computed again.
    """
    results = np.zeros((*wanted.shape, DIMENSIONS), np.float32)
    missing = wanted if known is None else _copied(results, wanted, *known, experts.count)
    flat = missing.reshape(-1)
    order = np.argsort(flat, kind="stable")
    bounds = np.searchsorted(flat[order], np.arange(experts.count + 1))
    target = results.reshape(-1, DIMENSIONS)
    onto = projection(x.shape[1])

    def compute(expert: int) -> None:
        places = order[bounds[expert] : bounds[expert + 1]]
        if not len(places):
            return
        own = experts[expert]
        narrow = onto @ own.down
        bias = onto @ own.down_bias if isinstance(own.down_bias, np.ndarray) else 0.0
        for start in range(0, len(places), _ROWS):
            part = places[start : start + _ROWS]
            target[part] = own.hidden(x[part // wanted.shape[1]], activation) @ narrow.T + bias
        experts.release(expert)

    # Two experts in two threads need no more memory bandwidth than one, and do not wait for each other as the
    # threads within a matrix product do.
    with ThreadPoolExecutor(cores()) as pool:
        list(pool.map(compute, range(experts.count)))
    return results


def _copied(results: Floats, wanted: Ids, lists: Ids, values: Floats, experts: int) -> Ids:
    """Fill ``results`` with what is in ``values``; ``wanted`` with -1 for that."""
    places = np.full((len(lists), experts + 1), -1, np.int16)
    np.put_along_axis(places, lists, np.arange(lists.shape[1], dtype=np.int16)[None], axis=1)
    places[:, -1] = -1  # where the ids of -1 went
    found = np.take_along_axis(places, wanted, axis=1)
    rows, columns = np.nonzero(found >= 0)
    results[rows, columns] = values[rows, found[rows, columns]]
    missing: Ids = np.where(found >= 0, -1, wanted)
    return missing
