"""What one pass over the calibration text leaves behind: additive sums per domain, and a reservoir of tokens.

On disk as safetensors, read array by array. Files over different texts of the same model can be merged.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeprune.errors import BadFile
from edgeprune.files import atomic_writer
from edgeprune.measure.reservoir import Reservoir
from edgeprune.measure.tensorfile import Array, ArrayFile, Shape, write_arrays
from edgeprune.model.gguf import DEFAULT_ALIGNMENT, TensorShape, align, header, make_entry

Doubles = npt.NDArray[np.float64]
RATIO_BINS = 64


@dataclass(frozen=True)
class Accumulator:
    """How one statistic of a layer is kept.

    Attributes:
        axes: what its axes count: ``E`` experts, ``D`` model width, ``F`` expert width, ``R`` chosen experts
            after the first, ``B`` bins; every array has the domains as its first axis before these.
        largest: merged by taking the larger value, instead of adding.
        backward: needs the gradient of the loss, which only the layerwise engine has.
    """

    axes: str
    largest: bool = False
    backward: bool = False

    @property
    def dtype(self) -> str:
        """On disk. Wide sums are added up in float64 and rounded once, to halve a file of gigabytes."""
        return "float32" if "D" in self.axes or "F" in self.axes else "float64"

    def combine(self, a: Array, b: Array) -> Array:
        """Two arrays as one: their sum or their maximum."""
        combined: Array = np.maximum(a, b) if self.largest else np.add(a, b)
        return combined


ACCUMULATORS: dict[str, Accumulator] = {
    "tokens": Accumulator(""),
    "routed": Accumulator("E"),
    "prob_sum": Accumulator("E"),
    "share_sum": Accumulator("E"),
    "gate_sum": Accumulator("E"),
    "gate_square": Accumulator("E"),
    "factor_sum": Accumulator("E"),
    "norm_sum": Accumulator("E"),
    "norm_square": Accumulator("E"),
    "gated_norm_sum": Accumulator("E"),
    "gated_square": Accumulator("E"),
    "norm_max": Accumulator("E", largest=True),
    "peak": Accumulator("E", largest=True),
    "angle_sum": Accumulator("E"),
    "turn_sum": Accumulator("E"),
    "turn_tokens": Accumulator(""),
    "token_turn": Accumulator(""),
    "token_full_turn": Accumulator(""),
    "token_ratio": Accumulator(""),
    "turn_histogram": Accumulator("B"),
    "top_logit_sum": Accumulator("E"),
    "chosen_logit_sum": Accumulator("E"),
    "ratio_histogram": Accumulator("RB"),
    "together": Accumulator("EE"),
    "logit_gram": Accumulator("EE"),
    "logit_sum": Accumulator("E"),
    "output_sum": Accumulator("ED"),
    "gated_output_sum": Accumulator("ED"),
    "output_square": Accumulator("ED"),
    "hidden_square": Accumulator("EF"),
    "hidden_abs": Accumulator("EF"),
    "gated_hidden_square": Accumulator("EF"),
    "gated_hidden_max": Accumulator("EF", largest=True),
    "scaled_hidden_square": Accumulator("EF"),
    "gate_square_sum": Accumulator("EF"),
    "up_square_sum": Accumulator("EF"),
    "gate_slope": Accumulator("EF"),
    "up_slope": Accumulator("EF"),
    "input_square": Accumulator("ED"),
    "gated_input_square": Accumulator("ED"),
    "hidden_gradient_square": Accumulator("EF", backward=True),
    "mask_gradient_sum": Accumulator("EF", backward=True),
    "mask_gradient_square": Accumulator("EF", backward=True),
    "expert_gradient_square": Accumulator("E", backward=True),
    "loss_weighted_square": Accumulator("E", backward=True),
    "output_gradient_square": Accumulator("D", backward=True),
}
FORWARD = tuple(name for name, kind in ACCUMULATORS.items() if not kind.backward)
BACKWARD = tuple(name for name, kind in ACCUMULATORS.items() if kind.backward)


@dataclass(frozen=True)
class LayerStatistics:
    """Sums over the calibration tokens of one MoE layer, by name in ``arrays``; first axis: domains.

    With, for a token t and an expert e that it was routed to: x the expert's input, h the residual stream before
    the block, z the router's logits, p the router's probability before any renormalisation, g the coefficient that
    really multiplies the output, a the input of the down projection, f the output before g, y the sum of g f over
    the chosen experts. Sums run over the tokens routed to the expert, unless said otherwise.

    - ``tokens`` []: number of tokens.
    - ``routed`` [E]: number of tokens routed to the expert.
    - ``prob_sum``, ``share_sum`` [E]: sums of p, and of g as a share of the token's sum of g.
    - ``gate_sum``, ``gate_square`` [E]: sums of g and g^2.
    - ``factor_sum`` [E]: sum of what f is multiplied with, which is g.
    - ``norm_sum``, ``norm_square``, ``gated_norm_sum``, ``gated_square`` [E]: sums of |f|, |f|^2, g|f|, g^2|f|^2.
    - ``norm_max``, ``peak`` [E]: largest |f|, and largest absolute value of a channel of f.
    - ``angle_sum`` [E]: sum of g|f| (1 - cos(x, f)).
    - ``turn_sum`` [E]: sum of g|f| s with s = max(1 - cos(h, h + y), 0).
    - ``turn_tokens``, ``token_turn``, ``token_full_turn``, ``token_ratio`` []: tokens whose h was seen, and their
      sums of s, of 1 - cos(h, h + y + shared experts), and of |y|^2 / |h|^2; ``turn_histogram`` [64]: these tokens by
      s, bins over 0..2.
    - ``top_logit_sum``, ``chosen_logit_sum`` [E]: sums of z over the tokens whose first choice the expert is, and
      over those routed to it.
    - ``ratio_histogram`` [k - 1, 64]: tokens by weight of the j-th choice relative to the first, bins over 0..1.
    - ``together`` [E, E]: tokens that chose both experts.
    - ``logit_gram``, ``logit_sum`` [E, E], [E]: sums of z z' and z over all tokens.
    - ``output_sum``, ``gated_output_sum``, ``output_square`` [E, D]: sums of f, g f and f^2.
    - ``hidden_square``, ``hidden_abs``, ``gated_hidden_square``, ``gated_hidden_max`` [E, F]: sums of a^2, |a|,
      (g a)^2, and the largest |g a|; ``scaled_hidden_square``: sum of (g a)^2 / |h|^2.
    - ``gate_square_sum``, ``up_square_sum`` [E, F]: sums of the squared gate and up products.
    - ``gate_slope``, ``up_slope`` [E, F]: sums of (g da/dgate)^2 and (g da/dup)^2.
    - ``input_square``, ``gated_input_square`` [E, D]: sums of x^2 and g^2 x^2.

    Where the router's coefficient multiplies the expert's input (Llama 4), ``gate_sum``, ``gate_square``,
    ``share_sum`` and ``ratio_histogram`` are of it, and in all others g is 1: x, a and f contain it already.

    With L the cross-entropy of the next tokens in nats, summed over a window, and by the layerwise engine only:

    - ``hidden_gradient_square`` [E, F]: sum of (dL/da)^2.
    - ``mask_gradient_sum``, ``mask_gradient_square`` [E, F]: sums of a dL/da and of its square.
    - ``expert_gradient_square`` [E]: sum of (g f . dL/dy)^2.
    - ``loss_weighted_square`` [E]: sum of |g f * dL/dy|^2, channel by channel.
    - ``output_gradient_square`` [D]: sum of (dL/dy)^2 over all tokens.

    An array that the model's graph does not show is absent.
    """

    arrays: Mapping[str, Array]

    def __getitem__(self, name: str) -> Doubles:
        """An accumulator by domain, float64 [domains, ...].

        Raises:
            BadFile: it was not observed.
        """
        if name not in self.arrays:
            raise BadFile(f"the statistics have no {name}: the model's graph does not show it")
        return np.asarray(self.arrays[name], np.float64)

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def total(self, name: str) -> Doubles:
        """An accumulator over all domains, float64 [...]: the sum, or the maximum where that is kept."""
        values = self[name]
        summed: Doubles = values.max(axis=0) if ACCUMULATORS[name].largest else values.sum(axis=0)
        return summed

    @property
    def experts(self) -> int:
        return int(self.arrays["routed"].shape[1])

    def of_domain(self, index: int) -> LayerStatistics:
        """The statistics of one domain alone."""
        return LayerStatistics(_OneDomain(self.arrays, index))

    @classmethod
    def zeros(cls, domains: int, experts: int, width: int = 1, hidden: int = 1, used: int = 2) -> LayerStatistics:
        """Empty sums, float64; for tests and for models that saw no token."""
        extents = {"E": experts, "D": width, "F": hidden, "R": used - 1, "B": RATIO_BINS}
        return cls(
            {name: np.zeros((domains, *(extents[axis] for axis in kind.axes))) for name, kind in ACCUMULATORS.items()}
        )


@dataclass(frozen=True, eq=False)
class _OneDomain(Mapping[str, Array]):
    arrays: Mapping[str, Array]
    index: int

    def __getitem__(self, name: str) -> Array:
        return self.arrays[name][self.index : self.index + 1]

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)


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


@dataclass(frozen=True, eq=False)
class _Under(Mapping[str, Array]):
    """The arrays of a file whose names begin with ``prefix``, by the rest of the name."""

    file: ArrayFile
    prefix: str

    def __getitem__(self, name: str) -> Array:
        return self.file[self.prefix + name]

    def __contains__(self, name: object) -> bool:
        return f"{self.prefix}{name}" in self.file

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self.prefix) for name in self.file if name.startswith(self.prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)


_MOMENT = ("square_sum", "count", "output_square")


@dataclass(frozen=True, eq=False)
class _StoredMoments(Mapping[str, InputMoments]):
    file: ArrayFile

    def __getitem__(self, weight: str) -> InputMoments:
        return InputMoments(*(self.file[f"moment.{weight}.{part}"] for part in _MOMENT))

    def __contains__(self, weight: object) -> bool:
        return f"moment.{weight}.count" in self.file

    def __iter__(self) -> Iterator[str]:
        names = (name for name in self.file if name.startswith("moment.") and name.endswith(".count"))
        return (name.removeprefix("moment.").removesuffix(".count") for name in names)

    def __len__(self) -> int:
        return sum(1 for _ in self)


@dataclass(frozen=True, eq=False)
class _StoredReservoirs(Mapping[int, Reservoir]):
    file: ArrayFile

    def __getitem__(self, layer: int) -> Reservoir:
        return Reservoir.from_arrays(self.file["reservoir.domain"], _Under(self.file, f"reservoir.{layer}."))

    def __contains__(self, layer: object) -> bool:
        return f"reservoir.{layer}.x" in self.file

    def __iter__(self) -> Iterator[int]:
        return iter(_numbers(self.file, "reservoir", "x"))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _numbers(file: ArrayFile, kind: str, last: str) -> list[int]:
    """Layers of which the file has the array ``kind.LAYER.last``, ascending."""
    parts = (name.split(".") for name in file)
    return sorted(int(part[1]) for part in parts if len(part) == 3 and (part[0], part[2]) == (kind, last))


@dataclass
class Statistics:
    """Everything that one calibration pass measured. What was loaded is read from the file when it is asked for.

    Attributes:
        domains: names, in the order of the domain axis.
        tokens: calibration tokens.
        window: most tokens per window.
        layers: by MoE layer index.
        moments: by name of the weight.
        made_from: digests of model, text and settings.
        reservoirs: by MoE layer index; may be empty.
    """

    domains: list[str]
    tokens: int
    window: int
    layers: Mapping[int, LayerStatistics]
    moments: Mapping[str, InputMoments]
    made_from: dict[str, Any]
    reservoirs: Mapping[int, Reservoir] = field(default_factory=dict)

    def _arrays(self) -> Iterator[tuple[str, str, Any]]:
        """Name, dtype on disk and a function that gives the array, for every array, in the file's order."""
        for layer, sums in self.layers.items():
            for name, array in sums.arrays.items():
                yield f"layer.{layer}.{name}", ACCUMULATORS[name].dtype, array
        for weight, moment in self.moments.items():
            for part in _MOMENT:
                yield f"moment.{weight}.{part}", "float64", getattr(moment, part)
        for number, (layer, tokens) in enumerate(self.reservoirs.items()):
            if number == 0:
                yield "reservoir.domain", "int16", tokens.domain
            for name, array in tokens.arrays().items():
                yield f"reservoir.{layer}.{name}", str(array.dtype), array

    def save(self, path: Path) -> None:
        """Write atomically."""
        shapes = [Shape(name, dtype, np.shape(array)) for name, dtype, array in self._arrays()]
        write_arrays(path, shapes, (array for _, _, array in self._arrays()), self._metadata())

    def _metadata(self) -> dict[str, str]:
        about = {
            "domains": self.domains,
            "tokens": self.tokens,
            "window": self.window,
            "made_from": self.made_from,
        }
        return {"edgeprune": json.dumps(about, sort_keys=True)}

    @classmethod
    def load(cls, path: Path) -> Statistics:
        """What ``save`` wrote.

        Raises:
            BadFile: missing, truncated or not statistics.
        """
        try:
            file = ArrayFile(path)
            if "edgeprune" not in file.metadata:
                raise BadFile(f"{path} holds arrays of another kind")
            about = json.loads(file.metadata["edgeprune"])
            layers = {
                layer: LayerStatistics(_Under(file, f"layer.{layer}.")) for layer in _numbers(file, "layer", "routed")
            }
            return cls(
                about["domains"],
                about["tokens"],
                about["window"],
                layers,
                _StoredMoments(file),
                about["made_from"],
                _StoredReservoirs(file),
            )
        except (BadFile, KeyError, ValueError, TypeError) as error:
            raise BadFile(f"cannot read the statistics in {path}: {error}", hint=_way_out(path)) from error


def _way_out(path: Path) -> str:
    """What helps where ``path`` holds no statistics; it may well be another file of the user's."""
    if not path.is_file():
        return "`edgeprune calibrate` makes statistics.safetensors"
    with path.open("rb") as stream:
        start = stream.read(4)
    if start == b"GGUF":
        return "this is a GGUF; `edgeprune calibrate` leaves statistics.safetensors beside its imatrix.gguf"
    return "it is damaged, or was not made by `edgeprune calibrate`, which writes statistics.safetensors"


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
