"""All tensors of a checkpoint from the headers of some of its files, where layers are alike and the bytes prove it.

A checkpoint with a tensor for every expert has tens of thousands of them, whose descriptions take megabytes and say
the same of one layer after the other. How many bytes all have is known without reading any: a safetensors file
is eight bytes, a header of the length that these say, and data without gaps.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from edgeprune.errors import EdgepruneError
from edgeprune.model.checkpoint import Checkpoint, Stored
from edgeprune.model.converter import converter_for
from edgeprune.model.values import kinds_by_config, prefix_of

Layer = dict[str, Stored]  # by what stands behind the number of the layer
_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
# Layers of several kinds take turns; every fourth one, for instance, has full attention.
_LONGEST_TURN = 8


def deduced(seen: Checkpoint, data_bytes: int) -> dict[str, Stored] | None:
    """Shape and type of every tensor, or None where what was seen does not say so for certain.

    Layers that were not seen, or in part, are taken to be as the nearest whole one before them that the configuration
    takes for the same kind, and is so many layers away that kinds may take turns. That counts only when the bytes of
    all tensors are then as many as there are.

    Args:
        seen: with the tensors of some files; scales are tensors like others.
        data_bytes: of the tensors in all files.
    """
    try:
        converter = converter_for(str(seen.config.get("model_type", "")))
        kinds = kinds_by_config(converter, seen)
    except EdgepruneError:  # which is for others to tell, who read everything
        return None
    placed = converter.with_prefix(prefix_of(converter, seen))
    front = next((name.split("{layer}")[0] for name in _sources(placed.tensors) if "{layer}" in name), "")
    layers, others = _by_layer(seen.stored, front, len(kinds))
    if any(stored.type not in _BYTES for stored in seen.stored.values()):
        return None
    for turn in range(1, _LONGEST_TURN + 1):
        found = _likened(layers, kinds, turn)
        if found is not None and _bytes_of(others) + sum(map(_bytes_of, found)) == data_bytes:
            named = (
                {f"{front}{number}.{name}": stored for name, stored in layer.items()}
                for number, layer in enumerate(found)
            )
            return {name: stored for part in (others, *named) for name, stored in part.items()}
    return None


def _sources(tensors: Mapping[str, Sequence[object]]) -> list[str]:
    return [getattr(source, "name", "") for sources in tensors.values() for source in sources]


def _by_layer(stored: Mapping[str, Stored], front: str, count: int) -> tuple[dict[int, Layer], Layer]:
    """The tensors of the first ``count`` layers, whose names begin with ``front`` and a number, and all others."""
    numbered = re.compile(rf"{re.escape(front)}(\d{{1,4}})\.(.+)")
    layers: dict[int, Layer] = {}
    others: Layer = {}
    for name, own in stored.items():
        match = numbered.fullmatch(name)
        if match and int(match[1]) < count:
            layers.setdefault(int(match[1]), {})[match[2]] = own
        else:
            others[name] = own
    return layers, others


def _bytes_of(tensors: Mapping[str, Stored]) -> int:
    return sum(math.prod(stored.shape) * _BYTES[stored.type] for stored in tensors.values())


def _likened(layers: Mapping[int, Layer], kinds: Sequence[frozenset[str]], turn: int) -> list[Layer] | None:
    """Every layer, or None where there is no whole one that it could be like, or it differs from that.

    A layer is whole when those beside it were seen too, because files follow the order of layers.
    """
    count = len(kinds)
    whole = [n for n in layers if (n == 0 or n - 1 in layers) and (n == count - 1 or n + 1 in layers)]
    found = []
    for number in range(count):
        like = [n for n in whole if kinds[n] == kinds[number] and (n - number) % turn == 0]
        nearest = max((n for n in like if n <= number), default=min(like, default=None))
        if nearest is None:
            return None
        pattern, own = layers[nearest], layers.get(number, {})
        if any(pattern.get(name) != stored for name, stored in own.items()):
            return None
        found.append(pattern)
    return found
