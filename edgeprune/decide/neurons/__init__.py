"""Scores of the neurons (channels) of experts: one file per published method.

A score is float64 [E, F] for one layer; larger means more worth keeping. It is compared within an expert, because
llama.cpp loads experts of one width only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from edgeprune.decide.neurons import camera, energy, heapr, mask_fisher, tenp, ziplm
from edgeprune.decide.neurons.layer import Doubles, NeuronEvidence

NeuronScore = Callable[[NeuronEvidence], Doubles]


@dataclass(frozen=True)
class Narrowing:
    """A way to rank the neurons of an expert.

    Attributes:
        score: of one layer's evidence.
        differentiates: the score needs gradients, which only a Hugging Face checkpoint can give.
        cube_seconds: of a core, for the cube of each expert's width; 0 of scores that look at each channel once.
    """

    score: NeuronScore
    differentiates: bool = False
    cube_seconds: float = 0.0


NARROWINGS: dict[str, Narrowing] = {
    "ziplm": Narrowing(ziplm.score, cube_seconds=1e-9),  # 1.0 to 0.5 ns at 768 to 2048 channels
    "camera": Narrowing(camera.score),
    "energy": Narrowing(energy.score),
    "tenp": Narrowing(tenp.score),
    "heapr": Narrowing(heapr.score, differentiates=True),
    "mask-fisher": Narrowing(mask_fisher.score, differentiates=True),
}
