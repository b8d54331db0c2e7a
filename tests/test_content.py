"""Digests of large files: of every byte, read once, and never those of an earlier content."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from edgeprune.errors import BadFile
from edgeprune.files import file_digest
from edgeprune.model import content
from edgeprune.model.content import content_digest

LONG_AGO = 1_600_000_000 * 10**9


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own, and a clock to which every file here is old."""
    monkeypatch.setattr(content.platformdirs, "user_cache_dir", lambda name: str(tmp_path / "cache" / name))
    monkeypatch.setattr(content, "_known", {})
    monkeypatch.setattr(content, "_SETTLED_NS", -(10**18))
    return tmp_path / "cache"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were read whole, in order."""
    names: list[str] = []

    def counted(path: Path, progress: Callable[[int, int], None] | None = None) -> str:
        names.append(path.name)
        return file_digest(path, progress)

    monkeypatch.setattr(content, "file_digest", counted)
    return names


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"weights" * 1000)
    os.utime(path, ns=(LONG_AGO, LONG_AGO))
    return path


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin as another process would."""
    monkeypatch.setattr(content, "_known", {})


def test_a_file_is_read_once_even_by_another_process(
    model: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = content_digest(model)
    assert first == file_digest(model)
    assert content_digest(model) == first
    forget(monkeypatch)
    assert content_digest(model) == first
    assert reads == ["model.gguf"]


def test_the_same_content_in_another_place_or_at_another_time_has_the_same_digest(
    model: Path, reads: list[str], tmp_path: Path
) -> None:
    first = content_digest(model)
    os.utime(model)
    assert content_digest(model) == first
    shutil.copy(model, tmp_path / "copy.gguf")
    assert content_digest(tmp_path / "copy.gguf") == first
    assert reads == ["model.gguf", "model.gguf", "copy.gguf"]


@pytest.mark.skipif(sys.platform == "win32", reason="no time of the inode's last change")
def test_a_change_whose_time_was_set_back_is_noticed(model: Path) -> None:
    before = content_digest(model)
    with model.open("r+b") as stream:
        stream.write(b"W")
    os.utime(model, ns=(LONG_AGO, LONG_AGO))
    assert content_digest(model) == file_digest(model) != before


def test_a_link_has_the_digest_of_its_target(model: Path, reads: list[str], tmp_path: Path) -> None:
    (tmp_path / "link.gguf").symlink_to(model)
    assert content_digest(tmp_path / "link.gguf") == content_digest(model)
    assert reads == ["model.gguf"]


def test_a_file_that_changed_just_now_is_not_remembered(
    model: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(content, "_SETTLED_NS", 3_600 * 10**9)
    assert content_digest(model) == content_digest(model)
    assert reads == ["model.gguf", "model.gguf"]


def test_a_file_that_changes_while_it_is_read_is_not_remembered(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(path: Path, progress: object = None) -> str:
        found = file_digest(path)
        path.write_bytes(b"other weights")
        return found

    monkeypatch.setattr(content, "file_digest", slow)
    content_digest(model)
    monkeypatch.setattr(content, "file_digest", file_digest)
    assert content_digest(model) == file_digest(model)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, "{}", '{"digest": 1}', '{"digest": "abc"}'])
def test_a_damaged_note_is_made_anew(
    text: str, model: Path, cache: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = content_digest(model)
    (note,) = cache.rglob("*.json")
    note.write_text(text)
    forget(monkeypatch)
    assert content_digest(model) == first
    forget(monkeypatch)
    assert content_digest(model) == first
    assert reads == ["model.gguf", "model.gguf"]


def test_a_cache_folder_that_cannot_be_written_to_costs_time_only(
    model: Path, cache: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.write_text("a file where the folder should be")
    assert content_digest(model) == content_digest(model) == file_digest(model)
    assert reads == ["model.gguf"]
    forget(monkeypatch)
    assert content_digest(model) == file_digest(model)


def test_a_missing_file_is_an_explained_error(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match=r"cannot read .*nowhere\.gguf: "):
        content_digest(tmp_path / "nowhere.gguf")
