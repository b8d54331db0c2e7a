"""What healing leaves of the errors of coarser types: a few experts of a few layers, healed for a trial.

The sampled experts' gate and up projections are encoded as a build encodes them, with error feedback; their down
projections are fitted to what the experts answered before (``refit``). What is left of the error at the output, in
what it is without either, is the share. It depends on the text, because experts that see few tokens for their width
cannot learn much: so it is taken with all of the tokens and with a quarter of them. It hardly depends on the type, so
a few types stand for all whose blocks are as long, and their mean for each of them.

Kept tokens are a sample of windows of text. Tokens of one window are alike, so those beside the ones that judge are
not fitted; otherwise a layer seems to mend up to twice what it mends on other text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeprune.device.probe import cores
from edgeprune.device.threads import in_order
from edgeprune.measure import feedback
from edgeprune.measure.activation import Activation
from edgeprune.measure.feedback import Encoded, Inputs
from edgeprune.measure.refit import Share, refit
from edgeprune.measure.replay import Expert, LayerExperts, activation_of, projection
from edgeprune.measure.reservoir import Reservoir
from edgeprune.measure.shares import Mended
from edgeprune.measure.statistics import Statistics
from edgeprune.measure.token_weights import fit_scale
from edgeprune.measure.weights import layer_tensors
from edgeprune.model import ggml
from edgeprune.model.architecture import Architecture, Tensor, read_architecture
from edgeprune.model.gguf import GgufFile

Floats = npt.NDArray[np.float32]
Flags = npt.NDArray[np.bool_]
Ids = npt.NDArray[np.intp]
# Quick to encode, and from all of the range of bits; the first three are for rows of whole 256-blocks.
TYPES = ("Q2_K", "Q3_K", "Q5_K", "Q4_0", "Q5_0", "Q8_0")
# At most so many layers, evenly spread, and experts of each; and so many weights in all, unless one layer has more.
_MOST_LAYERS, _MOST_EXPERTS, _LEAST_EXPERTS, _MOST_WEIGHTS = 6, 8, 2, 1 << 26
# Of so many runs of tokens one judges, in the middle of those that are fitted; there are at least twice so many runs.
_RUNS, _JUDGE = 8, 3
# Fewer tokens than so many tell nothing about an expert.
_FEWEST = 16


def measure(model: str, statistics: str, progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """A trial of healing. A task for a child process.

    Args:
        statistics: file with reservoirs and moments.

    Returns:
        by layer (as text), by type: the attributes of ``Mended``; a layer that cannot be healed has no types.
    """
    file = GgufFile(Path(model))
    architecture = read_architecture(file)
    measured = Statistics.load(Path(statistics))
    layers, experts = _sampled(architecture)
    found: dict[str, Any] = {}
    for number, layer in enumerate(layers):
        trial = _Trial(file, architecture, layer, measured, experts)
        found[str(layer)] = {kind.name: asdict(trial.of(kind)) for kind in trial.types} if trial.possible else {}
        if progress is not None:
            progress(number + 1, len(layers))
    return found


def _sampled(architecture: Architecture) -> tuple[list[int], int]:
    """Layers that are looked at, ascending, and how many experts of each."""
    layers = architecture.moe_layers
    own = [tensor for tensor in layer_tensors(architecture, layers[0]).values() if tensor.is_expert]
    weights = sum(math.prod(tensor.shape) for tensor in own) // architecture.experts
    experts = min(max(_MOST_WEIGHTS // (_MOST_LAYERS * weights), _LEAST_EXPERTS), _MOST_EXPERTS)
    count = min(max(_MOST_WEIGHTS // (experts * weights), 1), _MOST_LAYERS, len(layers))
    places = np.linspace(0, len(layers) - 1, count) if count > 1 else np.array([len(layers) // 2])
    return [layers[int(place)] for place in places.round()], experts


def parts(tokens: int, alike: int) -> tuple[Flags, Flags, Flags]:
    """Which of so many ``tokens`` judge, which are fitted, and which of these are a quarter, each bool [tokens].

    Args:
        alike: tokens that follow each other and may be of one window.
    """
    run = max(1, min(max(alike, 64), tokens // (2 * _RUNS)))
    guard, place = min(alike, run), np.arange(tokens)
    number = place // run
    judged = number % _RUNS == _JUDGE
    within = np.convolve(judged, np.ones(2 * guard + 1), "same") > 0.5 if tokens > 2 * guard else judged
    fitted = ~within
    return judged, fitted, fitted & (number // 2 % 4 == 0)


@dataclass(frozen=True)
class _Tried:
    """One expert, encoded.

    Attributes:
        hidden: its hidden values as encoded times the router's coefficients, float32 [n, F].
        outer: projected down projection, float32 [DIMENSIONS, F].
        lacks: what its answer lacks with that, float32 [n, DIMENSIONS].
        plain: the same without error feedback.
        down: its down projection as encoded.
    """

    hidden: Floats
    outer: Floats
    lacks: Floats
    plain: Floats
    down: Encoded


class _Trial:
    """One layer and a few of its experts.

    Attributes:
        possible: whether the layer can be healed at all, and some experts see enough tokens.
        types: that are tried.
    """

    def __init__(
        self, file: GgufFile, architecture: Architecture, layer: int, measured: Statistics, experts: int
    ) -> None:
        self.tensors = {role: t for role, t in layer_tensors(architecture, layer).items() if t.is_expert}
        self.inner = [t for role, t in self.tensors.items() if role != "expert_down"]
        self.types = _types(self.inner, self.tensors["expert_down"])
        tokens: Reservoir | None = measured.reservoirs.get(layer)
        self.layer, self.experts = layer, LayerExperts(file, architecture, layer)
        activation = None if tokens is None else activation_of(self.experts, tokens)
        self.possible = False
        if tokens is None or activation is None:
            return
        self.tokens, self.activation, self.scale = tokens, activation, fit_scale(tokens)
        alike = math.ceil(len(tokens) * measured.window / max(measured.tokens, 1))
        self.judged, self.fitted, self.quarter = parts(len(tokens), alike)
        self.moment = measured.moments[self.inner[0].name].mean()
        self.chosen = _of_all_ranks(tokens.ids[self.quarter], architecture.experts, experts)
        self.possible = bool(self.chosen and self.judged.any() and self.types)

    def of(self, kind: ggml.GgmlType) -> Mended:
        """What is left of the errors of ``kind``."""
        with ThreadPoolExecutor(cores()) as pool:
            tried = list(in_order(pool, (partial(self._tried, kind, expert) for expert in self.chosen)))
        plain = self._lacking(tried, plain=True)
        before = float(np.square(plain[self.judged], dtype=np.float64).sum())
        left = [self._left(tried, fitted) / before if before > 0 else 1.0 for fitted in (self.quarter, self.fitted)]
        few, many = (min(share, 1.0) for share in left)
        down = [own.down for own in tried if own.down.energy]
        error = sum(own.before for own in down)
        return Mended(
            tokens=float(self.fitted.sum()),
            few=max(few, many),
            many=many,
            down=sum(own.after for own in down) / error if error > 0 else 1.0,
        )

    def _rows(self, expert: int) -> tuple[Ids, Floats]:
        """The tokens that go to ``expert``, ascending, int [n], and its coefficients on their scale, float32
        [n, 1]."""
        tokens, slot = np.nonzero(self.tokens.ids == expert)
        return tokens, self.tokens.gates[tokens, slot][:, None] * self.scale[tokens]

    def _tried(self, kind: ggml.GgmlType, expert: int) -> _Tried:
        own, (rows, gates) = self.experts[expert], self._rows(expert)
        self.experts.release(expert)
        x, fitted, judged = self.tokens.x[rows], self.fitted[rows], self.judged[rows]
        inputs = Inputs(x[fitted], x[judged], self._prior(kind))
        importance = self.moment[expert if len(self.moment) > 1 else 0]
        names = ("up",) if own.gate is None else ("gate", "up")
        rough = {name: feedback.plain(kind, getattr(own, name), importance, name) for name in names}
        better = {
            name: feedback.improved(one, kind, getattr(own, name), importance, inputs, name)
            for name, one in rough.items()
        }
        hidden, plain, exact = (gates * self._hidden(own, way, x) for way in (better, rough, {}))
        energy = np.square(exact, dtype=np.float64).mean(axis=0).astype(np.float32)
        seen = Inputs(exact[fitted], exact[judged])
        down = feedback.encode(kind, own.down, energy, seen, "down").figures()
        outer = projection(len(own.down)) @ own.down
        return _Tried(hidden, outer, (exact - hidden) @ outer.T, (exact - plain) @ outer.T, down)

    def _hidden(self, own: Expert, encoded: Mapping[str, Encoded], x: Floats) -> Floats:
        activation: Activation = self.activation
        changed: dict[str, Any] = {name: one.decoded for name, one in encoded.items()}
        return replace(own, **changed).hidden(x, activation)

    def _prior(self, kind: ggml.GgmlType) -> Floats | None:
        """Second moments of what goes into the layer's experts; None where ``kind`` does not feed back."""
        if not kind.feeds_back(self.inner[0].shape[0]):
            return None
        x = self.tokens.x[self.fitted]
        prior: Floats = x.T @ x / np.float32(max(len(x), 1))
        return prior

    def _lacking(self, tried: Sequence[_Tried], *, plain: bool = False) -> Floats:
        """What the layer's output lacks, float32 [N, DIMENSIONS]."""
        lacks = np.zeros((len(self.tokens), len(tried[0].outer)), np.float32)
        for expert, own in zip(self.chosen, tried, strict=True):
            lacks[self._rows(expert)[0]] += own.plain if plain else own.lacks
        return lacks

    def _left(self, tried: Sequence[_Tried], fitted: Flags) -> float:
        """Squared error on the tokens that judge when the down projections are fitted on the ``fitted`` ones."""
        looked_at = fitted | self.judged
        shares = []
        for expert, own in zip(self.chosen, tried, strict=True):
            rows, _ = self._rows(expert)
            shares.append(Share(rows, own.hidden).of(looked_at))
        place = np.cumsum(looked_at) - 1
        shares = [Share(place[share.tokens], share.hidden) for share in shares]
        rest, judged = self._lacking(tried)[looked_at], self.judged[looked_at]
        fit = refit(lambda number: tried[number].outer, shares, rest, judged, rest)
        return fit.after * float(np.square(rest[judged], dtype=np.float64).sum())


def _types(inner: Sequence[Tensor], down: Tensor) -> list[ggml.GgmlType]:
    """Those of ``TYPES`` that both rows divide into and that are coarser than what the tensors have."""
    rows = {inner[0].shape[0], down.shape[0]}
    most = min(ggml.BY_NAME[tensor.type].bits_per_weight for tensor in inner)
    kinds = [ggml.BY_NAME[name] for name in TYPES]
    kinds = [k for k in kinds if k.bits_per_weight < most and not any(row % k.block for row in rows)]
    if any(kind.block == 256 for kind in kinds):
        return [kind for kind in kinds if kind.block == 256 or kind.name == "Q8_0"]
    return kinds


def _of_all_ranks(ids: npt.NDArray[np.integer], experts: int, count: int) -> list[int]:
    """About ``count`` of the experts that ``ids`` [n, k] name often enough, from the most used to the least."""
    used = np.bincount(ids.reshape(-1), minlength=experts)
    order = np.argsort(-used, kind="stable")[: int((used >= _FEWEST).sum())]
    if not len(order):
        return []
    places = np.linspace(0, len(order), min(count, len(order)), endpoint=False) + len(order) / (2 * count)
    return sorted({int(order[min(int(place), len(order) - 1)]) for place in places})
