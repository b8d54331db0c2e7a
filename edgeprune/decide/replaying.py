"""Ranking experts by replays of every layer: greedy elimination, or all subsets of a small layer (NAEE).

The authors of NAEE (arXiv 2402.14800) try all subsets of one size. Here sets are nested, so that every number of
experts is served by one order: from each number to the next smaller one the subsets of what is left are tried, never
less than half of it at once. Where these are more than 5,000, or the router has groups, the step is greedy, as in
``replay``; the result names such steps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeprune.decide.elimination import Ids, Layer, Replay, eliminate, error_of
from edgeprune.decide.keep import in_turns
from edgeprune.decide.scores import NAEE
from edgeprune.measure.activation import Activation
from edgeprune.measure.replay import (
    LayerExperts,
    activation_of,
    outputs,
    projection,
    relative_error,
)
from edgeprune.measure.reservoir import Reservoir
from edgeprune.measure.routing import Rule, preference, rule_of
from edgeprune.measure.statistics import Statistics
from edgeprune.measure.token_weights import token_weights
from edgeprune.model.architecture import Architecture, read_architecture
from edgeprune.model.gguf import GgufFile

Flags = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
# Outputs cost by far the most, and few are ever needed: a token's list holds the k + 1 experts that an elimination
# looks at and half as many again; when lists are used up they are made anew. Of this few experts it holds all,
# because an enumeration of subsets looks at all.
_FEW_EXPERTS, _LEAST_SPARE = 32, 4
_MOST_SUBSETS, _SUBSET_TOKENS = 5_000, 1_024
# Random projection moves a squared error by a percent or two.
_PROJECTION = 2


def rank(
    model: str,
    statistics: str,
    method: str,
    stops: list[int],
    protected: dict[str, list[int]],
    mixture: str = "pooled",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """The experts of every layer from most to least worth keeping. A task for a child process.

    Args:
        statistics: file with reservoirs.
        method: ``replay`` or ``naee``.
        stops: numbers of experts for which the sets are made as good as can be, descending.
        protected: experts that stay, by layer (as text, JSON has no integer keys).
        mixture: ``pooled``: every token counts the same; ``balanced``: every domain does; ``coverage``: every
            domain has an order of its own, and they take turns in naming experts to keep.

    Returns:
        ``orders``: by layer, for those that could be replayed; ``reasons``: by layer, why not, for the others;
        ``errors``: by layer, relative squared error of the output at each stop; ``greedy``: by layer, numbers of
        experts to which NAEE came greedily because there are too many subsets.
    """
    file = GgufFile(Path(model))
    architecture = read_architecture(file)
    measured = Statistics.load(Path(statistics))
    found: dict[str, Any] = {"orders": {}, "reasons": {}, "errors": {}, "greedy": {}}
    layers = architecture.moe_layers
    for number, layer in enumerate(layers):
        if layer not in measured.reservoirs:
            found["reasons"][str(layer)] = "no tokens of it were kept"
        else:
            ranker = _Ranker(file, architecture, layer, measured.reservoirs[layer], mixture)
            if ranker.obstacle:
                found["reasons"][str(layer)] = ranker.obstacle
            else:
                order, errors = ranker.mixed(method, stops, protected.get(str(layer), []))
                found["orders"][str(layer)], found["errors"][str(layer)] = order, errors
                if ranker.greedy:
                    found["greedy"][str(layer)] = sorted(ranker.greedy)
            del ranker  # a layer's tokens and outputs go before the next one's are read
        if progress is not None:
            progress(number + 1, len(layers))
    return found


def sample(domain: npt.NDArray[np.integer], most: int) -> tuple[Ids, Doubles]:
    """About ``most`` tokens, evenly spread over those of each domain, one of each at least.

    Args:
        domain: of every token [R].

    Returns:
        their positions, ascending, and how many tokens each of them stands for.
    """
    if len(domain) <= most:
        return np.arange(len(domain)), np.ones(len(domain))
    rows, stands_for = [], []
    for index in np.unique(domain):
        own = np.flatnonzero(domain == index)
        count = max(1, len(own) * most // len(domain))
        rows.append(own[np.arange(count) * len(own) // count])
        stands_for.append(np.full(count, len(own) / count))
    order = np.argsort(np.concatenate(rows), kind="stable")
    return np.concatenate(rows)[order], np.concatenate(stands_for)[order]


def understood(experts: LayerExperts, tokens: Reservoir) -> tuple[Rule, Activation] | str:
    """The router's rule and the experts' activation that reproduce ``tokens`` of their layer, or why none does."""
    rule = rule_of(tokens)
    if rule is None:
        return "its coefficients follow no known rule"
    activation = activation_of(experts, tokens)
    return "its experts do not reproduce the observed output" if activation is None else (rule, activation)


class _Ranker:
    """Replays one layer.

    Attributes:
        obstacle: why it cannot be replayed, or "".
        greedy: numbers of experts to which an enumeration came greedily.
    """

    def __init__(
        self, file: GgufFile, architecture: Architecture, layer: int, tokens: Reservoir, mixture: str
    ) -> None:
        self.architecture, self.tokens, self.mixture = architecture, tokens, mixture
        self.greedy: set[int] = set()
        self.weight = token_weights(tokens, balanced=mixture == "balanced")
        self.experts = LayerExperts(file, architecture, layer)
        found = understood(self.experts, tokens)
        self.obstacle = ""
        if isinstance(found, str):
            self.obstacle = found
        else:
            self.rule, self.activation = found
            everyone = np.ones(architecture.experts, bool)
            self.first = self._replay(everyone)
            self.whole = Layer(self.first, everyone)
            seen = tokens.y @ projection(tokens.y.shape[1]).T
            error = relative_error(self.whole.target, seen)
            if error > _PROJECTION * self.experts.tolerance:
                self.obstacle = f"its replayed output is off by {100 * error:.1f} %"

    def _replay(self, kept: Flags, before: Replay | None = None) -> Replay:
        """The layer's tokens with lists of their best experts among ``kept``; outputs in ``before`` are reused."""
        architecture, tokens = self.architecture, self.tokens
        scores = preference(tokens.selection, architecture.groups, architecture.groups_used, kept)
        left, seen = int(kept.sum()), architecture.used + 1
        few = architecture.experts <= _FEW_EXPERTS
        length = left if few else min(left, seen + max(seen // 2, _LEAST_SPARE))
        lists = np.argsort(-scores, axis=1, kind="stable")[:, :length]
        lists = np.where(np.isfinite(np.take_along_axis(scores, lists, axis=1)), lists, -1)
        mass = self.rule.mass
        known = None if before is None else (before.lists, before.outputs)
        return Replay(
            lists=lists,
            mass=np.take_along_axis(mass, np.maximum(lists, 0), axis=1),
            outputs=outputs(self.experts, self.activation, tokens.x, lists, known),
            used=architecture.used,
            denominator=self.rule.denominator,
            scale=self.rule.scale,
            all_mass=mass,
            weight=self.weight,
            cut=(lists[:, -1] >= 0) & (length < left),
        )

    def mixed(self, method: str, stops: Sequence[int], protected: Sequence[int]) -> tuple[list[int], list[float]]:
        """(experts from best to worst, relative squared error at each stop), domains put together as asked for."""
        domains = np.unique(self.tokens.domain)
        if self.mixture != "coverage" or len(domains) == 1:
            return self.rank(method, stops, protected)
        parts = [self._of(np.flatnonzero(self.tokens.domain == index)) for index in domains]
        order = in_turns([part.rank(method, stops, protected)[0] for part in parts])
        return order, [self._error(order, stop) / self._energy() for stop in sorted(stops, reverse=True)]

    def _of(self, rows: Ids) -> _Ranker:
        """The same layer with the tokens at ``rows`` alone."""
        part = copy.copy(self)
        part.tokens = self.tokens.rows(rows)
        part.weight = token_weights(part.tokens)
        part.rule = replace(self.rule, mass=self.rule.mass[rows])
        part.first = replace(self.first.rows(rows), weight=part.weight)
        part.whole = Layer(part.first, self.whole.kept)
        return part

    def _energy(self) -> float:
        return float((self.weight @ np.square(self.whole.target)).sum(dtype=np.float64)) or 1.0

    def _error(self, order: Sequence[int], count: int) -> float:
        """Squared error with the first ``count`` experts of ``order``, equal numbers per routing group."""
        groups = self.architecture.groups
        size = self.architecture.experts // groups
        kept = np.zeros(self.architecture.experts, bool)
        for group in range(groups):
            kept[[e for e in order if e // size == group][: count // groups]] = True
        return Layer(self._replay(kept, self.first), kept, self.whole.target).error

    def rank(self, method: str, stops: Sequence[int], protected: Sequence[int]) -> tuple[list[int], list[float]]:
        """(experts from best to worst, relative squared error at each stop), all tokens together."""
        energy = self._energy()
        removed: list[int] = []
        errors: list[float] = []
        layer = self.whole
        for stop in sorted(stops, reverse=True):
            while stop < int(layer.kept.sum()):
                half = max(stop, int(layer.kept.sum()) // 2)
                gone = self._step(method, layer, half, protected)
                removed += gone
                if not gone:  # everything that is left is protected
                    break
                if layer.short or self.architecture.groups > 1:  # open groups change with the experts that are left
                    layer = Layer(self._replay(layer.kept, layer.replay), layer.kept, layer.target)
            errors.append(layer.error / energy)
        left = [e for e in range(self.architecture.experts) if e not in set(removed)]
        costs = layer.removal_costs()
        left.sort(key=lambda e: (-costs[e], e))
        return [*left, *reversed(removed)], errors

    def _step(self, method: str, layer: Layer, stop: int, protected: Sequence[int]) -> list[int]:
        subset = self._best_subset(layer, stop, protected) if method == NAEE else None
        if method == NAEE and subset is None:
            self.greedy.add(stop)
        if subset is not None:
            gone = [e for e in np.flatnonzero(layer.kept) if e not in subset]
            for expert in gone:
                layer.remove(int(expert))
            return [int(expert) for expert in gone]
        return eliminate(layer, [stop], self.architecture.groups, protected)

    def _best_subset(self, layer: Layer, stop: int, protected: Sequence[int]) -> set[int] | None:
        """The best of all sets of ``stop`` kept experts, or None when there are too many, or routing groups."""
        kept = np.flatnonzero(layer.kept).tolist()
        if self.architecture.groups > 1 or comb(len(kept), stop) > _MOST_SUBSETS:
            return None
        rows, stands_for = sample(self.tokens.domain, _SUBSET_TOKENS)
        replay = layer.replay.rows(rows)
        replay = replace(replay, weight=(replay.weight * stands_for).astype(np.float32))
        target = layer.target[rows]
        best: tuple[float, set[int]] = (np.inf, set(kept))
        for subset in combinations(kept, stop):
            if not set(protected) <= set(subset):
                continue
            flags = np.zeros(self.architecture.experts, bool)
            flags[list(subset)] = True
            error = error_of(replay, flags, target)
            best = min(best, (error, set(subset)), key=lambda pair: pair[0])
        return best[1]
