"""Which stock presets to hold a plan against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

# Presets near in size can differ in quality in either direction, so the two largest are measured.
_MEASURED = 2
# The dry run's figure lacks the header and is rounded; a preset this far below is worth building.
_SLACK = 1.002


def contenders(sizes: Mapping[str, int], limit_bytes: int, header_bytes: int) -> list[str]:
    """The largest presets whose file would have at most ``limit_bytes``, largest first."""
    fitting = [name for name, size in sizes.items() if size + header_bytes <= limit_bytes * _SLACK]
    return sorted(fitting, key=lambda name: -sizes[name])[:_MEASURED]


def best(measured: Sequence[tuple[str, float]]) -> str | None:
    """Name of the contender with the least KL divergence."""
    return min(measured, key=lambda pair: pair[1])[0] if measured else None
