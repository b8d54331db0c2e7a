"""Two sweeps over a checkpoint's layers: forwards for the activations, backwards for everything else.

The forward sweep carries every window through one layer after the other and keeps what enters each. The backward
sweep takes the layers in reverse, computes each again from its input, now observed, and carries the gradient of the
loss on. The weights of one layer are in memory at a time. Both leave a file per layer behind, so that a killed run
goes on with the layer it was at.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from edgeprune.errors import BadFile
from edgeprune.files import digest, require_space, room_for
from edgeprune.measure.arena import Arena
from edgeprune.measure.layerwise.carried import Carried
from edgeprune.measure.layerwise.experts import Observer
from edgeprune.measure.layerwise.parameters import moved, opened_parameters
from edgeprune.measure.layerwise.skeleton import Skeleton
from edgeprune.measure.reservoir import Reservoir
from edgeprune.measure.statistics import InputMoments, LayerStatistics, Statistics
from edgeprune.measure.sums import Sums
from edgeprune.measure.text import Window

Progress = Callable[[int, int], None]
HIDDEN, GRADIENT = "hidden", "gradient"


@dataclass
class Text:
    """Windows in the order of their domains.

    Attributes:
        windows: by domain, those of one domain together.
        kept: positions of each window that go into the reservoir.
    """

    windows: list[Window]
    kept: list[npt.NDArray[np.intp]]

    @property
    def domains(self) -> list[str]:
        return list(dict.fromkeys(window.domain for window in self.windows))

    @property
    def tokens(self) -> list[tuple[int, ...]]:
        return [window.tokens for window in self.windows]


class _Part(NamedTuple):
    """A dense weight of the GGUF: the module it is in, and which of the module's outputs and inputs it has."""

    module: nn.Module
    outputs: torch.Tensor | slice = slice(None)
    inputs: torch.Tensor | slice = slice(None)


