"""Nats that errors cost, in the two parts that add up in different ways.

What an error changes in the numbers costs in proportion to its square, and the costs of several add up. But a small
error also sends tokens to other experts, those for which two experts were all but equal, and that changes much at
once. The number of such tokens grows with the error itself, so this part of the cost grows with the root of the
squared error, and errors of several sources add up before the root is taken.

Behind the last router there is nothing to reroute: sites there cost directly.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

# Relative squared errors that are injected at one site at a time.
SMALL, LARGE = 0.01, 0.1
# How far, relative, a measured cost may be off, and how far the shares of errors at once from 1 before anything is
# known: four costs that are not exact do not tell three numbers well enough by themselves.
_NOISE, _SPREAD = 0.05, 0.3
# Beyond these shares nothing is believed; with none at all, errors of some tensors would be free.
_LEAST_SHARE, _MOST_SHARE = 0.25, 2.0
# Cost that grows faster than with this power has a small point that is nothing but noise.
_STEEPEST = 1.3


@dataclass(frozen=True)
class Cost:
    """Of an error.

    Attributes:
        direct: nats per token that grow with the squared error.
        rerouted: square of the nats per token that tokens cost which go to other experts.
    """

    direct: float = 0.0
    rerouted: float = 0.0

    @property
    def nats(self) -> float:
        """Nats per token, if there are no other errors."""
        return self.direct + math.sqrt(self.rerouted)

    def __add__(self, other: Cost) -> Cost:
        """Of two errors at once that have nothing to do with each other."""
        return Cost(self.direct + other.direct, self.rerouted + other.rerouted)

    def __mul__(self, square: float) -> Cost:
        """Of an error of the same kind, ``square`` times as large in its square."""
        return Cost(self.direct * square, self.rerouted * square)

    def square_for(self, nats: float) -> float:
        """How large ``square`` is where ``(self * square).nats`` is ``nats``; 0 where that is no cost."""
        if not nats > 0 or self.nats <= 0:
            return 0.0
        # With x the root of the square: direct x^2 + r x = nats.
        root = math.sqrt(self.rerouted)
        return (2 * nats / (root + math.sqrt(root * root + 4 * self.direct * nats))) ** 2


def total(costs: Iterable[Cost]) -> Cost:
    """Of all errors at once."""
    direct = rerouted = 0.0
    for cost in costs:
        direct, rerouted = direct + cost.direct, rerouted + cost.rerouted
    return Cost(direct, rerouted)


@dataclass(frozen=True)
class Response:
    """Measured cost at one site.

    Attributes:
        small, large: nats per token at relative squared errors ``SMALL`` and ``LARGE``.
        interpolated: taken from neighbouring layers instead of measured.
        settled: no router is known to lie behind the site.
        unseen: it is in a block that text does not go through, which predicts further tokens.
    """

    small: float
    large: float
    interpolated: bool = False
    settled: bool = False
    unseen: bool = False

    @property
    def exponent(self) -> float | None:
        """d log(nats) / d log(squared error) between the two points: 1 where cost is all direct, a half where it is
        all of tokens that go elsewhere; None where one is below what rounding lets us see."""
        if self.small <= 0 or self.large <= 0:
            return None
        return math.log(self.large / self.small) / math.log(LARGE / SMALL)

    @cached_property
    def unit(self) -> Cost:
        """Of a relative squared error of 1, by the line and the root that go through both points; where cost grows
        faster than a line or slower than a root, by that one of them which misses both by the same factor, as a line
        where no router lies behind. A point that is nothing but noise, beside the other, is left out."""
        if self.small <= 0 or self.large < self.small:
            # The line through the point that is there.
            return Cost(max(self.large / LARGE, self.small / SMALL, 0.0))
        middle, square = math.sqrt(self.small * self.large), math.sqrt(SMALL * LARGE)
        if self.large > self.small * (LARGE / SMALL) ** _STEEPEST:
            return Cost(self.large / LARGE)
        growth = LARGE / SMALL
        root = (growth * self.small - self.large) / (growth * math.sqrt(SMALL) - math.sqrt(LARGE))
        if root < 0 or self.settled:
            return Cost(middle / square)
        direct = (self.small - root * math.sqrt(SMALL)) / SMALL
        return Cost(direct, root * root) if direct >= 0 else Cost(0.0, middle * middle / square)


@dataclass(frozen=True)
class Together:
    """How errors at all sites at once cost beside what they cost one by one.

    Attributes:
        unrest: nats per token that any change costs, however small.
        direct: share of the sum of the direct costs.
        rerouted: share of the root of the sum of the others.
    """

    unrest: float = 0.0
    direct: float = 1.0
    rerouted: float = 1.0

    def of(self, cost: Cost) -> Cost:
        """What an error that costs ``cost`` alone adds to others."""
        return Cost(self.direct * cost.direct, self.rerouted**2 * cost.rerouted)


def fit_together(unit: Cost, measured: Mapping[float, float]) -> Together:
    """What agrees best with ``measured`` and with shares near 1, in the squares of the deviations.

    Args:
        unit: sum of the costs of all sites at a relative squared error of 1.
        measured: by relative squared error, nats per token that it costs at all sites at once.
    """
    if not any(cost > 0 for cost in measured.values()) or unit.nats <= 0:
        return Together()
    from scipy.optimize import lsq_linear  # takes long to import and is not always needed

    errors, nats = np.array(list(measured)), np.array(list(measured.values()))
    direct, root = unit.direct * errors, math.sqrt(unit.rerouted) * np.sqrt(errors)
    # Weighed by the larger of what was measured and what is expected: a cost that noise made nearly nothing does not
    # decide alone. The unrest in units of the least that was measured, so that all unknowns are about one.
    weights, least = 1 / (_NOISE * np.maximum(nats, direct + root)), max(float(nats.min()), 0.0)
    rows = np.stack([np.full_like(errors, least), direct, root], axis=1) * weights[:, None]
    rows = np.concatenate([rows, [[0, 1 / _SPREAD, 0], [0, 0, 1 / _SPREAD]]])
    wanted = np.concatenate([nats * weights, [1 / _SPREAD] * 2])
    limits = (0.0, _LEAST_SHARE, _LEAST_SHARE), (1.0, _MOST_SHARE, _MOST_SHARE)  # no more unrest than the least cost
    unrest, *shares = lsq_linear(rows, wanted, limits, method="bvls").x.tolist()
    return Together(unrest * least, *shares)
