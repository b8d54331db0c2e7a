"""Measurements of this machine that are remembered."""

from __future__ import annotations

import os
import time
from pathlib import Path

import platformdirs
import pytest

from edgeprune.device.probe import this_machine
from edgeprune.errors import BadFile
from edgeprune.remembered import remembered


class Meter:
    """Counts how often it is read."""

    def __init__(self) -> None:
        self.reads = 0

    def __call__(self) -> int:
        self.reads += 1
        return self.reads


def positive(value: object, where: str) -> int:
    if not isinstance(value, int):
        raise BadFile(f"{where} is no number")
    return value


@pytest.fixture
def note(request: pytest.FixtureRequest) -> Path:
    """The folder of this test's notes in the cache."""
    return Path(platformdirs.user_cache_dir("edgeprune")) / request.node.name


def test_what_was_measured_is_not_measured_again(note: Path) -> None:
    meter = Meter()
    for _ in range(3):
        assert remembered(note.name, {"a": 1}, meter, positive) == 1
    assert remembered(note.name, {"a": 2}, meter, positive) == 2


@pytest.mark.parametrize("content", ["{", '"words"', ""])
def test_a_damaged_note_is_made_anew(note: Path, content: str) -> None:
    meter = Meter()
    remembered(note.name, {}, meter, positive)
    (file,) = note.iterdir()
    file.write_text(content)
    assert remembered(note.name, {}, meter, positive) == 2
    assert remembered(note.name, {}, meter, positive) == 2


@pytest.mark.parametrize(("age", "reads"), [(3000, 1), (4000, 2), (-100, 2)], ids=["young", "old", "of tomorrow"])
def test_an_old_note_is_made_anew(note: Path, age: float, reads: int) -> None:
    meter = Meter()
    remembered(note.name, {}, meter, positive)
    (file,) = note.iterdir()
    os.utime(file, (time.time() - age,) * 2)
    assert remembered(note.name, {}, meter, positive, most_seconds=3600) == reads


def test_without_a_place_to_remember_it_is_measured_every_time(note: Path) -> None:
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text("a file in the way")
    meter = Meter()
    assert [remembered(note.name, {}, meter, positive) for _ in range(2)] == [1, 2]


def test_bandwidth_of_this_machine_is_measured_once_a_day() -> None:
    first, second = (this_machine([]).ram.bandwidth_bytes_per_s for _ in range(2))
    assert first == second
