"""Expert scores: one file per published method, each a pure function of what was measured.

A score is float64 [E] for one layer; larger means more worth keeping.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from edgeprune.decide.evidence import Doubles, Evidence
from edgeprune.decide.scores import (
    aimer,
    camera,
    dern,
    ean,
    easy_ep,
    frequency,
    gated_energy,
    gated_norm,
    gemq,
    hc_smoe,
    heapr,
    man,
    mask_fisher,
    mc_moe,
    mone,
    msan,
    premoe,
    random,
    reap,
    shape,
    soft_frequency,
    stun,
    tenp,
    uncurl,
)

Score = Callable[[Evidence], Doubles]


@dataclass(frozen=True)
class Method:
    """A way to rank the experts of a layer.

    Attributes:
        score: of one layer's evidence.
        weighs: the score looks at the weights themselves.
        samples: the score looks at the tokens of the reservoir.
        draws: the score depends on the evidence's seed.
        differentiates: the score needs gradients, which only a Hugging Face checkpoint can give.
    """

    score: Score
    weighs: bool = False
    samples: bool = False
    draws: bool = False
    differentiates: bool = False


SCORES: dict[str, Method] = {
    "reap": Method(reap.score),
    "frequency": Method(frequency.score),
    "soft-frequency": Method(soft_frequency.score),
    "ean": Method(ean.score),
    "man": Method(man.score),
    "msan": Method(msan.score),
    "gated-norm": Method(gated_norm.score),
    "gated-energy": Method(gated_energy.score),
    "easy-ep": Method(easy_ep.score),
    "tenp": Method(tenp.score),
    "premoe": Method(premoe.score),
    "mc-moe": Method(mc_moe.score),
    "dern": Method(dern.score),
    "mone": Method(mone.score),
    "shape": Method(shape.score, samples=True),
    "uncurl": Method(uncurl.score),
    "hc-smoe": Method(hc_smoe.score),
    "stun": Method(stun.score, weighs=True),
    "camera": Method(camera.score, weighs=True),
    "aimer": Method(aimer.score, weighs=True),
    "heapr": Method(heapr.score, differentiates=True),
    "mask-fisher": Method(mask_fisher.score, differentiates=True),
    "gemq": Method(gemq.score, differentiates=True),
    "random": Method(random.score, draws=True),
}
# Methods that replay a layer from kept tokens instead of scoring its sums, see ``decide.replaying``; the last is for
# sets that are healed afterwards, see ``decide.healable``.
REPLAY, NAEE, HEALABLE = "replay", "naee", "healable"
METHODS = (REPLAY, NAEE, HEALABLE, *SCORES)
