"""STUN: clusters of experts with similar router rows (arXiv 2409.06211), cut at one count for every layer."""

from __future__ import annotations

import numpy as np

from edgeprune.decide.evidence import Doubles, Evidence, from_removals
from edgeprune.decide.grouping import distances, removals


def score(evidence: Evidence) -> Doubles:
    """Order of removal, float64 [E]: complete-link clusters under ||r_i - r_j||, one of which loses its less central
    representative at every merger.

    The authors cut the dendrogram at a global threshold, which gives layers different counts; llama.cpp loads one
    count, so it is cut at as many clusters as experts are kept. They keep the expert nearest to the centroid of the
    cluster's weights; here it is the nearest to the centroid of its router rows among the two representatives, so
    that sets are nested.
    """
    rows = evidence.facts.router

    def survivor(cluster: list[int], a: int, b: int) -> int:
        centre = rows[cluster].mean(axis=0)
        return min(a, b, key=lambda expert: (float(np.linalg.norm(rows[expert] - centre)), expert))

    return from_removals(removals(distances(rows), survivor, linkage="complete"), evidence.experts)
