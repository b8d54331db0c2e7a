"""The experts of one layer computed with everything in sight, in place of the model's own routine.

Works on every model whose experts follow transformers' experts interface (``use_experts_implementation``): a module
with stacked matrices that is given the tokens, the chosen experts and their coefficients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from edgeprune.errors import Unsupported
from edgeprune.measure.slots import Slots
from edgeprune.measure.sums import LayerWindow, Sums

Floats = npt.NDArray[np.float32]
# Spread of coefficient / probability over a token's experts that counts as none.
_TOLERANCE = 1e-3


@dataclass
class Routed:
    """What went through the experts of one layer in one window. Slots are pairs of token and chosen expert.

    Attributes:
        x: their input [T, D].
        ids, gates: chosen experts and coefficients [T, k].
        y: their combined output [T, D].
        products: gate and up products of the slots of each expert that has any [n, 2F] or [n, F].
        hidden: the same of the down projection's input [n, F].
        contributions: coefficient times output of every slot [T, k, D].
        inverse: where in the concatenated ``hidden`` and ``products`` each slot is, int [T * k].
        h: residual stream before the block [T, D], or None where it was not found.
    """

    x: torch.Tensor
    ids: torch.Tensor
    gates: torch.Tensor
    y: torch.Tensor
    products: list[torch.Tensor]
    hidden: list[torch.Tensor]
    contributions: torch.Tensor
    inverse: torch.Tensor
    h: torch.Tensor | None = None


@dataclass
class Observer:
    """Replaces the routine of the experts in ``layer`` and notes what goes through them.

    Raises:
        Unsupported: experts that are computed in a way that is not known here.

    Attributes:
        routed: of the last window; None in a layer without experts.
    """

    layer: nn.Module
    routed: Routed | None = None
    _norms: list[tuple[Any, Any]] = field(default_factory=list)
    _undo: list[Callable[[], None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        found = [(name, part) for name, part in self.layer.named_modules() if hasattr(part, "is_concatenated")]
        self.experts: Any = None
        if not found:
            return
        name, self.experts = found[0]
        if len(found) > 1 or getattr(self.experts, "has_post_expert_norm", False):
            raise Unsupported(f"{type(self.experts).__name__} is not computed as an ordinary mixture of experts")
        self.block = self.layer.get_submodule(name.rpartition(".")[0])
        self.router = self._router()

    def _router(self) -> nn.Module:
        for part in self.block.children():
            weight = getattr(part, "weight", None)
            if part is not self.experts and weight is not None and weight.shape[0] == self.experts.num_experts:
                return part
        raise Unsupported(f"{type(self.block).__name__} has no router beside its experts")

    def __enter__(self) -> Observer:
        if self.experts is not None:
            self.experts.forward = partial(self._forward, self.experts)
            self._undo.append(partial(delattr, self.experts, "forward"))
            for part in self.layer.children():
                self._undo.append(part.register_forward_hook(self._note).remove)
            self._undo.append(self.block.register_forward_pre_hook(self._enter).remove)
        return self

    def __exit__(self, *_: object) -> None:
        while self._undo:
            self._undo.pop()()

    # The norm before the block: its input is the residual stream.

    def _note(self, module: nn.Module, arguments: Any, output: Any) -> None:
        if module is not self.block and arguments and isinstance(arguments[0], torch.Tensor):
            self._norms.append((arguments[0], output))

    def _enter(self, _: nn.Module, arguments: Any) -> None:
        self._before = next((before for before, after in self._norms if after is arguments[0]), None)
        self._norms.clear()

    # The experts.

    def _forward(
        self, experts: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        tokens, used = top_k_index.shape
        flat = top_k_index.reshape(-1)
        order = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat, minlength=experts.num_experts).tolist()
        products, hidden, contributions = [], [], []
        for expert, places in enumerate(torch.split(order, counts)):
            if not len(places):
                continue
            x = hidden_states[places // used]
            product = expert_product(experts, "gate_up_proj" if experts.has_gate else "up_proj", expert, x)
            a = experts._apply_gate(product) if experts.has_gate else experts.act_fn(product)
            f = expert_product(experts, "down_proj", expert, a)
            products.append(product)
            hidden.append(a)
            contributions.append(f * top_k_weights.reshape(-1)[places, None])
        inverse = torch.argsort(order)
        weighted = torch.cat(contributions)[inverse].reshape(tokens, used, -1)
        y = weighted.sum(dim=1)
        h = None if self._before is None else self._before.reshape(tokens, -1)
        self.routed = Routed(hidden_states, top_k_index, top_k_weights, y, products, hidden, weighted, inverse, h)
        return y

    # To numbers.

    @torch.no_grad()
    def add_to(
        self, sums: Sums, layer: int, weights: dict[str, str], after: torch.Tensor, slopes: list[torch.Tensor]
    ) -> None:
        """The last window's statistics.

        Args:
            weights: names of the expert weights in the GGUF by ``gate``, ``up`` and ``down``.
            after: the layer's output [T, D].
            slopes: derivatives of the loss by ``routed.hidden`` and, last, by ``routed.y``.
        """
        assert self.routed is not None
        routed, seen = self.routed, LayerWindow()
        seen.slots = Slots(routed.ids.to(torch.int32).numpy(), sums.experts)
        seen.gates = _floats(routed.gates)
        if routed.h is not None:
            seen.h = _floats(routed.h)
        self._route(seen)
        sums.input(layer, seen, _floats(routed.x))
        self._products(sums, layer, seen, weights)
        hidden = _floats(torch.cat(routed.hidden)[routed.inverse])
        squares = sums.hidden(layer, seen, hidden)
        contributions = _floats(routed.contributions)
        gates = seen.gates[:, :, None]
        outputs = np.divide(contributions, gates, out=np.zeros_like(contributions), where=gates > 0)
        if "down" in weights:
            sums.expert_moment(weights["down"], squares, seen.slots, outputs)
        sums.output(layer, seen, contributions)
        sums.after(layer, seen, _floats(after))
        slope = _floats(torch.cat(slopes[:-1])[routed.inverse])
        sums.gradients(layer, seen, (hidden, slope), contributions, _floats(slopes[-1]))

    def _route(self, seen: LayerWindow) -> None:
        """Logits and probabilities of the router, from its weights: modules differ in what they return."""
        assert self.routed is not None
        bias = getattr(self.router, "bias", None)
        bias = bias if isinstance(bias, torch.Tensor) and bias.dim() == 1 else None
        weight = self.router.weight
        logits = nn.functional.linear(self.routed.x, weight, bias)  # type: ignore[arg-type]
        seen.logits = _floats(logits)
        probs = _probabilities(logits, self.routed.ids, self.routed.gates)
        if probs is None:
            return
        seen.probs, seen.chosen = _floats(probs), _floats(probs.gather(1, self.routed.ids))
        correction = getattr(self.router, "e_score_correction_bias", None)
        seen.selection = seen.probs if correction is None else _floats(probs + correction)

    def _products(self, sums: Sums, layer: int, seen: LayerWindow, weights: dict[str, str]) -> None:
        assert self.routed is not None and seen.slots is not None and seen.x_square is not None
        product = torch.cat(self.routed.products).detach()[self.routed.inverse]
        parts = {"up": product}
        if self.experts.has_gate:
            split = product.chunk(2, dim=1) if self.experts.is_concatenated else (product[:, ::2], product[:, 1::2])
            parts = dict(zip(("gate", "up"), split, strict=True))
            slopes = self._slopes(*split)
            sums.activation(layer, seen, _floats(parts["gate"]), _floats(parts["up"]), slopes)
        shape = (*seen.slots.ids.shape, -1)
        for kind, part in parts.items():
            if kind in weights:
                sums.expert_moment(weights[kind], seen.x_square, seen.slots, _floats(part).reshape(shape))

    def _slopes(self, gate: torch.Tensor, up: torch.Tensor) -> tuple[Floats, Floats] | None:
        """The activation's value and derivative, where the gate is act(gate) * up."""
        assert self.routed is not None
        with torch.enable_grad():
            at = gate.detach().clone().requires_grad_()
            value = self.experts.act_fn(at)
            (slope,) = torch.autograd.grad(value.sum(), at)
        hidden = torch.cat(self.routed.hidden).detach()[self.routed.inverse]
        if not torch.allclose(value.detach() * up, hidden, rtol=1e-4, atol=1e-6):
            return None
        return _floats(value), _floats(slope)


