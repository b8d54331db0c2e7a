"""What the weights alone say about the experts of each layer, for methods that need no text."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgeprune.errors import BadFile
from edgeprune.measure.tensorfile import ArrayFile, Shape, write_arrays
from edgeprune.model import ggml
from edgeprune.model.architecture import Architecture, Tensor, read_architecture
from edgeprune.model.gguf import GgufFile

Doubles = npt.NDArray[np.float64]
Floats = npt.NDArray[np.float32]
_FIELDS = ("absolute", "square", "count", "down_square", "router")


@dataclass(frozen=True)
class LayerWeights:
    """Sums over the weights of one layer's experts.

    Attributes:
        absolute, square: of |w| and w^2 over gate, up and down of each expert, float64 [E].
        count: how many weights that are, float64 [E].
        down_square: squared Euclidean norm of each column of the down projection, float64 [E, F].
        router: rows of the router matrix, float64 [E, D].
    """

    absolute: Doubles
    square: Doubles
    count: Doubles
    down_square: Doubles
    router: Doubles


def expert_matrix(file: GgufFile, tensor: Tensor, expert: int) -> Floats:
    """One expert's matrix, decoded, float32 [rows, width]."""
    raw = file.raw(tensor.name).reshape(tensor.matrices, -1)[expert]
    return ggml.decode(ggml.BY_NAME[tensor.type], np.ascontiguousarray(raw), tensor.shape[0])


def layer_tensors(architecture: Architecture, layer: int) -> dict[str, Tensor]:
    """The tensors of one layer's experts and router by role; the router's by ``router`` and ``router bias``."""
    found = {}
    for tensor in architecture.tensors:
        if tensor.layer != layer:
            continue
        if tensor.is_expert:
            found[tensor.role] = tensor
        elif tensor.name.endswith("ffn_gate_inp.weight"):
            found["router"] = tensor
    return found


def _scales(file: GgufFile, tensor: Tensor) -> Floats | None:
    """What the products of each expert's matrix are multiplied with, float32 [E], or None where they are not."""
    name = tensor.name.removesuffix("weight") + "scale"
    if name not in file.tensors:
        return None
    return ggml.decode(ggml.BY_NAME[file.tensors[name].type], file.raw(name), tensor.shape[2]).reshape(-1)


def _layer(file: GgufFile, tensors: dict[str, Tensor], experts: int) -> LayerWeights:
    down, router = tensors["expert_down"], tensors["router"]
    scales = {role: _scales(file, tensor) for role, tensor in tensors.items() if role != "router"}
    absolute, square, count = np.zeros(experts), np.zeros(experts), np.zeros(experts)
    columns = np.zeros((experts, down.shape[0]))
    for role, tensor in tensors.items():
        if role == "router":
            continue
        for expert in range(experts):
            matrix = expert_matrix(file, tensor, expert)
            if (scale := scales[role]) is not None:
                matrix = matrix * scale[expert]
            squares = np.square(matrix)
            absolute[expert] += np.abs(matrix).sum(dtype=np.float64)
            square[expert] += squares.sum(dtype=np.float64)
            count[expert] += matrix.size
            if role == "expert_down":
                columns[expert] = squares.sum(axis=0, dtype=np.float64)
        file.release(tensor.name)
    rows = ggml.decode(ggml.BY_NAME[router.type], file.raw(router.name), router.shape[0]).astype(np.float64)
    return LayerWeights(absolute, square, count, columns, rows)


def weigh(
    model: str,
    output: str,
    fingerprint: str,
    mtp: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, int]:
    """Measure every layer and write the result to ``output``. A task for a child process.

    One expert's matrix is decoded at a time.

    Args:
        mtp: with the blocks that predict further tokens.
    """
    file = GgufFile(Path(model))
    architecture = read_architecture(file, mtp=mtp)
    layers = architecture.sliced_layers
    measured: dict[int, LayerWeights] = {}
    for number, layer in enumerate(layers):
        measured[layer] = _layer(file, layer_tensors(architecture, layer), architecture.experts)
        if progress is not None:
            progress(number + 1, len(layers))

    def arrays() -> Iterator[tuple[str, Doubles]]:
        for layer, own in measured.items():
            for name in _FIELDS:
                yield f"{layer}.{name}", getattr(own, name)

    shapes = [Shape(name, "float64", array.shape) for name, array in arrays()]
    about = {"edgeprune": json.dumps({"model": fingerprint})}
    write_arrays(Path(output), shapes, (array for _, array in arrays()), about)
    return {"layers": len(layers)}


def load_weights(path: Path, fingerprint: str) -> dict[int, LayerWeights]:
    """What ``weigh`` wrote.

    Raises:
        BadFile: missing, damaged, or of another model.
    """
    file = ArrayFile(path)
    try:
        if json.loads(file.metadata["edgeprune"])["model"] != fingerprint:
            raise BadFile(f"{path} is of another model")
        layers = sorted({int(name.partition(".")[0]) for name in file})
        return {layer: LayerWeights(*(file[f"{layer}.{name}"] for name in _FIELDS)) for layer in layers}
    except (KeyError, ValueError, TypeError) as error:
        raise BadFile(f"cannot read {path}: {error}", hint="delete the file") from error
