"""Replay elimination: experts go one at a time, each time the one whose removal moves the layer's output least.

Removal is replayed with true re-routing: every token that used the expert goes on to its next-best expert and its
coefficients are made anew by the router's own rule. The loss is that of NAEE (arXiv 2402.14800), taken greedily and
backwards, with swaps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from edgeprune.measure.routing import CHOSEN, KEPT

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Ids = npt.NDArray[np.intp]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Replay:
    """One layer's tokens, ready for re-routing.

    Attributes:
        lists: each token's best experts in its order of preference, int [N, m]; -1 beyond the last.
        mass: of the experts in the lists, float32 [N, m].
        outputs: projected outputs of the experts in the lists, float32 [N, m, d].
        used: experts per token (k).
        denominator: of the router's rule.
        scale: of the router's rule.
        all_mass: of every expert, float32 [N, E]; needed only where the rule divides by the sum over kept experts.
        weight: of each token's error, float32 [N].
    """

    lists: Ids
    mass: Floats
    outputs: Floats
    used: int
    denominator: str
    scale: float
    all_mass: Floats
    weight: Floats

    @property
    def experts(self) -> int:
        return int(self.all_mass.shape[1])

    def some(self, most: int) -> Replay:
        """The first ``most`` tokens alone."""
        names = ("lists", "mass", "outputs", "all_mass", "weight")
        return replace(self, **{name: getattr(self, name)[:most] for name in names})


class Layer:
    """The state of an elimination: which experts are kept, how every token is routed, and what each removal costs."""

    def __init__(self, replay: Replay, kept: Flags | None = None, target: Floats | None = None) -> None:
        self.replay = replay
        self.kept = np.ones(replay.experts, bool) if kept is None else kept.copy()
        self._everyone = np.arange(len(replay.lists))
        self._route(self._everyone)
        self.target = self._output(self._everyone) if target is None else target
        self._price(self._everyone)

    # Routing.

    def _route(self, tokens: Ids) -> None:
        """Positions in the lists of the k best kept experts of each token and of the one after, [N, k + 1]."""
        replay, count = self.replay, self.replay.used + 1
        lists = replay.lists[tokens]
        alive = (lists >= 0) & self.kept[lists]
        rank = np.cumsum(alive, axis=1)
        places = np.full((len(tokens), count), -1)
        rows, columns = np.nonzero(alive & (rank <= count))
        places[rows, rank[rows, columns] - 1] = columns
        if not hasattr(self, "places"):
            self.places = np.full((len(replay.lists), count), -1)
        self.places[tokens] = places

    def _gathered(self, tokens: Ids) -> tuple[Floats, Floats]:
        """Mass [n, k + 1] and outputs [n, k + 1, d] of the routed experts and the next; 0 where there is none."""
        places = self.places[tokens]
        there = places >= 0
        rows = tokens[:, None]
        mass = np.where(there, self.replay.mass[rows, places], 0).astype(np.float32)
        return mass, self.replay.outputs[rows, places]

    def _kept_mass(self, tokens: Ids) -> Floats:
        summed: Floats = self.replay.all_mass[tokens] @ self.kept.astype(np.float32)
        return summed

    def _output(self, tokens: Ids) -> Floats:
        """The layer's projected output [n, d]."""
        mass, outputs = self._gathered(tokens)
        used = self.replay.used
        summed = np.einsum("nk,nkd->nd", mass[:, :used], outputs[:, :used])
        scaled: Floats = summed * self._factor(mass[:, :used].sum(axis=1), tokens)[:, None]
        return scaled

    def _factor(self, chosen_mass: Floats, tokens: Ids) -> Floats:
        """What a sum of mass times outputs is multiplied with, [n]."""
        divisor = np.ones_like(chosen_mass)
        if self.replay.denominator == CHOSEN:
            divisor = chosen_mass
        elif self.replay.denominator == KEPT:
            divisor = self._kept_mass(tokens)
        factor: Floats = np.divide(
            np.float32(self.replay.scale), divisor, out=np.zeros_like(divisor), where=divisor > 0
        )
        return factor

    # Costs.

    def _price(self, tokens: Ids) -> None:
        """What removing each routed expert adds to the error of each of ``tokens``, and their error now."""
        replay, used = self.replay, self.replay.used
        if not hasattr(self, "costs"):
            self.costs = np.zeros((len(replay.lists), used))
            self.errors = np.zeros(len(replay.lists))
            self.length = np.zeros(len(replay.lists))
            self.along = np.zeros(len(replay.lists))
        mass, outputs = self._gathered(tokens)
        target, weight = self.target[tokens], replay.weight[tokens].astype(np.float64)
        whole = mass[:, :used].sum(axis=1)
        summed = np.einsum("nk,nkd->nd", mass[:, :used], outputs[:, :used])
        output = summed * self._factor(whole, tokens)[:, None]
        now = np.square(output - target).sum(axis=1, dtype=np.float64)
        without = summed[:, None] - mass[:, :used, None] * outputs[:, :used]
        without += (mass[:, used, None] * outputs[:, used])[:, None]
        if replay.denominator == CHOSEN:
            divisor = whole[:, None] - mass[:, :used] + mass[:, used:]
        elif replay.denominator == KEPT:
            divisor = self._kept_mass(tokens)[:, None] - mass[:, :used]
            self.length[tokens] = weight * np.square(output).sum(axis=1)
            self.along[tokens] = weight * (output * target).sum(axis=1)
        else:
            divisor = np.ones_like(mass[:, :used])
        factor = np.divide(replay.scale, divisor, out=np.zeros_like(divisor), where=divisor > 1e-12)
        then = np.square(without * factor[:, :, None] - target[:, None]).sum(axis=2, dtype=np.float64)
        self.costs[tokens] = weight[:, None] * (then - now[:, None])
        self.errors[tokens] = weight * now

    def removal_costs(self) -> Doubles:
        """How much the error grows when each expert goes, float64 [E]; infinite for those that are gone."""
        replay, used = self.replay, self.replay.used
        ids = np.take_along_axis(replay.lists, np.maximum(self.places[:, :used], 0), axis=1)
        there = self.places[:, :used] >= 0
        costs = np.bincount(ids[there], self.costs[there], minlength=replay.experts).astype(np.float64)
        if replay.denominator == KEPT:
            costs += self._growth(ids, there)
        return np.where(self.kept, costs, np.inf)

    def _growth(self, ids: Ids, there: Flags) -> Doubles:
        """The cost for tokens that do not use the expert: all their coefficients grow when its mass goes."""
        mass = self._kept_mass(self._everyone)[:, None]
        growth = mass / np.maximum(mass - self.replay.all_mass, 1e-12) - 1
        added = (growth * growth + 2 * growth) * self.length[:, None] - 2 * growth * self.along[:, None]
        rows = np.broadcast_to(self._everyone[:, None], ids.shape)
        added[rows[there], ids[there]] = 0  # they are priced one by one
        summed: Doubles = added.sum(axis=0)
        return summed

    @property
    def error(self) -> float:
        """Weighted squared distance of the layer's output from the target, over all tokens."""
        return float(self.errors.sum())

    # Moves.

    def remove(self, expert: int) -> None:
        """Take an expert away; only tokens that had it among their k + 1 best are routed and priced anew."""
        ids = np.take_along_axis(self.replay.lists, np.maximum(self.places, 0), axis=1)
        touched = ((ids == expert) & (self.places >= 0)).any(axis=1)
        self.kept[expert] = False
        self._renew(np.flatnonzero(touched))

    def add(self, expert: int) -> None:
        """Give an expert back."""
        listed = (self.replay.lists == expert).any(axis=1)
        self.kept[expert] = True
        self._renew(np.flatnonzero(listed))

    def _renew(self, tokens: Ids) -> None:
        self._route(tokens)
        self._price(self._everyone if self.replay.denominator == KEPT else tokens)


