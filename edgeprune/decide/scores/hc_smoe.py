"""HC-SMoE: clusters of experts with similar mean outputs (arXiv 2410.08589)."""

from __future__ import annotations

from edgeprune.decide.evidence import Doubles, Evidence, from_removals, ratio
from edgeprune.decide.grouping import distances, removals


def score(evidence: Evidence) -> Doubles:
    """Order of removal, float64 [E]: average-link clusters under the Euclidean distance of mean outputs; of two
    merging clusters the more frequent representative stays.

    The mean is over the tokens that were routed to the expert; the authors send every token through every expert.
    Their frequency counts the first two choices whatever the model's k; here it is that of the real routing.
    """
    routed = evidence.sums.total("routed")
    means = ratio(evidence.sums.total("output_sum"), routed[:, None])
    order = removals(distances(means), lambda _, a, b: max(a, b, key=lambda e: (routed[e], -e)), linkage="average")
    return from_removals(order, evidence.experts)
