"""Building a few layers at a time: each stage is observed through the prefix of the model that is already built.

The tasks of a stage: ``write_prefix`` makes a file whose first layers are finished and whose next ones are only
pruned; llama.cpp runs it over the text as far as those (``measure.calibration.collect``); ``heal_layers`` fits and
encodes them.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.build.builder import encoded, kept_channels
from edgeprune.build.healer import LayerHealer
from edgeprune.build.overlay import opened
from edgeprune.build.store import Store
from edgeprune.decide.plan import Plan
from edgeprune.device.probe import cores
from edgeprune.files import atomic_writer
from edgeprune.measure import channels as channel_orders
from edgeprune.measure.statistics import Statistics
from edgeprune.model import ggml
from edgeprune.model.architecture import Tensor, read_architecture
from edgeprune.model.gguf import align
from edgeprune.model.layout import layout

Progress = Callable[[int, int], None]


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
    moved = None
    for number, layer in enumerate(wanted):
        if layer not in original.reservoirs or layer not in pruned.reservoirs:
            found[str(layer)] = {"reason": "its tokens cannot be replayed"}
            continue
        own = None if orders is None or not obeyed.width else orders.best(layer, obeyed.width)
        healer = LayerHealer(file, architecture, layer, obeyed, original.reservoirs[layer], pruned, own, moved)
        found[str(layer)] = healer.heal(finished)
        moved = healer.moved
        if progress is not None:
            progress(number + 1, len(wanted))
    return found
