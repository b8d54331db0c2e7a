"""What healing leaves of the errors of coarser types: a few experts of a few layers, healed for a trial.

The sampled experts' gate and up projections are encoded as a build encodes them, with error feedback; their down
projections are fitted to what the experts answered before (``refit``). What is left of the error at the output, in
what it is without either, is the share. It depends on the text, because experts that see few tokens for their width
cannot learn much: so it is taken with some of the tokens and with all. It hardly depends on the type but for the
length of its blocks, between which errors are fed back: one type stands for all whose blocks are as long.

Kept tokens are a sample of windows of text. Tokens of one window are alike, so those beside the ones that judge are
not fitted; otherwise a layer seems to mend more than it mends on other text, where 0.53 to 0.60 of the error was left
and not 0.36 to 0.42.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
# By length of block, quick to encode; the second where the source's own is the first.
TYPES = (("Q3_K", "Q2_K"), ("Q4_0", "IQ4_NL"))
# At most so many layers, evenly spread, and experts of each; and so many weights in all, unless the fewest have more.
_MOST_LAYERS, _MOST_EXPERTS, _LEAST_EXPERTS, _MOST_WEIGHTS = 6, 12, 4, 1 << 28
# Columns that error feedback is tried on: with more it takes as much memory and time as the square and the cube.
_MOST_COLUMNS = 4096
# Of so many runs of tokens one judges, and one is fitted at first; there are at least twice so many runs.
_RUNS, _JUDGE, _FIRST = 8, 3, 6
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

        def advance(done: int, whole: int, before: int = number) -> None:
            if progress is not None:
                progress(before * whole + done, len(layers) * whole)

        trial = _Trial(file, architecture, layer, measured, experts)
        found[str(layer)] = trial.outcome(advance) if trial.possible else {}
        advance(1, 1)
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
    """Which of so many ``tokens`` judge, which are fitted, and which of these at first, each bool [tokens].

    Args:
        alike: how many tokens that follow each other may be of one window; so many beside those that judge are left
            out.
    """
    run = max(1, min(max(alike, 64), tokens // (2 * _RUNS)))
    guard, place = min(alike, run), np.arange(tokens)
    number = place // run
    judged = number % _RUNS == _JUDGE
    within = np.convolve(judged, np.ones(2 * guard + 1), "same") > 0.5 if tokens > 2 * guard else judged
    fitted = ~within
    return judged, fitted, fitted & (number % _RUNS == _FIRST)


@dataclass(frozen=True)
class _Tried:
    """One expert, encoded as one type.

    Attributes:
        hidden: its hidden values as encoded times the router's coefficients, float32 [n, F].
        lacks: what its answer lacks with that, projected, float32 [n, DIMENSIONS].
        plain: the same without error feedback.
        down: what feedback does to its down projection.
    """

    hidden: Floats
    lacks: Floats
    plain: Floats
    down: Encoded


class _Trial:
    """One layer and a few of its experts.

    Attributes:
        possible: whether the layer can be healed at all, and some experts see enough tokens.
    """

    def __init__(
        self, file: GgufFile, architecture: Architecture, layer: int, measured: Statistics, experts: int
    ) -> None:
        tensors = {role: t for role, t in layer_tensors(architecture, layer).items() if t.is_expert}
        self.down = tensors.pop("expert_down")
        self.first = next(iter(tensors.values()))  # gate, up, or both in one
        tokens: Reservoir | None = measured.reservoirs.get(layer)
        self.experts = LayerExperts(file, architecture, layer)
        activation = None if tokens is None or not len(tokens) else activation_of(self.experts, tokens)
        self.possible = False
        if tokens is None or activation is None:
            return
        self.tokens, self.activation, self.scale = tokens, activation, fit_scale(tokens)
        alike = math.ceil(len(tokens) * measured.window / max(measured.tokens, 1))
        self.judged, self.fitted, self.begun = parts(len(tokens), alike)
        self.moment = measured.moments[self.first.name].mean()
        self.chosen = _of_all_ranks(tokens.ids[self.begun], architecture.experts, experts)
        self.possible = bool(self.chosen and self.judged.any())

    def outcome(self, progress: Callable[[int, int], None]) -> dict[str, Any]:
        """By type, the attributes of ``Mended``; none where values overflow."""
        kinds, prior = _types(self.first, self.down), self._prior()
        by_type: dict[str, list[_Tried]] = {kind.name: [] for kind in kinds}
        self.outer: list[Floats] = []
        with ThreadPoolExecutor(cores()) as pool:
            jobs = (partial(self._tried, expert, kinds, prior) for expert in self.chosen)
            for number, (outer, tried) in enumerate(in_order(pool, jobs)):
                self.outer.append(outer)
                for kind, own in zip(kinds, tried, strict=True):
                    by_type[kind.name].append(own)
                progress(number + 1, len(self.chosen))
        found = {name: asdict(self._mended(tried)) for name, tried in by_type.items()}
        return found if all(math.isfinite(value) for own in found.values() for value in own.values()) else {}

    def _mended(self, tried: Sequence[_Tried]) -> Mended:
        plain = self._lacking(tried, plain=True)
        before = float(np.square(plain[self.judged], dtype=np.float64).sum())
        few, many = (self._left(tried, part) / before if before > 0 else 1.0 for part in (self.begun, self.fitted))
        error = sum(own.down.before for own in tried)
        return Mended(
            few_tokens=float(self.begun.sum()),
            tokens=float(self.fitted.sum()),
            few=max(few, many),
            many=many,
            down=sum(own.down.after for own in tried) / error if error > 0 else 1.0,
        )

    def _rows(self, expert: int) -> tuple[Ids, Floats]:
        """The tokens that go to ``expert``, ascending, int [n], and its coefficients on their scale, float32
        [n, 1]."""
        tokens, slot = np.nonzero(self.tokens.ids == expert)
        return tokens, self.tokens.gates[tokens, slot][:, None] * self.scale[tokens]

    def _tried(
        self, expert: int, kinds: Sequence[ggml.GgmlType], prior: Floats | None
    ) -> tuple[Floats, list[_Tried]]:
        """The projected down projection of ``expert``, float32 [DIMENSIONS, F], and what becomes of it as each of
        ``kinds``."""
        own, (rows, gates) = self.experts[expert], self._rows(expert)
        self.experts.release(expert)
        x, fitted, judged = self.tokens.x[rows], self.fitted[rows], self.judged[rows]
        exact = gates * own.hidden(x, self.activation)
        columns = slice(0, min(_MOST_COLUMNS, exact.shape[1]))
        seen, hidden = Inputs(x[fitted], x[judged], prior), exact[:, columns]
        answers = Inputs(hidden[fitted], hidden[judged])
        outer = projection(len(own.down)) @ own.down
        importance = self.moment[expert if len(self.moment) > 1 else 0]

        def tried(kind: ggml.GgmlType) -> _Tried:
            rough, better = self._encoded(own, kind, importance, seen)
            coded, plain = (gates * way.hidden(x, self.activation) for way in (better, rough))
            lacks, unfed = (exact - coded) @ outer.T, (exact - plain) @ outer.T
            return _Tried(coded, lacks, unfed, _fed_back(kind, own.down[:, columns], answers))

        return outer, [tried(kind) for kind in kinds]

    def _encoded(self, own: Expert, kind: ggml.GgmlType, importance: Floats, seen: Inputs) -> tuple[Expert, Expert]:
        """``own`` with gate and up of type ``kind``, without error feedback and with it; as it is where their rows
        do not divide into its blocks."""
        rough: dict[str, Any] = {}
        better: dict[str, Any] = {}
        for name in ("up",) if own.gate is None else ("gate", "up"):
            weights: Floats = getattr(own, name)
            if weights.shape[1] % kind.block == 0:
                plain = feedback.plain(kind, weights, importance, name)
                rough[name] = plain.decoded
                better[name] = feedback.improved(plain, kind, weights, importance, seen, name).decoded
        return replace(own, **rough), replace(own, **better)

    def _prior(self) -> Floats | None:
        """Second moments of what goes into the layer's experts, float32 [D, D]; None where those are too wide."""
        x = self.tokens.x[self.fitted]
        if x.shape[1] > _MOST_COLUMNS:
            return None
        prior: Floats = x.T @ x / np.float32(max(len(x), 1))
        return prior

    def _lacking(self, tried: Sequence[_Tried], *, plain: bool = False) -> Floats:
        """What the layer's output lacks, projected, float32 [N, DIMENSIONS]."""
        lacks = np.zeros((len(self.tokens), len(self.outer[0])), np.float32)
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
        fit = refit(lambda number: self.outer[number], shares, rest, judged, rest)
        return fit.after * float(np.square(rest[judged], dtype=np.float64).sum())


