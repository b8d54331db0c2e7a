"""Agglomerative clusters of experts as an order of removal: at every merger one of two representatives goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]


def distances(rows: Doubles) -> Doubles:
    """Euclidean distance of each row from each, float64 [E, E], without an array of all differences."""
    norms = np.square(rows).sum(axis=1)
    squared = norms[:, None] + norms[None] - 2 * rows @ rows.T
    apart: Doubles = np.sqrt(np.maximum(squared, 0))
    return apart


def removals(
    distance: Doubles, survivor: Callable[[list[int], int, int], int], *, linkage: Literal["average", "complete"]
) -> list[int]:
    """Experts in the order in which they are removed, E - 1 of them.

    Args:
        distance: between experts, float64 [E, E], symmetric.
        survivor: given a merged cluster and the representatives of its two parts, the one that stays.
        linkage: ``average`` or ``complete``, of scipy's hierarchical clustering.
    """
    from scipy.cluster.hierarchy import linkage as agglomerate
    from scipy.spatial.distance import squareform

    experts = len(distance)
    if experts < 2:
        return []
    symmetric = np.maximum((distance + distance.T) / 2, 0)
    np.fill_diagonal(symmetric, 0)
    clusters: list[list[int]] = [[expert] for expert in range(experts)]
    standing = list(range(experts))
    removed = []
    for first, second, _, _ in agglomerate(squareform(symmetric, checks=False), linkage):
        a, b = int(first), int(second)
        merged = clusters[a] + clusters[b]
        stays = survivor(merged, standing[a], standing[b])
        removed.append(standing[b] if stays == standing[a] else standing[a])
        clusters.append(merged)
        standing.append(stays)
    return removed
