"""Two models answering the same questions: shares, their difference, and how many questions it takes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeprune.files import check_keys, checked_int

# Of the normal distribution: two-sided 95 %, and one-sided 80 %, the usual power of a test.
_Z_95, _Z_80 = 1.959964, 0.841621
_TAIL = 0.025  # on either side of an interval
# Of the weights that an interval is read off; its ends are then known to about a hundredth of its length.
_DRAWS = 20_000


def exact_interval(hits: int, count: int) -> tuple[float, float]:
    """95 % confidence interval of the share ``hits / count``, by Clopper and Pearson (Biometrika 26, 1934, 404-413).

    It holds the true share at least as often as it says, however few items there are and whatever the share is.
    """
    from scipy.special import betaincinv  # half a second, for all commands

    low = float(betaincinv(hits, count - hits + 1, _TAIL)) if hits else 0.0
    high = float(betaincinv(hits + 1, count - hits, 1 - _TAIL)) if hits < count else 1.0
    return low, high


def mean_of(changes: Sequence[float], counts: Sequence[int] | None = None) -> tuple[float, float, float]:
    """Mean of ``changes``, each between -1 and 1, and its 95 % confidence interval; of none, everything.

    The interval is Gaffke's (Math. Methods Stat. 14, 2005, 451-467; Phan et al., arXiv 2106.03163): the sample gets
    one more value at the bound, and the mean of it is taken with weights that are uniform on the simplex. It assumes
    nothing of the distribution, does not shrink to a point where few values are all the same, and is Clopper and
    Pearson's where the values are two.

    Args:
        counts: how often each was seen; once if None.
    """
    values, often = np.asarray(changes, np.float64), np.ones(len(changes)) if counts is None else np.asarray(counts)
    total = float(often.sum())
    if not total:
        return 0.0, -1.0, 1.0
    random = np.random.default_rng(0)
    # Gamma variables divided by their sum are such weights; equal values share theirs.
    own = random.standard_gamma(often, (_DRAWS, len(values)))
    bound = random.standard_exponential(_DRAWS)
    weighted, weight = own @ values, own.sum(axis=1) + bound
    low = np.quantile((weighted - bound) / weight, _TAIL)
    high = np.quantile((weighted + bound) / weight, 1 - _TAIL)
    return float(values @ often / total), float(low), float(high)


@dataclass(frozen=True)
class Paired:
    """How often something was seen of the original and of the candidate, on the same items.

    Attributes:
        both, original_only, candidate_only, neither: number of items.
    """

    both: int
    original_only: int
    candidate_only: int
    neither: int

    @classmethod
    def of(cls, original: list[bool], candidate: list[bool]) -> Paired:
        """The counts over items in the same order."""
        pairs = list(zip(original, candidate, strict=True))
        return cls(*(pairs.count(pair) for pair in ((True, True), (True, False), (False, True), (False, False))))

    @property
    def count(self) -> int:
        return self.both + self.original_only + self.candidate_only + self.neither

    @property
    def original(self) -> int:
        return self.both + self.original_only

    @property
    def candidate(self) -> int:
        return self.both + self.candidate_only

    @property
    def difference(self) -> tuple[float, float, float]:
        """Share of the candidate less that of the original, and its 95 % confidence interval, see ``mean_of``."""
        return mean_of([-1.0, 0.0, 1.0], [self.original_only, self.both + self.neither, self.candidate_only])

    @property
    def p_value(self) -> float:
        """Probability of so uneven a split of the items that differ, or a more uneven one, if both were as good:
        McNemar's test (Psychometrika 12, 1947, 153-157), exact and two-sided."""
        changed, fewer = self.original_only + self.candidate_only, min(self.original_only, self.candidate_only)
        tail: float = sum(math.comb(changed, k) for k in range(fewer + 1)) / 2**changed
        return min(1.0, 2 * tail)

    def needed(self, drop: float = 0.01) -> int:
        """How many items it takes to see a difference of ``drop`` at 5 %, two-sided, four times out of five.

        Connor's formula for McNemar's test (Biometrics 43, 1987, 207-211), with the share of items that differ as
        it was seen here, one more on either side.
        """
        changed = max(drop, (self.original_only + self.candidate_only + 2) / (self.count + 2))
        root = _Z_95 * math.sqrt(changed) + _Z_80 * math.sqrt(changed - drop**2)
        return math.ceil((root / drop) ** 2)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Paired:
        """The counts in ``value``.

        Raises:
            BadFile: something is missing, or no count.
        """
        names = tuple(cls.__dataclass_fields__)
        check_keys("a comparison of answers", value, set(names), set())
        return cls(*(checked_int(name, value[name], 0, 1 << 40) for name in names))
