"""HC-SMoE: clusters of experts with similar mean outputs (arXiv 2410.08589)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgeprune.decide.evidence import Evidence, ratio
from edgeprune.decide.grouping import clusters, distances
from edgeprune.decide.groups.group import Group


def groups(evidence: Evidence, kept: int, among: Sequence[int] | None = None) -> tuple[Group, ...]:
    """``kept`` average-link clusters under the Euclidean distance of mean outputs, before any coefficient.

    The centre of a cluster is the expert nearest to the mean of its members' outputs. Means are over the tokens that
    were routed to the expert; the authors send every token through every expert.
    """
    sums = evidence.sums
    ids = np.arange(evidence.experts) if among is None else np.array(among)
    means = ratio(sums.total("output_sum"), sums.total("routed")[:, None])[ids]
    found = []
    for members in clusters(distances(means), kept, linkage="average"):
        off = np.linalg.norm(means[members] - means[members].mean(axis=0), axis=1)
        found.append(Group(int(ids[members[int(np.argmin(off))]]), tuple(ids[members].tolist())))
    return tuple(sorted(found, key=lambda group: group.centre))
