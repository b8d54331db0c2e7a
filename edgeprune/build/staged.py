"""Building a few layers at a time: each stage is observed through the prefix of the model that is already built.

The tasks of a stage: ``write_prefix`` makes a file whose first layers are finished and whose next ones are only
pruned; llama.cpp runs it over the text as far as those (``measure.calibration.collect``); ``heal_layers`` fits and
encodes them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeprune.build import feedback
from edgeprune.build.builder import encoded, kept_channels
from edgeprune.build.feedback import Encoded, Inputs
from edgeprune.build.gather import Channel, gathered_rows
from edgeprune.build.overlay import opened
from edgeprune.build.store import Bytes, Store
from edgeprune.decide.plan import Plan
from edgeprune.device.probe import cores
from edgeprune.errors import BadFile
from edgeprune.files import atomic_writer
from edgeprune.measure import channels as channel_orders
from edgeprune.measure.activation import Activation
from edgeprune.measure.refit import Healed, Share, refit
from edgeprune.measure.replay import Expert, LayerExperts, activation_of
from edgeprune.measure.reservoir import Reservoir
from edgeprune.measure.statistics import InputMoments, Statistics
from edgeprune.measure.weights import layer_tensors
from edgeprune.model import ggml
from edgeprune.model.architecture import Architecture, Tensor, read_architecture
from edgeprune.model.gguf import GgufFile, align
from edgeprune.model.layout import layout

Floats = npt.NDArray[np.float32]
Progress = Callable[[int, int], None]
# Of so many runs of so many tokens one judges the fit.
_HELD_OUT_EVERY, _RUN = 8, 256
# How much of what the residual stream has gone astray before a layer that layer is to put right. With 28 of 32
# experts KL divergence was 0.0093 so and 0.0101 without (tests/benchmarks/healing.py).
_LEAN = 0.5
# Tokens for every channel that the second moments of a layer's input are taken from.
_PRIOR_TOKENS = 4
_NORM_BEHIND = re.compile(r"post_ffw_norm|layer_output_norm")


def write_prefix(
    model: str,
    plan: dict[str, Any],
    output: str,
    store: str,
    layers: list[int],
    statistics: str = "",
    channels: str = "",
    merged: str = "",
    progress: Progress | None = None,
) -> None:
    """Write a model for llama.cpp to run as far as the last of ``layers``. A task for a child process.

    Layers before them, and what stands outside the blocks, are as in the finished file; in ``layers`` the experts
    are as in the source, without those that are dropped; what follows is a hole in the file, which llama.cpp maps and
    never reads.

    Args:
        store: finished tensors; those that are missing and can be finished now are added.
        layers: first layer and the one after the last.
        statistics: of the calibration.
        channels: file with the order of every expert's channels, if the plan narrows experts.
        merged: folder of the merged experts, if the plan merges any.
    """
    file = opened(model, merged)
    obeyed, finished = Plan.from_json(plan, "plan"), Store(Path(store))
    architecture = read_architecture(file, mtp=obeyed.mtp)
    moments = Statistics.load(Path(statistics)).moments if statistics else {}
    raw = {t.name for t in architecture.tensors if t.is_expert and t.layer in range(*layers)}
    # A narrower row may be none of the source's type.
    same = {t.name for t in architecture.tensors if t.name in raw and _holds(t, obeyed.width)}
    types = {name: kind for name, kind in obeyed.types.items() if name not in same}
    made = layout(file, architecture, obeyed.kept, types, obeyed.records(), width=obeyed.width)
    orders = channel_orders.loaded(channels, obeyed.channels)
    with atomic_writer(Path(output)) as stream, ThreadPoolExecutor(cores()) as pool:
        stream.write(made.header)
        position = len(made.header)
        for tensor, target in zip(architecture.tensors, made.tensors, strict=True):
            if tensor.layer < layers[1]:
                kept, own = obeyed.kept_of(tensor.layer), kept_channels(obeyed, orders, tensor)
                pieces = encoded(file, tensor, target.type, kept, moments.get(tensor.name), pool, channels=own)
                if tensor.name not in raw:
                    if tensor.name not in finished:
                        finished.write(tensor.name, pieces)
                    pieces = iter((finished.read(tensor.name),))
                for piece in pieces:
                    stream.write(np.ascontiguousarray(piece).data)
                file.release(tensor.name)
            position += align(target.nbytes, made.alignment)
            stream.seek(position)
            if progress is not None:
                progress(position, made.nbytes)
        stream.truncate(made.nbytes)


def _holds(tensor: Tensor, width: int) -> bool:
    """Whether the type of ``tensor`` has rows as long as they are with ``width`` channels, 0 for all."""
    return tensor.kept_shape(1, width)[0] % ggml.BY_NAME[tensor.type].block == 0


def heal_layers(
    model: str,
    plan: dict[str, Any],
    store: str,
    teacher: str,
    student: str,
    layers: list[int],
    channels: str = "",
    merged: str = "",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Fit and encode the experts of ``layers``. A task for a child process.

    Args:
        store: where the finished tensors go.
        teacher, student: statistics of the source and of the prefix over the same text, with reservoirs.
        layers: first layer and the one after the last.
        channels: as for ``write_prefix``.
        merged: as for ``write_prefix``; the fit starts from the merged projections.

    Returns:
        by layer: ``before`` and ``after``, relative squared errors of its output on tokens that were not fitted,
        ``ridge``, and by tensor ``feedback``: relative squared errors without and with it on those tokens; or
        ``reason`` why nothing was fitted.
    """
    file = opened(model, merged)
    obeyed, finished = Plan.from_json(plan, "plan"), Store(Path(store))
    architecture = read_architecture(file, mtp=obeyed.mtp)
    original, pruned = Statistics.load(Path(teacher)), Statistics.load(Path(student))
    orders = channel_orders.loaded(channels, obeyed.channels)
    wanted = [layer for layer in architecture.moe_layers if layer in range(*layers)]
    found: dict[str, Any] = {}
    for number, layer in enumerate(wanted):
        if layer not in original.reservoirs or layer not in pruned.reservoirs:
            found[str(layer)] = {"reason": "its tokens cannot be replayed"}
            continue
        own = None if orders is None or not obeyed.width else orders.best(layer, obeyed.width)
        healer = _Healer(file, architecture, layer, obeyed, original.reservoirs[layer], pruned, own)
        found[str(layer)] = healer.heal(finished)
        if progress is not None:
            progress(number + 1, len(wanted))
    return found


