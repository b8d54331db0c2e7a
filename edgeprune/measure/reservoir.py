"""A sample of calibration tokens, kept whole for replays of one layer: its input, its routing and its output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeprune.measure.tensorfile import Array

Floats = npt.NDArray[np.float32]
# Width-long rows are stored as float16 below a scale of their own: 11 bits of every value near the row's largest.
_PACKED = ("x", "y")
# The same, but kept only by passes that look at tokens alone.
_EXTRA = "stream"
_PLAIN = ("ids", "gates", "selection", "probs", "residual", "turn")


@dataclass(frozen=True)
class Reservoir:
    """Tokens of one layer, the same tokens in every layer.

    Attributes:
        domain: index of each token's domain, int16 [R].
        x: input of the experts, float32 [R, D].
        y: their combined output, without shared experts, float32 [R, D].
        ids: chosen experts, int16 [R, k].
        gates: coefficient that multiplied each one's output, float32 [R, k].
        selection: what the router chose by, float32 [R, E]: biased where it has a selection bias, and before
            it closed any routing group.
        probs: what the router made its weights from, float32 [R, E]: probabilities, or logits where the softmax
            is over the chosen experts.
        residual: Euclidean norm of the residual stream before the block, float32 [R]; 0 where it was not seen.
        turn: 1 - cos(h, h + y), at least 0, float32 [R].
        stream: the residual stream h before the block, float32 [R, D], or None where it was not kept.
    """

    domain: npt.NDArray[np.int16]
    x: Floats
    y: Floats
    ids: npt.NDArray[np.int16]
    gates: Floats
    selection: Floats
    probs: Floats
    residual: Floats
    turn: Floats
    stream: Floats | None

    def __len__(self) -> int:
        return len(self.domain)

    def rows(self, which: npt.NDArray[np.intp]) -> Reservoir:
        """The tokens at the positions ``which`` alone."""
        every = self.unpacked()
        chosen: dict[str, Any] = {name: None if rows is None else rows[which] for name, rows in every.items()}
        return Reservoir(**chosen)

    def unpacked(self) -> dict[str, Any]:
        """Every attribute by name."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self)}

    def arrays(self) -> dict[str, Array]:
        """As stored, without ``domain``, which all layers share."""
        stored: dict[str, Array] = {}
        for name in _PACKED if self.stream is None else (*_PACKED, _EXTRA):
            stored[name], stored[f"{name}_scale"] = pack(getattr(self, name))
        return stored | {name: getattr(self, name) for name in _PLAIN}

    @staticmethod
    def from_arrays(domain: Array, stored: Mapping[str, Array]) -> Reservoir:
        """What ``arrays`` stored; what is asked for is unpacked then."""
        return _Stored(domain, stored)


class _Stored(Reservoir):
    """Tokens as ``arrays`` gave them: most who read them want some of their parts, or none.

    ``dataclasses.replace`` cannot make one; a changed sample is ``Reservoir(**{**tokens.unpacked(), ...})``.
    """

    def __init__(self, domain: Array, stored: Mapping[str, Array]) -> None:
        self.__dict__.update(domain=domain, stored=stored)

    def __getattr__(self, name: str) -> Any:
        if name not in (*_PACKED, *_PLAIN, _EXTRA):
            raise AttributeError(name)
        stored: Mapping[str, Array] = self.__dict__["stored"]
        value: Array | None = None
        if name in _PLAIN:
            value = stored[name]
        elif name in stored:
            value = np.multiply(stored[name], stored[f"{name}_scale"][:, None], dtype=np.float32)
        self.__dict__[name] = value
        return value

    def arrays(self) -> dict[str, Array]:
        stored: Mapping[str, Array] = self.__dict__["stored"]
        return {name: stored[name] for name in stored}


def pack(rows: Floats) -> tuple[npt.NDArray[np.float16], Floats]:
    """``rows`` float32 [R, D] as float16 [R, D] and a scale float32 [R] to multiply with."""
    scale = np.abs(rows).max(axis=1, initial=0.0)
    divisor = np.where(scale > 0, scale, 1).astype(np.float32)
    return (rows / divisor[:, None]).astype(np.float16), divisor
