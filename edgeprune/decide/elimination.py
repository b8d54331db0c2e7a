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
        cut: whether a token could also choose experts that are not in its list, bool [N].
    """

    lists: Ids
    mass: Floats
    outputs: Floats
    used: int
    denominator: str
    scale: float
    all_mass: Floats
    weight: Floats
    cut: Flags

    @property
    def experts(self) -> int:
        return int(self.all_mass.shape[1])

    def rows(self, which: Ids) -> Replay:
        """The tokens at the positions ``which`` alone."""
        names = ("lists", "mass", "outputs", "all_mass", "weight", "cut")
        return replace(self, **{name: getattr(self, name)[which] for name in names})


class Layer:
    """The state of an elimination: which experts are kept, how every token is routed, and what each removal costs.

    A token has k + 1 cases: each of its k experts gone, and none gone. A case is a sum of mass times output, and a
    factor, the router's scale over its denominator. What removals touch is measured anew as vectors. Where the
    denominator is the mass of all kept experts, a removal moves the factors of all other tokens too: their errors
    follow from three products that were kept.
    """

    def __init__(self, replay: Replay, kept: Flags | None = None, target: Floats | None = None) -> None:
        self.replay = replay
        self.kept = np.ones(replay.experts, bool) if kept is None else kept.copy()
        cases = (len(replay.lists), replay.used + 1)
        self._everyone = np.arange(len(replay.lists))
        self.ids, self.places = np.full(cases, -1), np.full(cases, -1)
        self._square, self._product, self._length = (np.zeros(cases, np.float32) for _ in range(3))
        self._mass, self._factor = np.zeros(cases, np.float32), np.zeros(cases, np.float32)
        self._route(self._everyone)
        if target is None:
            sums = self._sums(self._everyone)[:, -1]
            target = sums * self._factors(self._everyone)[:, -1:]
        self.target = target
        self._measure(self._everyone)
        self._price()

    # Routing.

    def _route(self, tokens: Ids) -> None:
        """The k best kept experts of each token and the one after: their ids, and their positions in the lists."""
        replay, count = self.replay, self.replay.used + 1
        lists = replay.lists[tokens]
        alive = (lists >= 0) & self.kept[lists]
        rank = np.cumsum(alive, axis=1)
        rows, columns = np.nonzero(alive & (rank <= count))
        slots = rank[rows, columns] - 1
        for found, values in ((self.places, columns), (self.ids, lists[rows, columns])):
            found[tokens] = -1
            found[tokens[rows], slots] = values
        mass = np.where(self.places[tokens] < 0, 0, replay.mass[tokens[:, None], self.places[tokens]])
        self._mass[tokens] = mass

    @property
    def short(self) -> float:
        """Share of tokens that have used up their list and would choose an expert that is not in it."""
        return float((self.replay.cut & (self.ids[:, -1] < 0)).mean())

    # Cases.

    def _sums(self, tokens: Ids) -> Floats:
        """Sums of mass times output, float32 [n, k + 1, d]: without the first expert, ..., with all."""
        used = self.replay.used
        mass = self._mass[tokens]
        weighted = mass[:, :, None] * self.replay.outputs[tokens[:, None], self.places[tokens]]
        whole = weighted[:, :used].sum(axis=1)
        sums: Floats = np.negative(weighted, out=weighted)
        sums[:, :used] -= sums[:, used:]  # the next one takes the place
        sums[:, used] = 0
        sums += whole[:, None]
        return sums

    def _factors(self, tokens: Ids | slice) -> Floats:
        """What the sums are multiplied with, float32 [n, k + 1]."""
        mass, used = self._mass[tokens], self.replay.used
        if self.replay.denominator == CHOSEN:
            divisor = mass[:, :used].sum(axis=1, keepdims=True) - mass + mass[:, used:]
        elif self.replay.denominator == KEPT:
            divisor = self._kept_mass()[tokens][:, None] - mass
            divisor[:, used] += mass[:, used]
        else:
            divisor = np.ones_like(mass)
        scale = np.float32(self.replay.scale)
        factors: Floats = np.divide(scale, divisor, out=np.zeros_like(divisor), where=divisor > 1e-12)
        return factors

    def _kept_mass(self) -> Floats:
        summed: Floats = self.replay.all_mass @ self.kept.astype(np.float32)
        return summed

    def _measure(self, tokens: Ids) -> None:
        """Distance of each case from the target, squared, at today's factors; and how it changes with the factor."""
        sums, factors = self._sums(tokens), self._factors(tokens)
        off = sums * factors[:, :, None] - self.target[tokens, None]
        self._square[tokens] = np.einsum("nkd,nkd->nk", off, off)
        if self.replay.denominator == KEPT:
            self._factor[tokens] = factors
            self._product[tokens] = np.einsum("nkd,nkd->nk", off, sums)
            self._length[tokens] = np.einsum("nkd,nkd->nk", sums, sums)

    # Costs.

    def _price(self) -> None:
        """Every token's weighted error, and what removing each of its experts adds to it."""
        square, used = self._square.astype(np.float64), self.replay.used
        if self.replay.denominator == KEPT:
            factor = self._factors(slice(None)).astype(np.float64)
            change = factor - self._factor
            square += change * (2 * self._product + change * self._length)
            # Of the case in which none is gone: |output|^2, and output times what it is off by.
            self._output = factor[:, used] ** 2 * self._length[:, used]
            self._along = factor[:, used] * (self._product + change * self._length)[:, used]
        weight = self.replay.weight.astype(np.float64)
        self._errors = weight * square[:, used]
        self._costs = weight[:, None] * square[:, :used] - self._errors[:, None]

    def removal_costs(self) -> Doubles:
        """How much the error grows when each expert goes, float64 [E]; infinite for those that are gone."""
        ids = self.ids[:, : self.replay.used]
        there = ids >= 0
        costs = np.bincount(ids[there], self._costs[there], minlength=self.replay.experts).astype(np.float64)
        if self.replay.denominator == KEPT:
            costs += self._growth(ids, there)
        return np.where(self.kept, costs, np.inf)

    def _growth(self, ids: Ids, there: Flags) -> Doubles:
        """The cost for tokens that do not use the expert: all their coefficients grow when its mass goes."""
        mass = self._kept_mass()[:, None]
        growth = mass / np.maximum(mass - self.replay.all_mass, 1e-12) - 1
        rows = np.broadcast_to(self._everyone[:, None], ids.shape)
        growth[rows[there], ids[there]] = 0  # they are priced one by one
        weight = self.replay.weight
        linear: Doubles = (2 * weight * self._along) @ growth + (weight * self._output) @ np.square(growth)
        return linear

    @property
    def error(self) -> float:
        """Weighted squared distance of the layer's output from the target, over all tokens."""
        return float(self._errors.sum())

    # Moves.

    def remove(self, expert: int) -> None:
        """Take an expert away; only tokens that had it among their k + 1 best are routed anew."""
        touched = (self.ids == expert).any(axis=1)
        self.kept[expert] = False
        self._renew(np.flatnonzero(touched))

    def add(self, expert: int) -> None:
        """Give an expert back."""
        listed = (self.replay.lists == expert).any(axis=1)
        self.kept[expert] = True
        self._renew(np.flatnonzero(listed))

    def _renew(self, tokens: Ids) -> None:
        self._route(tokens)
        self._measure(tokens)
        self._price()


# Share of tokens that may have used up their list before all lists are to be made anew.
_MOST_SHORT = 0.01


def error_of(replay: Replay, kept: Flags, target: Floats) -> float:
    """The error of keeping the experts in ``kept`` bool [E], from scratch."""
    return Layer(replay, kept, target).error


def eliminate(layer: Layer, stops: Sequence[int], groups: int = 1, protected: Sequence[int] = ()) -> list[int]:
    """Remove experts until the last of ``stops`` are left, or the tokens' lists no longer suffice; the experts in
    their order of removal.

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
        while layer.kept.sum() > stop and layer.short <= _MOST_SHORT:
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
