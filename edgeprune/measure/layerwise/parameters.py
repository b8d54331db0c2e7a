"""A checkpoint's tensors under the names that the model's modules give them.

Checkpoints spell what the modules of transformers have in several ways: experts one by one or stacked, blocks under
older names. The converter of the model's type lists the spellings, because it has to read them all.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune.errors import BadFile
from edgeprune.model.checkpoint import Checkpoint, open_checkpoint
from edgeprune.model.converter import Converter, converter_for
from edgeprune.model.planning import apply_tying, choose
from edgeprune.model.transforms import TRANSFORMS, Sizes
from edgeprune.model.values import language_config, prefix_of, sizes_of

if TYPE_CHECKING:
    import torch

_LAYER = re.compile(r"\.layers\.(\d+)\.")
_GATE, _UP, _DOWN = (f"blk.{{layer}}.ffn_{kind}_exps.weight" for kind in ("gate", "up", "down"))


@dataclass(frozen=True)
class Parameters:
    """Reads the parameters of one checkpoint, a tensor at a time.

    Attributes:
        checkpoint: where they are.
        converter: of its type.
        experts: routed experts per layer.
    """

    checkpoint: Checkpoint
    converter: Converter
    experts: int

    def read(self, name: str) -> torch.Tensor:
        """The parameter ``name`` of the model, float32 (whatever it is stored as, if that is a float).

        Raises:
            BadFile: the checkpoint has it under no known name.
        """
        return self._stored(name).float()

    def _stored(self, name: str) -> torch.Tensor:
        import torch

        name = self._spelt(name)
        if name in self.checkpoint.stored:
            return self.checkpoint.tensor(name)
        found = _LAYER.search(name)
        layer = int(found[1]) if found else 0
        if name.endswith(".experts.gate_up_proj"):
            return torch.cat([self._experts(_GATE, layer), self._experts(_UP, layer)], dim=1)
        if name.endswith(".experts.up_proj"):  # where they have no gate
            return self._experts(_UP, layer)
        if name.endswith(".experts.down_proj"):
            return self._experts(_DOWN, layer)
        for sources in self.converter.tensors.values():
            if any(source.name.format(layer=layer, expert=0) == name for source in sources):
                other = choose(self.checkpoint, sources, layer)
                if other is not None:
                    return self.checkpoint.tensor(other.name.format(layer=layer, expert=0))
        raise BadFile(f"{self.checkpoint.folder} lacks {name}")

    def _spelt(self, name: str) -> str:
        """``name`` with the prefix that the checkpoint has for the one of the model's modules, where they differ."""
        prefixes = self.converter.prefixes
        spellings = [other + name[len(own) :] for own in prefixes if name.startswith(own) for other in prefixes]
        return next((each for each in (name, *spellings) if each in self.checkpoint.stored), name)

    def _experts(self, template: str, layer: int) -> torch.Tensor:
        """All experts' matrices [E, rows, columns], from single ones or from a stack."""
        import torch

        source = choose(self.checkpoint, self.converter.tensors.get(template, ()), layer)
        if source is None:
            raise BadFile(f"{self.checkpoint.folder} lacks the experts of layer {layer}")
        count = self.experts if "{expert}" in source.name else 1
        names = [source.name.format(layer=layer, expert=expert) for expert in range(count)]
        for missing in (name for name in names if name not in self.checkpoint.stored):
            raise BadFile(f"{self.checkpoint.folder} lacks tensor {missing}")
        apply = TRANSFORMS[source.transform].apply
        none = Sizes()  # of no use to experts
        pieces = [piece for name in names for piece in apply(self.checkpoint.tensor(name), none)]
        return pieces[0] if pieces[0].dim() == 3 else torch.stack(pieces)

    def gguf_weights(self, name: str) -> dict[str, str]:
        """What the GGUF makes of the parameter ``name``: names of weights, and the transform that makes each."""
        name = self._spelt(name)
        found = _LAYER.search(name)
        layer = int(found[1]) if found else 0
        return {
            template.format(layer=layer): source.transform
            for template, sources in self.converter.tensors.items()
            for source in sources
            if source.name.format(layer=layer, expert=0) == name
        }


def opened_parameters(checkpoint: Path, experts: int) -> tuple[Parameters, Sizes]:
    """The parameters of the checkpoint in the folder ``checkpoint``, and the sizes that its converter names.

    Args:
        experts: routed experts per layer.

    Raises:
        BadFile: it cannot be read.
        Unsupported: there is no converter for it.
    """
    opened = open_checkpoint(checkpoint)
    converter = converter_for(str(opened.config.get("model_type", "")))
    converter = converter.with_prefix(prefix_of(converter, opened))
    config = language_config(converter, opened.config)
    apply_tying(opened, converter, config)
    return Parameters(opened, converter, experts), sizes_of(converter, config, opened)


def moved(transform: str, shape: tuple[int, int], sizes: Sizes) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Which rows and which columns of a matrix of ``shape`` a transform takes, in its order; None where it makes no
    matrix of whole rows and columns."""
    import torch

    rows, columns = (torch.arange(extent) for extent in shape)
    by_row = torch.cat(list(TRANSFORMS[transform].apply(rows[:, None].expand(shape), sizes)))
    by_column = torch.cat(list(TRANSFORMS[transform].apply(columns.expand(shape), sizes)))
    if by_row.dim() != 2 or not torch.equal(by_row, by_row[:, :1].expand_as(by_row)):
        return None
    return by_row[:, 0], by_column[0]
