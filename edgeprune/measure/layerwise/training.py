"""Distillation: what is left of a checkpoint learns to answer as the whole, layer by layer.

The loss is KL(original || student) of the next token. A step carries a few windows forwards through the layers, keeps
what enters each, and takes the layers in reverse, computing each again for its gradients, so that the weights of one
layer are in memory at a time. Each layer's optimiser steps as soon as its gradients are there.
"""

from __future__ import annotations

import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import cos, pi
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgeprune.errors import BadFile
from edgeprune.files import read_json, require_space, to_json, write_text
from edgeprune.measure.layerwise.carried import Carried
from edgeprune.measure.layerwise.experts import Observer
from edgeprune.measure.layerwise.parameters import Parameters
from edgeprune.measure.layerwise.skeleton import Skeleton
from edgeprune.measure.layerwise.trained import Trained, smalls

Progress = Callable[[int, int], None]
Tokens = Sequence[int]
TEACHER, STUDENT = "teacher", "embedded"
HELD_OUT_EVERY = 8
# Rows of logits that are in memory at once.
_ROWS = 128
# Of a token's way through the layers: once forwards, once again, and backwards at twice the products.
_STEP_COST = 4
_LAST_RATE = 0.05  # of the largest


@dataclass(frozen=True)
class Recipe:
    """How long and how fast.

    Attributes:
        rank: of the updates of experts.
        steps: most of them.
        batch: tokens of a step, about.
        rate: the largest learning rate.
        warm_up: share of the steps in which it rises; then it falls as a cosine.
        looks: how often the held-out windows are looked at.
        patience: looks without a gain, after which training ends.
        seconds: after which it ends, too, or 0 for none.
    """

    rank: int = 16
    steps: int = 300
    batch: int = 2_048
    rate: float = 5e-3
    warm_up: float = 0.05
    looks: int = 12
    patience: int = 3
    seconds: float = 0.0
    seed: int = 0

    def rate_at(self, share: float) -> float:
        """The learning rate when ``share`` of the steps, or of the time, is over."""
        if share < self.warm_up:
            return self.rate * (share / self.warm_up + 0.1) / 1.1
        fall = (1 + cos(pi * (share - self.warm_up) / (1 - self.warm_up))) / 2
        return self.rate * (_LAST_RATE + (1 - _LAST_RATE) * fall)


@dataclass
class Record:
    """How far it has come.

    Attributes:
        step: that are done.
        seconds: that these took.
        before, after: nats per token on the held-out windows, untrained and at best.
        best: the step after which they were best.
        idle: looks since then.
    """

    step: int = 0
    seconds: float = 0.0
    before: float = 0.0
    after: float = 0.0
    best: int = 0
    idle: int = 0


