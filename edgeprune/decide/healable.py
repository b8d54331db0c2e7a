"""Which experts to keep when the layer is healed afterwards: judged by what the healed layer can still reproduce.

Replays price a removal by what it does to the layer as it is. Healing (``measure.refit``) takes much of that back,
and not in proportion: what other experts' hidden values can be turned into costs little, what they do not see stays
lost. So several rankings are put forward for every layer, each set is healed on kept tokens, and the ranking whose
sets leave the least error on tokens that were not fitted is taken for that layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeprune.decide.keep import keep_set
from edgeprune.decide.replaying import understood
from edgeprune.measure.refit import Share, judges, refit
from edgeprune.measure.replay import Expert, LayerExperts, projection
from edgeprune.measure.reservoir import Reservoir
from edgeprune.measure.routing import coefficients, preference
from edgeprune.measure.statistics import Statistics
from edgeprune.measure.token_weights import token_weights
from edgeprune.model.architecture import Architecture, read_architecture
from edgeprune.model.gguf import GgufFile

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.intp]
Orders = Mapping[str, Mapping[str, Sequence[int]]]
# Put forward for every layer.
RIVALS = ("reap", "gated-energy", "easy-ep")
# Of the hidden values of all experts on all tokens that some set sends to them.
_MOST_BYTES = 400 << 20
# Tokens that follow each other, are fitted or judge together, and of which there are at least so many in all.
_RUN, _FEWEST = 64, 512


def choose(
    model: str,
    statistics: str,
    orders: dict[str, dict[str, list[int]]],
    counts: list[int],
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """For every layer the ranking that heals best. A task for a child process.

    Args:
        statistics: file with reservoirs.
        orders: rankings, best expert first, by name of the method and by layer (as text).
        counts: numbers of experts kept that are judged.

    Returns:
        ``orders``: by layer; ``methods``: whose it is, by layer; ``errors``: by layer and method, the layer's squared
        error relative to its output at each count, [before, after] healing; ``reasons``: by layer, why it could not
        be judged.
    """
    file = GgufFile(Path(model))
    architecture = read_architecture(file)
    measured = Statistics.load(Path(statistics))
    found: dict[str, Any] = {"orders": {}, "methods": {}, "errors": {}, "reasons": {}}
    for number, layer in enumerate(architecture.moe_layers):
        name = str(layer)
        own = {method: by_layer[name] for method, by_layer in orders.items() if name in by_layer}
        judge = _Judge(file, architecture, layer, measured.reservoirs.get(layer))
        if judge.obstacle:
            found["reasons"][name] = judge.obstacle
        else:
            errors = judge.errors(own, counts)
            best = min(errors, key=lambda method: float(np.log(np.maximum(errors[method], 1e-12))[:, 1].sum()))
            found["orders"][name], found["methods"][name], found["errors"][name] = list(own[best]), best, errors
        if progress is not None:
            progress(number + 1, len(architecture.moe_layers))
    return found


def spread(tokens: int, most: int) -> Ids:
    """Positions of about ``most`` of so many ``tokens``, ascending: runs from everywhere, because the kinds of text
    follow each other."""
    runs = -(-tokens // _RUN)
    chosen = np.linspace(0, runs - 1, min(runs, max(1, most // _RUN))).round().astype(np.intp)
    places = (chosen[:, None] * _RUN + np.arange(_RUN)).reshape(-1)
    return places[places < tokens]


class _Judge:
    """One layer's tokens, and the experts that they may be sent to.

    Attributes:
        obstacle: why it cannot be healed, or "".
    """

    def __init__(self, file: GgufFile, architecture: Architecture, layer: int, tokens: Reservoir | None) -> None:
        self.architecture, self.layer, self.obstacle = architecture, layer, ""
        if tokens is None:
            self.obstacle = "no tokens of it were kept"
            return
        self.experts = LayerExperts(file, architecture, layer)
        found = understood(self.experts, tokens)
        if isinstance(found, str):
            self.obstacle = found
        else:
            self.rule, self.activation = found
            self.tokens = tokens
            # An error counts as for a replay; with both sides of the equations scaled, so does the fit's.
            self.scale = np.sqrt(token_weights(tokens))[:, None]

    def errors(self, orders: Mapping[str, Sequence[int]], counts: Sequence[int]) -> dict[str, list[list[float]]]:
        """Each ranking's error at each of ``counts``, before and after healing."""
        sets = {method: [self._best(order, kept) for kept in counts] for method, order in orders.items()}
        routes = {kept: self._routed(kept) for own in sets.values() for kept in own}
        self._prepare([ids for ids, _ in routes.values()])
        left = {kept: self._healed(kept, *route) for kept, route in routes.items()}
        return {method: [left[kept] for kept in own] for method, own in sets.items()}

    def _best(self, order: Sequence[int], count: int) -> tuple[int, ...]:
        """The ``count`` experts that a ranking keeps."""
        return keep_set({self.layer: np.array(order)}, self.architecture, count)[self.layer]

    def _routed(self, kept: Sequence[int]) -> tuple[Ids, Floats]:
        """Experts [N, k] and coefficients [N, k] of every token when only ``kept`` are there."""
        flags = np.zeros(self.architecture.experts, bool)
        flags[list(kept)] = True
        groups, used = self.architecture.groups, self.architecture.used
        scores = preference(self.tokens.selection, groups, self.architecture.groups_used, flags)
        ids = np.argsort(-scores, axis=1, kind="stable")[:, :used]
        return ids, coefficients(self.rule, ids, flags)

    def _prepare(self, routes: Sequence[Ids]) -> None:
        """The hidden values of every expert on the tokens that any of ``routes`` sends to it, and its outer half."""
        count, experts = len(self.tokens), self.architecture.experts
        wanted = np.zeros((experts, count), bool)
        for ids in routes:
            for slot in range(ids.shape[1]):
                wanted[ids[:, slot], np.arange(count)] = True
        width = self.architecture.expert_width
        share = min(1.0, _MOST_BYTES / max(1, 4 * width * int(wanted.sum())))
        self.looked_at = spread(count, max(_FEWEST, int(count * share)))
        onto = projection(self.tokens.y.shape[1])
        self.rows: list[Ids] = []
        self.hidden: list[Floats] = []
        self.outer: list[Floats] = []
        self.biases: list[Floats] = []
        for index in range(experts):
            expert: Expert = self.experts[index]
            rows = np.flatnonzero(wanted[index, self.looked_at])
            self.rows.append(rows)
            self.hidden.append(expert.hidden(self.tokens.x[self.looked_at[rows]], self.activation))
            self.outer.append(onto @ expert.down)
            bias = np.broadcast_to(np.asarray(expert.down_bias, np.float32), (len(expert.down),))
            self.biases.append(onto @ bias)
            self.experts.release(index)
        self.target = self.tokens.y[self.looked_at] @ onto.T

    def _healed(self, kept: Sequence[int], ids: Ids, gates: Floats) -> list[float]:
        """The error of the layer with the experts ``kept``, relative to its output, before and after healing.

        Rows of the matrices are fitted independently of each other, so the fit of their projection is the projection
        of their fit.
        """
        ids, gates, scale = ids[self.looked_at], gates[self.looked_at], self.scale[self.looked_at]
        target = self.target.copy()
        shares = []
        for expert in kept:
            tokens, slot = np.nonzero(ids == expert)
            own = gates[tokens, slot][:, None]
            target[tokens] -= own * self.biases[expert]
            places = np.searchsorted(self.rows[expert], tokens)
            shares.append(Share(tokens, own * scale[tokens] * self.hidden[expert][places]))
        held_out = judges(len(target), _RUN)
        fit = refit(lambda place: self.outer[kept[place]], shares, scale * target, held_out)
        return [fit.before, fit.after]
