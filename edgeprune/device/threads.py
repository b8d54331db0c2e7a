"""Work that is shared between the cores, and taken in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from edgeprune.device.probe import cores

T = TypeVar("T")


def in_order(pool: ThreadPoolExecutor, jobs: Iterable[Callable[[], T]]) -> Iterator[T]:
    """Results of ``jobs`` in order. Only a few of them are under way or waiting to be taken, however many there are:
    ``ThreadPoolExecutor.map`` starts all at once and holds what nobody has taken yet."""
    pending: deque[Future[T]] = deque()
    for job in jobs:
        pending.append(pool.submit(job))
        if len(pending) >= 2 * cores():
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
