"""What a plan is chosen for and from, and what every part of it is predicted to cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeprune.decide.mended import HEALED_SHARE, NARROW_HEALED_SHARE, HealingText, Mending
from edgeprune.decide.plan import Plan
from edgeprune.device.budget import Budget
from edgeprune.device.probe import cores
from edgeprune.device.profile import Profile
from edgeprune.measure.cost import Cost
from edgeprune.measure.launch import Launch
from edgeprune.measure.rates import KernelRates
from edgeprune.measure.sensitivity import Sensitivity
from edgeprune.measure.shares import Sampled
from edgeprune.model import ggml
from edgeprune.model.architecture import Architecture, Tensor
from edgeprune.model.gguf import GgufFile


def _as_it_is(plan: Plan) -> Plan:
    return plan


def _no_time(_: Plan) -> float:
    return 0.0


@dataclass(frozen=True)
class Problem:
    """What a plan is chosen for and from.

    Attributes:
        file: the source GGUF.
        ranked: experts of each layer, best first, int [E].
        drop_nats: measured cost of keeping K experts, not healed, nats per token, by K; 0 for all.
        types: GGML types that may be used (besides each tensor's own).
        launch: settings before placement.
        made_from: digests for the plan.
        heal: whether the plan's changed experts are healed.
        text: that they are healed on, or None where what that mends is not known.
        train: whether those of a plan with fewer or narrower ones are trained before.
        limit_seconds: most time to encode what changes type, on all cores.
        part_bytes: most bytes of one file if it is to be split, or 0.
        healing: about how many seconds healing a plan takes here.
        reduced: makes of a plan that drops experts the one that merges them.
        rates: measured speed of the device's products, or None where its bandwidth has to do.
        width: channels that every expert keeps, or 0 for all; ``drop_nats`` is then of both.
        narrowing: the score that chooses them, or "".
        channels: digest of their order by it, or "".
        mtp: whether blocks that predict further tokens are kept.
    """

    file: GgufFile
    architecture: Architecture
    sensitivity: Sensitivity
    ranked: Mapping[int, npt.NDArray[np.intp]]
    drop_nats: Mapping[int, float]
    types: frozenset[str]
    budget: Budget
    profile: Profile
    launch: Launch
    method: str
    made_from: dict[str, Any]
    heal: bool = False
    text: HealingText | None = None
    train: bool = False
    limit_seconds: float = math.inf
    part_bytes: int = 0
    rates: KernelRates | None = None
    mtp: bool = False
    reduced: Callable[[Plan], Plan] = _as_it_is
    healing: Callable[[Plan], float] = _no_time
    width: int = 0
    narrowing: str = ""
    channels: str = ""

    def shape(self, tensor: Tensor, kept: int) -> tuple[int, ...]:
        """Shape of ``tensor`` with ``kept`` experts."""
        return tensor.kept_shape(kept, self.width)

    def quantised(self, tensor: Tensor, name: str, kept: int, *, healed: bool) -> Cost:
        """What ``tensor`` costs as the type ``name`` beside ``kept`` experts; healing makes good a part.

        Raises:
            BadFile: the type cannot hold the tensor's largest weight.
        """
        if not healed or self.text is None:
            return self.sensitivity.cost(tensor, name)
        channels = self.width / self.architecture.expert_width if self.width else 1.0
        mending = Mending(self.sampled, self.text, kept / self.architecture.experts, channels)
        return self.sensitivity.cost(tensor, name, mending.left(tensor, name, self.shape(tensor, 1)[0]))

    def dropped(self, kept: int) -> float:
        """Predicted nats per token that ``kept`` experts of the problem's width cost, healed if they are."""
        whole = kept == self.architecture.experts
        share = NARROW_HEALED_SHARE if whole else HEALED_SHARE
        return self.drop_nats[kept] * (share if self.heal and (self.width or not whole) else 1.0)

    def reduction(self, kept: int) -> Cost:
        """What ``dropped`` adds to the cost of other errors: an error in the experts' outputs that costs as much."""
        outputs = [tensor.name for tensor in self.architecture.tensors if tensor.role == "expert_down"]
        return self.sensitivity.error_of(outputs, self.dropped(kept))

    def nats(self, kept: int, quantised: Cost) -> float:
        """Predicted nats per token of all, where the types cost ``quantised``."""
        if quantised.nats <= 0:
            return self.dropped(kept)
        return self.sensitivity.nats(self.reduction(kept) + quantised)

    def seconds(self, tensor: Tensor, kept: int, name: str) -> float:
        """Time to encode ``tensor`` with ``kept`` experts as the type ``name`` on all cores of this machine; 0 where
        that was not measured. Healed experts are encoded twice, without error feedback and with it."""
        rate = self.sensitivity.rates.get(name, 0.0)
        if name == tensor.type or rate <= 0:
            return 0.0
        shape = self.shape(tensor, kept)
        twice = self.heal and tensor.is_expert and ggml.BY_NAME[name].feeds_back(shape[0])
        return (1 + twice) * float(np.prod(shape, dtype=np.int64)) / (rate * self.threads)

    @cached_property
    def sampled(self) -> Sampled:
        """What healing leaves of the errors of types."""
        return Sampled(self.sensitivity.mended)

    @cached_property
    def threads(self) -> int:
        """That encode and solve; asking the system takes as long as everything else that is computed for a tensor."""
        return cores()
