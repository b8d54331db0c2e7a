"""SHAPE: Shapley values of experts in the coalitions that the router forms (arXiv 2606.09886)."""

from __future__ import annotations

import numpy as np

from edgeprune.decide.evidence import Doubles, Evidence
from edgeprune.errors import Unsupported


def score(evidence: Evidence) -> Doubles:
    """phi_i = sum over coalitions A with i of (v(A) - alpha_i * N(A without i)), float64 [E].

    A coalition is the exact set of experts that a token was routed to, v(A) how many tokens chose it, N(S) how
    many tokens chose a coalition that contains the k - 1 experts of S, and alpha_i the smallest v(A) / N(A without
    i) over coalitions with i. The constant in front, which the authors fix to one model's k and E, does not change
    the order. Coalitions are those of the reservoir, an even sample of the text.

    Raises:
        Unsupported: every token has one expert, so that there are no coalitions and every score would be 0.
    """
    if evidence.reservoir.ids.shape[1] < 2:
        raise Unsupported("the router uses one expert per token, which forms no coalitions")
    sets, counts = np.unique(np.sort(evidence.reservoir.ids, axis=1), axis=0, return_counts=True)
    around: dict[tuple[int, ...], int] = {}
    for members, count in zip(sets.tolist(), counts.tolist(), strict=True):
        for place in range(len(members)):
            rest = tuple(members[:place] + members[place + 1 :])
            around[rest] = around.get(rest, 0) + count
    values: list[list[tuple[int, int]]] = [[] for _ in range(evidence.experts)]
    for members, count in zip(sets.tolist(), counts.tolist(), strict=True):
        for place, expert in enumerate(members):
            values[expert].append((count, around[tuple(members[:place] + members[place + 1 :])]))
    scores = np.zeros(evidence.experts)
    for expert, own in enumerate(values):
        least = min((count / total for count, total in own), default=0.0)
        scores[expert] = sum(count - least * total for count, total in own)
    return scores
