"""Speed at several depths of the context, and what the memory of a model can forget and share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import architectures
import numpy as np
import pytest
import toys

from edgeprune.measure import child
from edgeprune.measure.launch import Launch
from edgeprune.measure.llama import session

ONE_THREAD = Launch(context=512, threads=1)


def at_depths(model: Path, depths: list[int], **changes: Any) -> list[dict[str, Any]]:
    arguments = {"block": 32, "generated": 4, "seconds": 60.0, "launch": ONE_THREAD.to_json(), **changes}
    rows: list[dict[str, Any]] = child.call(
        "edgeprune.measure.depths:at_depths", {"model": str(model), "depths": depths, **arguments}
    )
    return rows


def test_every_depth_is_measured_three_times_and_has_its_first_token(synthetic: toys.Maker) -> None:
    rows = at_depths(synthetic("qwen3moe"), [0, 128, 476])
    assert [row["depth"] for row in rows] == [0, 128, 476]
    for row in rows:
        for speed in ("prefill_per_s", "decode_per_s"):
            median, least, most = row[speed]
            assert 0 < least <= median <= most
    assert rows[0]["first_token_seconds"] is None
    assert 0 < rows[1]["first_token_seconds"] < rows[2]["first_token_seconds"]


def test_depths_that_would_take_too_long_are_left_out(synthetic: toys.Maker) -> None:
    assert [row["depth"] for row in at_depths(synthetic("qwen3moe"), [0, 64, 128], seconds=0.0)] == [0, 64]


def test_a_memory_that_cannot_go_back_is_filled_anew(tmp_path: Path) -> None:
    """Else a depth would be what the repeats left, and its first token would not count what they had read."""
    path = architectures.toy(tmp_path / "toy.gguf", "lfm2moe")
    launch = Launch(context=256, threads=1)
    with session(path, launch) as opened:
        opened.extend([3, 1, 4, 1, 5], 0)
        assert not opened.forget(3)
    rows = at_depths(path, [0, 16, 40, 200], launch=launch.to_json())
    assert [row["depth"] for row in rows] == [0, 16, 40, 200]
    assert 0 < rows[1]["first_token_seconds"] < rows[3]["first_token_seconds"]
    assert all(row["prefill_per_s"][1] > 0 for row in rows)


def test_forgotten_tokens_leave_no_trace(synthetic: toys.Maker) -> None:
    with session(synthetic("qwen3moe"), ONE_THREAD) as opened:
        opened.extend([3, 1, 4, 1, 5], 0)
        straight = opened.extend([9, 2], 5).copy()
        assert opened.forget(5)
        opened.extend([200, 201, 202], 5)
        assert opened.forget(5)
        assert np.array_equal(opened.extend([9, 2], 5), straight)


@pytest.mark.parametrize("arch", ["qwen3moe", "deepseek2", "gpt-oss"])
def test_branches_say_what_whole_sequences_say(synthetic: toys.Maker, arch: str) -> None:
    prompt, continuations = [3, 1, 4, 1, 5, 9], [[2], [6, 5, 3], [5, 8]]
    with session(synthetic(arch), ONE_THREAD, sequences=4) as opened:
        expected = []
        for own in continuations:
            expected.append(opened.run([*prompt, *own])[len(prompt) :].copy())
        for _ in range(2):  # and the second time they find nothing left of the first
            opened.clear()
            opened.extend(prompt, 0, all_logits=False)
            found = opened.branch(continuations, len(prompt)).copy()
            assert found == pytest.approx(np.concatenate(expected), abs=2e-4)
