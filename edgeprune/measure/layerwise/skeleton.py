"""A transformers model of which only the layer at work has its weights in memory."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgeprune.errors import Unsupported
from edgeprune.measure.layerwise.parameters import Parameters

_LAYER = re.compile(r"\.layers\.(\d+)\.")
Visitor = Callable[[int, torch.Tensor, tuple[Any, ...], dict[str, Any]], torch.Tensor]


class _Stop(Exception):
    """Ends a run of the model whose rest is of no interest."""


class Skeleton:
    """The model's modules, empty. Layers, embeddings and output are filled while they are used.

    Everything is computed in float32, whatever the checkpoint is stored in.

    Args:
        folder: of the checkpoint.
        parameters: its tensors.
        keep: ids of the experts that stay by layer, as many in each, or None for all: the model has no others.
        device: where it is computed.

    Raises:
        Unsupported: transformers has no such model, or it is not a plain row of layers.

    Attributes:
        model: transformers' causal language model.
        layers: its decoder layers; they are called through ``layer``.
        width: of the residual stream.
    """

    def __init__(
        self,
        folder: Path,
        parameters: Parameters,
        keep: Mapping[int, Sequence[int]] | None = None,
        device: str = "cpu",
    ) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            if keep:
                self._set_experts(config.get_text_config(), parameters, len(next(iter(keep.values()))))
            with torch.device("meta"):
                self.model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, dtype=torch.float32)
        except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
            raise Unsupported(
                f"transformers cannot make a model of {folder / 'config.json'}: {error}"[:300]
            ) from error
        self.model.eval().requires_grad_(False)
        self._parameters, self._keep, self.device = parameters, keep or {}, device
        self.layers, self.prefix = _layers(self.model, config.get_text_config().num_hidden_layers)
        self.width = int(config.get_text_config().hidden_size)
        _restore_buffers(self.model)
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if not buffer.is_meta:
                    module._buffers[name] = buffer.to(device)
        self._forwards = [layer.forward for layer in self.layers]
        self._visitor: Visitor | None = None
        for index, layer in enumerate(self.layers):
            layer.forward = partial(self._visit, index)
        self.arguments = lru_cache(maxsize=16)(self._arguments)

    @staticmethod
    def _set_experts(config: Any, parameters: Parameters, count: int) -> None:
        """Have the model of the configuration made with ``count`` experts per layer."""
        names = [name for name in parameters.converter.experts if isinstance(getattr(config, name, None), int)]
        if not names:
            raise Unsupported("the configuration says nowhere how many experts the model has")
        for name in names:
            setattr(config, name, count)

    def _visit(self, index: int, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        assert self._visitor is not None
        return self._visitor(index, hidden, args, kwargs)

    def _run(self, visitor: Visitor, **inputs: Any) -> Any:
        self._visitor = visitor
        with contextlib.suppress(_Stop):
            return self.model(**inputs, use_cache=False)
        return None

    # Weights.

    @contextlib.contextmanager
    def _filled(self, modules: Sequence[tuple[str, nn.Module]]) -> Iterator[None]:
        """The modules' own parameters and buffers in memory, until the context ends."""
        for prefix, module in modules:
            names = [name for name, tensor in module.state_dict().items() if tensor.is_meta]
            shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
            tensors = {name: self._read(f"{prefix}.{name}", shapes[name]).to(self.device) for name in names}
            module.load_state_dict(tensors, strict=False, assign=True)
            module.requires_grad_(False)
        try:
            yield
        finally:
            for _, module in modules:
                for part in module.modules():
                    for name, parameter in list(part.named_parameters(recurse=False)):
                        setattr(part, name, nn.Parameter(parameter.to("meta"), requires_grad=False))

    def _read(self, name: str, shape: torch.Size) -> torch.Tensor:
        """A parameter; of one that is larger than ``shape``, the rows of the experts that stay."""
        tensor, found = self._parameters.read(name), _LAYER.search(name)
        kept = self._keep.get(int(found[1])) if found else None
        if kept is None or tensor.shape == shape:
            return tensor
        if tensor.shape[1:] != shape[1:] or tensor.shape[0] != self._parameters.experts or shape[0] != len(kept):
            raise Unsupported(f"{name} of the shape {list(tensor.shape)} has no place for fewer experts")
        return tensor[list(kept)]

    def filled_layer(self, index: int) -> contextlib.AbstractContextManager[None]:
        """Layer ``index`` with its weights."""
        return self._filled([(f"{self.prefix}.{index}", self.layers[index])])

    @contextlib.contextmanager
    def filled_output(self) -> Iterator[nn.Module]:
        """The output matrix, which the context gives, and whatever else stands outside the layers, with weights."""
        output, embeddings = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        inside = {id(module) for layer in self.layers for module in layer.modules()}
        outer = [
            (name, module)
            for name, module in self.model.named_modules()
            if id(module) not in inside
            and module not in (output, embeddings)
            and next(module.parameters(recurse=False), None) is not None
        ]
        name = next(name for name, module in self.model.named_modules() if module is output)
        if f"{name}.weight" not in self._parameters.checkpoint.stored:  # tied
            name = next(name for name, module in self.model.named_modules() if module is embeddings)
        with self._filled([*outer, (name, output)]):
            yield output

    # What the model does outside its layers.

    def embedded(self, windows: Sequence[Sequence[int]]) -> Iterator[torch.Tensor]:
        """What enters the first layer, float32 [1, T, D], for each window in turn."""
        embeddings = self.model.get_input_embeddings()
        name = next(name for name, module in self.model.named_modules() if module is embeddings)
        with self._filled([(name, embeddings)]), torch.no_grad():
            for tokens in windows:
                found: list[torch.Tensor] = []

                def first(
                    _: int, hidden: torch.Tensor, args: Any, kwargs: Any, found: list[torch.Tensor] = found
                ) -> torch.Tensor:
                    found.append(hidden)
                    raise _Stop

                self._run(first, input_ids=torch.tensor([list(tokens)], device=self.device))
                yield found[0]

    def _arguments(self, length: int) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """What every layer is called with beside its input, in a window of ``length`` tokens.

        Raises:
            Unsupported: the model does more between its layers than to hand their outputs on.
        """
        start = torch.zeros(1, length, self.width, device=self.device)
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def note(index: int, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
            if index != len(calls) or hidden.shape != start.shape:
                raise Unsupported(f"{type(self.model).__name__} does not run its layers one after the other")
            calls.append((args, kwargs))
            if len(calls) == len(self.layers):
                raise _Stop
            return start

        with torch.no_grad():
            self._run(note, inputs_embeds=start)
        return calls

    def layer(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """Output of a filled layer, float32 [1, T, D], for its input ``hidden``."""
        args, kwargs = self.arguments(hidden.shape[1])[index]
        output = self._forwards[index](hidden, *args, **kwargs)
        result: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def loss(self, tokens: Sequence[int], hidden: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of every next token in nats, summed over the window, from the last layer's output ``hidden``
        [1, T, D]; to be called with the output filled."""
        wanted = torch.tensor(list(tokens[1:]), device=hidden.device)
        loss: torch.Tensor = nn.functional.cross_entropy(self.logits(hidden)[:-1], wanted, reduction="sum")
        return loss

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of every next token, float32 [T, V], from the last layer's output ``hidden`` [1, T, D], which may be
        any part of a window; to be called with the output filled."""
        output = self._run(lambda *_: hidden, inputs_embeds=torch.zeros_like(hidden))
        found: torch.Tensor = output.logits[0].float()
        return found


def _layers(model: nn.Module, count: int) -> tuple[nn.ModuleList, str]:
    """The decoder layers and the name of their list.

    Raises:
        Unsupported: there is no such list.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and name.endswith("layers") and len(module) == count:
            return module, name
    raise Unsupported(f"{type(model).__name__} has no list of {count} layers")


def _restore_buffers(model: nn.Module) -> None:
    """Make anew what is computed from the configuration and not stored, such as the rotary frequencies.

    Raises:
        Unsupported: a module that cannot be made from its configuration alone.
    """
    for name, module in list(model.named_modules()):
        stored = {own for own in module.state_dict() if "." not in own}
        lost = [own for own, buffer in module.named_buffers(recurse=False) if buffer.is_meta and own not in stored]
        if not lost:
            continue
        config = getattr(module, "config", None)
        if config is None:
            raise Unsupported(f"{name} of {type(model).__name__} holds {lost[0]}, which no checkpoint stores")
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, type(module)(config))
