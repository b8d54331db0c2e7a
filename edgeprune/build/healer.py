"""One layer's experts encoded as planned, their down projections fitted to that.

Expert by expert: gate and up are encoded, what they make of their tokens is kept, and they are let go; then all down
projections are fitted together, and each is made and encoded when its turn comes. So the largest thing in memory is
what the layer's tokens take, however large the layer is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeprune.build.gather import Channel, gathered_rows
from edgeprune.build.store import Bytes, Store
from edgeprune.decide.plan import Plan
from edgeprune.device.probe import cores
from edgeprune.device.threads import in_order
from edgeprune.errors import BadFile
from edgeprune.measure import feedback
from edgeprune.measure.activation import Activation
from edgeprune.measure.feedback import Encoded, Inputs
from edgeprune.measure.refit import Healed, Share, judges, refit
from edgeprune.measure.replay import Expert, LayerExperts, activation_of
from edgeprune.measure.reservoir import Reservoir
from edgeprune.measure.statistics import InputMoments, Statistics
from edgeprune.measure.token_weights import fit_scale
from edgeprune.measure.weights import layer_tensors
from edgeprune.model import ggml
from edgeprune.model.architecture import Architecture, Tensor
from edgeprune.model.gguf import GgufFile

Floats = npt.NDArray[np.float32]
# Longest run of tokens that are fitted or judge together: those of a window are alike.
_RUN = 512
# How much of what the residual stream has gone astray before a layer that layer is to put right. With 28 of 32
# experts KL divergence was 0.0093 so and 0.0101 without (tests/benchmarks/healing.py).
_LEAN = 0.5
# Tokens for every channel that the second moments of a layer's input are taken from.
_PRIOR_TOKENS = 4
_NORM_BEHIND = re.compile(r"post_ffw_norm|layer_output_norm")


def joins_the_stream(file: GgufFile, architecture: Architecture, layer: int) -> bool:
    """Whether the experts' output is added to the residual stream as it is: not normed again (Gemma), nor scaled
    (Granite)."""
    normed = any(t.layer == layer and _NORM_BEHIND.search(t.name) for t in architecture.tensors)
    return not normed and file.get(f"{architecture.arch}.residual_scale", 1.0) == 1.0


@dataclass(frozen=True)
class _Begun:
    """An expert whose gate and up are encoded.

    Attributes:
        encoded: these.
        share: what is left for its down projection to do.
        answer: what that answers as it was, float32 [n, D].
        bias: what its bias answers, float32 [n, D] or 0; like the others on the tokens' scale.
    """

    encoded: list[Encoded]
    share: Share
    answer: Floats
    bias: Floats | float


class LayerHealer:
    """One layer, and the tokens that it is fitted on."""

    def __init__(
        self,
        file: GgufFile,
        architecture: Architecture,
        layer: int,
        plan: Plan,
        teacher: Reservoir,
        student: Statistics,
        channels: Channel | None = None,
        moved: Floats | None = None,
    ) -> None:
        """
        Args:
            file: the source, with merged experts in it if there are any.
            teacher: what the source's layer sees and answers.
            student: of the prefix that is built, over the same tokens.
            moved: how the residual stream that enters the layer differs by now from the ``student``'s, float32
                [N, D], because layers before it are healed that were not when that was observed.
            channels: that every expert keeps, int [E, F'], or None for all.

        Raises:
            BadFile: the tokens are others.
        """
        self.channels = channels
        self.file, self.architecture, self.plan, self.layer = file, architecture, plan, layer
        self.kept = plan.kept_of(layer)
        self.teacher, self.student = teacher, student.reservoirs[layer]
        self.moments = student.moments
        self.tensors = {
            role: tensor for role, tensor in layer_tensors(architecture, layer).items() if tensor.is_expert
        }
        self.experts = LayerExperts(file, architecture, layer)
        # Merged experts do not answer as the teacher did, which is what the activation is known by.
        self.originals = LayerExperts(GgufFile(file.path), architecture, layer)
        if not np.array_equal(self.teacher.domain, self.student.domain):
            raise BadFile("the statistics of the source and of the pruned model are over different tokens")
        self.held_out = judges(len(self.student), _RUN)
        self.scale = fit_scale(self.teacher)
        self.moved = moved

    def heal(self, store: Store) -> dict[str, Any]:
        """Write the layer's experts to ``store``; what is returned is what ``staged.heal_layers`` says of a layer."""
        activation = activation_of(self.originals, self.teacher)
        if activation is None:
            return {"reason": "its experts' activation is not known"}
        with ThreadPoolExecutor(cores()) as pool:
            gains, fit, shares = self._fitted(activation, store, pool)
            down, encoded = self.tensors["expert_down"], []

            def pieces() -> Iterator[Bytes]:
                for own in in_order(pool, self._downs(fit, shares)):
                    yield own.raw
                    encoded.append(own.figures())

            store.write(down.name, pieces())
        gains[down.name] = _gain(encoded)
        found = {name: gain for name, gain in gains.items() if gain}
        return {"before": fit.before, "after": fit.after, "ridge": fit.ridge, "feedback": found}

    def _fitted(
        self, activation: Activation, store: Store, pool: ThreadPoolExecutor
    ) -> tuple[dict[str, dict[str, float] | None], Healed, list[Share]]:
        """Gate and up encoded and stored with what feedback did to each; down fitted to what they answer now."""
        inner, target = self._inner(), self._wanted()
        known = target - self.scale * self.student.y if self._leans else None
        answered = np.zeros_like(target)
        shares: list[Share] = []
        encoded: list[list[Encoded]] = []

        def pieces() -> Iterator[list[Bytes]]:
            for own in in_order(pool, self._beginnings(inner, activation)):
                yield [part.raw for part in own.encoded]
                tokens = own.share.tokens
                target[tokens] -= own.bias
                answered[tokens] += own.answer
                shares.append(own.share)
                encoded.append([part.figures() for part in own.encoded])

        store.write_together([tensor.name for tensor in inner], pieces())
        gains = {tensor.name: _gain([row[number] for row in encoded]) for number, tensor in enumerate(inner)}
        fit = refit(self._old_down, shares, target, self.held_out, target - answered)
        if known is not None:
            own = (known - (target - answered if fit.rest is None else fit.rest)) / self.scale
            self.moved = own if self.moved is None else self.moved + own
        return gains, fit, shares

    @property
    def _leans(self) -> bool:
        """Whether the layer is to put right what has gone astray before it."""
        known = self.teacher.stream is not None and self.student.stream is not None
        return known and joins_the_stream(self.file, self.architecture, self.layer)

    def _inner(self) -> list[Tensor]:
        """The tensors before the activation."""
        return [self.tensors[role] for role in ("expert_gate", "expert_up", "expert_gate_up") if role in self.tensors]

    def _target(self, tensor: Tensor) -> ggml.GgmlType:
        """The planned type."""
        return ggml.BY_NAME[self.plan.types.get(tensor.name, tensor.type)]

    def _wanted(self) -> Floats:
        """What the layer is to answer, each token's on its scale, float32 [N, D]."""
        target: Floats = self.teacher.y.copy()
        if self._leans:
            assert self.teacher.stream is not None and self.student.stream is not None
            astray = self.teacher.stream - self.student.stream
            target += np.float32(_LEAN) * (astray if self.moved is None else astray - self.moved)
        target *= self.scale
        return target

    def _beginnings(self, inner: Sequence[Tensor], activation: Activation) -> Iterator[Callable[[], _Begun]]:
        prior = self._prior([tensor for tensor in inner if self._target(tensor).name != tensor.type])
        for place in range(len(self.kept)):
            yield partial(self._begun, inner, prior, activation, place)

    def _begun(self, inner: Sequence[Tensor], prior: Floats | None, activation: Activation, place: int) -> _Begun:
        row = self._requantised(inner, prior, place)
        expert = self._expert(self.kept[place], row)
        tokens, slot = np.nonzero(self.student.ids == place)
        gates = self.student.gates[tokens, slot][:, None] * self.scale[tokens]
        hidden = expert.hidden(self.student.x[tokens], activation)
        hidden *= gates
        bias = gates * expert.down_bias if np.any(expert.down_bias) else 0.0
        self.experts.release(self.kept[place])
        encoded = [part.without_values() for part in row]
        return _Begun(encoded, Share(tokens, hidden), hidden @ expert.down.T, bias)

    def _requantised(self, tensors: Sequence[Tensor], prior: Floats | None, place: int) -> list[Encoded]:
        expert = self.kept[place]
        found, seen = [], self._inputs_of(place, prior)
        for tensor in tensors:
            raw = self.file.raw(tensor.name).reshape(tensor.matrices, -1)[expert]
            raw, _ = gathered_rows(raw, tensor, self._channels_of(expert))
            values = ggml.decode(ggml.BY_NAME[tensor.type], np.ascontiguousarray(raw), tensor.shape[0])
            if self._target(tensor).name == tensor.type:
                found.append(Encoded(raw.copy(), values))  # the mapped pages are let go before it is written
            else:
                found.append(self._encoded(tensor, values, self.moments[tensor.name].mean()[place], seen))
        return found

    def _channels_of(self, expert: int) -> Channel | None:
        """The channels that stay of ``expert``, ascending, int [F'], or None for all."""
        return None if self.channels is None else self.channels[expert]

    def _prior(self, tensors: Sequence[Tensor]) -> Floats | None:
        """Second moments [D, D] of what goes into the layer's experts, whichever of them it goes to; None where they
        are not needed for the encoding of ``tensors``."""
        if not any(self._target(tensor).feeds_back(tensor.shape[0]) for tensor in tensors):
            return None
        x = self.student.x[~self.held_out]
        x = x[:: max(1, len(x) // (_PRIOR_TOKENS * x.shape[1]))]
        prior: Floats = x.T @ x / np.float32(max(len(x), 1))
        return prior

    def _inputs_of(self, place: int, prior: Floats | None) -> Inputs:
        """What goes into an expert."""
        tokens = np.flatnonzero((self.student.ids == place).any(axis=1))
        judged = self.held_out[tokens]
        return Inputs(self.student.x[tokens[~judged]], self.student.x[tokens[judged]], prior)

    def _encoded(self, tensor: Tensor, values: Floats, importance: Floats, inputs: Inputs) -> Encoded:
        """``values`` [rows, width] in the planned type."""
        return feedback.encode(self._target(tensor), values, importance, inputs, tensor.name)

    def _expert(self, expert: int, row: Sequence[Encoded]) -> Expert:
        """The expert as it will answer, but for its down projection, which is the old one."""
        gate: Floats | None = None
        if "expert_gate_up" in self.tensors:
            both = row[0].decoded
            gate, up = both[: len(both) // 2], both[len(both) // 2 :]
        elif "expert_gate" in self.tensors:
            gate, up = row[0].decoded, row[1].decoded
        else:
            up = row[0].decoded
        up = up * self.experts.scale("up", expert)
        gate = None if gate is None else gate * self.experts.scale("gate", expert)
        channels = self._channels_of(expert)

        def bias(kind: str) -> Floats | float:
            found = self.experts.bias(kind, expert)
            return found if channels is None or not isinstance(found, np.ndarray) else found[channels]

        down_bias = self.experts.bias("down", expert)
        return Expert(gate, up, self._old_down_of(expert), bias("gate"), bias("up"), down_bias)

    def _old_down_of(self, expert: int) -> Floats:
        """The down projection in the source, with its scale, float32 [D, F]."""
        old, channels = self.experts.down(expert), self._channels_of(expert)
        return old if channels is None else old[:, channels]

    def _old_down(self, place: int) -> Floats:
        return self._old_down_of(self.kept[place])

    def _downs(self, fit: Healed, shares: Sequence[Share]) -> Iterator[Callable[[], Encoded]]:
        tensor = self.tensors["expert_down"]
        if fit.ridge is None and self._target(tensor).name == tensor.type and self.channels is None:
            # As in the source: encoding anew could only lose something.
            for expert in self.kept:
                yield partial(self._copied, tensor, expert)
            return
        means = _importance(shares).mean()
        for place in range(len(self.kept)):
            yield partial(self._encoded_down, fit, means[place], shares[place], place)

    def _copied(self, tensor: Tensor, expert: int) -> Encoded:
        raw = self.file.raw(tensor.name).reshape(tensor.matrices, -1)[expert].copy()
        self.experts.release(expert)
        return Encoded(raw, np.zeros((0, 0), np.float32))

    def _encoded_down(self, fit: Healed, importance: Floats, share: Share, place: int) -> Encoded:
        """The fitted down projection of an expert; what it decodes to is not kept."""
        # A scale of zero leaves nothing to fit.
        scale = self.experts.scale("down", self.kept[place]) or np.float32(1)
        fitted, judged = share.of(~self.held_out).hidden, share.of(self.held_out).hidden
        # Neurons of different experts have nothing in common, so other experts' tokens say nothing about these.
        inputs = Inputs(fitted, judged)
        own = self._encoded(self.tensors["expert_down"], fit.matrix(place) / scale, importance, inputs)
        self.experts.release(self.kept[place])
        return own.without_values()


def _importance(shares: Sequence[Share]) -> InputMoments:
    """Second moments of the down projections' inputs, weighted as the router weighs them: an error there counts as
    much as what comes out."""
    squares = np.stack([np.square(share.hidden, dtype=np.float64).sum(axis=0) for share in shares])
    counts = np.array([float(len(share.tokens)) for share in shares])
    return InputMoments(squares, counts, np.zeros(len(shares)))


def _gain(parts: Sequence[Encoded]) -> dict[str, float] | None:
    """What feedback did to a tensor: relative squared errors of its products; None where it was not tried."""
    energy = sum(part.energy for part in parts)
    if not energy:
        return None
    return {name: sum(getattr(part, name) for part in parts) / energy for name in ("before", "after")}