def _fed_back(kind: ggml.GgmlType, weights: Floats, answers: Inputs) -> Encoded:
    """What error feedback does to a down projection ``weights`` [D, F]; nothing where its rows do not divide."""
    if weights.shape[1] % kind.block:
        return Encoded(np.zeros(0, np.uint8), weights).figures()
    energy = np.square(answers.fitted, dtype=np.float64).mean(axis=0).astype(np.float32)
    return feedback.encode(kind, weights, energy, answers, "down").figures()


def _types(first: Tensor, down: Tensor) -> list[ggml.GgmlType]:
    """Of every length of block that divides the rows of the ``first`` projections or of ``down`` one type, which is
    not what they have."""
    own, rows = {first.type, down.type}, (first.shape[0], down.shape[0])
    kinds = [ggml.BY_NAME[next(name for name in names if name not in own or name == names[-1])] for names in TYPES]
    return [kind for kind in kinds if any(row % kind.block == 0 for row in rows)]


def _of_all_ranks(ids: npt.NDArray[np.integer], experts: int, count: int) -> list[int]:
    """About ``count`` of the experts that ``ids`` [n, k] name often enough, from the most used to the least."""
    used = np.bincount(ids.reshape(-1), minlength=experts)
    order = np.argsort(-used, kind="stable")[: int((used >= _FEWEST).sum())]
    if not len(order):
        return []
    places = np.linspace(0, len(order), min(count, len(order)), endpoint=False) + len(order) / (2 * count)
    return sorted({int(order[min(int(place), len(order) - 1)]) for place in places})
