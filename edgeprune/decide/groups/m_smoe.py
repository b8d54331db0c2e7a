"""M-SMoE: the experts that are used most take in those that are chosen alike (arXiv 2310.01334)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgeprune.decide.evidence import Evidence, ratio
from edgeprune.decide.groups.group import Group


def groups(evidence: Evidence, kept: int, among: Sequence[int] | None = None) -> tuple[Group, ...]:
    """``kept`` groups around the experts with the most tokens; each other one joins the centre with the largest
    cosine of the columns of router logits over all tokens.

    The authors take the most used experts of the whole model, so that layers keep different numbers; here every layer
    keeps as many.
    """
    ids = np.arange(evidence.experts) if among is None else np.array(among)
    used = evidence.sums.total("routed")[ids]
    gram = evidence.sums.total("logit_gram")
    length = np.sqrt(np.maximum(np.diag(gram), 0))
    alike = ratio(gram, np.outer(length, length))
    centres = np.sort(ids[np.argsort(-used, kind="stable")[:kept]])
    members: dict[int, list[int]] = {centre: [centre] for centre in centres.tolist()}
    for expert in ids.tolist():
        if expert not in members:
            members[int(centres[np.argmax(alike[expert, centres])])].append(expert)
    return tuple(Group(centre, tuple(sorted(own))) for centre, own in members.items())
