"""DERN: neurons of dropped experts are taken in by the kept expert with the most similar one (arXiv 2509.10377)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from edgeprune.build.averages import Floats, Ids, Neurons, unit

# Cosine below which a neuron is given up; the paper recommends 0.4 to 0.6.
ALPHA = 0.6
_MOST_ROUNDS = 10


def receivers(
    neurons: Callable[[int], Neurons], dropped: Sequence[int], kept: Sequence[int]
) -> dict[int, dict[int, Ids]]:
    """By kept expert and by dropped one: which neurons of it are taken in.

    A neuron goes to the kept expert that has the one of the largest cosine with it, the gate left out, which the
    paper finds slightly better; if that is at most ``ALPHA``, it goes nowhere.
    """
    found: dict[int, dict[int, Ids]] = {expert: {} for expert in kept}
    directions = {expert: _direction(neurons(expert)) for expert in dropped}
    nearest = {expert: np.full(len(own), ALPHA, np.float32) for expert, own in directions.items()}
    taker = {expert: np.full(len(own), -1) for expert, own in directions.items()}  # none yet
    for into in kept:
        own = _direction(neurons(into))
        for expert, rows in directions.items():
            cosine = (rows @ own.T).max(axis=1)
            better = cosine > nearest[expert]
            nearest[expert][better], taker[expert][better] = cosine[better], into
    for expert, takers in taker.items():
        for into in np.unique(takers[takers >= 0]).tolist():
            found[into][expert] = np.flatnonzero(takers == into)
    return found


def _direction(own: Neurons) -> Floats:
    return unit(np.concatenate([own.up, own.down], axis=1))


def recombined(own: Neurons, received: Sequence[Neurons], importance: Sequence[float]) -> Neurons:
    """As many neurons as ``own`` has, of its own and the ``received`` ones: centres of weighted spherical k-means.

    It begins with the neurons that have the largest weight of a gate (of up where there is none). A centre has the
    direction of the weighted mean of its neurons' directions and the weighted mean of their lengths.

    Args:
        importance: of a neuron of ``own``, and of each of ``received``.
    """
    if not received:
        return own
    rows = np.concatenate([own.rows(), *(other.rows() for other in received)])
    gates = np.concatenate([one.up if one.gate is None else one.gate for one in (own, *received)])
    counts = [len(one.up) for one in (own, *received)]
    weight = np.maximum(np.repeat(np.array(importance, np.float32), counts), np.finfo(np.float32).tiny)
    length = np.linalg.norm(rows, axis=1)
    directions = unit(rows)
    first = np.sort(np.argsort(-np.abs(gates[:, :-1]).max(axis=1), kind="stable")[: counts[0]])
    centres, cluster = directions[first], np.full(len(rows), -1)
    for _ in range(_MOST_ROUNDS):
        earlier, cluster = cluster, np.argmax(directions @ centres.T, axis=1)
        if np.array_equal(earlier, cluster):
            break
        centres = unit(_sums(cluster, directions * weight[:, None], centres))
    total = np.bincount(cluster, weight, len(centres))
    lengths = np.bincount(cluster, weight * length, len(centres)) / np.where(total > 0, total, 1)
    lengths = np.where(total > 0, lengths, length[first])  # one that lost all its neurons stays as it began
    made = (centres * lengths[:, None]).astype(np.float32)
    width = own.up.shape[1]
    gate = None if own.gate is None else made[:, :width]
    rest = made if gate is None else made[:, width:]
    return Neurons(gate, rest[:, :width], rest[:, width:])


def _sums(cluster: Ids, rows: Floats, centres: Floats) -> Floats:
    """Sums of ``rows`` by cluster; an empty one keeps its centre."""
    order = np.argsort(cluster, kind="stable")
    present, start = np.unique(cluster[order], return_index=True)
    sums = centres.copy()
    sums[present] = np.add.reduceat(rows[order], start)
    return sums
