"""Encoding without bias: what is decoded is on the whole neither larger nor smaller than what was encoded.

Some of ggml's encoders are off by a few percent, all in one direction: scales of IQ3_S come out 2.3 % too large,
those of Q2_K 3.7 % too small. Beside the errors of single weights that is little, but those average out in the sums
of the products that follow, and a matrix that is too large on the whole makes all of its answers too large: at the
output of experts of a 41 M model such an error of an up projection in IQ3_S costs seven to twelve times as much as
one at random of the same energy. An encoder answers to weights that are multiplied by a number with codes that are
multiplied by it, so the matrix is divided by its gain first.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgeprune.model import ggml

Floats = npt.NDArray[np.float32]
# Of which the gain is found: its chance error is then below 0.003 in the coarsest types.
_SAMPLED_WEIGHTS, _LEAST_ROWS = 8_192, 4
# Finer types have none to speak of: below 0.001.
_MOST_BITS = 5.0
# Beyond this it is no bias but a matrix that the type cannot hold.
_MOST = 1.25


def gain(kind: ggml.GgmlType, weights: Floats, importance: Floats, name: str = "") -> float:
    """How much larger the matrix ``weights`` [rows, W] is on the whole when it comes back from ``kind``.

    That is <Q, W> / <W, W>, with columns weighted by ``importance`` [W], on rows from all over the matrix.

    Raises:
        as ``ggml.encode``.
    """
    if kind.bits_per_weight > _MOST_BITS:
        return 1.0
    rows, width = weights.shape
    sample = weights[:: max(1, rows // max(_LEAST_ROWS, _SAMPLED_WEIGHTS // width))]
    decoded = ggml.decode(kind, ggml.encode(kind, sample, importance, name).reshape(-1), width)
    columns = importance.astype(np.float64)
    energy = float((np.square(sample, dtype=np.float64) @ columns).sum())
    found = float(((decoded.astype(np.float64) * sample) @ columns).sum()) / energy if energy > 0 else 1.0
    return found if 1 / _MOST < found < _MOST else 1.0


def encode(kind: ggml.GgmlType, weights: Floats, importance: Floats, name: str = "") -> npt.NDArray[np.uint8]:
    """``weights`` [rows, W] in type ``kind`` without its bias, uint8 [rows, row_bytes].

    Raises:
        as ``ggml.encode``.
    """
    return divided(kind, weights, importance, gain(kind, weights, importance, name), name)


def divided(
    kind: ggml.GgmlType, weights: Floats, importance: Floats, by: float, name: str = ""
) -> npt.NDArray[np.uint8]:
    """``encode`` where the gain is known: ``weights`` [rows, W] divided ``by`` it if the type holds them, else as
    they are; uint8 [rows, row_bytes].

    Raises:
        as ``ggml.encode``.
    """
    own = weights / np.float32(by) if by != 1 else weights
    if by < 1 and float(np.abs(own).max(initial=0.0)) > kind.largest:
        own = weights
    return ggml.encode(kind, own, importance, name)
