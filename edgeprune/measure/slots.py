"""Sums over the tokens that were routed to each expert."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

Floats = npt.NDArray[np.float32]


class Slots:
    """The pairs of token and chosen expert of one window in one layer, grouped by expert.

    Args:
        ids: chosen experts [T, k].
        experts: E.
    """

    def __init__(self, ids: npt.NDArray[np.int32], experts: int) -> None:
        self.ids, self.experts = ids, experts
        self.tokens, self.used = ids.shape
        flat = ids.reshape(-1)
        self.counts = np.bincount(flat, minlength=experts)
        self._order = np.argsort(flat, kind="stable").astype(np.int32)
        self._bounds = np.concatenate([[0], np.cumsum(self.counts)]).astype(np.int32)
        self._ones = np.ones(flat.size, np.float32)

    def sums(self, values: Floats, weights: Floats | None = None) -> Floats:
        """Weighted sums per expert, float32 [E, width].

        Args:
            values: one row per slot [T * k, width], or per token [T, width].
            weights: of the slots [T, k].
        """
        columns = self._order if len(values) == self.ids.size else self._order // self.used
        data = self._ones if weights is None else weights.reshape(-1)[self._order]
        matrix = csr_array((data, columns, self._bounds), shape=(self.experts, len(values)))
        summed: Floats = matrix @ np.ascontiguousarray(values)
        return summed

    def totals(self, values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """Sums per expert of one number per slot [T, k], float64 [E]."""
        weights = np.asarray(values, np.float64).reshape(-1)
        return np.bincount(self.ids.reshape(-1), weights, self.experts).astype(np.float64)

    def largest(self, values: Floats) -> Floats:
        """Maxima per expert over slots [T * k, ...]; 0 where an expert has none; ``values`` are not negative."""
        result = np.zeros((self.experts, *values.shape[1:]), np.float32)
        present = np.flatnonzero(self.counts)
        result[present] = np.maximum.reduceat(values[self._order], self._bounds[present], axis=0)
        return result
