"""Distillation as tasks for a child process: whether a checkpoint can be trained, and what it has learnt."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edgeprune.measure import channels as channel_orders
from edgeprune.measure.launch import Launch
from edgeprune.measure.layerwise.experts import Observer
from edgeprune.measure.layerwise.parameters import Parameters, opened_parameters
from edgeprune.measure.layerwise.skeleton import Skeleton
from edgeprune.measure.layerwise.trained import inner_of
from edgeprune.measure.layerwise.training import Recipe, Trainer
from edgeprune.measure.llama import Session
from edgeprune.measure.tasks import chosen_windows
from edgeprune.measure.tensorfile import Shape, write_arrays
from edgeprune.model.architecture import read_architecture
from edgeprune.model.gguf import GgufFile
from edgeprune.model.transforms import TRANSFORMS, Sizes

Progress = Callable[[int, int], None]
Floats = npt.NDArray[np.float32]


def require_trainable(checkpoint: str) -> None:
    """See whether torch runs a checkpoint's layers and experts. A task for a child process; no weights are read.

    Raises:
        Unsupported: it does not.
    """
    parameters, _ = opened_parameters(Path(checkpoint), 0)
    for layer in Skeleton(Path(checkpoint), parameters).layers:
        Observer(layer)


def train(
    model: str,
    checkpoint: str,
    output: str,
    folder: str,
    texts: list[dict[str, str]],
    beside: list[dict[str, str]],
    most_tokens: int,
    window: int,
    keep: dict[str, list[int]],
    width: int,
    channels: str,
    channels_digest: str,
    recipe: dict[str, Any],
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train what is left of a checkpoint and write what it has learnt to ``output``. A task for a child process.

    Args:
        model: the GGUF that it was converted to.
        folder: for what is carried and learnt; a killed task goes on from what is there.
        texts, beside, most_tokens: as for ``measure.calibration.collect``.
        keep: ids of the experts that stay by layer, empty for all.
        width, channels, channels_digest: as in the plan; how wide the experts are, 0 for all channels.
        recipe: fields of ``Recipe``.

    Returns:
        the fields of ``Record``, the tokens that were trained on and held out, and the device.
    """
    file = GgufFile(Path(model))
    architecture = read_architecture(file)
    opened = Session(Path(model), Launch(), vocab_only=True)
    with contextlib.closing(opened):
        windows = [
            own.tokens
            for some in (texts, beside)
            if some
            for own in chosen_windows(opened, some, "calibration", window, most_tokens)
        ]
    kept = {int(layer): ids for layer, ids in keep.items()}
    orders = channel_orders.loaded(channels, channels_digest) if width else None
    masks = {}
    for layer in architecture.moe_layers if orders is not None else ():
        assert orders is not None
        chosen = orders.best(layer, width)[kept.get(layer, list(range(architecture.experts)))]
        mask = np.zeros((len(chosen), architecture.expert_width), np.bool_)
        np.put_along_axis(mask, chosen, True, axis=1)
        masks[layer] = torch.from_numpy(mask)
    Path(folder).mkdir(parents=True, exist_ok=True)
    parameters, sizes = opened_parameters(Path(checkpoint), architecture.experts)
    tensors, how = set(file.tensors), Recipe(**recipe)
    trainer = Trainer(Path(checkpoint), parameters, windows, kept, masks, tensors, Path(folder), how, progress)
    trainer.teach()
    record = trainer.train()
    found = {
        **asdict(record),
        "tokens": sum(len(windows[index]) for index in trainer.fitted),
        "held_out": sum(len(windows[index]) for index in trainer.held_out),
        "device": trainer.device,
    }
    save(trainer, parameters, sizes, kept, tensors, Path(output), found)
    return found


def save(
    trainer: Trainer,
    parameters: Parameters,
    sizes: Sizes,
    kept: Mapping[int, Sequence[int]],
    tensors: set[str],
    output: Path,
    found: Mapping[str, Any],
) -> None:
    """Write norms and routers as the GGUF has them, all experts' rows, and the factors of the experts' updates.

    These are called ``LAYER.inner.in`` [K, r, inputs] and ``LAYER.inner.out`` [K, outputs, r], before the activation,
    and ``LAYER.down.in`` and ``LAYER.down.out``.
    """
    shapes: list[Shape] = []
    interleaved = False
    for index, place in enumerate(trainer.places):
        for small in place.smalls:
            for name, values in _of_gguf(parameters, sizes, small.name, tensors, None, ()):
                shapes.append(Shape(name, "float32", values.shape))
        if place.experts is not None:
            interleaved = not place.experts.is_concatenated
            shapes += [
                Shape(f"{index}.{_short(place.experts, n)}", "float32", place.shapes[n]) for n in _factors(place)
            ]

    def pieces() -> Iterator[Floats]:
        for index, place in enumerate(trainer.places):
            best = trainer.best(index) if place.shapes else {}
            for small in place.smalls:
                own = best[small.name]
                for _, values in _of_gguf(parameters, sizes, small.name, tensors, own, kept.get(index, ())):
                    yield values
            for name in _factors(place):
                yield best[name].numpy()

    about = {"found": dict(found), "interleaved": interleaved}
    write_arrays(output, shapes, pieces(), {"edgeprune": json.dumps(about)})


def _factors(place: Any) -> list[str]:
    return [name for name in place.shapes if name not in {small.name for small in place.smalls}]


def _short(experts: Any, name: str) -> str:
    return name.replace(inner_of(experts), "inner").replace("down_proj", "down")


def _of_gguf(
    parameters: Parameters,
    sizes: Sizes,
    name: str,
    tensors: set[str],
    trained: torch.Tensor | None,
    kept: Sequence[int],
) -> Iterator[tuple[str, Floats]]:
    """What the GGUF makes of the parameter ``name``, ``trained`` if given, of all experts or those ``kept``."""
    whole = parameters.read(name)
    if trained is not None:
        if trained.shape == whole.shape:
            whole = trained
        else:
            whole[list(kept)] = trained
    for gguf, transform in parameters.gguf_weights(name).items():
        if gguf in tensors:
            made = torch.cat(list(TRANSFORMS[transform].apply(whole, sizes)))
            yield gguf, np.ascontiguousarray(made.float().numpy())
