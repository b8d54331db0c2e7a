"""Which channels narrowed experts keep, from a score of every neuron."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.decide.neurons import NARROWINGS
from edgeprune.decide.neurons.layer import NeuronEvidence
from edgeprune.errors import UsageError
from edgeprune.measure.channels import Channels
from edgeprune.measure.replay import LayerExperts
from edgeprune.measure.statistics import Statistics
from edgeprune.model.architecture import Architecture, read_architecture
from edgeprune.model.gguf import GgufFile

# Of a core, that ranking the channels of a model may take where nobody asked for narrower experts.
MOST_RANKING_SECONDS = 7_200.0


def ranking_seconds(architecture: Architecture, narrowing: str) -> float:
    """About how long a core takes to rank the channels of all experts by the score ``narrowing``; 0 where it is
    little beside a pass over the text."""
    experts = architecture.experts * len(architecture.moe_layers)
    return experts * architecture.expert_width**3 * NARROWINGS[narrowing].cube_seconds


def widths_to_try(architecture: Architecture, narrowing: str) -> tuple[int, ...]:
    """Widths that are tried unasked, largest first; none where ranking the channels takes too long."""
    slow = ranking_seconds(architecture, narrowing) > MOST_RANKING_SECONDS
    return () if slow else architecture.width_rule.worth_trying()


def check_narrowing(name: str) -> None:
    """Refuse the name of a score of neurons that does not exist.

    Raises:
        UsageError: names a near one, and those that do.
    """
    if name not in NARROWINGS:
        near = difflib.get_close_matches(name, NARROWINGS, n=1)
        suggestion = f"did you mean {near[0]}? " if near else ""
        raise UsageError(f"unknown narrowing '{name}'", hint=f"{suggestion}known: {', '.join(NARROWINGS)}")


def asked_width(asked: float, architecture: Architecture) -> int:
    """The channels of every expert that ``asked`` means: a number of them, or below 1 a share, of which the nearest
    possible number is taken.

    Raises:
        UsageError: experts of this model cannot have that width; says why, and which they can.
    """
    rule = architecture.width_rule
    possible = rule.widths()
    if not possible:
        reason = rule.obstacle or rule.problem(rule.width // 2)
        raise UsageError(f"experts of {architecture.name} cannot be narrowed: {reason}")
    if 0 < asked < 1:
        return min(possible, key=lambda width: (abs(width - asked * rule.width), -width))
    width = int(asked)
    if width != asked or width not in possible:
        nearest = sorted(sorted(possible, key=lambda own: abs(own - asked))[:3])
        reason = rule.problem(width) if width != rule.width else f"they have {width} channels"
        raise UsageError(
            f"experts of {architecture.name} cannot be narrowed to {asked:g} channels: {reason}",
            hint=f"possible are, for instance, {', '.join(map(str, nearest))}",
        )
    return width


def rank(
    model: str,
    statistics: str,
    narrowing: str,
    output: str,
    made_from: dict[str, Any],
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write the channels of every expert from most to least worth keeping to ``output``. A task for a child process.

    Ties go to the lower channel, so that the result does not depend on the sort. One layer is in memory at a time.

    Args:
        statistics: that the score ``narrowing`` looks at.

    Returns:
        ``digest`` of the channels.

    Raises:
        BadFile: the statistics have not what the score needs.
        Unsupported: the experts of a layer cannot be replayed, and the score needs that.
    """
    file = GgufFile(Path(model))
    architecture = read_architecture(file)
    measured, score = Statistics.load(Path(statistics)), NARROWINGS[narrowing].score
    orders = {}
    for number, layer in enumerate(architecture.moe_layers):
        experts = LayerExperts(file, architecture, layer)
        evidence = NeuronEvidence(layer, measured.layers[layer], experts, measured.reservoirs.get(layer))
        orders[layer] = np.argsort(-score(evidence), axis=1, kind="stable").astype(np.int16)
        if progress is not None:
            progress(number + 1, len(architecture.moe_layers))
    found = Channels(orders, made_from)
    found.save(Path(output))
    return {"digest": found.digest}