def expert_product(experts: Any, name: str, expert: int, x: torch.Tensor) -> torch.Tensor:
    """``x`` [n, inputs] through one expert's matrix, its bias added, [n, outputs]."""
    weight = getattr(experts, name)[expert]
    bias = getattr(experts, f"{name}_bias")[expert] if experts.has_bias else None
    return nn.functional.linear(x, weight.T if experts.is_transposed else weight, bias)


def _floats(values: torch.Tensor) -> Floats:
    return np.ascontiguousarray(values.detach().float().numpy())


def _probabilities(logits: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor) -> torch.Tensor | None:
    """What the coefficients were made from: softmax or sigmoid of ``logits`` [T, E], whichever the coefficients of a
    token's chosen experts are proportional to; None where neither fits."""
    best: tuple[float, torch.Tensor | None] = (_TOLERANCE, None)
    for probs in (logits.softmax(dim=1), logits.sigmoid()):
        ratio = gates / probs.gather(1, ids).clamp(min=1e-30)
        mean = ratio.mean(dim=1, keepdim=True)
        spread = float(((ratio - mean).abs() / mean.abs().clamp(min=1e-30)).max())
        if ids.shape[1] == 1:  # every single coefficient is proportional to everything
            spread = float((gates - probs.gather(1, ids)).abs().max())
        if spread < best[0]:
            best = (spread, probs)
    return best[1]