def judges(tokens: int) -> npt.NDArray[np.bool_]:
    """Which of so many ``tokens`` are not fitted, bool [tokens]: every eighth run, of shorter ones where there are
    few, because a fit that nothing judges is none."""
    run = max(1, min(_RUN, tokens // _HELD_OUT_EVERY))
    return np.asarray(np.arange(tokens) // run % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1)


def joins_the_stream(file: GgufFile, architecture: Architecture, layer: int) -> bool:
    """Whether the experts' output is added to the residual stream as it is: not normed again (Gemma), nor scaled
    (Granite)."""
    normed = any(t.layer == layer and _NORM_BEHIND.search(t.name) for t in architecture.tensors)
    return not normed and file.get(f"{architecture.arch}.residual_scale", 1.0) == 1.0


def _gain(parts: Sequence[Encoded]) -> dict[str, float] | None:
    """What feedback did to a tensor: relative squared errors of its products; None where it was not tried."""
    energy = sum(part.energy for part in parts)
    if not energy:
        return None
    return {name: sum(getattr(part, name) for part in parts) / energy for name in ("before", "after")}


class _Healer:
    """One layer: its experts encoded as planned, their down projections fitted to that."""

    def __init__(
        self,
        file: GgufFile,
        architecture: Architecture,
        layer: int,
        plan: Plan,
        teacher: Reservoir,
        student: Statistics,
        channels: Channel | None = None,
    ) -> None:
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
        self.held_out = judges(len(self.student))

    def heal(self, store: Store) -> dict[str, Any]:
        activation = activation_of(self.originals, self.teacher)
        if activation is None:
            return {"reason": "its experts' activation is not known"}
        with ThreadPoolExecutor(cores()) as pool:
            inner = self._inner()
            prior = self._prior([tensor for tensor in inner if self._target(tensor).name != tensor.type])
            rows = list(pool.map(lambda place: self._requantised(inner, prior, place), range(len(self.kept))))
            for number, tensor in enumerate(inner):
                store.write(tensor.name, (row[number].raw for row in rows))
            own = [self._expert(expert, row) for expert, row in zip(self.kept, rows, strict=True)]
            gains = {tensor.name: _gain([row[number] for row in rows]) for number, tensor in enumerate(inner)}
            del rows
            fit = self._fitted(own, activation, pool)
            down = self.tensors["expert_down"]
            means = self._importance(self.shares).mean()

            outcome: list[Encoded] = []

            def pieces() -> Iterator[Bytes]:
                for own in pool.map(self._encoded_down, fit.weights, means, range(len(self.kept))):
                    outcome.append(replace(own, raw=own.raw[:0]))
                    yield own.raw

            store.write(down.name, pieces())
            gains[down.name] = _gain(outcome)
        for expert in self.kept:
            self.experts.release(expert)
        gains = {name: gain for name, gain in gains.items() if gain}
        return {"before": fit.before, "after": fit.after, "ridge": fit.ridge, "feedback": gains}

    def _inner(self) -> list[Tensor]:
        """The tensors before the activation."""
        return [self.tensors[role] for role in ("expert_gate", "expert_up", "expert_gate_up") if role in self.tensors]

    def _target(self, tensor: Tensor) -> ggml.GgmlType:
        """The planned type."""
        return ggml.BY_NAME[self.plan.types.get(tensor.name, tensor.type)]

    def _requantised(self, tensors: Sequence[Tensor], prior: Floats | None, place: int) -> list[Encoded]:
        expert = self.kept[place]
        found, seen = [], self._inputs_of(place, prior)
        for tensor in tensors:
            raw = self.file.raw(tensor.name).reshape(tensor.matrices, -1)[expert]
            raw, _ = gathered_rows(raw, tensor, self._channels_of(expert))
            values = ggml.decode(ggml.BY_NAME[tensor.type], np.ascontiguousarray(raw), tensor.shape[0])
            if self._target(tensor).name == tensor.type:
                found.append(Encoded(np.ascontiguousarray(raw), values))
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

    def _encoded_down(self, weights: Floats, importance: Floats, place: int) -> Encoded:
        """The fitted down projection of an expert; what it decodes to is not kept."""
        # A scale of zero leaves nothing to fit.
        scale = self.experts.scale("down", self.kept[place]) or np.float32(1)
        share = self.shares[place]
        fitted, judged = share.of(~self.held_out).hidden, share.of(self.held_out).hidden
        # Neurons of different experts have nothing in common, so other experts' tokens say nothing about these.
        inputs = Inputs(fitted, judged)
        own = self._encoded(self.tensors["expert_down"], weights / scale, importance, inputs)
        return replace(own, decoded=np.zeros((0, 0), np.float32))

    def _expert(self, expert: int, row: Sequence[Encoded]) -> Expert:
        """The expert as it will answer, but for its down projection, which is the old one."""
        old = self.experts[expert]
        if "expert_gate_up" in self.tensors:
            both = row[0].decoded
            gate: Floats | None = both[: len(both) // 2]
            up = both[len(both) // 2 :]
        else:
            gate, up = (row[0].decoded, row[1].decoded) if old.gate is not None else (None, row[0].decoded)
        up = up * self.experts.scale("up", expert)
        gate = None if gate is None else gate * self.experts.scale("gate", expert)
        rest = old.of_channels(self._channels_of(expert))
        return Expert(gate, up, rest.down, rest.gate_bias, rest.up_bias, rest.down_bias)

    def _fitted(self, experts: Sequence[Expert], activation: Activation, pool: ThreadPoolExecutor) -> Healed:
        target = self.teacher.y.copy()
        known = self.teacher.stream is not None and self.student.stream is not None
        if known and joins_the_stream(self.file, self.architecture, self.layer):
            assert self.teacher.stream is not None and self.student.stream is not None
            target += np.float32(_LEAN) * (self.teacher.stream - self.student.stream)

        def share(place: int) -> Share:
            tokens, slot = np.nonzero(self.student.ids == place)
            hidden = experts[place].hidden(self.student.x[tokens], activation)
            hidden *= self.student.gates[tokens, slot][:, None]
            return Share(tokens, hidden)

        self.shares = list(pool.map(share, range(len(experts))))
        for place, expert in enumerate(experts):
            if np.any(expert.down_bias):
                tokens, slot = np.nonzero(self.student.ids == place)
                target[tokens] -= self.student.gates[tokens, slot][:, None] * expert.down_bias
        return refit([expert.down for expert in experts], self.shares, target, self.held_out)

    def _importance(self, shares: Sequence[Share]) -> InputMoments:
        """Second moments of the down projections' inputs, weighted as the router weighs them: an error there counts
        as much as what comes out."""
        squares = np.stack([np.square(share.hidden, dtype=np.float64).sum(axis=0) for share in shares])
        counts = np.array([float(len(share.tokens)) for share in shares])
        return InputMoments(squares, counts, np.zeros(len(shares)))
