"""What is trained of one layer, with its optimiser, in a mapped file that comes into memory and goes with it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgeprune.files import PARTIAL_SUFFIX
from edgeprune.measure.layerwise.experts import Observer, expert_product
from edgeprune.measure.layerwise.parameters import Parameters

# AdamW (arXiv 1711.05101). Weight decay draws the low-rank updates to nothing; norms and routers are not decayed.
_BETAS, _EPSILON, _DECAY = (0.9, 0.99), 1e-8, 0.01
_LARGEST_GRADIENT = 1.0  # Euclidean norm over one layer; larger ones are scaled down to it
_IN_FRONT, _BEHIND = "in", "out"


@dataclass(frozen=True)
class Small:
    """A norm's or a router's weight, which is trained itself.

    Attributes:
        name: of the parameter in the model.
        module: that has it as ``weight``.
    """

    name: str
    module: nn.Module


def smalls(
    modules: Sequence[tuple[str, nn.Module]], router: nn.Module | None, parameters: Parameters, tensors: set[str]
) -> list[Small]:
    """The norms among ``modules``, and the ``router``, as far as they become one of the GGUF's ``tensors``."""
    found = []
    for name, module in modules:
        weight = getattr(module, "weight", None)
        norm = "Norm" in type(module).__name__ and weight is not None and weight.dim() == 1
        own = f"{name}.weight"
        if (norm or module is router) and parameters.gguf_weights(own).keys() & tensors:
            found.append(Small(own, module))
    return found


