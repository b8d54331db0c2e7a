"""Merging statistics over different texts of one model: sums add up, reservoirs are joined."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeprune.errors import BadFile
from edgeprune.measure.statistics import ACCUMULATORS, Statistics
from edgeprune.measure.tensorfile import Array, ArrayFile, Shape, write_arrays

Ids = npt.NDArray[np.intp]
_DOMAIN = "reservoir.domain"


class _Part:
    """One file to be merged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.about = Statistics.load(path)
        self.file = ArrayFile(path)

    @property
    def model(self) -> Any:
        return self.about.made_from.get("model")

    def rows(self, name: str, which: Ids | None) -> Array:
        values = self.file[name]
        return values if which is None else values[which]


def merge(
    paths: Sequence[Path], output: Path, made_from: Mapping[str, Any], most_tokens: int | None = None
) -> list[str]:
    """Write the statistics of all the texts of ``paths`` as if they had been measured in one pass.

    One array is in memory at a time. Domains of the same name are added up.

    Args:
        made_from: of the result; its ``model`` must be that of every file.
        most_tokens: of the joined reservoir, which is then drawn again, so that every token of all the texts is as
            likely to be in it; None to keep what the parts have.

    Returns:
        what not every file has, and is therefore left out: names of accumulators, ``the reservoir``, and weights
        without an input moment.

    Raises:
        BadFile: a file is damaged, or of another model.
    """
    parts = [_Part(path) for path in paths]
    for part in parts:
        if part.model != made_from.get("model"):
            raise BadFile(
                f"{part.path} was measured with another model",
                rows=[("its model", str(part.model)[:12]), ("this model", str(made_from.get("model"))[:12])],
                hint="merge statistics of one model over different texts",
            )
    domains = list(dict.fromkeys(name for part in parts for name in part.about.domains))
    common = [name for name in parts[0].file if all(name in part.file for part in parts)]
    places = [[domains.index(name) for name in part.about.domains] for part in parts]
    drawn = [None] * len(parts) if most_tokens is None or _DOMAIN not in common else _drawn(parts, most_tokens)
    shapes = [_shape(name, parts, len(domains), drawn) for name in common]
    about = {
        "domains": domains,
        "tokens": sum(part.about.tokens for part in parts),
        "window": max(part.about.window for part in parts),
        "made_from": dict(made_from),
    }
    pieces = (piece for name in common for piece in _merged(name, parts, places, len(domains), drawn))
    write_arrays(output, shapes, pieces, {"edgeprune": json.dumps(about, sort_keys=True)})
    left_out = {name for part in parts for name in part.file} - set(common)
    return sorted({_described(name) for name in left_out})


def _described(name: str) -> str:
    kind = _kind(name)
    if kind == "moment":
        return name.removeprefix("moment.").rpartition(".")[0]
    return "the reservoir" if kind == "reservoir" else name.split(".")[2]


def _drawn(parts: Sequence[_Part], most: int) -> list[Ids | None]:
    """Which rows of each part's reservoir stay: as many as its share of all tokens, ``most`` in all.

    A reservoir is an even sample of its text. Where one is too small for its text's share, all are.
    """
    tokens = [part.about.tokens for part in parts]
    held = [part.file.shape(_DOMAIN)[0] for part in parts]
    share = min(most / max(sum(tokens), 1), *(rows / max(own, 1) for rows, own in zip(held, tokens, strict=True)))
    random = np.random.default_rng(0)
    counts = [min(rows, round(share * own)) for rows, own in zip(held, tokens, strict=True)]
    return [np.sort(random.choice(rows, count, replace=False)) for rows, count in zip(held, counts, strict=True)]


def _kind(name: str) -> str:
    return name.partition(".")[0]


def _shape(name: str, parts: Sequence[_Part], domains: int, drawn: Sequence[Ids | None]) -> Shape:
    extents = [part.file.shape(name) for part in parts]
    if any(extent[1:] != extents[0][1:] for extent in extents):
        raise BadFile(f"{parts[0].path} and another file disagree on the shape of {name}")
    first = {
        "layer": domains,
        "moment": extents[0][0],
        "reservoir": sum(e[0] if rows is None else len(rows) for e, rows in zip(extents, drawn, strict=True)),
    }[_kind(name)]
    dtype = str(parts[0].file.part(name, 0, 0).dtype)
    return Shape(name, dtype, (first, *extents[0][1:]))


def _merged(
    name: str, parts: Sequence[_Part], places: Sequence[list[int]], domains: int, drawn: Sequence[Ids | None]
) -> Iterator[Array]:
    if _kind(name) == "reservoir":
        for part, place, which in zip(parts, places, drawn, strict=True):
            values = part.rows(name, which)
            yield np.asarray(place, np.int16)[values] if name == _DOMAIN else values
        return
    if _kind(name) == "moment":
        yield sum((part.file[name] for part in parts[1:]), start=parts[0].file[name])
        return
    kind = ACCUMULATORS[name.split(".")[2]]
    total = np.zeros((domains, *parts[0].file.shape(name)[1:]))
    for part, place in zip(parts, places, strict=True):
        values = part.file[name]
        for row, domain in enumerate(place):
            total[domain] = kind.combine(total[domain], values[row])
    yield total
