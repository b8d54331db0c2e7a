"""Keep-sets: nested, equal per group, and independent of how ties are sorted."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import toys

from edgeprune.decide import keep
from edgeprune.decide.evidence import Evidence
from edgeprune.decide.keep import Order, check_method, check_room, fewest_kept, keep_set
from edgeprune.errors import UsageError
from edgeprune.measure.statistics import LayerStatistics, Statistics
from edgeprune.model.architecture import Architecture, read_architecture
from edgeprune.model.gguf import GgufFile

EXPERTS, LAYERS = 16, 3


@pytest.fixture(scope="module")
def ungrouped(tmp_path_factory: pytest.TempPathFactory) -> Architecture:
    path = tmp_path_factory.mktemp("keep") / "toy.gguf"
    toys.synthetic_gguf(path, layers=LAYERS, experts=EXPERTS, width=32, expert_width=32)
    return read_architecture(GgufFile(path))


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Architecture:
    path = tmp_path_factory.mktemp("keep") / "grouped.gguf"
    toys.synthetic_gguf(path, layers=LAYERS, experts=EXPERTS, width=32, expert_width=32, groups=4, groups_used=2)
    return read_architecture(GgufFile(path))


def measured(routed: list[list[float]]) -> Statistics:
    """Statistics with the given numbers of routed tokens per layer."""
    layers = {}
    for layer, counts in enumerate(routed):
        layers[layer] = LayerStatistics.zeros(1, len(counts))
        layers[layer].arrays["routed"][0] = counts
    return Statistics(["toy"], 100, 50, layers, {}, {})


def rankings(statistics: Statistics, architecture: Architecture, method: str) -> dict[int, Order]:
    """Of the layers with experts."""
    own = [Evidence(layer, statistics.layers[layer]) for layer in architecture.moe_layers]
    return keep.rankings(own, method, len(statistics.domains))


@pytest.fixture
def shuffled() -> Statistics:
    random = np.random.default_rng(5)
    return measured([random.permutation(EXPERTS).tolist() for _ in range(LAYERS)])


def test_ranking_goes_from_best_to_worst(ungrouped: Architecture, shuffled: Statistics) -> None:
    ranked = rankings(shuffled, ungrouped, "frequency")
    assert sorted(ranked) == list(range(LAYERS))
    for layer, order in ranked.items():
        counts = shuffled.layers[layer].total("routed")[order]
        assert counts.tolist() == list(range(EXPERTS - 1, -1, -1))


def test_ties_go_to_the_lower_id(ungrouped: Architecture) -> None:
    ranked = rankings(measured([[1, 3, 1, 3] * 4] * LAYERS), ungrouped, "frequency")
    for order in ranked.values():
        assert order.tolist() == [*range(1, 16, 2), *range(0, 16, 2)]
    assert keep_set(ranked, ungrouped, 4)[0] == (1, 3, 5, 7)


def test_unknown_method_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="unknown method 'reep'") as raised:
        check_method("reep")
    assert raised.value.hint.startswith("did you mean reap") and "known: replay, naee, " in raised.value.hint
    check_method("replay")


@pytest.mark.parametrize("which", ["ungrouped", "grouped"])
@pytest.mark.parametrize("method", ["frequency", "random"])
def test_sets_are_ascending_of_the_right_size_and_nested(
    request: pytest.FixtureRequest, shuffled: Statistics, which: str, method: str
) -> None:
    architecture: Architecture = request.getfixturevalue(which)
    ranked = rankings(shuffled, architecture, method)
    counts = architecture.allowed_counts()[1:]
    assert len(counts) >= 2
    sets = [keep_set(ranked, architecture, kept) for kept in counts]
    for kept, by_layer in zip(counts, sets, strict=True):
        assert set(by_layer) == set(architecture.moe_layers)
        for ids in by_layer.values():
            assert len(ids) == kept
            assert list(ids) == sorted(set(ids))
    for larger, smaller in pairwise(sets):
        assert all(set(smaller[layer]) < set(larger[layer]) for layer in smaller)


def test_ungrouped_set_holds_the_best(ungrouped: Architecture, shuffled: Statistics) -> None:
    for layer, ids in keep_set(rankings(shuffled, ungrouped, "frequency"), ungrouped, 6).items():
        counts = shuffled.layers[layer].total("routed")
        assert sorted(counts[list(ids)]) == list(range(EXPERTS - 6, EXPERTS))


def test_each_group_keeps_the_same_number_of_its_own_best(grouped: Architecture, shuffled: Statistics) -> None:
    ranked = rankings(shuffled, grouped, "frequency")
    for layer, ids in keep_set(ranked, grouped, 8).items():
        assert Counter(expert // 4 for expert in ids) == dict.fromkeys(range(4), 2)
        counts = shuffled.layers[layer].total("routed")
        for group in range(4):
            own = range(4 * group, 4 * group + 4)
            best = sorted(own, key=lambda expert: -counts[expert])[:2]
            assert sorted(best) == [expert for expert in ids if expert in own]


def test_keeping_all_experts_lists_none(ungrouped: Architecture, shuffled: Statistics) -> None:
    assert keep_set(rankings(shuffled, ungrouped, "reap"), ungrouped, EXPERTS) == {}


def test_permuting_experts_permutes_the_set(ungrouped: Architecture, shuffled: Statistics) -> None:
    order = np.random.default_rng(6).permutation(EXPERTS)
    counts = [shuffled.layers[layer].total("routed") for layer in range(LAYERS)]
    renamed = rankings(measured([count[order].tolist() for count in counts]), ungrouped, "frequency")
    original = keep_set(rankings(shuffled, ungrouped, "frequency"), ungrouped, 6)
    for layer, ids in keep_set(renamed, ungrouped, 6).items():
        assert {int(order[expert]) for expert in ids} == set(original[layer])


def test_models_with_dense_layers_rank_only_the_others(shuffled: Statistics, tmp_path: Path) -> None:
    path = toys.synthetic_gguf(tmp_path / "toy.gguf", "deepseek2", layers=LAYERS, experts=EXPERTS, expert_width=32)
    architecture = read_architecture(GgufFile(path))
    assert architecture.moe_layers == (1, 2)
    assert sorted(rankings(shuffled, architecture, "frequency")) == [1, 2]


def test_super_experts_need_room(ungrouped: Architecture, grouped: Architecture) -> None:
    protected = {0: (1, 2, 9), 2: (0,)}
    assert fewest_kept({}, ungrouped) == 0
    assert fewest_kept(protected, ungrouped) == 3
    assert fewest_kept(protected, grouped) == 8  # two of the first of four groups
    check_room(protected, ungrouped, 3)
    with pytest.raises(UsageError, match="2 of 16 experts have no room for the super experts of layer 0") as error:
        check_room(protected, ungrouped, 2)
    assert error.value.rows == (("super experts", "1, 2, 9"),) and "keep 3 or more" in error.value.hint
