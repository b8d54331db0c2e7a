"""One pass over the calibration text, in a child process: every sum and token that scores and solver ask for."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeprune.errors import BadFile
from edgeprune.files import digest, room_for
from edgeprune.measure.arena import Arena
from edgeprune.measure.child import peak_memory_bytes
from edgeprune.measure.collector import Collector
from edgeprune.measure.launch import Launch
from edgeprune.measure.llama import Session, session
from edgeprune.measure.merging import merge
from edgeprune.measure.statistics import Statistics
from edgeprune.measure.tasks import Switch, chosen_windows, finite, window_launch
from edgeprune.measure.text import LeftOut, Window

Progress = Callable[[int, int], None]
# A shard is what a killed pass loses at most; but every one of them is as large on the disk as all statistics.
_SHARD_TOKENS, _MOST_SHARDS = 1 << 13, 16


def _calibration(
    opened: Session, texts: list[dict[str, str]], window: int, most: int
) -> tuple[list[list[Window]], dict[str, Any]]:
    """Shards of the calibration text, and what is to be said of the text: see ``collect``."""
    short: dict[str, LeftOut] = {}
    shards = _shards(chosen_windows(opened, texts, "calibration", window, most, short))
    held_out = True
    if any(text["split"] == "shared" for text in texts):
        try:
            chosen_windows(opened, texts, "held_out", window, window)
        except BadFile:
            held_out = False
    left_out = {name: [own.documents, own.of, own.tokens] for name, own in short.items() if own.documents}
    return shards, {"held_out": held_out, "left_out": left_out}


def collect(
    model: str,
    output: str,
    scratch: str,
    texts: list[dict[str, str]],
    window: int,
    most_tokens: int,
    weights: list[str],
    experts: int,
    arch: str,
    made_from: dict[str, Any],
    reservoir_tokens: int = 0,
    layers: list[int] | None = None,
    tokens_only: bool = False,
    beside: list[dict[str, str]] | None = None,
    threads: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """One pass over the calibration text; writes ``Statistics`` to ``output``.

    The text is worked off in shards, each a part of one domain, whose statistics are kept in the folder
    ``scratch`` until all are there: a killed pass goes on after the last finished one.

    Args:
        reservoir_tokens: how many tokens are kept whole, spread at random over the text.
        layers: first layer and the one after the last that are looked at, instead of all; the model is not
            computed further.
        tokens_only: the sums are not wanted, only tokens and the moments of ``weights``.
        beside: other texts, of which ``most_tokens`` are read after those of ``texts``.

    Returns:
        tokens seen and peak memory in bytes; ``left_out``: by domain, how many documents were too short, of how many,
        and their tokens; ``held_out``: whether the text leaves any to be held out.
    """
    folder, names = Path(scratch), frozenset(weights)
    folder.mkdir(parents=True, exist_ok=True)
    observer = Switch()
    with room_for(Path(output)), session(Path(model), window_launch(window, threads), observer) as opened:
        shards, found = _calibration(opened, texts, window, most_tokens)
        shards += _calibration(opened, beside, window, most_tokens)[0] if beside else []
        kept = _kept_positions([part for shard in shards for part in shard], reservoir_tokens)
        total, done = sum(map(len, shards)), 0
        paths: list[Path] = []
        for index, shard in enumerate(shards):
            path = folder / f"statistics-{digest(made_from)[:16]}-{index:04d}.safetensors"
            own = kept[done : done + len(shard)]
            paths.append(path)
            if not _is_statistics(path):
                arena = Arena(folder)
                collector = Collector(
                    experts,
                    arena,
                    gates_input=arch == "llama4",
                    capacity=sum(map(len, own)) if reservoir_tokens else None,
                    weights=names,
                    only=None if layers is None else range(*layers),
                    tokens_only=tokens_only,
                )
                observer.current = collector
                for part, positions in zip(shard, own, strict=True):
                    collector.kept = positions
                    logits = opened.run(part.tokens)
                    if layers is None:
                        finite(model, logits)
                    collector.end_window()
                    done += 1
                    if progress is not None:
                        progress(done, total)
                _saved(collector, shard, window, made_from, path)
            else:
                done += len(shard)
    merge(paths, Path(output), made_from)
    for path in paths:
        path.unlink()
    tokens = sum(len(part.tokens) for shard in shards for part in shard)
    return {"tokens": tokens, "peak_bytes": peak_memory_bytes(), **found}


def collect_layerwise(
    model: str,
    checkpoint: str,
    output: str,
    scratch: str,
    texts: list[dict[str, str]],
    window: int,
    most_tokens: int,
    weights: list[str],
    experts: int,
    made_from: dict[str, Any],
    reservoir_tokens: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The same over the checkpoint that ``model`` was converted from, run by torch, with gradients.

    The windows and the kept tokens are those of ``collect``; of ``model`` only the tokenizer is used.
    """
    from edgeprune.measure.layerwise.engine import Text, measure

    opened = Session(Path(model), Launch(), vocab_only=True)
    with contextlib.closing(opened):
        shards, found = _calibration(opened, texts, window, most_tokens)
    parts = [part for shard in shards for part in shard]
    text = Text(parts, _kept_positions(parts, reservoir_tokens))
    measure(
        Path(checkpoint), text, Path(output), Path(scratch), weights, experts, window, made_from, progress=progress
    )
    return found


def _shards(chosen: list[Window]) -> list[list[Window]]:
    """The windows of each domain, in runs of at most ``_SHARD_TOKENS`` tokens or one window; of long texts in longer
    runs, so that there are no more than about ``_MOST_SHARDS``."""
    most = max(_SHARD_TOKENS, sum(len(part.tokens) for part in chosen) // _MOST_SHARDS)
    by_domain: dict[str, list[Window]] = {}
    for part in chosen:
        by_domain.setdefault(part.domain, []).append(part)
    shards: list[list[Window]] = []
    for own in by_domain.values():
        tokens = most
        for part in own:
            if tokens + len(part.tokens) > most:
                shards.append([])
                tokens = 0
            shards[-1].append(part)
            tokens += len(part.tokens)
    return shards


def _kept_positions(chosen: list[Window], most: int) -> list[npt.NDArray[np.intp]]:
    """Which positions of each window go into the reservoir: ``most`` of all tokens, equally likely."""
    bounds = np.cumsum([0, *(len(part.tokens) for part in chosen)])
    picked = np.random.default_rng(0).choice(bounds[-1], min(most, int(bounds[-1])), replace=False)
    picked.sort()
    return [picked[(picked >= a) & (picked < b)] - a for a, b in itertools.pairwise(bounds)]


def _is_statistics(path: Path) -> bool:
    with contextlib.suppress(BadFile):
        Statistics.load(path)
        return True
    return False


def _saved(collector: Collector, shard: list[Window], window: int, made_from: dict[str, Any], path: Path) -> None:
    tokens, moments = sum(len(part.tokens) for part in shard), collector.moments
    layers, reservoirs = collector.layers(), collector.reservoirs()
    Statistics([shard[0].domain], tokens, window, layers, moments, made_from, reservoirs).save(path)
