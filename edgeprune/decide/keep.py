"""Keep-sets: which experts stay, for any count, from one ranking per layer."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from edgeprune.decide.evidence import Doubles, Evidence
from edgeprune.decide.scores import METHODS, SCORES
from edgeprune.errors import UsageError
from edgeprune.model.architecture import Architecture

KeepSet = dict[int, tuple[int, ...]]
Order = npt.NDArray[np.intp]


def check_method(method: str) -> None:
    """Refuse the name of a method that does not exist.

    Raises:
        UsageError: names near ones, and those that do.
    """
    if method not in METHODS:
        near = difflib.get_close_matches(method, METHODS, n=2)
        suggestion = f"did you mean {' or '.join(near)}? " if near else ""
        raise UsageError(f"unknown method '{method}'", hint=f"{suggestion}known: {', '.join(METHODS)}")


def _pooled(score: Callable[[Evidence], Doubles], evidence: Evidence, domains: int) -> Doubles:
    return score(evidence)


def _balanced(score: Callable[[Evidence], Doubles], evidence: Evidence, domains: int) -> Doubles:
    total = np.zeros(evidence.experts)
    for domain in range(domains):
        own = score(evidence.of_domain(domain))
        own = own - min(float(own.min()), 0.0)
        total += own / own.sum() if own.sum() > 0 else own
    return total


def _coverage(score: Callable[[Evidence], Doubles], evidence: Evidence, domains: int) -> Doubles:
    orders = [np.argsort(-score(evidence.of_domain(domain)), kind="stable") for domain in range(domains)]
    result = np.zeros(evidence.experts)
    for place, expert in enumerate(in_turns(orders)):
        result[expert] = evidence.experts - place
    return result


def in_turns(orders: Iterable[Iterable[int]]) -> list[int]:
    """One order of several of the same experts: each in turn names the best of its own that is not yet named."""
    taken: dict[int, None] = {}
    for turn in zip(*orders, strict=True):
        taken.update(dict.fromkeys(int(expert) for expert in turn))
    return list(taken)


# How the domains of the text are put together: added up as they come; each domain's score made to sum to one first,
# so that none outweighs the others (EASY-EP, arXiv 2504.06792); or every domain in turn keeps its best (TB-Coverage,
# arXiv 2607.01710).
MIXTURES: dict[str, Callable[[Callable[[Evidence], Doubles], Evidence, int], Doubles]] = {
    "pooled": _pooled,
    "balanced": _balanced,
    "coverage": _coverage,
}


def rankings(evidence: Iterable[Evidence], method: str, domains: int, mixture: str = "pooled") -> dict[int, Order]:
    """Experts of each layer from most to least worth keeping, int [E].

    Ties go to the lower id, so that the result does not depend on the sort.

    Args:
        method: one of ``SCORES``.
        mixture: one of ``MIXTURES``.
    """
    score = SCORES[method].score
    return {own.layer: np.argsort(-MIXTURES[mixture](score, own, domains), kind="stable") for own in evidence}


def protecting(ranked: Mapping[int, Order], protected: Mapping[int, Sequence[int]]) -> dict[int, Order]:
    """``ranked`` with the protected experts of each layer moved to the front."""
    result = {}
    for layer, order in ranked.items():
        first = set(protected.get(layer, ()))
        result[layer] = np.array([*(e for e in order if e in first), *(e for e in order if e not in first)], np.intp)
    return result


def fewest_kept(protected: Mapping[int, Sequence[int]], architecture: Architecture) -> int:
    """The smallest number of experts per layer that has room for all protected ones, equal numbers per group."""
    size = architecture.experts // architecture.groups
    crowded = (Counter(expert // size for expert in ids).most_common(1) for ids in protected.values() if len(ids))
    return architecture.groups * max((found[0][1] for found in crowded), default=0)


def check_room(protected: Mapping[int, Sequence[int]], architecture: Architecture, kept: int) -> None:
    """Refuse a number of experts that would drop super experts.

    Raises:
        UsageError: names the smallest number that does not.
    """
    least = fewest_kept(protected, architecture)
    if kept < least:
        layer = max(protected, key=lambda own: fewest_kept({own: protected[own]}, architecture))
        raise UsageError(
            f"{kept} of {architecture.experts} experts have no room for the super experts of layer {layer}",
            rows=[("super experts", ", ".join(map(str, protected[layer])))],
            hint=f"keep {least} or more: these are never dropped",
        )


def keep_set(ranked: Mapping[int, Order], architecture: Architecture, kept: int) -> KeepSet:
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
