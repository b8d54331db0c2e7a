"""What was measured of this machine on an earlier day, in the user's cache folder."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from edgeprune.errors import BadFile, EdgepruneError
from edgeprune.files import digest, read_json, to_json, write_text

T = TypeVar("T")


def remembered(
    kind: str,
    made_from: Mapping[str, Any],
    measure: Callable[[], Any],
    read: Callable[[Any, str], T],
    *,
    most_seconds: float | Callable[[Any], float] = float("inf"),
) -> T:
    """What ``measure`` returns, a JSON value, or returned earlier where all of ``made_from`` was the same.

    Args:
        kind: folder within the cache.
        read: makes of the value what is wanted, given where it was found; raises BadFile if it cannot, and then it
            is measured anew.
        most_seconds: age up to which it counts, or what says so of a value.
    """
    import platformdirs  # only here: the pytest plugin loads nothing of the kind

    path = Path(platformdirs.user_cache_dir("edgeprune")) / kind / f"{digest(dict(made_from))[:32]}.json"
    with contextlib.suppress(BadFile, OSError):
        age, value = time.time() - path.stat().st_mtime, read_json(path)
        if 0 <= age <= (most_seconds(value) if callable(most_seconds) else most_seconds):
            return read(value, str(path))
    value = measure()
    with contextlib.suppress(OSError, EdgepruneError):  # a cache that cannot be written to is none
        write_text(path, to_json(value))
    return read(value, "the measurement")
