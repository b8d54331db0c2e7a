"""Everything that one pass over the text shows of a model, through llama.cpp's eval callback.

Routing is observed, never recomputed: which experts a token went to comes from the ids that the expert matrix
products were given, and the effective weights from the last weight tensor of the layer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeprune.measure.activation import glu_slopes
from edgeprune.measure.llama import Node
from edgeprune.measure.observers import weight_name
from edgeprune.measure.slots import Slots
from edgeprune.measure.sums import LayerWindow, Sums

Floats = npt.NDArray[np.float32]

_NAME = re.compile(r"ffn_moe_([a-z_]+)-(\d+)")
_PRODUCT = re.compile(r"blk\.(\d+)\.ffn_(gate|up|gate_up|down)_exps\.weight")
_ROUTER_LOGITS = ("logits", "logits_biased")
# In the order in which the graph builds them; the last one present is what multiplies the output.
_WEIGHTS = ("weights", "weights_softmax", "weights_norm", "weights_scaled")
_OUTPUTS = ("down", "down_scaled", "down_biased")
# From a normed input back to the residual stream: what may stand between (a norm's weight, its bias, views).
_BETWEEN = frozenset({"MUL", "ADD", "REPEAT", "RESHAPE", "VIEW", "CONT", "SCALE"})
_NORMS = frozenset({"RMS_NORM", "NORM"})
# Of wider products (the logits of a big vocabulary) a few rows stand for the energy of all.
_WIDEST_OUTPUT_READ = 1 << 15
_ROWS_OF_WIDE_OUTPUT = 32


@dataclass
class _Seen(LayerWindow):
    """A layer in the running window, with what only a graph has.

    Attributes:
        biased: the router's probabilities plus its selection bias, float32 [T, E].
        x_pointer, h_pointer: tensors that held the experts' input and the residual stream before the block.
        finished: the routed experts have answered; what follows under the same names is of experts of another kind
            (grovemoe's chunk experts).
    """

    biased: Floats | None = None
    x_pointer: int = 0
    h_pointer: int = 0
    finished: bool = False


@dataclass
class Collector(Sums):
    """Adds up one domain's statistics while the model runs.

    Args:
        weights: names of the weights whose inputs are wanted.
        only: layers that are looked at, or None for all; the model is not computed beyond the last of them, so
            that its logits mean nothing.
    """

    weights: frozenset[str] = frozenset()
    only: range | None = None
    _windows: dict[int, _Seen] = field(default_factory=dict, init=False)
    _residuals: dict[int, int] = field(default_factory=dict, init=False)  # pointer of a residual stream to its layer

    def end_window(self) -> None:
        """To be called after every window."""
        super().end_window()
        self._windows.clear()
        self._residuals.clear()

    def _window(self, layer: int) -> _Seen:
        return self._windows.setdefault(layer, _Seen())

    # What the callback is asked and told.

    def __call__(self, node: Node, ask: bool) -> bool:
        op = node.op
        if op in ("MUL_MAT", "MUL_MAT_ID") and (weight := weight_name(node)) in self.weights:
            if not ask:
                self._product(node, weight, op)
                if self.gates_input and (match := _NAME.fullmatch(node.name)) and match[1] in _OUTPUTS:
                    self._contributions(int(match[2]), match[1], node)
            return True
        if op == "ADD" and self._residuals and (layer := self._residual_of(node)) is not None:
            if not ask:
                self._continued(layer, node)
            return True
        name = node.name
        if not name.startswith("ffn_moe_"):
            return False
        match = _NAME.fullmatch(name)
        if match is None:
            return False
        handler, layer = self._handler(match[1], op), int(match[2])
        if layer in self._windows and self._windows[layer].finished:
            return False
        if handler is None or (self.only is not None and layer not in self.only):
            return False
        if not ask:
            handler(layer, match[1], node)
            return self.only is None or layer != self.only[-1] or match[1] != "weighted"
        return True

    def _handler(self, kind: str, op: str) -> Any:
        if kind in (*_ROUTER_LOGITS, "probs", "probs_biased", "argsort"):
            return self._router
        if kind in _WEIGHTS:
            return self._weights
        if op == "GLU":
            return None if self.tokens_only else self._glu
        if kind in (_OUTPUTS if self.gates_input else ("weighted",)):
            return self._contributions
        return None

    # The router.

    def _router(self, layer: int, kind: str, node: Node) -> None:
        window = self._window(layer)
        if kind == "probs_biased":
            window.biased = node.read()[0, 0]
        elif kind == "argsort":
            source = node.source(0)
            assert source is not None
            if source.name.startswith("ffn_moe_probs_masked"):  # of the groups that were not chosen
                window.selection = window.probs if window.biased is None else window.biased
            else:
                window.selection = source.read()[0, 0]
        elif kind == "probs":
            window.probs = node.read()[0, 0]
        else:
            window.logits = node.read()[0, 0]

    def _weights(self, layer: int, kind: str, node: Node) -> None:
        window = self._window(layer)
        values = node.read()
        if kind == "weights":  # [1, T, k, 1]; those that follow have it in one shape or another
            window.chosen = values.reshape(values.shape[1:3])
        if window.chosen is not None:
            window.gates = values.reshape(window.chosen.shape)
        window.softmax_last |= kind == "weights_softmax"

    # Products with weights.

    def _product(self, node: Node, weight: str, op: str) -> None:
        inputs = node.source(1)
        assert inputs is not None
        if op == "MUL_MAT":
            self._dense(weight, node, inputs.view())
            return
        ids_node, matrices = node.source(2), node.source(0)
        assert ids_node is not None and matrices is not None
        match = _PRODUCT.fullmatch(weight)
        if match is None or matrices.shape[2] != self.experts:  # experts of another kind, which no router mask drops
            slots = Slots(np.ascontiguousarray(ids_node.read()[0, 0]), max(1, matrices.shape[2]))
            self.expert_moment(weight, slots.sums(np.square(_rows(inputs.view()))), slots, node.view()[0])
            return
        layer = int(match[1])
        window = self._window(layer)
        if window.slots is None:
            window.slots = Slots(np.ascontiguousarray(ids_node.read()[0, 0]), self.experts)
        if match[2] == "down":
            squares = self.hidden(layer, window, _rows(inputs.view()))
        else:
            if window.x is None or window.x_pointer != inputs.pointer:
                self._inputs(layer, window, inputs)
            assert window.x_square is not None
            squares = window.x_square
        self.expert_moment(weight, squares, window.slots, node.view()[0])

    def _inputs(self, layer: int, window: _Seen, inputs: Node) -> None:
        """The experts' input, and the residual stream it was made from."""
        assert window.slots is not None
        self.input(layer, window, np.array(_rows(inputs.view())))
        window.x_pointer = inputs.pointer
        source = _residual_stream(inputs)
        if source is not None and source.shape[1] * source.shape[2] * source.shape[3] == window.slots.tokens:
            window.h = np.array(_rows(source.view()))
            window.h_pointer = source.pointer
            self._residuals[source.pointer] = layer

    def _dense(self, weight: str, node: Node, inputs: Floats) -> None:
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
            output = node.view()
            energy = np.einsum("ahtd,ahtd->h" if batched else "ahtd,ahtd->", output, output, dtype=np.float64)
            energy = np.atleast_1d(energy)
        else:
            sample = node.read_rows(_ROWS_OF_WIDE_OUTPUT)
            energy = np.square(sample).sum(dtype=np.float64)[None] * (rows / len(sample))
        self.moment(weight, sums, np.full(len(sums), float(rows)), energy)

    # Inside the experts, and what comes out of them.

    def _glu(self, layer: int, _: str, node: Node) -> None:
        window = self._windows.get(layer)
        gate_node, up_node = node.source(0), node.source(1)
        if window is None or window.slots is None or gate_node is None or up_node is None:
            return
        gate = _rows(gate_node.view())
        slopes = glu_slopes(node.struct.op_params[0], gate)
        self.activation(layer, window, gate, _rows(up_node.view()), slopes)

    def _contributions(self, layer: int, _: str, node: Node) -> None:
        window = self._windows.get(layer)
        if window is not None and window.slots is not None and window.gates is not None:
            self.output(layer, window, node.view()[0])
            window.finished = not self.gates_input

    def _residual_of(self, node: Node) -> int | None:
        """The layer whose residual stream the sum ``node`` continues."""
        first, second = node.struct.src[0], node.struct.src[1]
        return self._residuals.get(first, self._residuals.get(second))

    def _continued(self, layer: int, node: Node) -> None:
        window = self._windows.get(layer)
        self._residuals.pop(window.h_pointer if window else 0, None)
        if window is not None and window.slots is not None:
            self.after(layer, window, _rows(node.view()))


def _rows(values: Floats) -> Floats:
    """[1, T, k, width] as [T * k, width]."""
    return values.reshape(-1, values.shape[3])


def _residual_stream(inputs: Node) -> Node | None:
    """The tensor that was normed to give ``inputs``, or None where the graph is built in another way."""
    node: Node | None = inputs
    for _ in range(8):
        if node is None or node.op not in _BETWEEN | _NORMS:
            return None
        if node.op in _NORMS:
            return node.source(0)
        node = node.source(0)
    return None
