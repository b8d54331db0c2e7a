"""GEMQ: error of the layer's output, weighted by the squared gradient of the loss (arXiv 2605.23078)."""

from __future__ import annotations

from edgeprune.decide.evidence import Doubles, Evidence


def score(evidence: Evidence) -> Doubles:
    """Sum over tokens and channels c of (dL/dy_c)^2 (g f_c)^2, float64 [E].

    The paper charges quantisation errors of an expert in this way, to spread bits over a whole model; an expert that
    is gone is an error as large as its contribution g f to the layer's output y.
    """
    return evidence.sums.total("loss_weighted_square")
