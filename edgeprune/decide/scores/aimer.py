"""AIMER: flatness of the weights, without any text (arXiv 2603.18492)."""

from __future__ import annotations

import numpy as np

from edgeprune.decide.evidence import Doubles, Evidence


def score(evidence: Evidence) -> Doubles:
    """Minus mean |W| over root mean W^2 of gate, up and down together, float64 [E]: the flattest experts go first."""
    facts = evidence.facts
    flatness: Doubles = (facts.absolute / facts.count) / np.sqrt(facts.square / facts.count)
    return -flatness
