"""Comparing methods of choosing experts, or of narrowing them, on held-out text by masking: no file is written.

Merged experts are other weights, so each number of them is a file of the source's types, measured and deleted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgeprune.decide.keep import check_method, check_room, keep_set
from edgeprune.decide.narrowing import asked_width, check_narrowing
from edgeprune.decide.plan import DROP, REDUCTIONS, USER, Plan, Prediction
from edgeprune.decide.scores import SCORES
from edgeprune.errors import BadFile, UsageError
from edgeprune.files import digest, read_json, to_json, write_text
from edgeprune.measure import child
from edgeprune.measure.launch import Launch
from edgeprune.model.architecture import Architecture
from edgeprune.prove.comparison import Comparison, Row, ordered, row
from edgeprune.prove.page import render_comparison
from edgeprune.settings import KEEP
from edgeprune.stages.measuring import MeasureStages, tools
from edgeprune.stages.merging import MergeStages
from edgeprune.stages.narrowing import NARROW, NarrowStages

COMPARISON = "compare.json"
MERGE = "merge:"  # before the name of a way to merge, of which some are names of scores, too


def counts_of(fractions: Sequence[float], architecture: Architecture) -> list[int]:
    """Numbers of experts for the fractions to keep: the nearest that the router allows, largest first.

    Raises:
        UsageError: a fraction that is none, or that no number is near.
    """
    if architecture.obstacle:
        raise UsageError(f"experts of {architecture.name} cannot be dropped: {architecture.obstacle}")
    counts = {_count_of(fraction, architecture) for fraction in fractions}
    return sorted(counts, reverse=True)


def _count_of(fraction: float, architecture: Architecture) -> int:
    allowed = [n for n in range(1, architecture.experts) if architecture.count_allowed(n)]
    if not 0 < fraction < 1 or not allowed:
        raise UsageError(f"{fraction:g} is not a fraction of experts to keep", hint="for example 0.9,0.75,0.5")
    return min(allowed, key=lambda n: (abs(n - fraction * architecture.experts), -n))


def rounded(fractions: Sequence[float], architecture: Architecture) -> list[str]:
    """What is not quite as it was asked for: fractions that no number of experts is near, or that share one."""
    remarks, meant = [], dict[int, list[float]]()
    for fraction in dict.fromkeys(fractions):
        kept = _count_of(fraction, architecture)
        meant.setdefault(kept, []).append(fraction)
        if abs(kept - fraction * architecture.experts) > 0.5:
            remarks.append(f"{fraction:g} of {architecture.experts} experts is not possible: the nearest is K={kept}")
    for kept, own in meant.items():
        if len(own) > 1:
            remarks.append(f"{' and '.join(f'{one:g}' for one in own)} are the same number of experts, K={kept}")
    return remarks


def compare(run: MergeStages, fractions: Sequence[float], methods: Sequence[str] | None, seeds: int) -> Comparison:
    """Measure every method at every fraction; saved as ``compare.json`` and ``compare.html`` in the run directory.

    What an earlier comparison measured is taken from it; its other rows stay, if they are of the same model and text.

    Args:
        methods: all that can be used on the model when None; ``narrow:SCORE`` keeps all experts and narrows them,
            ``merge:NAME`` merges them by one of ``plan.REDUCTIONS``.
        seeds: draws of the methods that draw at random.
    """
    for method in methods or ():
        _check(method, run.architecture)
    counts = counts_of(fractions, run.architecture)
    for remark in rounded(fractions, run.architecture):
        run.listener.say(remark)
    check_room(run.protected, run.architecture, min(counts))
    methods = (*run.comparable(), *run.narrowable()) if methods is None else methods
    tokens = run.settings.evaluation_tokens
    made_from = {
        "source": run.fingerprint,
        "statistics": digest(run.statistics.made_from),
        "text": run.text_digest,
        "tokens": tokens,
        "window": run.settings.window,
        "mixture": run.settings.mixture,
        "tools": tools(),
    }
    path = run.folder.path / "compare-cache.json"
    cache = _cache(path, made_from)
    rows: list[Row] = []
    for method in methods:
        if method.startswith(MERGE):
            for kept in counts:
                key = f"{method} {kept}"
                if key not in cache["measured"]:
                    cache["measured"][key] = _merged(run, method.removeprefix(MERGE), kept)
                    write_text(path, to_json(cache))
                rows.append(row(method, kept, [cache["measured"][key]]))
            continue
        if method.startswith(NARROW):
            rows += _narrowed(run, method, counts, cache, path)
            continue
        draws = range(seeds if method in SCORES and SCORES[method].draws else 1)
        results: dict[int, list[dict[str, Any]]] = {kept: [] for kept in counts}
        for seed in draws:
            ranked = run.ranked(method, counts, seed)
            sets = {kept: keep_set(ranked, run.architecture, kept) for kept in counts}
            keys = {kept: digest({str(layer): ids for layer, ids in keep.items()}) for kept, keep in sets.items()}
            missing = [kept for kept in counts if keys[kept] not in cache["measured"]]
            if missing:
                masks = [run.mask(sets[kept]) for kept in missing]
                measured = run.divergence(run.source, "held_out", masks, f"{method} on held-out text")
                cache["measured"].update(zip((keys[kept] for kept in missing), measured, strict=True))
                write_text(path, to_json(cache))
            for kept in counts:
                results[kept].append(cache["measured"][keys[kept]])
        rows += [row(method, kept, results[kept]) for kept in counts]
    if earlier := _others(run, made_from, rows):
        run.listener.say(f"with {len(earlier)} rows of earlier comparisons in {run.folder.path}")
    rows += earlier
    text = {"tokens": int(rows[0].quality["tokens"]), "domains": sorted(rows[0].domains)}
    found = Comparison(run.architecture.name, run.architecture.experts, ordered(rows), text, made_from)
    write_text(run.folder.path / COMPARISON, to_json(found.to_json()))
    write_text(run.folder.path / "compare.html", render_comparison(found))
    return found


def _check(method: str, architecture: Architecture) -> None:
    """Refuse a method that does not exist, or that the model's experts cannot bear.

    Raises:
        UsageError: names those that do.
    """
    if method.startswith(NARROW):
        check_narrowing(method.removeprefix(NARROW))
        asked_width(0.5, architecture)
        return
    merging = [MERGE + name for name in REDUCTIONS if name != DROP]
    if not method.startswith(MERGE):
        check_method(method)
    elif method not in merging:
        raise UsageError(f"unknown method '{method}'", hint=f"known: {', '.join(merging)}")


def _merged(run: MergeStages, reduce: str, kept: int) -> dict[str, Any]:
    """Quality on held-out text of the file in which ``kept`` experts have taken in the others."""
    plan = _merging_plan(run, reduce, kept)
    path = run.folder.scratch / "merged.gguf"
    merged = run.merged(plan)
    try:
        arguments = {"model": str(run.source), "plan": plan.to_json(), "output": str(path), "merged": merged}
        with run.listener.progress(f"file with K={kept} merged by {reduce}") as progress:
            child.call("edgeprune.build.builder:build", arguments, progress)
        return run.divergence(path, "held_out", title=f"{MERGE}{reduce} on held-out text")[0]
    finally:
        path.unlink(missing_ok=True)
        run.remove_merged(merged)


def _merging_plan(run: MergeStages, reduce: str, kept: int) -> Plan:
    """All types as they are; nothing is predicted."""
    plan = Plan(
        arch=run.architecture.arch,
        experts=run.architecture.experts,
        kept=kept,
        keep=keep_set(run.ranked("reap", [kept]), run.architecture, kept),
        types={},
        launch=Launch(),
        method="reap",
        origin=USER,
        predicted=Prediction(),
        made_from={"source": run.fingerprint, "statistics": digest(run.statistics.made_from)},
        mtp=run.settings.mtp == KEEP,
    )
    return run.merging(plan, reduce)


def _narrowed(run: NarrowStages, method: str, counts: Sequence[int], cache: dict[str, Any], path: Path) -> list[Row]:
    """Rows of narrowing all experts to the bytes of each of ``counts``, by the score that ``method`` names."""
    score, experts = method.removeprefix(NARROW), run.architecture.experts
    widths = {kept: asked_width(kept / experts, run.architecture) for kept in counts}
    about = run.channels_digest(score)
    keys = {width: digest({"channels": about, "width": width}) for width in widths.values()}
    missing = [width for width, key in keys.items() if key not in cache["measured"]]
    if missing:
        masks = [run.narrowed(width, score) for width in missing]
        title = f"{method} on held-out text"
        measured = run.divergence(run.source, "held_out", [None] * len(masks), title, masks)
        cache["measured"].update(zip((keys[width] for width in missing), measured, strict=True))
        write_text(path, to_json(cache))
    return [row(method, kept, [cache["measured"][keys[width]]], width) for kept, width in widths.items()]


def _others(run: MeasureStages, made_from: dict[str, Any], rows: Sequence[Row]) -> list[Row]:
    """Rows of earlier comparisons of the same, but for those that were measured again."""
    earlier = saved(run)
    if earlier is None or earlier.made_from != made_from:
        return []
    again = {(own.method, own.kept) for own in rows}
    return [own for own in earlier.rows if (own.method, own.kept) not in again]


def saved(run: MeasureStages) -> Comparison | None:
    """The last comparison in the run directory, whatever it is of; None when there is none that can be read."""
    with contextlib.suppress(BadFile):
        return Comparison.from_json(read_json(run.folder.path / COMPARISON))
    return None


def _cache(path: Path, made_from: dict[str, Any]) -> dict[str, Any]:
    with contextlib.suppress(BadFile, AttributeError, TypeError):
        known: dict[str, Any] = read_json(path)
        if known.get("made_from") == made_from and isinstance(known.get("measured"), dict):
            return known
    return {"made_from": made_from, "measured": {}}
