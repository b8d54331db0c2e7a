"""How far llama.cpp's kernels round the inputs of a product with a quantised weight.

On a CPU the activations are quantised too, to eight bits with one scale for every block of them: ``Q8_K``, blocks of
256, for weights of 256-blocks, and ``Q8_0``, blocks of 32, for the others (ggml-cpu.c, ``vec_dot_type``). What that
moves does not depend on the weights' bits, so it is the floor below which no quantised file gets.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeprune.measure.divergence import Reference, summarise
from edgeprune.measure.launch import Launch
from edgeprune.measure.llama import Node, session
from edgeprune.measure.observers import Disturbance, weight_name
from edgeprune.measure.sensitivity import RIPPLES
from edgeprune.measure.tasks import Switch, chosen_windows, compared

Floats = npt.NDArray[np.float32]
BLOCKS = (32, 256)
_LEVELS = 127
_MOST_ROWS = 128  # of one product's inputs in one window
_MOST_TOKENS = 2048


def rounding_error(rows: Floats, block: int) -> npt.NDArray[np.float64]:
    """Squared error of rounding each block of ``rows`` [n, width] to 255 levels of its largest magnitude, summed over
    rows, float64 [width / block]."""
    error = (rows - rounded(rows, block)).reshape(len(rows), -1, block)
    squares: npt.NDArray[np.float64] = np.einsum("nbc,nbc->b", error, error, dtype=np.float64)
    return squares


def rounded(rows: Floats, block: int) -> Floats:
    """Each block of ``rows`` [n, width] in 255 levels of its largest magnitude, float32 [n, width]."""
    blocks = rows.reshape(len(rows), -1, block)
    step = np.abs(blocks).max(axis=2, keepdims=True) / np.float32(_LEVELS)
    step[step == 0] = 1
    found: Floats = (np.rint(blocks / step) * step).reshape(rows.shape)
    return found


class InputRounding:
    """Watches the inputs of products with ``weights``; experts' are taken together.

    Attributes:
        sums: by weight and block size, squared error of rounding summed over rows, float64 [width / block].
        rows: by weight, how many.
    """

    def __init__(self, weights: frozenset[str]) -> None:
        self.weights = weights
        self.sums: dict[str, dict[int, npt.NDArray[np.float64]]] = {}
        self.rows: dict[str, int] = {}

    def __call__(self, node: Node, ask: bool) -> bool:
        if node.op not in ("MUL_MAT", "MUL_MAT_ID") or (weight := weight_name(node)) not in self.weights:
            return False
        inputs = node.source(1)
        if not ask and inputs is not None:
            self._look(weight, inputs.view())
        return True

    def _look(self, weight: str, inputs: npt.NDArray[Any]) -> None:
        rows = np.ascontiguousarray(inputs).reshape(-1, inputs.shape[-1])
        rows = rows[:: max(1, len(rows) // _MOST_ROWS)][:_MOST_ROWS]
        own = self.sums.setdefault(weight, {})
        for block in BLOCKS:
            if rows.shape[1] % block == 0:
                own[block] = own.get(block, 0.0) + rounding_error(rows, block)
        self.rows[weight] = self.rows.get(weight, 0) + len(rows)


class Ripple:
    """Adds noise of one relative size to the output of every product with one of ``weights``, and to the rows that
    are looked up in them."""

    def __init__(self, weights: frozenset[str], relative_square: float) -> None:
        self._own = {
            lookup: {
                weight: Disturbance(weight, lookup=lookup, relative_square=relative_square, seed=number)
                for number, weight in enumerate(sorted(weights))
            }
            for lookup in (False, True)
        }

    def __call__(self, node: Node, ask: bool) -> bool:
        if node.op not in ("GET_ROWS", "MUL_MAT", "MUL_MAT_ID"):
            return False
        found = self._own[node.op == "GET_ROWS"].get(weight_name(node) or "")
        return found is not None and found(node, ask)


class RoundedInputs:
    """Rounds the inputs of products with ``weights`` as a kernel for quantised weights would, for all who read them
    from there on.

    Every node of the graph is computed on its own, so that what feeds a product is there when it is asked for. The
    router's product, in F32, comes before those of its experts and still sees what is not rounded.
    """

    def __init__(self, weights: frozenset[str], block: int) -> None:
        self.weights, self.block = weights, block

    def __call__(self, node: Node, ask: bool) -> bool:
        if ask and node.op in ("MUL_MAT", "MUL_MAT_ID") and weight_name(node) in self.weights:
            inputs = node.source(1)
            if inputs is not None and inputs.shape[0] % self.block == 0 and inputs.is_contiguous:
                values = np.array(inputs.read())
                inputs.write(rounded(values.reshape(-1, values.shape[-1]), self.block).reshape(values.shape))
        return True


def measure(
    model: str,
    reference: str,
    texts: list[dict[str, str]],
    split: str,
    window: int,
    most_tokens: int,
    weights: list[str],
    threads: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """What rounding the inputs of ``weights`` does. A task for a child process; the arguments are those of
    ``tasks.disturb``.

    Returns:
        ``inputs``: by weight and block size, mean squared error of one input channel in each block of channels, on
        at most 2,048 tokens; without weights that are in no product of the graph. ``floor``: by block size, what
        rounding the inputs of all of them at once costs, nats per token. ``together``: by relative squared error,
        what noise of that size in all of their outputs at once costs, nats per token. ``tokens_per_s``: how fast
        this machine computes them while they are watched.
    """
    switch, watched = Switch(), frozenset(weights)
    watcher, costs = InputRounding(watched), {}
    with session(Path(model), Launch(context=window, batch=window, threads=threads), switch) as opened:
        chosen = chosen_windows(opened, texts, split, window, most_tokens)
        switch.current = watcher
        speed = 0.0
        for part in chosen[: max(1, _MOST_TOKENS // window)]:
            started = time.perf_counter()
            opened.run(part.tokens)
            speed = max(speed, len(part.tokens) / (time.perf_counter() - started))
        kept = Reference(Path(reference), opened.vocabulary_size)
        together = {str(error): Ripple(watched, error) for error in RIPPLES}
        floor = {str(block): RoundedInputs(watched, block) for block in BLOCKS}
        for number, (name, observer) in enumerate((together | floor).items()):
            switch.current = observer
            costs[name] = summarise(list(compared(opened, chosen, kept, None))).kl_mean
            if progress is not None:
                progress(number + 1, len(together) + len(floor))
    inputs = {
        weight: {str(block): (sums / (block * watcher.rows[weight])).tolist() for block, sums in own.items()}
        for weight, own in watcher.sums.items()
    }
    return {
        "inputs": inputs,
        "floor": {name: costs[name] for name in floor},
        "together": {name: costs[name] for name in together},
        "tokens_per_s": speed,
    }
