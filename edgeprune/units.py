"""Bytes and times for people: the only place that knows what a GiB is."""

from __future__ import annotations

import re
from decimal import Decimal

from edgeprune.errors import UsageError

_FACTORS = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?i?b)\s*", re.IGNORECASE)
_TIME = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(s|m|min|h|)\s*", re.IGNORECASE)
_SECONDS = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def parse_bytes(text: str) -> int:
    """Bytes meant by ``"9.5GiB"``, ``"12 MB"`` or ``"4096 B"``; GB is 10^9, GiB is 2^30.

    Raises:
        UsageError: ``text`` is not a number with a unit.
    """
    match = _SIZE.fullmatch(text)
    if match is None or match[2].lower() not in _FACTORS:
        raise UsageError(f"'{text}' is not a size", hint="write a number and a unit, for example 9.5GiB or 12MB")
    # Decimal, because 2.01 GB in binary floating point is a byte short.
    return int(Decimal(match[1]) * _FACTORS[match[2].lower()])


def parse_seconds(text: str) -> float:
    """Seconds meant by ``"90s"``, ``"30m"``, ``"1.5 h"`` or a bare number.

    Raises:
        UsageError: ``text`` is no such time, or not above zero.
    """
    match = _TIME.fullmatch(text)
    seconds = float(match[1]) * _SECONDS[match[2].lower()] if match else 0.0
    if seconds <= 0:
        raise UsageError(f"'{text}' is not a time", hint="write a number and a unit, for example 90s, 30m or 2h")
    return seconds


def format_bytes(count: float) -> str:
    """``count`` bytes with three significant digits or so: ``"1.50 GiB"``, ``"820 KiB"``."""
    sign, value = ("-" if count < 0 else ""), abs(float(count))
    for unit in ("B", "KiB", "MiB", "GiB"):
        if round(value) < 1024 or unit == "GiB":
            break
        value /= 1024
    digits = 0 if unit == "B" or value >= 100 else 1 if value >= 10 else 2
    return f"{sign}{value:.{digits}f} {unit}"


def compact_bytes(count: int) -> str:
    """``count`` for a file name, in the unit that writes it shortest: ``"4MB"``, ``"9.5GiB"``."""
    written = [f"{count / _FACTORS[unit.lower()]:.6g}{unit}" for unit in ("kB", "MB", "GB", "KiB", "MiB", "GiB")]
    exact = [text for text in written if "e" not in text and parse_bytes(text) == count]
    return min(exact or [f"{count / 2**20:.1f}MiB"], key=len)


def format_seconds(seconds: float) -> str:
    """A duration: ``"46 ms"``, ``"0.8 s"``, ``"42 s"``, ``"3 min 20 s"``, ``"2 h 5 min"``."""
    if 0 < seconds < 0.1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60)} min"
