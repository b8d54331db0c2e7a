"""Eval-callback observers that change what the model computes: mask the router, disturb a weight's output."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeprune.errors import EdgepruneError
from edgeprune.measure.channels import Channels
from edgeprune.measure.llama import Node

# Where the softmax is over the chosen experts, "probs" is what the logits are called in the end.
_LOGITS = re.compile(r"ffn_moe_(?:logits|logits_biased|probs|probs_biased)-(\d+)")
# What the experts' activations are called (``build_moe_ffn`` in src/llama-graph.cpp).
_ACTIVATION = re.compile(
    r"ffn_moe_(?:swiglu|geglu|reglu|silu|gelu|relu|relu_sqr|swiglu_oai|swiglu_limited|situ)-(\d+)"
)
# From an activation back to its product: bias, scale, clamp, halves of one product, and what SiTU is made of.
_MOST_STEPS = 10
MASKED_LOGIT = -1.0e9  # finite: llama.cpp's kernels handle -inf, its checks do not


def weight_name(node: Node) -> str:
    """Name of the weight that a matrix product multiplies with; copies on a GPU are called ``DEV#name#0``."""
    source = node.source(0)
    if source is None:
        return ""
    parts = source.name.split("#")
    return parts[1] if len(parts) > 1 else parts[0]


class RouterMask:
    """Takes experts out of the router's choice, which equals dropping them from the file.

    Written before the softmax or sigmoid, the mask also leaves the sum of a softmax right, so that
    routers that do not renormalise are covered. Where a selection bias is added later, the biased
    scores are masked as well.

    Args:
        keep: kept expert ids by layer; layers that are absent stay whole.
        experts: routed experts per layer (E).
    """

    def __init__(self, keep: Mapping[int, list[int]], experts: int) -> None:
        self.touched: set[int] = set()
        self._dropped = {layer: np.setdiff1d(np.arange(experts), np.asarray(ids)) for layer, ids in keep.items()}

    def check(self) -> None:
        """To be called after a pass.

        Raises:
            EdgepruneError: a layer's scores were never seen, so that nothing was taken out there.
        """
        wanted = {layer for layer, dropped in self._dropped.items() if len(dropped)}
        if missing := sorted(wanted - self.touched):
            raise EdgepruneError(
                f"llama.cpp's graph shows no router scores in layer {missing[0]}; it cannot be masked"
            )

    def __call__(self, node: Node, ask: bool) -> bool:
        match = _LOGITS.fullmatch(node.name)
        if match is None:
            return False
        dropped = self._dropped.get(int(match[1]))
        if dropped is None or not len(dropped):
            return False
        if not ask:
            scores = np.array(node.read())
            scores[..., dropped] = MASKED_LOGIT
            node.write(scores)
            self.touched.add(int(match[1]))
        return True


class ChannelMask:
    """Zeroes channels between an expert's activation and its down projection, which equals cutting them out of the
    file.

    Args:
        channels: of every expert, best first.
        width: how many are kept.
    """

    def __init__(self, channels: Channels, width: int) -> None:
        self.touched: set[int] = set()
        self._kept: dict[int, npt.NDArray[np.float32]] = {}
        for layer, order in channels.orders.items():
            kept = np.zeros(order.shape, np.float32)
            np.put_along_axis(kept, channels.best(layer, width), 1.0, axis=1)
            self._kept[layer] = kept

    def check(self) -> None:
        """To be called after a pass.

        Raises:
            EdgepruneError: a layer's activation was never seen, so that nothing was taken out there.
        """
        if missing := sorted(self._kept.keys() - self.touched):
            raise EdgepruneError(
                f"llama.cpp's graph shows no activation of the experts in layer {missing[0]}; it cannot be masked"
            )

    def __call__(self, node: Node, ask: bool) -> bool:
        match = _ACTIVATION.fullmatch(node.name)
        if match is None or (kept := self._kept.get(int(match[1]))) is None:
            return False
        if not ask and (ids := _expert_ids(node)) is not None:
            values = np.array(node.read()[0])
            node.write(values * kept[ids])
            self.touched.add(int(match[1]))
        return True


def _expert_ids(node: Node) -> npt.NDArray[np.int32] | None:
    """The experts [T, k] whose activation ``node`` is, from the product with their weights that it was made from."""
    found: Node | None = node
    for _ in range(_MOST_STEPS):
        if found is None:
            return None
        if found.op == "MUL_MAT_ID":
            ids = found.source(2)
            return None if ids is None else np.ascontiguousarray(ids.read()[0, 0])
        found = found.source(0)
    return None


class Masks:
    """Several masks at once, or none."""

    def __init__(self, masks: Sequence[RouterMask | ChannelMask]) -> None:
        self._masks = masks

    def check(self) -> None:
        """To be called after a pass.

        Raises:
            EdgepruneError: a mask did not take hold.
        """
        for mask in self._masks:
            mask.check()

    def __call__(self, node: Node, ask: bool) -> bool:
        return any([mask(node, ask) for mask in self._masks])


class Disturbance:
    """Adds Gaussian noise of a given relative size to the output of one weight.

    Args:
        weight: whose product, or (for the embeddings) whose rows are disturbed.
        lookup: disturb the row lookup (embedding) instead of the matrix product.
        relative_square: E|error|^2 / |output|^2 of each output row.
        seed: of the noise.
    """

    def __init__(self, weight: str, *, lookup: bool, relative_square: float, seed: int) -> None:
        self.weight = weight
        self.ops = ("GET_ROWS",) if lookup else ("MUL_MAT", "MUL_MAT_ID")
        self.scale = float(np.sqrt(relative_square))
        self.random = np.random.default_rng(seed)
        self.touched = 0

    def __call__(self, node: Node, ask: bool) -> bool:
        if node.op not in self.ops or weight_name(node) != self.weight:
            return False
        if not ask:
            output: npt.NDArray[Any] = np.array(node.read())
            width = output.shape[-1]
            norms = np.sqrt(np.square(output).sum(axis=-1, keepdims=True) / width)
            noise = self.random.standard_normal(output.shape, dtype=np.float32)
            node.write(output + noise * norms * np.float32(self.scale))
            self.touched += 1
        return True
