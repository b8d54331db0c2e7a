"""What healing leaves of the errors of coarser types: what a trial of some layers found, and what follows for all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from edgeprune.errors import BadFile
from edgeprune.files import check_keys, checked_number
from edgeprune.model import ggml


@dataclass(frozen=True)
class Mended:
    """What healing leaves of one type's errors in one layer.

    Attributes:
        few_tokens, tokens: of the layer, that the experts were fitted on, at first and with all.
        few, many: share of the squared error at the output that gate and up of this type leave after these fits.
        down: share that error feedback leaves of the error of the down projection's own rounding.
    """

    few_tokens: float
    tokens: float
    few: float
    many: float
    down: float

    def inner(self, tokens: float) -> float:
        """Share of the error of gate and up that is left after a fit on so many ``tokens``, 0 to 1.

        A fit's errors go down with the number of tokens towards what the experts cannot learn; here with its root,
        from the two that were measured on.
        """
        near, far = 1 / math.sqrt(self.few_tokens), 1 / math.sqrt(self.tokens)
        slope = (self.few - self.many) / (near - far) if near > far else 0.0
        share = self.many + slope * (1 / math.sqrt(max(tokens, 1.0)) - far)
        return min(max(share, 0.0), 1.0)


def mean(parts: Sequence[tuple[float, Mended]]) -> Mended:
    """Of some, each with its weight; the weights sum to 1."""
    names = [entry.name for entry in fields(Mended)]
    return Mended(**{name: sum(weight * getattr(own, name) for weight, own in parts) for name in names})


class Sampled:
    """What was found, for every layer and type.

    Args:
        layers: by layer, by type; a layer that cannot be healed has no types.
    """

    def __init__(self, layers: Mapping[int, Mapping[str, Mended]]) -> None:
        self._layers = layers
        self._known: dict[tuple[int, int], Mended | None] = {}

    def of(self, layer: int, block: int) -> Mended | None:
        """Of the types in ``layer`` whose blocks have so many weights, or if there are none, of any; None where
        nothing is healed."""
        key = layer, block
        if key not in self._known:
            self._known[key] = self._between(layer, block)
        return self._known[key]

    def tried(self, block: int) -> bool:
        """Whether types of such blocks were among those that were tried."""
        return any(ggml.BY_NAME[name].block == block for own in self._layers.values() for name in own)

    def _between(self, layer: int, block: int) -> Mended | None:
        """Of ``layer``, or of its neighbours that were looked at, by how near they are."""
        if layer in self._layers:
            return _pooled(self._layers[layer], block)
        known = {place: own for place in sorted(self._layers) if (own := _pooled(self._layers[place], block))}
        if not known:
            return None
        low = max((place for place in known if place < layer), default=min(known))
        high = min((place for place in known if place > layer), default=max(known))
        share = (layer - low) / (high - low) if high > low else 0.0
        share = min(max(share, 0.0), 1.0)
        return mean([(1 - share, known[low]), (share, known[high])])


def _pooled(by_type: Mapping[str, Mended], block: int) -> Mended | None:
    own = [found for name, found in by_type.items() if ggml.BY_NAME[name].block == block] or [*by_type.values()]
    return mean([(1 / len(own), found) for found in own]) if own else None


def mended(layer: str, by_type: Mapping[str, Any]) -> dict[str, Mended]:
    """What ``mending.measure`` found of a layer.

    Raises:
        BadFile: it is not that.
    """
    where, names = f"what healing leaves in layer {layer}", {entry.name for entry in fields(Mended)}
    if wrong := sorted(by_type.keys() - ggml.BY_NAME.keys()):
        raise BadFile(f"{where}: {wrong[0]} is no type")
    for own in by_type.values():
        check_keys(where, own, names, set())
    found = {
        kind: Mended(**{name: checked_number(where, own[name]) for name in names}) for kind, own in by_type.items()
    }
    if any(own.few_tokens <= 0 or own.tokens <= 0 for own in found.values()):
        raise BadFile(f"{where}: experts fitted on no tokens")
    return found
