"""Merging the experts that a plan does not keep into those that it keeps, layer by layer.

What is written are the tensors of the source with the kept experts replaced, of the same type and shape, so that
whatever builds or heals the file goes on as from any source (``build.overlay``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeprune.build.averages import Neurons, average, by_answers, by_weights
from edgeprune.build.recombined import receivers, recombined
from edgeprune.build.store import Bytes, Store
from edgeprune.decide.evidence import Evidence
from edgeprune.decide.groups import weights
from edgeprune.decide.plan import DERN, Plan
from edgeprune.decide.protection import super_experts
from edgeprune.decide.scores import dern
from edgeprune.measure.activation import Activation
from edgeprune.measure.replay import Expert, LayerExperts, activation_of
from edgeprune.measure.reservoir import Reservoir
from edgeprune.measure.statistics import Statistics
from edgeprune.model import ggml
from edgeprune.model.architecture import Architecture, Tensor, read_architecture
from edgeprune.model.gguf import GgufFile

# Fields of ``Expert`` by what stands behind the block in a tensor's name.
_BIAS = {"ffn_gate_exps.bias": "gate_bias", "ffn_up_exps.bias": "up_bias", "ffn_down_exps.bias": "down_bias"}


def merge_layers(
    model: str,
    plan: dict[str, Any],
    store: str,
    statistics: str,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write the merged experts of every layer. A task for a child process; layers that are there are not made again.

    Args:
        store: where the tensors go.
        statistics: of the calibration.

    Returns:
        by layer: how many experts took something in.
    """
    file = GgufFile(Path(model))
    obeyed, measured, finished = Plan.from_json(plan, "plan"), Statistics.load(Path(statistics)), Store(Path(store))
    architecture = read_architecture(file, mtp=obeyed.mtp)
    obeyed.check(architecture)
    found: dict[str, Any] = {}
    for number, layer in enumerate(architecture.moe_layers):
        merger = _Merger(file, architecture, layer, obeyed, measured)
        if not all(tensor.name in finished for tensor in merger.tensors):
            found[str(layer)] = merger.write(finished)
        if progress is not None:
            progress(number + 1, len(architecture.moe_layers))
    return found


def _bias_of(tensor: Tensor) -> str:
    """The field of ``Expert`` with what ``tensor`` holds, or "" if it is no bias."""
    return _BIAS.get(tensor.name.removeprefix(f"blk.{tensor.layer}."), "")


class _Merger:
    """One layer."""

    def __init__(
        self, file: GgufFile, architecture: Architecture, layer: int, plan: Plan, measured: Statistics
    ) -> None:
        self.file, self.layer, self.plan, self.measured = file, layer, plan, measured
        self.kept = plan.kept_of(layer)
        self.tensors = [t for t in architecture.tensors if t.layer == layer and (t.is_expert or _bias_of(t))]
        self.experts = LayerExperts(file, architecture, layer)
        self.alone = super_experts(measured.layers, architecture.layers).get(layer, ())
        self.evidence = Evidence(layer, measured.layers[layer])
        self.read = lru_cache(maxsize=4)(self.experts.__getitem__)

    def write(self, store: Store) -> int:
        """The tensors of the layer; how many experts are others than before."""
        changed: dict[int, list[Bytes]] = {}
        for expert, made in self._dern() if self.plan.reduce == DERN else self._averaged():
            changed[expert] = [self._bytes(tensor, expert, made) for tensor in self.tensors]
        for number, tensor in enumerate(self.tensors):
            raw = self.file.raw(tensor.name).reshape(self.plan.experts, -1)
            store.write(
                tensor.name,
                (changed[e][number] if e in changed else raw[e] for e in range(self.plan.experts)),
            )
            self.file.release(tensor.name)
        return len(changed)

    def _averaged(self) -> Iterator[tuple[int, Expert]]:
        members: dict[int, list[int]] = {}
        for expert, into in self.plan.merge.get(self.layer, {}).items():
            members.setdefault(into, [into]).append(expert)
        x, activation = self._inputs()
        for centre, group in sorted(members.items()):
            experts = [self.read(expert) for expert in group]
            orders = [self._order(experts[0], other, x, activation) for other in experts[1:]]
            orders.insert(0, np.arange(len(experts[0].up)))
            yield centre, average(experts, weights(self.plan.reduce, self.evidence, group), orders)

    def _inputs(self) -> tuple[npt.NDArray[np.float32], Activation | None]:
        """What goes into the experts and what they do with it; None where that is not known."""
        tokens: Reservoir | None = self.measured.reservoirs.get(self.layer)
        if self.plan.reduce != "ream" or tokens is None or not len(tokens):
            return np.zeros((0, 0), np.float32), None
        return tokens.x, activation_of(self.experts, tokens)

    def _order(
        self, centre: Expert, other: Expert, x: npt.NDArray[np.float32], activation: Activation | None
    ) -> npt.NDArray[np.intp]:
        """How the neurons of ``other`` stand against those of ``centre``: HC-SMoE averages them as they are."""
        if self.plan.reduce == "hc-smoe":
            return np.arange(len(other.up))
        return by_weights(centre, other) if self.plan.reduce == "m-smoe" else by_answers(centre, other, x, activation)

    def _dern(self) -> Iterator[tuple[int, Expert]]:
        score = dern.score(self.evidence)
        dropped = sorted(set(range(self.plan.experts)) - set(self.kept))

        def neurons(expert: int) -> Neurons:
            return Neurons.of(self.read(expert))

        takers = [expert for expert in self.kept if expert not in self.alone]
        for into, parts in receivers(neurons, dropped, takers).items():
            if not parts:
                continue
            taken = [neurons(expert).pick(which) for expert, which in parts.items()]
            made = recombined(neurons(into), taken, [float(score[expert]) for expert in (into, *parts)])
            yield into, made.expert(self.read(into).down_bias)

    def _bytes(self, tensor: Tensor, expert: int, made: Expert) -> Bytes:
        """The part of ``made`` that ``tensor`` holds, in the tensor's type."""
        scales = {kind: self.experts.scale(kind, expert) or np.float32(1) for kind in ("gate", "up", "down")}
        if bias := _bias_of(tensor):
            values = np.asarray(getattr(made, bias), np.float32)[None]
        elif tensor.role == "expert_gate_up":
            assert made.gate is not None
            values = np.concatenate([made.gate / scales["gate"], made.up / scales["up"]])
        else:
            kind = tensor.role.removeprefix("expert_")
            values = getattr(made, kind) / scales[kind]
        moment = self.measured.moments.get(tensor.name)
        means = np.ones((1, tensor.shape[0]), np.float32) if moment is None else moment.mean()
        importance = means[expert if len(means) > 1 else 0]
        return ggml.encode(ggml.BY_NAME[tensor.type], values, importance, tensor.name).reshape(-1)
