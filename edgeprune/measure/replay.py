"""One layer's experts replayed on kept tokens: what each would answer, in a space of few dimensions.

Outputs are compressed by a random projection, which keeps distances (Johnson and Lindenstrauss): a sum of squared
errors over thousands of tokens is off by a percent or so in 48 dimensions. The replay proves itself: with all
experts kept it must give what llama.cpp computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgeprune.measure.activation import GATED, UNGATED, Activation
from edgeprune.measure.reservoir import Reservoir
from edgeprune.measure.weights import expert_matrix, layer_tensors
from edgeprune.model import ggml
from edgeprune.model.architecture import Architecture, Tensor
from edgeprune.model.gguf import GgufFile

Floats = npt.NDArray[np.float32]
DIMENSIONS = 48
# Largest relative error of a replayed layer's output that is taken for rounding.
TOLERANCE = 1e-2


@dataclass(frozen=True)
class Expert:
    """One expert's weights: gate (or None) and up float32 [F, D], down float32 [D, F], and their biases or 0."""

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


class LayerExperts:
    """The experts of one layer of a GGUF, decoded one at a time."""

    def __init__(self, file: GgufFile, architecture: Architecture, layer: int) -> None:
        self._file, self._layer = file, layer
        self._tensors = layer_tensors(architecture, layer)
        self._biases = {t.name: t for t in architecture.tensors if t.layer == layer and t.name.endswith("exps.bias")}
        self.count = architecture.experts

    def _bias(self, kind: str, expert: int) -> Floats | float:
        tensor: Tensor | None = self._biases.get(f"blk.{self._layer}.ffn_{kind}_exps.bias")
        if tensor is None:
            return 0.0
        rows: Floats = ggml.decode(ggml.BY_NAME[tensor.type], self._file.raw(tensor.name), tensor.shape[0])
        own: Floats = rows[expert]
        return own

    def __getitem__(self, expert: int) -> Expert:
        tensors = self._tensors
        down = expert_matrix(self._file, tensors["expert_down"], expert)
        gate: Floats | None = None
        if "expert_gate_up" in tensors:
            both = expert_matrix(self._file, tensors["expert_gate_up"], expert)
            gate, up = both[: len(both) // 2], both[len(both) // 2 :]
        else:
            up = expert_matrix(self._file, tensors["expert_up"], expert)
            if "expert_gate" in tensors:
                gate = expert_matrix(self._file, tensors["expert_gate"], expert)
        biases = (self._bias(kind, expert) for kind in ("gate", "up", "down"))
        return Expert(gate, up, down, *biases)

    def release(self) -> None:
        """Give the mapped pages back."""
        for tensor in self._tensors.values():
            self._file.release(tensor.name)

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

    Looks at the tokens whose first choice is the most common one, as many as there are but 64 at most.
    """
    first = int(np.bincount(tokens.ids[:, 0]).argmax())
    rows = np.flatnonzero(tokens.ids[:, 0] == first)[:64]
    small = tokens.rows(rows)
    involved = {int(e): experts[int(e)] for e in np.unique(small.ids)}
    for activation in experts.activations().values():
        y = np.zeros_like(small.y)
        for expert, weights in involved.items():
            token, slot = np.nonzero(small.ids == expert)
            output = weights.hidden(small.x[token], activation) @ weights.down.T + weights.down_bias
            y[token] += small.gates[token, slot][:, None] * output
        if relative_error(y, small.y) < TOLERANCE:
            return activation
    return None


def relative_error(replayed: Floats, captured: Floats) -> float:
    """Root of the squared difference over the squared captured output, over all tokens."""
    difference = float(np.square(replayed - captured, dtype=np.float64).sum())
    energy = float(np.square(captured, dtype=np.float64).sum())
    return float(np.sqrt(difference / energy)) if energy > 0 else 0.0


def outputs(experts: LayerExperts, activation: Activation, x: Floats, wanted: npt.NDArray[np.integer]) -> Floats:
    """Projected outputs of each token's ``wanted`` experts, float32 [R, m, DIMENSIONS], before any coefficient.

    Args:
        x: inputs [R, D].
        wanted: expert ids [R, m]; -1 for none, whose output is 0.
    """
    results = np.zeros((*wanted.shape, DIMENSIONS), np.float32)
    onto: Floats | None = None
    flat = wanted.reshape(-1)
    order = np.argsort(flat, kind="stable")
    bounds = np.searchsorted(flat[order], np.arange(experts.count + 1))
    target = results.reshape(-1, DIMENSIONS)
    for expert in range(experts.count):
        places = order[bounds[expert] : bounds[expert + 1]]
        if not len(places):
            continue
        weights = experts[expert]
        if onto is None:
            onto = projection(weights.down.shape[0])
        narrow = onto @ weights.down
        bias = onto @ weights.down_bias if isinstance(weights.down_bias, np.ndarray) else 0.0
        target[places] = weights.hidden(x[places // wanted.shape[1]], activation) @ narrow.T + bias
    experts.release()
    return results