class Engine:
    """Statistics of one checkpoint over one text.

    Args:
        checkpoint: folder.
        weights: names that the GGUF's quantisable weights have.
        experts: routed experts per layer.
        folder: for what is carried; may hold what an earlier run left.
        made_from: of the statistics.
    """

    def __init__(
        self,
        checkpoint: Path,
        text: Text,
        weights: Sequence[str],
        experts: int,
        window: int,
        folder: Path,
        made_from: dict[str, Any],
        progress: Progress | None,
    ) -> None:
        self.parameters, self.sizes = opened_parameters(checkpoint, experts)
        self.skeleton = Skeleton(checkpoint, self.parameters)
        self.text, self.weights, self.experts = text, set(weights), experts
        self.window, self.made_from, self.folder, self.progress = window, made_from, folder, progress
        self.carried = Carried(folder, [len(tokens) for tokens in text.tokens], self.skeleton.width)
        self.layers = len(self.skeleton.layers)
        self._done = 0

    def _step(self) -> None:
        self._done += 1
        if self.progress is not None:
            self.progress(self._done, (2 * self.layers + 1) * len(self.text.windows))

    def _skip(self) -> None:
        self._done += len(self.text.windows)

    # The sweeps.

    def forwards(self) -> None:
        """Keep what enters every layer and what leaves the last."""
        if self._path(self.layers).is_file():  # the backward sweep had begun
            self._done += self.layers * len(self.text.windows)
            return
        require_space(self.folder, (self.layers + 2) * self.carried.nbytes)
        if not self.carried.has(HIDDEN, 0):
            self.carried.write(HIDDEN, 0, self.skeleton.embedded(self.text.tokens))
        for layer in range(self.layers):
            if self.carried.has(HIDDEN, layer + 1):
                self._skip()
                continue
            with self.skeleton.filled_layer(layer), torch.no_grad():
                self.carried.write(HIDDEN, layer + 1, self._forward(layer))

    def _forward(self, layer: int) -> Iterator[torch.Tensor]:
        for hidden in self.carried.read(HIDDEN, layer):
            yield self.skeleton.layer(layer, hidden)
            self._step()

    def backwards(self) -> None:
        """Statistics of the output and of every layer, each in a file of its own."""
        for layer in range(self.layers, -1, -1):
            if self._path(layer).is_file():
                self._skip()
                continue
            self._statistics(layer, self._loss if layer == self.layers else self._backward)
            if layer < self.layers:
                self.carried.forget(HIDDEN, layer + 1)
                self.carried.forget(GRADIENT, layer + 1)

    def _statistics(self, layer: int, sweep: Callable[[int, list[Sums]], Iterator[torch.Tensor]]) -> None:
        domains = self.text.domains
        sums = []
        for domain in domains:
            pairs = zip(self.text.windows, self.text.kept, strict=True)
            capacity = sum(len(kept) for window, kept in pairs if window.domain == domain)
            wanted = any(len(kept) for kept in self.text.kept)
            arena = Arena(self.folder)
            sums.append(Sums(self.experts, arena, capacity=capacity if wanted else None, backward=True))
        self.carried.write(GRADIENT, layer, sweep(layer, sums))
        joined(sums, domains, sum(map(len, self.text.tokens)), self.window, self.made_from).save(self._path(layer))

    def _loss(self, layer: int, sums: list[Sums]) -> Iterator[torch.Tensor]:
        """Gradients of the loss by what leaves the last layer."""
        with self.skeleton.filled_output() as output:
            name = "output.weight" if "output.weight" in self.weights else "token_embd.weight"
            for index, hidden in enumerate(self.carried.read(HIDDEN, layer)):
                hidden.requires_grad_()
                with self._dense({name: _Part(output)}, sums[self._domain(index)]):
                    loss = self.skeleton.loss(self.text.tokens[index], hidden)
                if not bool(torch.isfinite(loss)):
                    raise BadFile(f"{self.parameters.checkpoint.folder} computes values that are not finite")
                yield torch.autograd.grad(loss, hidden)[0]
                self._step()

    def _backward(self, layer: int, sums: list[Sums]) -> Iterator[torch.Tensor]:
        """Gradients of the loss by what enters ``layer``, while its statistics are added to ``sums``."""
        module = self.skeleton.layers[layer]
        dense, experts = self._names(layer)
        inputs, gradients = self.carried.read(HIDDEN, layer), self.carried.read(GRADIENT, layer + 1)
        with self.skeleton.filled_layer(layer), Observer(module) as observer:
            for index, (hidden, gradient) in enumerate(zip(inputs, gradients, strict=True)):
                own = sums[self._domain(index)]
                own.kept = self.text.kept[index]
                hidden.requires_grad_()
                with self._dense(dense, own):
                    output = self.skeleton.layer(layer, hidden)
                routed = observer.routed
                wanted = [hidden] if routed is None else [hidden, *routed.hidden, routed.y]
                slopes = list(torch.autograd.grad(output, wanted, gradient))
                if routed is not None:
                    observer.add_to(own, layer, experts, output[0], slopes[1:])
                own.end_window()
                observer.routed = None
                yield slopes[0]
                self._step()

    def _domain(self, index: int) -> int:
        return self.text.domains.index(self.text.windows[index].domain)

    # Names, hooks and files.

    def _names(self, layer: int) -> tuple[dict[str, _Part], dict[str, str]]:
        """The layer's dense weights in the GGUF with where they come from, and its expert weights by kind."""
        dense: dict[str, _Part] = {}
        for name, module in self.skeleton.model.named_modules():
            if not isinstance(module, nn.Linear) or f".layers.{layer}." not in name:
                continue
            for gguf, transform in self.parameters.gguf_weights(f"{name}.weight").items():
                if gguf in self.weights:
                    places = moved(transform, (module.out_features, module.in_features), self.sizes)
                    if places is not None:  # else nothing is known of its inputs
                        dense[gguf] = _Part(module, *places)
        kinds = {kind: f"blk.{layer}.ffn_{kind}_exps.weight" for kind in ("gate", "up", "down")}
        return dense, {kind: name for kind, name in kinds.items() if name in self.weights}

    @contextlib.contextmanager
    def _dense(self, parts: dict[str, _Part], sums: Sums) -> Iterator[None]:
        """While the context lasts, inputs and outputs of the modules are added to the moments of their weights."""

        def noting(name: str, part: _Part) -> Callable[[nn.Module, Any, torch.Tensor], None]:
            def note(_: nn.Module, arguments: Any, output: torch.Tensor) -> None:
                rows = arguments[0].detach().reshape(-1, arguments[0].shape[-1])
                squares = rows.square().sum(dim=0, dtype=torch.float64)[part.inputs].numpy()[None]
                taken = output.detach().reshape(len(rows), -1)[:, part.outputs]
                energy = float(taken.square().sum(dtype=torch.float64))
                sums.moment(name, squares, np.array([float(len(rows))]), np.array([energy]))

            return note

        handles = [part.module.register_forward_hook(noting(name, part)) for name, part in parts.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _path(self, layer: int) -> Path:
        return self.folder / f"layer-{layer}.safetensors"

    def save(self, output: Path) -> None:
        """All layers' statistics as one file."""
        parts = [Statistics.load(self._path(layer)) for layer in range(self.layers + 1)]
        layers = {layer: sums for part in parts for layer, sums in part.layers.items()}
        moments = {name: moment for part in parts for name, moment in part.moments.items()}
        reservoirs = {layer: tokens for part in parts for layer, tokens in part.reservoirs.items()}
        first = parts[0]
        whole = Statistics(first.domains, first.tokens, first.window, layers, moments, self.made_from, reservoirs)
        with room_for(output):
            whole.save(output)


def joined(parts: list[Sums], domains: list[str], tokens: int, window: int, made_from: dict[str, Any]) -> Statistics:
    """The sums of each domain as statistics with a domain axis."""
    found = [part.layers() for part in parts]
    layers = {
        layer: LayerStatistics(
            {name: np.concatenate([own[layer].arrays[name] for own in found]) for name in sums.arrays}
        )
        for layer, sums in found[0].items()
    }
    moments = {}
    for name in parts[0].moments:
        own = [part.moments[name] for part in parts]
        total = (sum(getattr(m, part) for m in own) for part in ("square_sum", "count", "output_square"))
        moments[name] = InputMoments(*total)
    kept = [part.reservoirs() for part in parts]
    reservoirs = {}
    for layer in kept[0]:
        with_domain = [_numbered(own[layer], index) for index, own in enumerate(kept) if layer in own]
        reservoirs[layer] = _concatenated(with_domain)
    return Statistics(domains, tokens, window, layers, moments, made_from, reservoirs)


def _numbered(tokens: Reservoir, domain: int) -> dict[str, Any]:
    return {**tokens.unpacked(), "domain": np.full(len(tokens), domain, np.int16)}


def _concatenated(parts: list[dict[str, Any]]) -> Reservoir:
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0] if name != "stream"}
    return Reservoir(**joined, stream=None)  # this pass keeps none


def measure(
    checkpoint: Path,
    text: Text,
    output: Path,
    scratch: Path,
    weights: Sequence[str],
    experts: int,
    window: int,
    made_from: dict[str, Any],
    progress: Progress | None = None,
) -> None:
    """Write the statistics of ``checkpoint`` over ``text``, gradients included, to ``output``."""
    folder = scratch / f"layerwise-{digest(made_from)[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    engine = Engine(checkpoint, text, weights, experts, window, folder, made_from, progress)
    engine.forwards()
    engine.backwards()
    engine.save(output)
    shutil.rmtree(folder)