def low_rank(experts: Any, rank: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the updates of stacked ``experts``: ``out`` [K, outputs, r] times ``in`` [K, r, inputs] is added to
    what a matrix does (LoRA, arXiv 2106.09685)."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name in (inner_of(experts), "down_proj"):
        count, outputs, inputs = getattr(experts, name).shape
        if experts.is_transposed:
            outputs, inputs = inputs, outputs
        shapes[f"{name}.{_BEHIND}"] = (count, outputs, rank)
        shapes[f"{name}.{_IN_FRONT}"] = (count, rank, inputs)
    return shapes


def inner_of(experts: Any) -> str:
    """What the matrix before the activation is called."""
    return "gate_up_proj" if experts.has_gate else "up_proj"


class Trained:
    """The trained weights of one layer, or of what stands behind the last.

    Args:
        path: of the file, float32 [3, n]: the weights and AdamW's first and second moments of their gradients. It is
            made when the layer is first filled.
        smalls: norms and routers.
        layer: with the experts, or None where there are none.
        channels: channels that are kept of every expert, bool [K, F], or None for all.
    """

    def __init__(
        self,
        path: Path,
        smalls: Sequence[Small],
        observer: Observer | None,
        rank: int,
        seed: int,
        device: str,
        channels: torch.Tensor | None = None,
    ) -> None:
        self.path, self.smalls, self.device, self._seed = path, smalls, device, seed
        self.experts = observer.experts if observer is not None else None
        self.channels = None if channels is None else channels.to(device, torch.float32)
        self.shapes = {small.name: tuple(small.module.weight.shape) for small in smalls}  # type: ignore[arg-type]
        self._undecayed = sum(map(prod, self.shapes.values()))
        if self.experts is not None:
            self.shapes |= low_rank(self.experts, rank)
        self._size = sum(map(prod, self.shapes.values()))

    def _mapped(self) -> torch.Tensor:
        """The file, float32 [3, n]; whatever is done to it is done to the file."""
        return torch.from_file(str(self.path), shared=True, size=3 * self._size).reshape(3, self._size)

    def begin(self) -> None:
        """Make the file, if it is not there: the layer as it is. The layer has to be filled."""
        if self.path.is_file() or not self._size:
            return
        partial_path = self.path.with_name(self.path.name + PARTIAL_SUFFIX)
        partial_path.write_bytes(b"")
        own = torch.from_file(str(partial_path), shared=True, size=3 * self._size).reshape(3, self._size)
        generator = torch.Generator().manual_seed(self._seed)
        for (name, shape), values in zip(self.shapes.items(), self._split(own[0]), strict=True):
            small = next((each for each in self.smalls if each.name == name), None)
            if small is not None:
                values.copy_(small.module.weight.detach().cpu())  # type: ignore[operator]
            elif name.endswith(_IN_FRONT):
                values.copy_(torch.randn(shape, generator=generator) / shape[-1] ** 0.5)
        del own
        partial_path.replace(self.path)

    def _split(self, flat: torch.Tensor) -> list[torch.Tensor]:
        parts = torch.split(flat, [prod(shape) for shape in self.shapes.values()])
        return [part.view(shape) for part, shape in zip(parts, self.shapes.values(), strict=True)]

    def values(self, path: Path | None = None) -> dict[str, torch.Tensor]:
        """The weights as they are now, or as they were kept at ``path``."""
        flat = self._mapped()[0] if path is None else torch.from_file(str(path), shared=False, size=self._size)
        return dict(zip(self.shapes, self._split(flat), strict=True))

    def keep(self, path: Path) -> None:
        """Write the weights alone to ``path``."""
        if self._size:
            path.write_bytes(self._mapped()[0].numpy().tobytes())

    @contextlib.contextmanager
    def used(self) -> Iterator[list[torch.Tensor]]:
        """While the context lasts, the filled layer computes with the weights, which it gives as they are named in
        ``shapes``, to be differentiated by."""
        if not self._size:
            yield []
            return
        leaves = {name: own.to(self.device).requires_grad_() for name, own in self.values().items()}
        for small in self.smalls:
            leaves[small.name] = nn.Parameter(leaves[small.name].detach())
            small.module.weight = leaves[small.name]
        if self.experts is not None:
            self.experts.forward = partial(self._forward, self.experts, leaves)
        try:
            yield list(leaves.values())
        finally:
            if self.experts is not None:
                del self.experts.forward

    def _forward(
        self,
        experts: Any,
        leaves: dict[str, torch.Tensor],
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """The experts with their updates, as their own routine computes them without."""
        parts = {
            name: own.unbind(0) for name, own in leaves.items() if name.endswith((f".{_IN_FRONT}", f".{_BEHIND}"))
        }

        def product(name: str, expert: int, x: torch.Tensor) -> torch.Tensor:
            update = x @ parts[f"{name}.{_IN_FRONT}"][expert].T @ parts[f"{name}.{_BEHIND}"][expert].T
            return expert_product(experts, name, expert, x) + update

        used, flat = top_k_index.shape[1], top_k_index.reshape(-1)
        order = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat, minlength=experts.num_experts).tolist()
        contributions = []
        for expert, places in enumerate(torch.split(order, counts)):
            if not len(places):
                continue
            inner = product(inner_of(experts), expert, hidden_states[places // used])
            a = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
            if self.channels is not None:
                a = a * self.channels[expert]
            contributions.append(product("down_proj", expert, a) * top_k_weights.reshape(-1)[places, None])
        return torch.zeros_like(hidden_states).index_add(0, order // used, torch.cat(contributions))

    def step(self, gradients: Sequence[torch.Tensor], rate: float, count: int) -> None:
        """One step of AdamW, the ``count``-th, from 1."""
        if not self._size:
            return
        weights, first, second = self._mapped()
        slope = torch.cat([own.reshape(-1).cpu() for own in gradients])
        slope *= min(1.0, _LARGEST_GRADIENT / max(float(slope.norm()), 1e-30))
        first.lerp_(slope, 1 - _BETAS[0])
        second.lerp_(slope.square_(), 1 - _BETAS[1])
        weights[self._undecayed :] *= 1 - rate * _DECAY
        spread = (second / (1 - _BETAS[1] ** count)).sqrt_().add_(_EPSILON)
        weights.addcdiv_(first, spread, value=-rate / (1 - _BETAS[0] ** count))
