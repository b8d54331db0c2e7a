"""Groups of experts to be merged: one file per published method, each a pure function of what was measured.

The groups of one layer are as many as experts are kept, ascending by their centres; every expert is in one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from edgeprune.decide.evidence import Evidence
from edgeprune.decide.groups import hc_smoe, m_smoe, ream
from edgeprune.decide.groups.group import Group
from edgeprune.errors import UsageError

# Of one layer's evidence, a number of groups, and the experts that are grouped (ascending), or None for all.
Grouping = Callable[[Evidence, int, Sequence[int] | None], tuple[Group, ...]]
GROUPINGS: dict[str, Grouping] = {"ream": ream.groups, "hc-smoe": hc_smoe.groups, "m-smoe": m_smoe.groups}


def grouped(method: str, evidence: Evidence, kept: int, alone: Sequence[int] = (), routing: int = 1) -> list[Group]:
    """``kept`` groups of all experts of a layer, ascending by their centres.

    Args:
        alone: super experts, each a group of its own.
        routing: groups of the router, each of which is grouped by itself into equally many.

    Raises:
        UsageError: a routing group has nothing left to merge into beside its super experts.
    """
    size, share = evidence.experts // routing, kept // routing
    found = [Group(expert, (expert,)) for expert in sorted(alone)]
    for first in range(0, evidence.experts, size):
        rest = [expert for expert in range(first, first + size) if expert not in set(alone)]
        count = share - (size - len(rest))
        if rest and count < 1:
            raise UsageError(
                f"layer {evidence.layer} has {size - len(rest)} super experts, which are never averaged, among "
                f"{size}: {share} leave none to merge the others into",
                hint=f"keep at least {routing * (size - len(rest) + 1)} experts per layer",
            )
        if rest:
            found += GROUPINGS[method](evidence, min(count, len(rest)), rest)
    return sorted(found, key=lambda group: group.centre)


def weights(method: str, evidence: Evidence, members: Sequence[int]) -> list[float]:
    """What each of ``members`` counts in the average, summing to one: REAP's score for REAM, how often it is used for
    the others; the same for all where no token reached any."""
    from edgeprune.decide.scores import reap

    score = reap.score(evidence) if method == "ream" else evidence.sums.total("routed")
    own = np.asarray(score, np.float64)[list(members)]
    total = float(own.sum())
    return [float(one) / total for one in own] if total > 0 else [1 / len(members)] * len(members)