def best_device() -> str:
    """The fastest that torch has here."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


class Trainer:
    """One student of one checkpoint.

    Args:
        windows: tokens of each; every eighth is held out.
        keep: ids of the experts that stay by layer; empty for all.
        channels: by layer, the channels that stay of each of these, bool [K, F]; empty for all.
        tensors: names in the GGUF.
        folder: for what is carried and learnt; may hold what an earlier run left.

    Raises:
        Unsupported: the model is not a row of layers with ordinary experts.
    """

    def __init__(
        self,
        checkpoint: Path,
        parameters: Parameters,
        windows: Sequence[Tokens],
        keep: Mapping[int, Sequence[int]],
        channels: Mapping[int, torch.Tensor],
        tensors: set[str],
        folder: Path,
        recipe: Recipe,
        progress: Progress | None = None,
        device: str = "",
    ) -> None:
        self.parameters, self.recipe, self.folder, self.progress = parameters, recipe, folder, progress
        device = device or best_device()
        self.skeleton = Skeleton(checkpoint, parameters, keep, device)
        self._teacher = Skeleton(checkpoint, parameters, None, device)
        self.layers, self.windows, self.device = len(self.skeleton.layers), windows, device
        self.places = self._places(channels, tensors)
        self.carried = Carried(folder, [len(tokens) for tokens in windows], self.skeleton.width)
        held = range(HELD_OUT_EVERY - 1, len(windows), HELD_OUT_EVERY)
        self.held_out = list(held) or [len(windows) - 1]
        self.fitted = [index for index in range(len(windows)) if index not in set(self.held_out)] or [0]
        self.record = Record()
        self._done = 0.0

    def _places(self, channels: Mapping[int, torch.Tensor], tensors: set[str]) -> list[Trained]:
        """What is trained of every layer, and of what stands behind the last."""
        inside = {id(module) for layer in self.skeleton.layers for module in layer.modules()}
        outer = [(name, own) for name, own in self.skeleton.model.named_modules() if id(own) not in inside]
        places = []
        for index in range(self.layers + 1):
            observer, modules = None, outer
            if index < self.layers:
                layer, prefix = self.skeleton.layers[index], f"{self.skeleton.prefix}.{index}"
                modules = [(f"{prefix}.{name}", own) for name, own in layer.named_modules() if name]
                observer = Observer(layer)
                observer = observer if observer.experts is not None else None
            own = smalls(modules, observer.router if observer is not None else None, self.parameters, tensors)
            path, seed = self._state / f"{index}.f32", self.recipe.seed + index
            places.append(Trained(path, own, observer, self.recipe.rank, seed, self.device, channels.get(index)))
        return places

    # What the run leaves behind: the working state, a whole copy of it after every look, and the best weights.

    @property
    def _state(self) -> Path:
        return self.folder / "state"

    @property
    def _saved(self) -> Path:
        return self.folder / "saved"

    def best(self, place: int) -> dict[str, torch.Tensor]:
        """The best weights of a place, by name as in ``Trained.shapes``; those of the original where none helped."""
        return self.places[place].values(self.folder / f"best-{place}.f32")

    def _save(self) -> None:
        made = self.folder / "saving"
        shutil.rmtree(made, ignore_errors=True)
        shutil.copytree(self._state, made)
        write_text(made / "record.json", to_json(asdict(self.record)))
        shutil.rmtree(self._saved, ignore_errors=True)
        made.replace(self._saved)

    def _restore(self) -> bool:
        """Go back to what was saved last; whether there is such a thing."""
        shutil.rmtree(self._state, ignore_errors=True)
        try:
            self.record = Record(**read_json(self._saved / "record.json"))
            shutil.copytree(self._saved, self._state, ignore=shutil.ignore_patterns("*.json"))
        except (BadFile, OSError, TypeError):
            shutil.rmtree(self._state, ignore_errors=True)
            self._state.mkdir(parents=True)
            self.record = Record()
            return False
        return True

    # The original.

    def teach(self) -> None:
        """Keep what enters the first layer, and what leaves the last one of the original."""
        require_space(self.folder, 4 * self.carried.nbytes)
        if not self.carried.has(STUDENT, 0):
            self.carried.write(STUDENT, 0, self._teacher.embedded(self.windows))
        if self.carried.has(TEACHER, self.layers):
            self._advance(self.layers * sum(map(len, self.windows)))
            return
        for layer in range(self.layers):
            if not self.carried.has(TEACHER, layer + 1):
                with self._teacher.filled_layer(layer), torch.no_grad():
                    self.carried.write(TEACHER, layer + 1, self._taught(layer))
            self.carried.forget(TEACHER, layer)

    def _taught(self, layer: int) -> Iterator[torch.Tensor]:
        for hidden in self.carried.read(TEACHER if layer else STUDENT, layer):
            yield self._teacher.layer(layer, hidden.to(self.device))
            self._advance(hidden.shape[1])

    # The student.

    def train(self) -> Record:
        """Take the steps that are left."""
        recipe = self.recipe
        if not self._restore():
            self.record.before = self.record.after = self._look(begin=True)
            self._keep_best()
            self._save()
        every = max(1, recipe.steps // recipe.looks)
        total, started, earlier = recipe.steps, time.monotonic(), self.record.seconds
        self._advance(self.record.step * recipe.batch * self.layers * _STEP_COST)
        for step, batch in enumerate(self._batches()):
            if step < self.record.step:
                continue
            share = step / total
            if recipe.seconds:
                share = max(share, self.record.seconds / recipe.seconds)
            if step >= total or share >= 1 or self.record.idle >= recipe.patience:
                break
            self._step(batch, recipe.rate_at(share), step + 1)
            self.record.step = step + 1
            self.record.seconds = earlier + time.monotonic() - started
            out_of_time = recipe.seconds and self.record.seconds >= recipe.seconds
            if (step + 1) % every == 0 or step + 1 == total or out_of_time:
                self._judge()
                self._save()
        return self.record

    def _judge(self) -> None:
        nats = self._look()
        if nats < self.record.after:
            self.record.after, self.record.best, self.record.idle = nats, self.record.step, 0
            self._keep_best()
        else:
            self.record.idle += 1

    def _keep_best(self) -> None:
        for index, place in enumerate(self.places):
            place.keep(self.folder / f"best-{index}.f32")

    def _batches(self) -> Iterator[list[int]]:
        """Windows of one step after the other; all of them, in a new order, before one comes again."""
        random = np.random.default_rng(self.recipe.seed)
        batch: list[int] = []
        while True:
            for index in random.permutation(self.fitted).tolist():
                batch.append(index)
                if sum(len(self.windows[own]) for own in batch) >= self.recipe.batch:
                    yield batch
                    batch = []

    def _forwards(self, batch: Sequence[int], *, begin: bool = False) -> Iterator[list[torch.Tensor]]:
        """What enters each layer in turn, and what leaves the last, of each window [1, T, D]."""
        passed = [self.carried.window(STUDENT, 0, index).to(self.device) for index in batch]
        yield passed
        for index, place in enumerate(self.places[:-1]):
            with self.skeleton.filled_layer(index):
                if begin:
                    place.begin()
                with place.used(), torch.no_grad():
                    passed = [self.skeleton.layer(index, hidden) for hidden in passed]
            yield passed

    def _look(self, *, begin: bool = False) -> float:
        """Nats per token on the held-out windows."""
        # Of all layers only one's inputs are held: there is more held-out text than a step has.
        (last,) = deque(self._forwards(self.held_out, begin=begin), maxlen=1)
        nats, _, _ = self._output(self.held_out, last, learn=False, begin=begin)
        return nats

    def _step(self, batch: Sequence[int], rate: float, count: int) -> None:
        passed = list(self._forwards(batch))
        _, slopes, own = self._output(batch, passed.pop())
        self.places[-1].step(own, rate, count)
        for index in reversed(range(self.layers)):
            place, inputs = self.places[index], passed.pop()
            with self.skeleton.filled_layer(index):
                with place.used() as leaves:
                    sums = [torch.zeros_like(leaf) for leaf in leaves]
                    for number, hidden in enumerate(inputs):
                        slopes[number] = self._back(index, hidden, slopes[number], leaves, sums)
                place.step(sums, rate, count)
        self._advance(self.recipe.batch * self.layers * _STEP_COST)

    def _back(
        self,
        layer: int,
        hidden: torch.Tensor,
        slope: torch.Tensor,
        leaves: list[torch.Tensor],
        sums: list[torch.Tensor],
    ) -> torch.Tensor:
        """The loss's derivative by what enters ``layer``; those by its ``leaves`` are added to ``sums``."""
        hidden.requires_grad_()
        output = self.skeleton.layer(layer, hidden)
        first, *rest = torch.autograd.grad(output, [hidden, *leaves], slope, allow_unused=True)
        for total, own in zip(sums, rest, strict=True):
            if own is not None:  # experts that no token of the window went to
                total += own.detach()
        return first.detach()

    def _output(
        self, batch: Sequence[int], last: Sequence[torch.Tensor], *, learn: bool = True, begin: bool = False
    ) -> tuple[float, list[torch.Tensor], list[torch.Tensor]]:
        """KL divergence from the original in nats per token, its derivatives by what leaves the last layer, and by
        what is trained behind it. Logits are there for a few rows at a time."""
        tokens, nats, slopes, place = sum(hidden.shape[1] for hidden in last), 0.0, [], self.places[-1]
        with self.skeleton.filled_output():
            if begin:
                place.begin()
            originals = [small.module.weight for small in place.smalls]
            with place.used() as leaves, torch.set_grad_enabled(learn):
                own = [small.module.weight for small in place.smalls]
                sums = [torch.zeros_like(leaf) for leaf in leaves]
                for index, hidden in zip(batch, last, strict=True):
                    wanted, slope = self.carried.window(TEACHER, self.layers, index).to(self.device), []
                    for start in range(0, hidden.shape[1], _ROWS):
                        rows = slice(start, start + _ROWS)
                        self._put(originals)
                        with torch.no_grad():
                            target = self.skeleton.logits(wanted[:, rows]).log_softmax(-1)
                        self._put(own)
                        part = hidden[:, rows].detach().requires_grad_(learn)
                        found = self.skeleton.logits(part).log_softmax(-1)
                        loss = (target.exp() * (target - found)).sum() / tokens
                        nats += float(loss.detach())
                        if learn:
                            first, *rest = torch.autograd.grad(loss, [part, *leaves])
                            slope.append(first)
                            for total, each in zip(sums, rest, strict=True):
                                total += each
                    slopes.append(torch.cat(slope, dim=1) if learn else hidden)
        if not np.isfinite(nats):
            raise BadFile(f"{self.parameters.checkpoint.folder} computes values that are not finite")
        return nats, slopes, sums

    def _put(self, weights: Sequence[Any]) -> None:
        for small, weight in zip(self.places[-1].smalls, weights, strict=True):
            small.module.weight = weight

    def _advance(self, amount: float) -> None:
        self._done += amount
        if self.progress is not None:
            whole = self.layers * (sum(map(len, self.windows)) + self.recipe.steps * self.recipe.batch * _STEP_COST)
            done = self._done / whole
            if self.recipe.seconds:
                done = max(done, self.record.seconds / self.recipe.seconds)
            self.progress(int(1000 * min(done, 1.0)), 1000)
