"""Loops: the two measures on token lists whose answer is known, and the generations of a real small model."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toys

from edgeprune.errors import BadFile
from edgeprune.measure import child
from edgeprune.measure.repetition import MODES, ends_in_loop, repeated_share
from edgeprune.prove.deeper import NOTHING, Deeper, Loops, Named, Speed, Task
from edgeprune.prove.paired import Paired

pytest_plugins = ("demo_fixtures",)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([], False),
        ([7], False),
        (list(range(30)), False),
        ([5, 5, 5, 5, 5], False),  # a phrase has two tokens at least: three of them are six
        ([5, 5, 5, 5, 5, 5], True),
        ([9, 1, 2, 1, 2], False),  # twice is no loop
        ([9, 1, 2, 1, 2, 1, 2], True),
        ([1, 2, 1, 2, 1, 2, 9], False),  # it got out of it
        ([*range(40), *[50, 51, 52, 53] * 2, 50, 51, 52, 53, 50, 51], True),  # cut off within the phrase
        ([*[1, 2, 3] * 2, 1, 2], False),
        (list(range(100)) * 3, True),
    ],
)
def test_a_loop_is_a_phrase_said_three_times_at_the_end(tokens: list[int], expected: bool) -> None:
    assert ends_in_loop(tokens) is expected


def test_random_tokens_do_not_loop_and_hardly_repeat() -> None:
    for seed in range(20):
        tokens = np.random.default_rng(seed).integers(0, 1000, 512).tolist()
        assert not ends_in_loop(tokens)
        assert repeated_share(tokens) < 0.01


def test_repeated_share_counts_runs_that_were_there_before() -> None:
    assert repeated_share([1, 2, 3]) == 0
    assert repeated_share([1, 2, 3, 4, 5]) == 0
    assert repeated_share([1] * 13) == pytest.approx(1 - 1 / 10)  # ten runs, all the same
    assert repeated_share([1, 2, 3, 4] * 2) == pytest.approx(1 - 4 / 5)  # five runs, the last is the first


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model of bytes. Do not change it."""
    path = tmp_path_factory.mktemp("talker") / "talker.gguf"
    return toys.synthetic_gguf(path, experts=4, width=64, expert_width=64, vocabulary=257)


def generations(model: Path, length: int = 60) -> dict[str, list[dict[str, Any]]]:
    arguments = {"model": str(model), "prompts": ["Why?\n", "Where to?"], "special": False, "length": length}
    found: dict[str, list[dict[str, Any]]] = child.call("edgeprune.measure.loops:loops", {**arguments, "threads": 1})
    return found


def test_generations_are_the_same_every_time_and_differ_by_mode(talker: Path) -> None:
    first = generations(talker)
    assert first == generations(talker)
    assert set(first) == set(MODES) and all(len(own) == 2 for own in first.values())
    assert first["greedy"] != first["sampled"]
    assert all(1 <= one["tokens"] <= 60 for own in first.values() for one in own)


def one(loops: bool, share: float, end: str = "") -> dict[str, Any]:
    return {"loops": loops, "repeated_share": share, "tokens": 9, "end": end}


def test_a_probe_counts_pairs_and_shows_what_was_lost() -> None:
    original = [one(True, 0.5), one(False, 0.1), one(False, 0.0), one(False, 0.2)]
    candidate = [one(True, 0.6, "a"), one(True, 0.8, "b b b"), one(False, 0.0), one(True, 0.9, "c")]
    found = Loops.of("greedy", 512, original, candidate)
    assert (found.looping.both, found.looping.candidate_only, found.looping.original_only) == (1, 2, 0)
    assert found.repeated == pytest.approx((0.2, 0.575))
    mean, low, high = found.change
    assert mean == pytest.approx(0.375) and -0.6 < low < 0 < mean < high < 0.9  # four tell little
    assert found.example == "b b b"


def test_deeper_measurements_survive_json_and_damage_is_explained() -> None:
    speed = Speed(0, (3.0, 2.0, 4.0), (1.0, 1.0, 1.0), None)
    quality = {"kl_mean": 0.1, "kl_99": 0.2, "kl_999": 0.3, "kl_max": 0.4, "same_top": 0.9, "tokens": 7}
    named = Named("code", {**quality, "perplexity": 3.0, "reference_perplexity": 2.0})
    probe = Loops.of("greedy", 9, [one(False, 0.0)], [one(True, 0.5, "x")])
    task = Task("a.jsonl", "arc", 9, Paired(1, 2, 3, 1))
    found = Deeper((speed,), (probe,), (task,), (named,), (named, named), Paired(1, 0, 0, 1))
    value = asdict(found)
    assert Deeper.from_json(value) == found
    assert Deeper.from_json(asdict(NOTHING)) == NOTHING
    for damage in (
        {**value, "speeds": [{**value["speeds"][0], "prefill": [1.0]}]},
        {**value, "speeds": 3},
        {**value, "objects": {"both": 1}},
        {**value, "tasks": [{**value["tasks"][0], "total": 0}]},
        {**value, "slices": [{**value["slices"][0], "quality": {"kl_mean": 1.0}}]},
        {**value, "loops": [{**value["loops"][0], "looping": None}]},
        {"speeds": []},
    ):
        with pytest.raises(BadFile):
            Deeper.from_json(damage)
