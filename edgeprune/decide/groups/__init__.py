"""Groups of experts to be merged: one file per published method, each a pure function of what was measured.

The groups of one layer are as many as experts are kept, ascending by their centres; every expert is in one of them.
"""

from __future__ import annotations

from collections.abc import Callable

from edgeprune.decide.evidence import Evidence
from edgeprune.decide.groups import hc_smoe, ream
from edgeprune.decide.groups.group import Group

# Of one layer's evidence and a number of experts to keep.
Grouping = Callable[[Evidence, int], tuple[Group, ...]]
GROUPINGS: dict[str, Grouping] = {"ream": ream.groups, "hc-smoe": hc_smoe.groups}
