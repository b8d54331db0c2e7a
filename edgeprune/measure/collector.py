"""Everything that one pass over the text shows of a model, through llama.cpp's eval callback.

Routing is observed, never recomputed: which experts a token went to comes from the ids that the expert matrix
products were given, and the effective weights from the last weight tensor of the layer. The sums are those of
``edgeprune.measure.statistics.LayerStatistics``, whose letters the comments here use.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeprune.measure.activation import glu_slopes
from edgeprune.measure.arena import Arena
from edgeprune.measure.llama import Node
from edgeprune.measure.observers import weight_name
from edgeprune.measure.reservoir import Reservoir
from edgeprune.measure.slots import Slots
from edgeprune.measure.statistics import ACCUMULATORS, RATIO_BINS, Doubles, InputMoments, LayerStatistics
from edgeprune.measure.tensorfile import Array

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
class _Window:
    """What is known of one layer in the window that runs."""

    logits: Floats | None = None
    probs: Floats | None = None
    biased: Floats | None = None
    selection: Floats | None = None
    chosen: Floats | None = None  # the router's weights of the chosen experts, before any renormalisation
    gates: Floats | None = None
    softmax_last: bool = False
    x: Floats | None = None
    x_pointer: int = 0
    x_square: Floats | None = None
    h: Floats | None = None
    h_pointer: int = 0
    slots: Slots | None = None

    @cached_property
    def residual(self) -> Floats | None:
        """|h| [T], or None."""
        return None if self.h is None else np.sqrt(np.einsum("td,td->t", self.h, self.h))


@dataclass
class Collector:
    """Adds up one domain's statistics while the model runs.

    Args:
        weights: names of the weights whose inputs are wanted.
        experts: routed experts per layer (E).
        arena: where the sums live.
        gates_input: the router weights multiply the expert's input (Llama 4), so that the expert's output is its
            whole contribution, and nothing can be replayed.
        capacity: tokens of the reservoir in all; 0 for none.

    Attributes:
        kept: positions of the running window that go into the reservoir, ascending; to be set before it runs.
    """

    weights: set[str]
    experts: int
    arena: Arena
    gates_input: bool = False
    capacity: int = 0
    kept: npt.NDArray[np.intp] = field(default_factory=lambda: np.zeros(0, np.intp))
    sums: dict[int, dict[str, Array]] = field(default_factory=dict, init=False)
    seen: dict[int, set[str]] = field(default_factory=dict, init=False)
    moments: dict[str, InputMoments] = field(default_factory=dict, init=False)
    stored: dict[int, dict[str, Array]] = field(default_factory=dict, init=False)
    filled: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._windows: dict[int, _Window] = {}
        self._residuals: dict[int, int] = {}  # pointer of a residual stream to its layer

    def end_window(self) -> None:
        """To be called after every window."""
        self._windows.clear()
        self._residuals.clear()
        self.filled += len(self.kept)

    # What the callback is asked and told.

    def __call__(self, node: Node, ask: bool) -> bool:
        op = node.op
        if op in ("MUL_MAT", "MUL_MAT_ID") and (weight := weight_name(node)) in self.weights:
            if not ask:
                self._product(node, weight, op)
                if self.gates_input and (match := _NAME.fullmatch(node.name)) and match[1] in _OUTPUTS:
                    self._output(int(match[2]), match[1], node)
            return True
        if op == "ADD" and self._residuals and (layer := self._residual_of(node)) is not None:
            if not ask:
                self._after(layer, node)
            return True
        name = node.name
        if not name.startswith("ffn_moe_"):
            return False
        match = _NAME.fullmatch(name)
        if match is None:
            return False
        handler = self._handler(match[1], op)
        if handler is None:
            return False
        if not ask:
            handler(int(match[2]), match[1], node)
        return True

    def _handler(self, kind: str, op: str) -> Any:
        if kind in (*_ROUTER_LOGITS, "probs", "probs_biased", "argsort"):
            return self._router
        if kind in _WEIGHTS:
            return self._weights
        if op == "GLU":
            return self._activation
        if kind in (_OUTPUTS if self.gates_input else ("weighted",)):
            return self._output
        return None

    # The router.

    def _router(self, layer: int, kind: str, node: Node) -> None:
        window = self._windows.setdefault(layer, _Window())
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
        window = self._windows.setdefault(layer, _Window())
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
            self._add(weight, slots.sums(np.square(_rows(inputs.view()))), slots, node)
            return
        window = self._windows.setdefault(int(match[1]), _Window())
        if window.slots is None:
            window.slots = Slots(np.ascontiguousarray(ids_node.read()[0, 0]), self.experts)
        if match[2] == "down":
            self._hidden(int(match[1]), window, weight, node, _rows(inputs.view()))
            return
        if window.x is None or window.x_pointer != inputs.pointer:
            self._input(int(match[1]), window, inputs)
        assert window.x_square is not None
        self._add(weight, window.x_square, window.slots, node)

    def _input(self, layer: int, window: _Window, inputs: Node) -> None:
        """The experts' input, its squares, and the residual stream it was made from."""
        assert window.slots is not None
        rows = np.array(_rows(inputs.view()))
        square = np.square(rows)
        window.x, window.x_pointer = rows, inputs.pointer
        window.x_square = window.slots.sums(square)
        sums = self._sums(layer, window, width=rows.shape[1])
        self._sum(layer, sums, input_square=window.x_square)
        if window.gates is not None:
            self._sum(layer, sums, gated_input_square=window.slots.sums(square, np.square(window.gates)))
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
        self._add_moment(weight, sums, np.full(len(sums), float(rows)), energy)

    def _add(self, weight: str, square_sums: Floats, slots: Slots, node: Node) -> None:
        output = node.view()[0]  # [T, k, rows]
        energy = np.einsum("tkd,tkd->tk", output, output)
        self._add_moment(weight, square_sums, slots.counts, slots.totals(energy))

    def _add_moment(self, weight: str, sums: Array, counts: Array, energy: Array) -> None:
        moment = self.moments.get(weight)
        if moment is None:
            shapes = {"square_sum": (sums.shape, "float64"), "count": (counts.shape, "float64")}
            arrays = self.arena.zeros({**shapes, "output_square": (energy.shape, "float64")})
            moment = self.moments[weight] = InputMoments(**arrays)
        moment.square_sum += sums
        moment.count += counts
        moment.output_square += energy

    # Inside the experts.

    def _activation(self, layer: int, _: str, node: Node) -> None:
        """Squares of the gate and up products, and slopes of the activation."""
        window = self._windows.get(layer)
        gate_node, up_node = node.source(0), node.source(1)
        if window is None or window.slots is None or gate_node is None or up_node is None:
            return
        gate, up = _rows(gate_node.view()), _rows(up_node.view())
        slots, sums = window.slots, self._sums(layer, window, hidden=gate.shape[1])
        self._sum(layer, sums, gate_square_sum=slots.sums(np.square(gate)))
        self._sum(layer, sums, up_square_sum=slots.sums(np.square(up)))
        slopes = glu_slopes(node.struct.op_params[0], gate)
        if slopes is not None and window.gates is not None:
            value, slope = slopes
            weights = np.square(window.gates)
            self._sum(layer, sums, up_slope=slots.sums(np.square(value), weights))
            self._sum(layer, sums, gate_slope=slots.sums(np.square(slope * up), weights))

    def _hidden(self, layer: int, window: _Window, weight: str, node: Node, hidden: Floats) -> None:
        """Input of the down projection, ``hidden`` [T * k, F]."""
        slots = window.slots
        assert slots is not None
        sums = self._sums(layer, window, hidden=hidden.shape[1])
        square, size = np.square(hidden), np.abs(hidden)
        plain = slots.sums(square)
        self._add(weight, plain, slots, node)
        self._sum(layer, sums, hidden_square=plain, hidden_abs=slots.sums(size))
        if window.gates is None:
            return
        gates = np.abs(window.gates)
        weights = np.square(gates)
        self._sum(layer, sums, gated_hidden_square=slots.sums(square, weights))
        size *= gates.reshape(-1, 1)
        self._sum(layer, sums, gated_hidden_max=slots.largest(size))
        if window.residual is not None:
            scale = np.square(window.residual)[:, None]
            scaled = np.divide(weights, scale, out=np.zeros_like(weights), where=scale > 0)
            self._sum(layer, sums, scaled_hidden_square=slots.sums(square, scaled))

    # The experts' outputs.

    def _output(self, layer: int, _: str, node: Node) -> None:
        """Everything that is made of the experts' contributions, ``node`` [1, T, k, D]."""
        window = self._windows.get(layer)
        if window is None or window.slots is None or window.gates is None:
            return
        slots, gates = window.slots, np.abs(window.gates)
        weighted = node.view()[0]
        rows = weighted.reshape(-1, weighted.shape[2])
        gated = np.sqrt(np.einsum("tkd,tkd->tk", weighted, weighted))
        # f is the contribution by its coefficient, unless that went into the input.
        inverse = (
            np.ones_like(gates)
            if self.gates_input
            else np.divide(1, gates, out=np.zeros_like(gates), where=gates > 0)
        )
        norms = gated * inverse
        sums = self._sums(layer, window, width=rows.shape[1])
        self._sum(layer, sums, tokens=np.float64(slots.tokens), routed=slots.counts)
        self._sum(layer, sums, gate_sum=slots.totals(gates), gate_square=slots.totals(np.square(gates)))
        self._sum(layer, sums, norm_sum=slots.totals(norms), norm_square=slots.totals(np.square(norms)))
        self._sum(layer, sums, gated_norm_sum=slots.totals(gated), gated_square=slots.totals(np.square(gated)))
        self._sum(layer, sums, norm_max=slots.largest(norms.reshape(-1)))
        peaks = np.maximum(rows.max(axis=1), -rows.min(axis=1)) * inverse.reshape(-1)
        self._sum(layer, sums, peak=slots.largest(peaks))
        self._sum(layer, sums, output_sum=slots.sums(rows, inverse), gated_output_sum=slots.sums(rows))
        self._sum(layer, sums, output_square=slots.sums(np.square(rows), np.square(inverse)))
        self._routing(layer, window, gates, sums)
        output = weighted.sum(axis=1)
        turn = self._turning(layer, window, output, weighted, gated, sums)
        self._keep(layer, window, output, turn)

    def _routing(self, layer: int, window: _Window, gates: Floats, sums: dict[str, Array]) -> None:
        slots, experts = window.slots, self.experts
        assert slots is not None
        total = gates.sum(axis=1, keepdims=True)
        share = np.divide(gates, total, out=np.zeros_like(gates), where=total > 0)
        self._sum(layer, sums, share_sum=slots.totals(share))
        chosen = np.zeros((slots.tokens, experts), np.float32)
        np.put_along_axis(chosen, slots.ids.astype(np.intp), 1.0, axis=1)
        self._sum(layer, sums, together=chosen.T @ chosen)
        if slots.used > 1:
            ordered = -np.sort(-gates, axis=1)
            ratio = np.divide(
                ordered[:, 1:], ordered[:, :1], out=np.zeros_like(ordered[:, 1:]), where=ordered[:, :1] > 0
            )
            bins = np.minimum((ratio * RATIO_BINS).astype(np.int64), RATIO_BINS - 1)
            flat = bins + RATIO_BINS * np.arange(slots.used - 1)
            counts = np.bincount(flat.reshape(-1), minlength=RATIO_BINS * (slots.used - 1))
            self._sum(layer, sums, ratio_histogram=counts.reshape(slots.used - 1, RATIO_BINS))
        logits = window.probs if window.softmax_last or window.logits is None else window.logits
        if logits is not None:
            picked = np.take_along_axis(logits, slots.ids.astype(np.intp), axis=1)
            first = logits.argmax(axis=1)
            self._sum(layer, sums, logit_gram=logits.T @ logits, logit_sum=logits.sum(axis=0, dtype=np.float64))
            self._sum(layer, sums, chosen_logit_sum=slots.totals(picked))
            top = np.bincount(first, weights=logits[np.arange(len(first)), first], minlength=experts)
            self._sum(layer, sums, top_logit_sum=top)
            if window.softmax_last:
                spread = np.exp(logits - logits.max(axis=1, keepdims=True))
                spread /= spread.sum(axis=1, keepdims=True)
                window.chosen = np.take_along_axis(spread, slots.ids.astype(np.intp), axis=1)
        if window.chosen is not None:
            self._sum(layer, sums, prob_sum=slots.totals(window.chosen))

    def _turning(
        self, layer: int, window: _Window, output: Floats, weighted: Floats, gated: Floats, sums: dict[str, Array]
    ) -> Floats | None:
        """How far the experts turn the residual stream and their own input; 1 - cos(h, h + y) [T] or None."""
        slots, x = window.slots, window.x
        assert slots is not None
        if x is not None and x.shape == output.shape:
            along = np.einsum("tkd,td->tk", weighted, x)
            lengths = np.sqrt(np.einsum("td,td->t", x, x))[:, None]
            # g|f| cos(x, f), with g > 0
            cosine = np.divide(along, lengths, out=np.zeros_like(along), where=lengths > 0)
            self._sum(layer, sums, angle_sum=slots.totals(gated - cosine))
        if window.h is None or window.h.shape != output.shape:
            return None
        turn = np.maximum(_angle(window.h, output), 0).astype(np.float32)
        self._sum(layer, sums, turn_sum=slots.totals(gated * turn[:, None]))
        squared = np.square(window.residual, dtype=np.float64)  # type: ignore[arg-type]
        moved = np.einsum("td,td->t", output, output, dtype=np.float64)
        ratio = np.divide(moved, squared, out=np.zeros_like(moved), where=squared > 0).sum()
        self._sum(layer, sums, turn_tokens=np.float64(len(turn)), token_turn=turn.sum(dtype=np.float64))
        self._sum(layer, sums, token_ratio=ratio)
        return turn

    def _residual_of(self, node: Node) -> int | None:
        """The layer whose residual stream the sum ``node`` continues."""
        first, second = node.struct.src[0], node.struct.src[1]
        return self._residuals.get(first, self._residuals.get(second))

    def _after(self, layer: int, node: Node) -> None:
        """The residual stream after the block, shared experts included."""
        window = self._windows.get(layer)
        self._residuals.pop(window.h_pointer if window else 0, None)
        if window is None or window.h is None or window.slots is None:
            return
        after = _rows(node.view())
        if after.shape == window.h.shape and layer in self.sums:
            turn = _angle(window.h, after - window.h).sum()
            self._sum(layer, self.sums[layer], token_full_turn=turn)

    # Sums and reservoir.

    def _sums(self, layer: int, window: _Window, *, width: int = 0, hidden: int = 0) -> dict[str, Array]:
        """The accumulators of ``layer``; those over D or F are made when that width is first known."""
        assert window.slots is not None
        sums = self.sums.setdefault(layer, {})
        extents = {"E": self.experts, "D": width, "F": hidden, "R": window.slots.used - 1, "B": RATIO_BINS}
        wanted = {}
        for name, kind in ACCUMULATORS.items():
            shape = tuple(extents[axis] for axis in kind.axes)
            if name not in sums and 0 not in shape:
                wanted[name] = (shape, "float64")
        if wanted:
            sums.update(self.arena.zeros(wanted))
        return sums

    def _sum(self, layer: int, sums: dict[str, Array], **values: Any) -> None:
        """Add each of ``values`` to the accumulator of its name, or take the maximum where that is kept."""
        seen = self.seen.setdefault(layer, set())
        for name, value in values.items():
            if ACCUMULATORS[name].largest:
                np.maximum(sums[name], value, out=sums[name])
            else:
                sums[name] += value
            seen.add(name)

    def _keep(self, layer: int, window: _Window, output: Floats, turn: Floats | None) -> None:
        """The kept tokens of the window, if the layer can be replayed from them."""
        x, slots, gates = window.x, window.slots, window.gates
        missing = window.selection is None or window.probs is None or x is None or self.gates_input
        if not len(self.kept) or missing or slots is None or gates is None or len(x) != slots.tokens:  # type: ignore[arg-type]
            return
        rows = self.kept
        assert x is not None and window.selection is not None and window.probs is not None
        zeros = np.zeros(slots.tokens, np.float32)
        tokens = Reservoir(
            domain=np.zeros(len(rows), np.int16),
            x=x[rows],
            y=output[rows],
            ids=slots.ids[rows].astype(np.int16),
            gates=gates[rows],
            selection=window.selection[rows],
            probs=window.probs[rows],
            residual=(zeros if window.residual is None else window.residual)[rows],
            turn=(zeros if turn is None else turn)[rows],
        )
        arrays = tokens.arrays()
        if layer not in self.stored:
            shapes = {name: ((self.capacity, *a.shape[1:]), str(a.dtype)) for name, a in arrays.items()}
            self.stored[layer] = self.arena.zeros(shapes)
        for name, array in arrays.items():
            self.stored[layer][name][self.filled : self.filled + len(rows)] = array

    # What was collected.

    def layers(self) -> dict[int, LayerStatistics]:
        """The sums by layer with a domain axis of one, without those that were never seen."""
        return {
            layer: LayerStatistics({name: sums[name][None] for name in ACCUMULATORS if name in self.seen[layer]})
            for layer, sums in sorted(self.sums.items())
            if "routed" in self.seen[layer]
        }

    def reservoirs(self) -> dict[int, Reservoir]:
        """The kept tokens by layer, one domain."""
        domain = np.zeros(self.filled, np.int16)
        return {
            layer: Reservoir.from_arrays(domain, {name: array[: self.filled] for name, array in stored.items()})
            for layer, stored in sorted(self.stored.items())
        }


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


def _angle(before: Floats, change: Floats) -> Doubles:
    """1 - cos(before, before + change) of each row, float64 [T]; 0 where either is nothing."""
    start = before.astype(np.float64)
    end = start + change
    product = np.einsum("td,td->t", start, end)
    lengths = np.sqrt(np.einsum("td,td->t", start, start) * np.einsum("td,td->t", end, end))
    angle: Doubles = 1 - np.divide(product, lengths, out=np.ones_like(product), where=lengths > 0)
    return angle
