"""Agglomerative clusters of experts: as groups, or as an order of removal, at every merger one of two
representatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]
Linkage = Literal["average", "complete"]  # of scipy's hierarchical clustering


def distances(rows: Doubles) -> Doubles:
    """Euclidean distance of each row from each, float64 [E, E], without an array of all differences."""
    norms = np.square(rows).sum(axis=1)
    squared = norms[:, None] + norms[None] - 2 * rows @ rows.T
    apart: Doubles = np.sqrt(np.maximum(squared, 0))
    return apart


def _mergers(distance: Doubles, linkage: Linkage) -> list[tuple[int, int]]:
    """Pairs of clusters that become one, E - 1 of them: the first E are single experts, then those that were made."""
    from scipy.cluster.hierarchy import linkage as agglomerate
    from scipy.spatial.distance import squareform

    if len(distance) < 2:
        return []
    symmetric = np.maximum((distance + distance.T) / 2, 0)
    np.fill_diagonal(symmetric, 0)
    return [(int(a), int(b)) for a, b, _, _ in agglomerate(squareform(symmetric, checks=False), linkage)]


def clusters(distance: Doubles, count: int, *, linkage: Linkage) -> list[list[int]]:
    """``count`` clusters of experts, each ascending.

    Args:
        distance: between experts, float64 [E, E], symmetric.
    """
    experts = len(distance)
    parts = {expert: [expert] for expert in range(experts)}
    for number, (a, b) in enumerate(_mergers(distance, linkage)[: experts - count]):
        parts[experts + number] = sorted(parts.pop(a) + parts.pop(b))
    return list(parts.values())


def removals(distance: Doubles, survivor: Callable[[list[int], int, int], int], *, linkage: Linkage) -> list[int]:
    """Experts in the order in which they are removed, E - 1 of them.

    Args:
        distance: between experts, float64 [E, E], symmetric.
        survivor: given a merged cluster and the representatives of its two parts, the one that stays.
    """
    experts = len(distance)
    merged: list[list[int]] = [[expert] for expert in range(experts)]
    standing = list(range(experts))
    removed = []
    for a, b in _mergers(distance, linkage):
        merged.append(merged[a] + merged[b])
        stays = survivor(merged[-1], standing[a], standing[b])
        removed.append(standing[b] if stays == standing[a] else standing[a])
        standing.append(stays)
    return removed
