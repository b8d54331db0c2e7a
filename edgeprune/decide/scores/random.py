"""Random: the score that every other one has to beat."""

from __future__ import annotations

import numpy as np

from edgeprune.decide.evidence import Doubles, Evidence


def score(evidence: Evidence) -> Doubles:
    """Uniform numbers float64 [E], the same at every call for the same layer and seed."""
    return np.random.default_rng([evidence.seed, evidence.layer]).random((evidence.experts,))
