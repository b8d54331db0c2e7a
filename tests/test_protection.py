"""Super experts are found by the size of a channel, of either sign, in the early layers."""

from __future__ import annotations

import numpy as np
import pytest

from edgeprune.decide.keep import protecting
from edgeprune.decide.protection import super_experts
from edgeprune.measure.statistics import LayerStatistics

EXPERTS, BLOCKS = 64, 8


def layers(outliers: dict[tuple[int, int], float]) -> dict[int, LayerStatistics]:
    random = np.random.default_rng(0)
    made = {}
    for layer in range(BLOCKS):
        made[layer] = LayerStatistics.zeros(2, EXPERTS)
        made[layer].arrays["peak"][:] = random.uniform(1, 5, (2, EXPERTS))
    for (layer, expert), value in outliers.items():
        made[layer].arrays["peak"][1, expert] = value
    return made


def test_an_outlier_of_either_domain_in_an_early_layer_is_protected() -> None:
    found = super_experts(layers({(1, 7): 900.0, (2, 9): 500.0}), BLOCKS)
    assert found == {1: (7,), 2: (9,)}


@pytest.mark.parametrize("outliers", [{}, {(7, 3): 900.0}, {(1, 3): 30.0}], ids=["none", "late", "not far above"])
def test_nothing_is_protected_without_a_massive_activation(outliers: dict[tuple[int, int], float]) -> None:
    assert super_experts(layers(outliers), BLOCKS) == {}


def test_what_is_a_tenth_of_the_largest_is_not_super() -> None:
    assert super_experts(layers({(1, 7): 9000.0, (2, 9): 500.0}), BLOCKS) == {1: (7,)}


def test_a_small_model_with_one_outlier_has_one() -> None:
    few = {0: LayerStatistics.zeros(1, 4), 1: LayerStatistics.zeros(1, 4)}
    few[0].arrays["peak"][0], few[1].arrays["peak"][0] = [1, 2, 800, 2], [3, 2, 1, 2]
    assert super_experts(few, 2) == {0: (2,)}


def test_protected_experts_come_first_and_the_order_of_the_others_stays() -> None:
    ranked = {0: np.array([3, 1, 0, 2]), 1: np.array([0, 1, 2, 3])}
    made = protecting(ranked, {0: (0, 2)})
    assert made[0].tolist() == [0, 2, 3, 1]
    assert made[1].tolist() == [0, 1, 2, 3]
