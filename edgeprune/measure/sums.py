"""The sums of one domain's statistics, whatever engine showed the layers.

The sums are those of ``edgeprune.measure.statistics.LayerStatistics``, whose letters the comments here use.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeprune.measure.arena import Arena
from edgeprune.measure.reservoir import Reservoir
from edgeprune.measure.slots import Slots
from edgeprune.measure.statistics import ACCUMULATORS, RATIO_BINS, Doubles, InputMoments, LayerStatistics
from edgeprune.measure.tensorfile import Array

Floats = npt.NDArray[np.float32]


@dataclass
class LayerWindow:
    """What is known of one layer in the window that runs; what an engine does not show stays None.

    Attributes:
        logits: of the router, float32 [T, E].
        probs: what it makes its weights from, float32 [T, E].
        selection: what it chooses by, float32 [T, E].
        chosen: the router's weights of the chosen experts, before any renormalisation, float32 [T, k].
        gates: coefficients that really multiply the outputs, float32 [T, k].
        softmax_last: the softmax is over the chosen experts.
        x: input of the experts, float32 [T, D].
        x_square: its squares summed per expert, float32 [E, D].
        h: the residual stream before the block, float32 [T, D].
        slots: which expert every token went to.
    """

    logits: Floats | None = None
    probs: Floats | None = None
    selection: Floats | None = None
    chosen: Floats | None = None
    gates: Floats | None = None
    softmax_last: bool = False
    x: Floats | None = None
    x_square: Floats | None = None
    h: Floats | None = None
    slots: Slots | None = None

    @cached_property
    def residual(self) -> Floats | None:
        """|h| [T], or None."""
        return None if self.h is None else np.sqrt(np.einsum("td,td->t", self.h, self.h))


@dataclass
class Sums:
    """Adds up what is seen of a model's layers.

    Args:
        experts: routed experts per layer (E).
        arena: where the sums live.
        gates_input: the router weights multiply the expert's input (Llama 4), so that all inside the expert contains
            them, its output is its whole contribution, and nothing can be replayed.
        capacity: tokens of the reservoir in all, of which there may be none; None for no reservoir.
        backward: gradients are shown as well.
        tokens_only: nothing is added up but how often each expert is chosen; for passes that only the reservoir and
            the moments of the weights are wanted of.

    Attributes:
        kept: positions of the running window that go into the reservoir, ascending; to be set before it runs.
    """

    experts: int
    arena: Arena
    gates_input: bool = False
    capacity: int | None = None
    backward: bool = False
    tokens_only: bool = False
    kept: npt.NDArray[np.intp] = field(default_factory=lambda: np.zeros(0, np.intp))
    moments: dict[str, InputMoments] = field(default_factory=dict, init=False)
    _sums: dict[int, dict[str, Array]] = field(default_factory=dict, init=False)
    _seen: dict[int, set[str]] = field(default_factory=dict, init=False)
    _stored: dict[int, dict[str, Array]] = field(default_factory=dict, init=False)
    _filled: int = field(default=0, init=False)

    def end_window(self) -> None:
        """To be called after every window."""
        self._filled += len(self.kept)

    # Products with weights.

    def moment(self, weight: str, squares: Array, counts: Array, energy: Array) -> None:
        """Inputs and outputs of a weight.

        Args:
            squares: sums of squared inputs [matrices, ne0].
            counts: input rows [matrices].
            energy: sums of squared outputs [matrices].
        """
        moment = self.moments.get(weight)
        if moment is None:
            shapes = {"square_sum": (squares.shape, "float64"), "count": (counts.shape, "float64")}
            arrays = self.arena.zeros({**shapes, "output_square": (energy.shape, "float64")})
            moment = self.moments[weight] = InputMoments(**arrays)
        moment.square_sum += squares
        moment.count += counts
        moment.output_square += energy

    def expert_moment(self, weight: str, squares: Array, slots: Slots, output: Floats) -> None:
        """The same of an expert weight, from the outputs [T, k, rows] of its product."""
        energy = np.einsum("tkd,tkd->tk", output, output)
        self.moment(weight, squares, slots.counts, slots.totals(energy))

    # Inside the experts.

    def input(self, layer: int, window: LayerWindow, x: Floats) -> None:
        """The experts' input [T, D]."""
        assert window.slots is not None
        square = np.square(x)
        window.x, window.x_square = x, window.slots.sums(square)
        if self.tokens_only:
            return
        sums = self._of(layer, window, width=x.shape[1])
        self._add(layer, sums, input_square=window.x_square)
        factors = self._factors(window)
        if factors is not None:
            self._add(layer, sums, gated_input_square=window.slots.sums(square, np.square(factors)))

    def _factors(self, window: LayerWindow) -> Floats | None:
        """What the experts' outputs are multiplied with [T, k]."""
        if window.gates is None:
            return None
        factors: Floats = np.ones_like(window.gates) if self.gates_input else np.abs(window.gates)
        return factors

    def activation(
        self, layer: int, window: LayerWindow, gate: Floats, up: Floats, slopes: tuple[Any, Any] | None
    ) -> None:
        """Squares of the gate and up products [T * k, F], and slopes of the activation.

        Args:
            slopes: the activation's value and derivative at ``gate``, or None where they are not known.
        """
        slots = window.slots
        assert slots is not None
        sums = self._of(layer, window, hidden=gate.shape[1])
        self._add(layer, sums, gate_square_sum=slots.sums(np.square(gate)))
        self._add(layer, sums, up_square_sum=slots.sums(np.square(up)))
        factors = self._factors(window)
        if slopes is not None and factors is not None:
            value, slope = slopes
            weights = np.square(factors)
            self._add(layer, sums, up_slope=slots.sums(np.square(value), weights))
            self._add(layer, sums, gate_slope=slots.sums(np.square(slope * up), weights))

    def hidden(self, layer: int, window: LayerWindow, hidden: Floats) -> Floats:
        """Input of the down projection [T * k, F]; returns its squares summed per expert [E, F]."""
        slots = window.slots
        assert slots is not None
        sums = self._of(layer, window, hidden=hidden.shape[1])
        square, size = np.square(hidden), np.abs(hidden)
        plain = slots.sums(square)
        self._add(layer, sums, hidden_square=plain, hidden_abs=slots.sums(size))
        factors = self._factors(window)
        if factors is None:
            return plain
        weights = np.square(factors)
        self._add(layer, sums, gated_hidden_square=slots.sums(square, weights))
        size *= factors.reshape(-1, 1)
        self._add(layer, sums, gated_hidden_max=slots.largest(size))
        if window.residual is not None:
            scale = np.square(window.residual)[:, None]
            scaled = np.divide(weights, scale, out=np.zeros_like(weights), where=scale > 0)
            self._add(layer, sums, scaled_hidden_square=slots.sums(square, scaled))
        return plain

    # The experts' outputs.

    def output(self, layer: int, window: LayerWindow, weighted: Floats) -> None:
        """Everything that is made of the experts' contributions g f, ``weighted`` [T, k, D]."""
        slots = window.slots
        assert slots is not None and window.gates is not None
        if self.tokens_only:
            sums = self._of(layer, window)
            self._add(layer, sums, tokens=np.float64(slots.tokens), routed=slots.counts)
            self._keep(layer, window, weighted.sum(axis=1), None)
            return
        gates, factors = np.abs(window.gates), self._factors(window)
        assert factors is not None
        rows = weighted.reshape(-1, weighted.shape[2])
        gated = np.sqrt(np.einsum("tkd,tkd->tk", weighted, weighted))
        inverse = np.divide(1, factors, out=np.zeros_like(factors), where=factors > 0)
        norms = gated * inverse
        sums = self._of(layer, window, width=rows.shape[1])
        self._add(layer, sums, tokens=np.float64(slots.tokens), routed=slots.counts)
        self._add(layer, sums, gate_sum=slots.totals(gates), gate_square=slots.totals(np.square(gates)))
        self._add(layer, sums, factor_sum=slots.totals(factors))
        self._add(layer, sums, norm_sum=slots.totals(norms), norm_square=slots.totals(np.square(norms)))
        self._add(layer, sums, gated_norm_sum=slots.totals(gated), gated_square=slots.totals(np.square(gated)))
        self._add(layer, sums, norm_max=slots.largest(norms.reshape(-1)))
        peaks = np.maximum(rows.max(axis=1), -rows.min(axis=1)) * inverse.reshape(-1)
        self._add(layer, sums, peak=slots.largest(peaks))
        self._add(layer, sums, output_sum=slots.sums(rows, inverse), gated_output_sum=slots.sums(rows))
        self._add(layer, sums, output_square=slots.sums(np.square(rows), np.square(inverse)))
        self._routing(layer, window, gates, sums)
        output = weighted.sum(axis=1)
        turn = self._turning(layer, window, output, weighted, gated, sums)
        self._keep(layer, window, output, turn)

    def _routing(self, layer: int, window: LayerWindow, gates: Floats, sums: dict[str, Array]) -> None:
        slots, experts = window.slots, self.experts
        assert slots is not None
        total = gates.sum(axis=1, keepdims=True)
        share = np.divide(gates, total, out=np.zeros_like(gates), where=total > 0)
        self._add(layer, sums, share_sum=slots.totals(share))
        chosen = np.zeros((slots.tokens, experts), np.float32)
        np.put_along_axis(chosen, slots.ids.astype(np.intp), 1.0, axis=1)
        self._add(layer, sums, together=chosen.T @ chosen)
        if slots.used > 1:
            ordered = -np.sort(-gates, axis=1)
            ratio = np.divide(
                ordered[:, 1:], ordered[:, :1], out=np.zeros_like(ordered[:, 1:]), where=ordered[:, :1] > 0
            )
            bins = np.minimum((ratio * RATIO_BINS).astype(np.int64), RATIO_BINS - 1)
            flat = bins + RATIO_BINS * np.arange(slots.used - 1)
            counts = np.bincount(flat.reshape(-1), minlength=RATIO_BINS * (slots.used - 1))
            self._add(layer, sums, ratio_histogram=counts.reshape(slots.used - 1, RATIO_BINS))
        logits = window.probs if window.softmax_last or window.logits is None else window.logits
        if logits is not None:
            picked = np.take_along_axis(logits, slots.ids.astype(np.intp), axis=1)
            first = logits.argmax(axis=1)
            self._add(layer, sums, logit_gram=logits.T @ logits, logit_sum=logits.sum(axis=0, dtype=np.float64))
            self._add(layer, sums, chosen_logit_sum=slots.totals(picked))
            top = np.bincount(first, weights=logits[np.arange(len(first)), first], minlength=experts)
            self._add(layer, sums, top_logit_sum=top)
            if window.softmax_last:
                spread = np.exp(logits - logits.max(axis=1, keepdims=True))
                spread /= spread.sum(axis=1, keepdims=True)
                window.chosen = np.take_along_axis(spread, slots.ids.astype(np.intp), axis=1)
        if window.chosen is not None:
            self._add(layer, sums, prob_sum=slots.totals(window.chosen))

    def _turning(
        self,
        layer: int,
        window: LayerWindow,
        output: Floats,
        weighted: Floats,
        gated: Floats,
        sums: dict[str, Array],
    ) -> Floats | None:
        """How far the experts turn the residual stream and their own input; 1 - cos(h, h + y) [T] or None."""
        slots, x = window.slots, window.x
        assert slots is not None
        if x is not None and x.shape == output.shape:
            along = np.einsum("tkd,td->tk", weighted, x)
            lengths = np.sqrt(np.einsum("td,td->t", x, x))[:, None]
            # g|f| cos(x, f), with g > 0
            cosine = np.divide(along, lengths, out=np.zeros_like(along), where=lengths > 0)
            self._add(layer, sums, angle_sum=slots.totals(gated - cosine))
        if window.h is None or window.h.shape != output.shape:
            return None
        turn = np.maximum(_angle(window.h, output), 0).astype(np.float32)
        self._add(layer, sums, turn_sum=slots.totals(gated * turn[:, None]))
        squared = np.square(window.residual, dtype=np.float64)  # type: ignore[arg-type]
        moved = np.einsum("td,td->t", output, output, dtype=np.float64)
        ratio = np.divide(moved, squared, out=np.zeros_like(moved), where=squared > 0).sum()
        self._add(layer, sums, turn_tokens=np.float64(len(turn)), token_turn=turn.sum(dtype=np.float64))
        bins = np.minimum((turn * (RATIO_BINS / 2)).astype(np.int64), RATIO_BINS - 1)
        self._add(layer, sums, token_ratio=ratio, turn_histogram=np.bincount(bins, minlength=RATIO_BINS))
        return turn

    def after(self, layer: int, window: LayerWindow, after: Floats) -> None:
        """The residual stream after the block [T, D], shared experts included."""
        if window.h is not None and after.shape == window.h.shape and layer in self._sums:
            turn = _angle(window.h, after - window.h).sum()
            self._add(layer, self._sums[layer], token_full_turn=turn)

    # Gradients.

    def gradients(
        self,
        layer: int,
        window: LayerWindow,
        hidden: tuple[Floats, Floats],
        weighted: Floats,
        output_gradient: Floats,
    ) -> None:
        """What the loss says of neurons and experts.

        Args:
            hidden: input of the down projection and the loss's derivative by it, [T * k, F] each.
            weighted: the experts' contributions g f [T, k, D].
            output_gradient: derivative of the loss by their sum y [T, D].
        """
        slots = window.slots
        assert slots is not None
        value, slope = hidden
        sums = self._of(layer, window, width=weighted.shape[2], hidden=value.shape[1])
        product = value * slope
        self._add(layer, sums, hidden_gradient_square=slots.sums(np.square(slope)))
        self._add(layer, sums, mask_gradient_sum=slots.sums(product), mask_gradient_square=slots.sums(product**2))
        effect = weighted * output_gradient[:, None]
        self._add(layer, sums, expert_gradient_square=slots.totals(np.square(effect.sum(axis=2, dtype=np.float64))))
        self._add(layer, sums, loss_weighted_square=slots.totals(np.einsum("tkd,tkd->tk", effect, effect)))
        squared = np.square(output_gradient).sum(axis=0, dtype=np.float64)
        self._add(layer, sums, output_gradient_square=squared)

    # Sums and reservoir.

    def _of(self, layer: int, window: LayerWindow, *, width: int = 0, hidden: int = 0) -> dict[str, Array]:
        """The accumulators of ``layer``; those over D or F are made when that width is first known."""
        assert window.slots is not None
        sums = self._sums.setdefault(layer, {})
        extents = {"E": self.experts, "D": width, "F": hidden, "R": window.slots.used - 1, "B": RATIO_BINS}
        wanted = {}
        for name, kind in ACCUMULATORS.items():
            shape = tuple(extents[axis] for axis in kind.axes)
            wide = self.tokens_only and kind.axes not in ("", "E")
            if name not in sums and 0 not in shape and not wide and (self.backward or not kind.backward):
                wanted[name] = (shape, "float64")
        if wanted:
            sums.update(self.arena.zeros(wanted))
        return sums

    def _add(self, layer: int, sums: dict[str, Array], **values: Any) -> None:
        """Add each of ``values`` to the accumulator of its name, or take the maximum where that is kept."""
        seen = self._seen.setdefault(layer, set())
        for name, value in values.items():
            if ACCUMULATORS[name].largest:
                np.maximum(sums[name], value, out=sums[name])
            else:
                sums[name] += value
            seen.add(name)

    def _keep(self, layer: int, window: LayerWindow, output: Floats, turn: Floats | None) -> None:
        """The kept tokens of the window, if the layer can be replayed from them."""
        x, slots, gates = window.x, window.slots, window.gates
        missing = window.selection is None or window.probs is None or x is None or self.gates_input
        if self.capacity is None or missing or slots is None or gates is None or len(x) != slots.tokens:  # type: ignore[arg-type]
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
            stream=window.h[rows] if self.tokens_only and window.h is not None and len(window.h) == len(x) else None,
        )
        arrays = tokens.arrays()
        if layer not in self._stored:
            shapes = {name: ((self.capacity, *a.shape[1:]), str(a.dtype)) for name, a in arrays.items()}
            self._stored[layer] = self.arena.zeros(shapes)
        for name, array in arrays.items():
            self._stored[layer][name][self._filled : self._filled + len(rows)] = array

    # What was collected.

    def layers(self) -> dict[int, LayerStatistics]:
        """The sums by layer with a domain axis of one, without those that were never seen."""
        return {
            layer: LayerStatistics({name: sums[name][None] for name in ACCUMULATORS if name in self._seen[layer]})
            for layer, sums in sorted(self._sums.items())
            if "routed" in self._seen[layer]
        }

    def reservoirs(self) -> dict[int, Reservoir]:
        """The kept tokens by layer, one domain."""
        domain = np.zeros(self._filled, np.int16)
        return {
            layer: Reservoir.from_arrays(domain, {name: array[: self._filled] for name, array in stored.items()})
            for layer, stored in sorted(self._stored.items())
        }


def _angle(before: Floats, change: Floats) -> Doubles:
    """1 - cos(before, before + change) of each row, float64 [T]; 0 where either is nothing."""
    start = before.astype(np.float64)
    end = start + change
    product = np.einsum("td,td->t", start, end)
    lengths = np.sqrt(np.einsum("td,td->t", start, start) * np.einsum("td,td->t", end, end))
    angle: Doubles = 1 - np.divide(product, lengths, out=np.ones_like(product), where=lengths > 0)
    return angle
