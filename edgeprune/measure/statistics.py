"""What one pass over the calibration text leaves behind: additive sums, on disk as safetensors."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeprune.errors import BadFile
from edgeprune.files import atomic_writer
from edgeprune.model.gguf import DEFAULT_ALIGNMENT, TensorShape, align, header, make_entry

Doubles = npt.NDArray[np.float64]
PER_EXPERT = ("routed", "gate_sum", "gate_square", "norm_sum", "gated_norm_sum", "gated_square")


@dataclass
class LayerStatistics:
    """Sums over the calibration tokens of one MoE layer; each float64 [domains, E].

    With ``g`` the coefficient that really multiplies an expert's output (after renormalisation and
    scaling) and ``f`` that output, summed over the tokens t routed to the expert:

    Attributes:
        routed: number of tokens.
        gate_sum, gate_square: sums of g and of g squared.
        norm_sum: sum of the Euclidean norm of f.
        gated_norm_sum: sum of g times that norm.
        gated_square: sum of its square.
    """

    routed: Doubles
    gate_sum: Doubles
    gate_square: Doubles
    norm_sum: Doubles
    gated_norm_sum: Doubles
    gated_square: Doubles

    @classmethod
    def zeros(cls, domains: int, experts: int) -> LayerStatistics:
        return cls(*(np.zeros((domains, experts)) for _ in PER_EXPERT))

    def total(self, name: str) -> Doubles:
        """Accumulator ``name`` summed over domains, float64 [E]."""
        summed: Doubles = getattr(self, name).sum(axis=0)
        return summed


@dataclass
class InputMoments:
    """Second moments of a weight's input (an importance matrix) and of its output.

    Attributes:
        square_sum: sum of squared inputs, float64 [matrices, ne0]; one matrix per expert, or one.
        count: number of input rows, float64 [matrices].
        output_square: sum of squared outputs, float64 [matrices]; zero where they were not observed.
    """

    square_sum: Doubles
    count: Doubles
    output_square: Doubles

    def mean(self) -> npt.NDArray[np.float32]:
        """Mean squared input float32 [matrices, ne0], safe to quantise with.

        A matrix that saw no token borrows the mean over the others (all ones when none did). Each entry
        is floored at 1e-6 of the row's mean, because an encoder given a zero importance may put
        anything there.
        """
        total, seen = self.square_sum.sum(axis=0), self.count.sum()
        fallback = total / seen if seen else np.ones_like(total)
        mean = np.where(
            self.count[:, None] > 0, self.square_sum / np.maximum(self.count, 1)[:, None], fallback[None, :]
        )
        level = mean.mean(axis=1, keepdims=True)
        floored = np.where(level > 0, np.maximum(mean, 1e-6 * level), 1.0)
        return floored.astype(np.float32)


@dataclass
class Statistics:
    """Everything that one calibration pass measured.

    Attributes:
        domains: names, in the order of the domain axis.
        tokens: calibration tokens.
        window: tokens per window.
        layers: by MoE layer index.
        moments: by name of the weight.
        made_from: digests of model, text and settings.
    """

    domains: list[str]
    tokens: int
    window: int
    layers: dict[int, LayerStatistics]
    moments: dict[str, InputMoments]
    made_from: dict[str, Any]

    def save(self, path: Path) -> None:
        """Write atomically as safetensors."""
        from safetensors.numpy import save

        arrays: dict[str, Doubles] = {}
        for layer, sums in self.layers.items():
            for name in PER_EXPERT:
                arrays[f"layer.{layer}.{name}"] = getattr(sums, name)
        for name, moment in self.moments.items():
            arrays[f"moment.{name}.square_sum"] = moment.square_sum
            arrays[f"moment.{name}.count"] = moment.count
            arrays[f"moment.{name}.output_square"] = moment.output_square
        about = {
            "domains": self.domains,
            "tokens": self.tokens,
            "window": self.window,
            "made_from": self.made_from,
        }
        with atomic_writer(path) as stream:
            stream.write(save(arrays, metadata={"edgeprune": json.dumps(about, sort_keys=True)}))

    @classmethod
    def load(cls, path: Path) -> Statistics:
        """Read what ``save`` wrote.

        Raises:
            BadFile: missing, truncated or not statistics.
        """
        import safetensors

        try:
            with safetensors.safe_open(str(path), framework="np") as file:
                about = json.loads((file.metadata() or {})["edgeprune"])
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            layers, moments = _layers(arrays), _moments(arrays)
            return cls(about["domains"], about["tokens"], about["window"], layers, moments, about["made_from"])
        except (OSError, KeyError, ValueError, TypeError, safetensors.SafetensorError) as error:
            raise BadFile(f"cannot read the statistics in {path}: {error}", hint="delete the file") from error


def _layers(arrays: dict[str, Doubles]) -> dict[int, LayerStatistics]:
    numbers = [int(name.split(".")[1]) for name in arrays if name.startswith("layer.") and name.endswith(".routed")]
    return {n: LayerStatistics(*(arrays[f"layer.{n}.{field}"] for field in PER_EXPERT)) for n in sorted(numbers)}


def _moments(arrays: dict[str, Doubles]) -> dict[str, InputMoments]:
    prefix, suffix = "moment.", ".square_sum"
    names = [name for name in arrays if name.startswith(prefix) and name.endswith(suffix)]
    return {
        weight: InputMoments(*(arrays[f"{prefix}{weight}.{f}"] for f in ("square_sum", "count", "output_square")))
        for weight in (name.removeprefix(prefix).removesuffix(suffix) for name in names)
    }


def write_imatrix(statistics: Statistics, path: Path) -> None:
    """The input moments as an importance-matrix GGUF that ``llama-quantize --imatrix`` reads."""
    shapes, bodies = [], []
    for name, moment in sorted(statistics.moments.items()):
        matrices, width = moment.square_sum.shape
        shapes.append(TensorShape(f"{name}.in_sum2", (width, matrices), "F32"))
        bodies.append(moment.square_sum.astype(np.float32).tobytes())
        shapes.append(TensorShape(f"{name}.counts", (1, matrices), "F32"))
        bodies.append(moment.count.astype(np.float32).tobytes())
    entries = [
        make_entry("general.type", "str", "imatrix"),
        make_entry("imatrix.datasets", "[str]", statistics.domains),
        make_entry("imatrix.chunk_count", "u32", max(1, statistics.tokens // statistics.window)),
        make_entry("imatrix.chunk_size", "u32", statistics.window),
    ]
    with atomic_writer(path) as stream:
        stream.write(header(entries, shapes, DEFAULT_ALIGNMENT))
        for body in bodies:
            stream.write(body)
            stream.write(bytes(align(len(body), DEFAULT_ALIGNMENT) - len(body)))