def error_of(replay: Replay, kept: Flags, target: Floats) -> float:
    """The error of keeping the experts in ``kept`` bool [E], from scratch."""
    return Layer(replay, kept, target).error


def eliminate(layer: Layer, stops: Sequence[int], groups: int = 1, protected: Sequence[int] = ()) -> list[int]:
    """Remove experts until the last of ``stops`` are left; the experts in their order of removal.

    At each stop, swaps of a kept expert for one removed since the stop before are tried, and made where they lower
    the error. So the sets at the stops are nested.

    Args:
        stops: numbers of experts to keep, descending.
        groups: contiguous routing groups, from which equal numbers go.
        protected: experts that never go.
    """
    size = layer.replay.experts // groups
    order: list[int] = []
    for stop in stops:
        since: list[int] = []
        while layer.kept.sum() > stop:
            costs = layer.removal_costs()
            costs[list(protected)] = np.inf
            left = layer.kept.reshape(groups, size).sum(axis=1)
            for group in range(groups):
                if left[group] <= stop // groups:
                    costs[group * size : (group + 1) * size] = np.inf
            expert = int(np.argmin(costs))
            if not np.isfinite(costs[expert]):
                break
            layer.remove(expert)
            since.append(expert)
        order += _swapped(layer, since, size, protected)
    return order


_MOST_SWAPS = 24
_PARTNERS = 4


def _swapped(layer: Layer, removed: list[int], size: int, protected: Sequence[int]) -> list[int]:
    """``removed`` after swaps that lower the error; each pair is of one group."""
    removed = list(removed)
    for _ in range(_MOST_SWAPS):
        before = layer.error
        costs = layer.removal_costs()
        costs[list(protected)] = np.inf
        if not _one_swap(layer, removed, costs, size, before):
            break
    return removed


def _one_swap(layer: Layer, removed: list[int], costs: Doubles, size: int, before: float) -> bool:
    for place in range(len(removed) - 1, -1, -1):  # those removed last cost most
        back = removed[place]
        layer.add(back)
        with_it = layer.removal_costs()
        with_it[~np.isfinite(costs)] = np.inf
        partners = [e for e in np.argsort(with_it)[: _PARTNERS * 4] if e // size == back // size and e != back]
        for out in partners[:_PARTNERS]:
            if not np.isfinite(with_it[out]) or layer.error + with_it[out] >= before * (1 - 1e-6):
                continue
            layer.remove(int(out))
            removed[place] = int(out)
            return True
        layer.remove(back)
    return False
