"""Speed at several depths of the context, in a child process: what a long conversation feels like."""

from __future__ import annotations

import statistics as stdlib_statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.measure.launch import Launch
from edgeprune.measure.llama import Session, session
from edgeprune.measure.meanwhile import Meanwhile

Progress = Callable[[int, int], None]


def at_depths(
    model: str,
    launch: dict[str, Any],
    depths: Sequence[int],
    block: int,
    generated: int,
    seconds: float,
    repeats: int = 3,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Prefill and decode speed with so many tokens in the context already.

    A task for ``edgeprune.measure.child``. At each depth, ``block`` tokens are prefilled and ``generated`` decoded,
    ``repeats`` times over, from the same place where the model's memory can go back, else one after the other; what
    cannot go back is filled from the beginning again for the next depth.

    Args:
        depths: in tokens, ascending; each with ``block + generated`` less than the context at most.
        seconds: no deeper depth is begun once filling the context has taken so long, or would.

    Returns:
        for each depth that was reached: ``depth``, in tokens; ``prefill_per_s`` and ``decode_per_s``, median, least
        and most of the repeats in tokens per second; ``first_token_seconds``, what a prompt of that length takes
        from an empty context to its first token, None at depth 0; ``others``, the share of all cores that other
        programs used meanwhile, or None after too short a time.
    """
    settings, rows = Launch(**launch), []
    random = np.random.default_rng(0)
    with session(Path(model), settings, single_output=True) as opened:
        _filled(opened, random, 0, min(block, settings.context))  # the first decode finds no page in memory
        opened.clear()
        # Tokens in the context and seconds that they took; both of them in all, however often it was filled.
        filled, spent, tokens, seconds_spent = 0, 0.0, 0, 0.0
        for number, depth in enumerate(depths):
            rate = seconds_spent / tokens if tokens else 0.0
            late = tokens > 0 and seconds_spent + rate * (depth - filled) > seconds
            if late or depth + block + generated > settings.context:
                break
            meanwhile, started = Meanwhile(), time.perf_counter()
            _filled(opened, random, filled, depth)
            took = time.perf_counter() - started
            spent, tokens, seconds_spent = spent + took, tokens + depth - filled, seconds_spent + took
            held, measured = _repeated(opened, random, depth, block, generated, repeats)
            rows.append({"depth": depth, **measured, "first_token_seconds": spent if depth else None})
            rows[-1]["others"] = meanwhile.others()
            filled = depth
            if held > depth:  # the repeats stay in a memory that cannot go back
                opened.clear()
                filled, spent = 0, 0.0
            if progress is not None:
                progress(number + 1, len(depths))
    return rows


def _filled(opened: Session, random: np.random.Generator, start: int, end: int) -> None:
    """Prefill positions ``start`` to ``end`` with tokens of all kinds, so that many experts take part."""
    batch = min(opened.launch.batch, opened.launch.context)
    while start < end:
        count = min(batch, end - start)
        tokens = random.integers(0, opened.vocabulary_size, count).tolist()
        opened.extend(tokens, start, all_logits=False)
        start += count


def _repeated(
    opened: Session, random: np.random.Generator, depth: int, block: int, generated: int, repeats: int
) -> tuple[int, dict[str, list[float]]]:
    """How many tokens the context then holds, and both speeds."""
    prefill, decode, position = [], [], depth
    for _ in range(repeats):
        if position + block + generated > opened.launch.context:  # of what cannot go back, at the end of the context
            break
        started = time.perf_counter()
        _filled(opened, random, position, position + block)
        prefill.append(block / (time.perf_counter() - started))
        position += block
        started = time.perf_counter()
        for token in random.integers(0, opened.vocabulary_size, generated).tolist():
            opened.extend([token], position, all_logits=False)
            position += 1
        decode.append(generated / (time.perf_counter() - started))
        position = depth if opened.forget(depth) else position
    return position, {"prefill_per_s": _of_three(prefill), "decode_per_s": _of_three(decode)}


def _of_three(values: list[float]) -> list[float]:
    """Median, least and most."""
    return [stdlib_statistics.median(values), min(values), max(values)]
