"""One expert out of several: their neurons put in one order, and averaged.

A neuron is a row of gate and up, their biases, and a column of down. The order of neurons within an expert means
nothing, so that neurons that do the same are found first, as an assignment of least cost (the Hungarian method).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgeprune.measure.activation import Activation
from edgeprune.measure.replay import Expert

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.intp]
_COMPONENTS = 64  # of the weights of neurons, as REAM reduces them
_MOST_TOKENS = 4_096  # that neurons are compared on


@dataclass(frozen=True)
class Neurons:
    """The neurons of one expert as rows: gate (or None) and up float32 [F, D + 1], the bias last, and down [F, D]."""

    gate: Floats | None
    up: Floats
    down: Floats

    @classmethod
    def of(cls, expert: Expert) -> Neurons:
        gate = None if expert.gate is None else _with(expert.gate, expert.gate_bias)
        return cls(gate, _with(expert.up, expert.up_bias), np.ascontiguousarray(expert.down.T))

    def rows(self) -> Floats:
        """All of a neuron side by side, float32 [F, 2 (D + 1) + D]."""
        return np.concatenate([part for part in (self.gate, self.up, self.down) if part is not None], axis=1)

    def pick(self, which: Ids) -> Neurons:
        """Those at the positions ``which`` alone."""
        return Neurons(None if self.gate is None else self.gate[which], self.up[which], self.down[which])

    def expert(self, down_bias: Floats | float) -> Expert:
        """The expert with these neurons."""
        gate = None if self.gate is None else self.gate[:, :-1]
        gate_bias: Floats | float = 0.0 if self.gate is None else self.gate[:, -1]
        return Expert(gate, self.up[:, :-1], np.ascontiguousarray(self.down.T), gate_bias, self.up[:, -1], down_bias)


def _with(rows: Floats, bias: Floats | float) -> Floats:
    return np.concatenate([rows, np.broadcast_to(np.float32(bias), len(rows))[:, None]], axis=1)


def average(experts: Sequence[Expert], weights: Sequence[float], orders: Sequence[Ids]) -> Expert:
    """The weighted mean of ``experts``, whose neurons are taken in ``orders`` (int [F] each)."""
    neurons = [Neurons.of(expert) for expert in experts]
    parts = list(zip(neurons, weights, orders, strict=True))

    def mean(name: str) -> Floats:
        total: Floats = sum(np.float32(weight) * getattr(own, name)[order] for own, weight, order in parts)
        return total

    gate = None if neurons[0].gate is None else mean("gate")
    biases = [np.float32(weight) * np.asarray(own.down_bias) for own, weight in zip(experts, weights, strict=True)]
    bias: Floats = np.asarray(np.sum(biases, axis=0, dtype=np.float32))
    return Neurons(gate, mean("up"), mean("down")).expert(bias)


def by_weights(centre: Expert, other: Expert) -> Ids:
    """The order of ``other``'s neurons with the largest sum of inner products with ``centre``'s: M-SMoE's."""
    from scipy.optimize import linear_sum_assignment

    alike = Neurons.of(centre).rows() @ Neurons.of(other).rows().T
    order: Ids = linear_sum_assignment(alike, maximize=True)[1]
    return order


def by_answers(centre: Expert, other: Expert, x: Floats, activation: Activation | None) -> Ids:
    """The order of ``other``'s neurons nearest to ``centre``'s: REAM's.

    The cost is the distance of hidden values over tokens, each neuron's scaled to length one, plus the distance of
    weights in their first 64 principal components. (The authors' program does not put the two on one scale, nor does
    this.)

    Args:
        x: inputs of the layer, float32 [N, D].
        activation: None where it is not known; then weights alone count.
    """
    from scipy.optimize import linear_sum_assignment

    first, second = _components(Neurons.of(centre).rows(), Neurons.of(other).rows())
    cost = _apart(first, second)
    if activation is not None and len(x):
        step = -(-len(x) // _MOST_TOKENS)
        cost += _apart(*(unit(expert.hidden(x[::step], activation).T) for expert in (centre, other)))
    order: Ids = linear_sum_assignment(cost)[1]
    return order


def _components(first: Floats, second: Floats) -> tuple[Floats, Floats]:
    """Both sets of rows in the principal components of all of them."""
    rows = np.concatenate([first, second])
    rows = rows - rows.mean(axis=0)
    values, vectors = np.linalg.eigh((rows @ rows.T).astype(np.float64))
    narrow = (vectors * np.sqrt(np.maximum(values, 0)))[:, -_COMPONENTS:].astype(np.float32)
    return narrow[: len(first)], narrow[len(first) :]


def unit(rows: Floats) -> Floats:
    """Each row scaled to length one, or left at zero."""
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    scaled: Floats = np.divide(rows, np.where(length > 0, length, 1), dtype=np.float32)
    return scaled


def _apart(first: Floats, second: Floats) -> Floats:
    squared = np.square(first).sum(axis=1)[:, None] + np.square(second).sum(axis=1)[None] - 2 * first @ second.T
    distance: Floats = np.sqrt(np.maximum(squared, 0))
    return distance
