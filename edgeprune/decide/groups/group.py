"""Experts that become one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Group:
    """Experts of one layer that are to be merged into one.

    Attributes:
        centre: the member whose router row the merged expert keeps.
        members: ids, ascending, with the centre's.
    """

    centre: int
    members: tuple[int, ...]
