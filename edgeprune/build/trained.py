"""What training has changed, as tensors of the source: of the same type and shape, so that whatever builds or heals
the file goes on as from any source (``build.overlay``)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeprune.build.store import Bytes, Store
from edgeprune.decide.plan import Plan
from edgeprune.measure.tensorfile import ArrayFile
from edgeprune.measure.weights import expert_matrix
from edgeprune.model import ggml
from edgeprune.model.architecture import Architecture, Tensor, read_architecture
from edgeprune.model.gguf import GgufFile

Floats = npt.NDArray[np.float32]


def write_trained(
    model: str,
    plan: dict[str, Any],
    trained: str,
    store: str,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write the tensors that training has changed. A task for a child process; those that are there stay.

    Args:
        trained: what ``measure.layerwise.distillation.train`` wrote.
        store: where the tensors go.

    Returns:
        what ``train`` said of itself.
    """
    file, learnt, finished = GgufFile(Path(model)), ArrayFile(Path(trained)), Store(Path(store))
    obeyed, about = Plan.from_json(plan, "plan"), json.loads(learnt.metadata["edgeprune"])
    architecture = read_architecture(file, mtp=obeyed.mtp)
    for number, tensor in enumerate(architecture.tensors):
        if tensor.name in finished:
            continue
        if tensor.name in learnt:
            values = learnt[tensor.name].reshape(-1, tensor.shape[0])
            finished.write(tensor.name, iter([_encoded(tensor, values)]))
        elif tensor.is_expert and f"{tensor.layer}.down.in" in learnt:
            finished.write(tensor.name, _experts(file, tensor, obeyed, learnt, about["interleaved"]))
            file.release(tensor.name)
        if progress is not None:
            progress(number + 1, len(architecture.tensors))
    found: dict[str, Any] = about["found"]
    return found


def _experts(file: GgufFile, tensor: Tensor, plan: Plan, learnt: ArrayFile, interleaved: bool) -> Iterator[Bytes]:
    """All experts' matrices in ``tensor``, those that stay with their updates."""
    inner = tensor.role != "expert_down"
    own = f"{tensor.layer}.{'inner' if inner else 'down'}"
    places = {expert: place for place, expert in enumerate(plan.kept_of(tensor.layer))}
    raw = file.raw(tensor.name).reshape(plan.experts, -1)
    for expert in range(plan.experts):
        place = places.get(expert)
        if place is None:
            yield raw[expert]
            continue
        behind, before = (learnt.part(f"{own}.{side}", place, place + 1)[0] for side in ("out", "in"))
        if inner:
            behind = _rows_of(tensor, behind, interleaved)
        yield _encoded(tensor, expert_matrix(file, tensor, expert) + behind @ before)


def _rows_of(tensor: Tensor, rows: Floats, interleaved: bool) -> Floats:
    """Those of the ``rows`` before the activation, gate's and up's, that ``tensor`` has."""
    if len(rows) == tensor.shape[1] and tensor.role != "expert_gate_up":
        return rows  # experts without a gate
    gate, up = (rows[::2], rows[1::2]) if interleaved else np.split(rows, 2)
    return {"expert_gate": gate, "expert_up": up, "expert_gate_up": np.concatenate([gate, up])}[tensor.role]


def _encoded(tensor: Tensor, values: Floats) -> Bytes:
    """``values`` in the tensor's type."""
    return ggml.encode(ggml.BY_NAME[tensor.type], values, None, tensor.name).reshape(-1)


def without_room(architecture: Architecture) -> Tensor | None:
    """The first expert tensor whose type has no room for small changes, or None."""
    return next((t for t in architecture.tensors if t.is_expert and t.type not in ("F32", "BF16", "F16")), None)
