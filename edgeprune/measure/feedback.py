"""Error feedback while a matrix is encoded: what one group of columns gets wrong, the columns after it put right.

Of a matrix W the file holds Q, and with inputs x of second moments H = E[x x'] the squared error of the product is
tr((W - Q) H (W - Q)'). With H = R R', R upper triangular, and columns in groups b that are encoded from left to
right, that is the sum over b of |(T_b - Q_b) R_bb|^2, where

    T_b = W_b + sum_{j < b} (W_j - Q_j) R_jb R_bb^-1

does not depend on Q_b. So every group is encoded as T_b instead of W_b: T_b is the least-squares answer to the errors
made so far. This is GPTQ (Frantar et al., arXiv 2210.17323) in the form of LDLQ (Chee et al., arXiv 2307.13304, who
show that the two are the same). A group is what ggml's encoder takes at least: one block of the type in each row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from edgeprune.model import ggml, unbiased

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
# The prior counts as a quarter as many tokens as there are columns; the diagonal is raised by so much of its mean.
# Both lie in a wide valley: half or twice the prior, a third or three times the damping change the error by about 1 %
_PRIOR, _DAMPING = 0.25, 0.01


@dataclass(frozen=True)
class Inputs:
    """What a matrix is multiplied with.

    Attributes:
        fitted: that its encoding is fitted to, float32 [N, W].
        judged: that it is judged on, float32 [M, W].
        prior: second moments [W, W] that those of few inputs are drawn towards; None for equal energies and no
            correlation.
    """

    fitted: Floats
    judged: Floats
    prior: Floats | None = None

    @cached_property
    def root(self) -> Floats:
        return factor(self.fitted, self.prior)


@dataclass(frozen=True)
class Encoded:
    """A matrix as the file has it.

    Attributes:
        raw: uint8 [rows * row_bytes].
        decoded: float32 [rows, W].
        before, after: squared error of the product with the inputs that judge, without feedback and as it is; equal
            where there is none.
        energy: of the product.
    """

    raw: Bytes
    decoded: Floats
    before: float = 0.0
    after: float = 0.0
    energy: float = 0.0

    def without_values(self) -> Encoded:
        """What is written, and how good it is."""
        return replace(self, decoded=np.zeros((0, 0), np.float32))

    def figures(self) -> Encoded:
        """How good it is, alone."""
        return replace(self.without_values(), raw=np.zeros(0, np.uint8))


def factor(inputs: Floats, prior: Floats | None) -> Floats:
    """Upper triangular R, float32 [W, W], with R R' the second moments of ``inputs`` as they are estimated.

    Args:
        inputs: float32 [N, W].
        prior: see ``Inputs``.
    """
    from scipy.linalg import cholesky

    width = inputs.shape[1]
    weight, diagonal = _PRIOR * width, slice(None, None, width + 1)
    estimate = (inputs.T @ inputs).astype(np.float64)
    if prior is None:
        estimate.flat[diagonal] += weight * np.trace(estimate) / (width * len(inputs))
    else:
        estimate += weight * prior
    estimate /= len(inputs) + weight
    estimate.flat[diagonal] += _DAMPING * np.trace(estimate) / width or 1.0
    lower = cholesky(estimate[::-1, ::-1], lower=True, overwrite_a=True, check_finite=False)
    return np.ascontiguousarray(lower[::-1, ::-1], np.float32)


def corrected(weights: Floats, errors: Floats, root: Floats, group: slice) -> Floats:
    """T_b of the columns ``group`` of ``weights`` [rows, W], given the ``errors`` W - Q of those before it."""
    from scipy.linalg import solve_triangular

    own = weights[:, group]
    if not group.start:
        return own
    carried = errors[:, : group.start] @ root[: group.start, group]
    answer = solve_triangular(root[group, group], carried.T, trans="T", check_finite=False).T
    return own + answer


def spread(kind: ggml.GgmlType, weights: Floats, importance: Floats, root: Floats, name: str) -> tuple[Bytes, Floats]:
    """``weights`` [rows, W] in type ``kind`` with feedback: uint8 [rows * row_bytes], and decoded float32 [rows, W].

    Args:
        importance: of each column within its group, float32 [W].
        root: the factor of the inputs' second moments.
    """
    rows, width = weights.shape
    raw = np.empty((rows, width // kind.block, kind.block_bytes), np.uint8)
    errors, decoded = np.zeros_like(weights), np.empty_like(weights)
    for index in range(width // kind.block):
        group = slice(index * kind.block, (index + 1) * kind.block)
        # What is added must not carry weights out of the type's range.
        wanted = np.clip(corrected(weights, errors, root, group), -kind.largest, kind.largest)
        raw[:, index] = ggml.encode(kind, wanted, importance[group], name)
        decoded[:, group] = ggml.decode(kind, raw[:, index].reshape(-1), kind.block)
        errors[:, group] = weights[:, group] - decoded[:, group]
    return raw.reshape(-1), decoded


def _energy(inputs: Floats, weights: Floats) -> float:
    return float(np.square(inputs @ weights.T, dtype=np.float64).sum())


def plain(kind: ggml.GgmlType, weights: Floats, importance: Floats, name: str) -> Encoded:
    """``weights`` [rows, W] in type ``kind`` without feedback.

    Raises:
        as ``ggml.encode``.
    """
    raw = unbiased.encode(kind, weights, importance, name).reshape(-1)
    return Encoded(raw, ggml.decode(kind, raw, weights.shape[1]))


def encode(kind: ggml.GgmlType, weights: Floats, importance: Floats, inputs: Inputs, name: str) -> Encoded:
    """``weights`` [rows, W] in type ``kind``, with feedback where the inputs that judge are the better for it.

    Raises:
        as ``ggml.encode``.
    """
    return improved(plain(kind, weights, importance, name), kind, weights, importance, inputs, name)


def improved(
    own: Encoded, kind: ggml.GgmlType, weights: Floats, importance: Floats, inputs: Inputs, name: str
) -> Encoded:
    """The better of ``own``, which is ``weights`` without feedback, and what they are with it."""
    if not kind.feeds_back(weights.shape[1]) or not len(inputs.fitted) or not len(inputs.judged):
        return own
    before, energy = _energy(inputs.judged, weights - own.decoded), _energy(inputs.judged, weights)
    raw, decoded = spread(kind, weights, importance, inputs.root, name)
    after = _energy(inputs.judged, weights - decoded)
    if after < before:
        return Encoded(raw, decoded, before, after, energy)
    return replace(own, before=before, after=before, energy=energy)
