"""Groups of experts to be merged, against groups worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import toys
from observed import Family

from edgeprune.decide.evidence import Evidence
from edgeprune.decide.groups import GROUPINGS, Group, ream
from edgeprune.errors import UsageError
from edgeprune.measure.statistics import LayerStatistics

pytest_plugins = ("observed_fixtures",)


@pytest.fixture
def four() -> Evidence:
    """Four experts with the REAP scores 4, 1, 3 and 2; 0 and 3 answer alike, 0 and 1 are chosen alike."""
    sums = LayerStatistics.zeros(1, 4, width=2)
    logits = np.array([[1.0, 2.0, 0.0, 0.0], [0.0, 0.0, 1.0, 3.0]])  # of two tokens
    sums.arrays["routed"][0] = [1, 2, 1, 4]
    sums.arrays["gated_norm_sum"][0] = [4, 2, 3, 8]
    sums.arrays["gated_output_sum"][0] = [[1.0, 0.0], [0.0, 1.0], [0.0, 2.0], [3.0, 0.0]]
    sums.arrays["logit_gram"][0] = logits.T @ logits
    return Evidence(0, sums)


def test_ream_is_half_likeness_of_answers_and_half_likeness_of_choices(four: Evidence) -> None:
    found = ream.similarity(four)
    # Cosines of outputs are 0 or 1; columns of logits are the same direction, or sqrt 2 apart, which is the most.
    expected = {(0, 1): (0.5 + 1) / 2, (0, 2): (0.5 + 0) / 2, (0, 3): (1 + 0) / 2, (1, 2): (1 + 0) / 2}
    for pair, value in expected.items():
        assert found[pair] == found[pair[::-1]] == pytest.approx(value)
    np.testing.assert_allclose(np.diag(found), 1)


def test_ream_fills_the_most_salient_group_first(four: Evidence, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ream.groups(four, 2) == (Group(0, (0, 1, 3)), Group(2, (2,)))
    assert ream.groups(four, 4) == tuple(Group(expert, (expert,)) for expert in range(4))
    monkeypatch.setattr(ream, "_LARGEST", 2)
    assert ream.groups(four, 2) == (Group(0, (0, 1)), Group(2, (2, 3)))
    assert ream.groups(four, 3) == (Group(0, (0, 1)), Group(2, (2,)), Group(3, (3,)))
    with pytest.raises(UsageError, match="1 groups of at most 2 experts do not hold 4"):
        ream.groups(four, 1)


def test_ream_takes_experts_that_no_token_reached_last() -> None:
    sums = LayerStatistics.zeros(1, 3, width=2)
    sums.arrays["routed"][0], sums.arrays["gated_norm_sum"][0] = [1, 0, 2], [1, 0, 1]
    sums.arrays["gated_output_sum"][0, :] = [[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]
    assert ream.groups(Evidence(0, sums), 2) == (Group(0, (0, 1)), Group(2, (2,)))


def test_hc_smoe_clusters_mean_outputs_around_the_one_in_the_middle() -> None:
    sums = LayerStatistics.zeros(2, 5, width=1)
    means, routed = np.array([14.0, 0.0, 1.0, 15.0, 10.0]), np.array([[1.0, 2, 0, 4, 1], [1, 0, 7, 1, 1]])
    sums.arrays["routed"][:] = routed
    sums.arrays["output_sum"][:, :, 0] = means * routed
    found = GROUPINGS["hc-smoe"](Evidence(0, sums), 2)
    # The mean of 14, 15 and 10 is 13; 0 and 1 are equally far from theirs.
    assert found == (Group(0, (0, 3, 4)), Group(1, (1, 2)))
    assert GROUPINGS["hc-smoe"](Evidence(0, sums), 3) == (Group(0, (0, 3)), Group(1, (1, 2)), Group(4, (4,)))


@pytest.mark.parametrize("method", sorted(GROUPINGS))
def test_every_expert_is_in_one_group(method: str, family: Family) -> None:
    evidence = Evidence(1, family.both.layers[1])
    for kept in range(1, toys.EXPERTS + 1):
        found = GROUPINGS[method](evidence, kept)
        assert len(found) == kept
        assert sorted(expert for group in found for expert in group.members) == list(range(toys.EXPERTS))
        for group in found:
            assert group.centre in group.members and list(group.members) == sorted(group.members)
        assert [group.centre for group in found] == sorted(group.centre for group in found)
