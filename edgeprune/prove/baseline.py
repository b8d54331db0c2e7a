"""Which stock presets to hold a plan against."""

from __future__ import annotations

from collections.abc import Mapping

# Presets near in size can differ in quality in either direction, so the two largest are measured.
MEASURED = 2


def contenders(sizes: Mapping[str, int], limit_bytes: int, header_bytes: int) -> list[str]:
    """Presets whose file would have at most ``limit_bytes``, largest first; ``MEASURED`` are worth measuring."""
    fitting = [name for name, size in sizes.items() if size + header_bytes <= limit_bytes]
    return sorted(fitting, key=lambda name: -sizes[name])
