"""REAM: the most salient experts take in those that are most like them (arXiv 2604.04356)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgeprune.decide.evidence import Doubles, Evidence, ratio
from edgeprune.decide.groups.group import Group
from edgeprune.decide.scores import reap
from edgeprune.errors import UsageError

_LARGEST = 16  # C of the paper, the centre included


def groups(evidence: Evidence, kept: int, among: Sequence[int] | None = None) -> tuple[Group, ...]:
    """``kept`` groups around the experts with the largest REAP scores.

    From the most salient centre down, each takes the 15 experts that are most similar to it among those that are
    no centre and not taken; so most groups are a centre alone.

    The authors multiply every expert's output with its coefficient before they hand it to REAP's score, which
    multiplies with the coefficient again: their centres are those of g^2 ||f||. Here it enters once, as REAP has it.
    Theirs are also outputs and softmax coefficients for all tokens; here they are those of the tokens that were
    really routed to the expert.

    Raises:
        UsageError: so few groups cannot hold all experts.
    """
    ids = np.arange(evidence.experts) if among is None else np.array(among)
    experts = len(ids)
    if kept * _LARGEST < experts:
        raise UsageError(
            f"{kept} groups of at most {_LARGEST} experts do not hold {experts}",
            hint=f"keep at least {-(-experts // _LARGEST)} experts per layer",
        )
    centres = ids[np.argsort(-reap.score(evidence)[ids], kind="stable")[:kept]].tolist()
    nearest_first = np.argsort(-similarity(evidence), axis=1, kind="stable")
    free = set(ids.tolist()) - set(centres)
    found = []
    for centre in centres:
        nearest = [expert for expert in nearest_first[centre].tolist() if expert in free][: _LARGEST - 1]
        free -= set(nearest)
        found.append(Group(centre, tuple(sorted([centre, *nearest]))))
    return tuple(sorted(found, key=lambda group: group.centre))


def similarity(evidence: Evidence) -> Doubles:
    """S = 1/2 [(cos(o_i, o_j) + 1) / 2 + 1 - d_ij / max d], float64 [E, E].

    o is an expert's mean gated output; d_ij the Euclidean distance of the columns of router logits over all tokens,
    each scaled to length one, which the logits' Gram matrix gives.
    """
    sums = evidence.sums
    answers = _cosines(sums.total("gated_output_sum") @ sums.total("gated_output_sum").T)  # a mean has no other angle
    apart = np.sqrt(np.maximum(2 - 2 * _cosines(sums.total("logit_gram")), 0))
    most = float(apart.max())
    liked = 1 - apart / most if most > 0 else np.ones_like(apart)
    both: Doubles = ((answers + 1) / 2 + liked) / 2
    return both


def _cosines(gram: Doubles) -> Doubles:
    """Of the vectors with the inner products ``gram`` [E, E]; 0 with a vector of length zero."""
    length = np.sqrt(np.maximum(np.diag(gram), 0))
    return ratio(gram, np.outer(length, length))
