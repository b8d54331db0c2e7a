"""Picking some channels out of an expert's matrices and biases."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgeprune.build.store import Bytes
from edgeprune.model import ggml
from edgeprune.model.architecture import Tensor

# Of one expert, int [F'] or of all, int [E, F'].
Channel = npt.NDArray[np.intp]


def _indices(tensor: Tensor, channels: Channel) -> Channel:
    """Positions of ``channels`` [F'] on the axis of ``tensor`` that counts them; those of gate before those of up
    where both are one tensor."""
    assert tensor.channels is not None
    axis, times = tensor.channels
    extent = tensor.shape[axis] // times
    return np.concatenate([channels + turn * extent for turn in range(times)])


def gathered(matrix: Bytes, tensor: Tensor, channels: Channel) -> Bytes:
    """One expert's part of ``tensor`` with ``channels`` [F'] alone, byte by byte as it is.

    Rows are copied in any type; elements of rows, as columns of down are, in types without blocks.
    """
    if tensor.channels is None:
        return matrix
    kind, picked = ggml.BY_NAME[tensor.type], _indices(tensor, channels)
    if tensor.channels[0] == 1:
        return matrix.reshape(tensor.shape[1], -1)[picked].reshape(-1)
    elements = matrix.reshape(-1, tensor.shape[0], kind.row_bytes(tensor.shape[0]) // tensor.shape[0])
    return np.ascontiguousarray(elements[:, picked]).reshape(-1)


def gathered_rows(matrix: Bytes, tensor: Tensor, channels: Channel | None) -> tuple[Bytes, Channel | None]:
    """The rows of one expert's matrix that are left, and which elements of them, or None for all."""
    if channels is None or tensor.channels is None:
        return matrix, None
    return (matrix, channels) if tensor.channels[0] == 0 else (gathered(matrix, tensor, channels), None)
