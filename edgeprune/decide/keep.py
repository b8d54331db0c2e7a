"""Keep-sets: which experts stay, for any count, from one ranking per layer."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from edgeprune.decide.scores import SCORES
from edgeprune.errors import UsageError
from edgeprune.measure.statistics import Statistics
from edgeprune.model.architecture import Architecture

KeepSet = dict[int, tuple[int, ...]]


def check_score(method: str) -> None:
    """Refuse the name of a score that does not exist.

    Raises:
        UsageError: names those that do.
    """
    if method not in SCORES:
        raise UsageError(f"unknown score '{method}'", hint=f"known: {', '.join(SCORES)}")


def rankings(statistics: Statistics, architecture: Architecture, method: str) -> dict[int, npt.NDArray[np.intp]]:
    """Experts of each MoE layer from most to least worth keeping, int [E].

    Ties go to the lower id, so that the result does not depend on the sort.

    Raises:
        UsageError: an unknown method.
    """
    check_score(method)
    ranked = {}
    for layer in architecture.moe_layers:
        score = SCORES[method](statistics.layers[layer], layer)
        ranked[layer] = np.argsort(-score, kind="stable")
    return ranked


def keep_set(ranked: Mapping[int, npt.NDArray[np.intp]], architecture: Architecture, kept: int) -> KeepSet:
    """The ``kept`` best experts of each layer, ids ascending; equal numbers per routing group.

    Sets are nested: the set for a smaller count is a subset of that for a larger one.
    """
    if kept == architecture.experts:
        return {}
    groups = architecture.groups
    group_size = architecture.experts // groups
    result: KeepSet = {}
    for layer, order in ranked.items():
        chosen: list[int] = []
        for group in range(groups):
            members = [int(expert) for expert in order if expert // group_size == group]
            chosen += members[: kept // groups]
        result[layer] = tuple(sorted(chosen))
    return result
