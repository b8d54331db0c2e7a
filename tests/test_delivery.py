"""A file to another machine: sent once, gone on with, checked. The other machine is a shell in a folder here."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest

from edgeprune.errors import EdgepruneError
from edgeprune.prove.smoke.delivery import deliver

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
CONTENT = bytes(range(256)) * 5000


class Here:
    """A real shell, whose programs can be replaced by those in the folder ``bin``."""

    name = "here"

    def __init__(self, folder: Path) -> None:
        self._environment = {**os.environ, "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"}
        self.sent = 0
        self.spoil = b""

    def ask(self, script: str) -> str:
        done = subprocess.run(
            ["sh", "-c", script], capture_output=True, text=True, env=self._environment, check=False
        )
        if done.returncode:
            raise EdgepruneError(done.stderr.strip())
        return done.stdout

    def append(self, stream: BinaryIO, path: str, progress: Callable[[int], None]) -> None:
        data = stream.read()
        self.sent += len(data)
        with Path(path).open("ab") as out:
            out.write(data + self.spoil)
        progress(len(data))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model with 'quotes'.gguf"
    path.write_bytes(CONTENT)
    return path


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def sent(shell: Here, model: Path, folder: Path) -> Path:
    """Deliver ``model``; the file that is then there, which has to be it."""
    steps: list[tuple[int, int]] = []
    path = Path(deliver(shell, model, str(folder), sha256_of(model), lambda done, total: steps.append((done, total))))
    assert path.read_bytes() == model.read_bytes()
    assert [file.name for file in folder.iterdir()] == [path.name]
    assert all(step == (len(CONTENT), len(CONTENT)) for step in steps)
    return path


def test_a_file_is_sent_once_under_the_name_of_its_hash(model: Path, tmp_path: Path) -> None:
    shell, folder = Here(tmp_path), tmp_path / "far away" / "it's here"
    first = sent(shell, model, folder)
    assert first.name == f"{sha256_of(model)[:32]}.gguf" and shell.sent == len(CONTENT)
    renamed = Path(shutil.copyfile(model, tmp_path / "other.gguf"))
    assert sent(shell, renamed, folder) == first
    assert shell.sent == len(CONTENT)


def partial(model: Path, folder: Path, content: bytes) -> Path:
    folder.mkdir(parents=True)
    path = folder / f"{sha256_of(model)[:32]}.gguf.partial"
    path.write_bytes(content)
    return path


def test_what_was_broken_off_is_gone_on_with(model: Path, tmp_path: Path) -> None:
    shell = Here(tmp_path)
    begun = partial(model, tmp_path / "far", CONTENT[:1_000_000]).stat().st_ino
    assert sent(shell, model, tmp_path / "far").stat().st_ino == begun
    assert shell.sent == len(CONTENT) - 1_000_000


@pytest.mark.parametrize(
    "content",
    [b"x" * 1000, CONTENT + b"more", CONTENT[:-1] + b"?"],
    ids=["another", "too long", "damaged at the end"],
)
def test_a_part_that_is_wrong_is_sent_again_from_the_beginning(content: bytes, model: Path, tmp_path: Path) -> None:
    shell = Here(tmp_path)
    partial(model, tmp_path / "far", content)
    sent(shell, model, tmp_path / "far")
    assert shell.sent >= len(CONTENT)


def test_a_part_that_is_whole_is_only_checked(model: Path, tmp_path: Path) -> None:
    shell = Here(tmp_path)
    partial(model, tmp_path / "far", CONTENT)
    sent(shell, model, tmp_path / "far")
    assert shell.sent == 0


def test_a_file_that_was_damaged_there_is_replaced(model: Path, tmp_path: Path) -> None:
    shell = Here(tmp_path)
    path = sent(shell, model, tmp_path / "far")
    path.write_bytes(CONTENT[:-1] + b"?")
    sent(shell, model, tmp_path / "far")
    assert shell.sent == 2 * len(CONTENT)


def test_what_arrives_wrong_is_refused_and_nothing_is_left(model: Path, tmp_path: Path) -> None:
    shell = Here(tmp_path)
    shell.spoil = b"!"
    with pytest.raises(EdgepruneError, match="what arrived at here is not model"):
        deliver(shell, model, str(tmp_path / "far"), sha256_of(model), lambda done, total: None)
    assert list((tmp_path / "far").iterdir()) == []


def program(folder: Path, name: str, script: str) -> None:
    (folder / "bin").mkdir(exist_ok=True)
    path = folder / "bin" / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_a_full_device_is_explained_before_anything_is_sent(model: Path, tmp_path: Path) -> None:
    program(
        tmp_path, "df", "echo 'Filesystem 1024-blocks Used Available Capacity Mounted'; echo '/dev/a b 9 8 1 90% /x'"
    )
    shell = Here(tmp_path)
    with pytest.raises(EdgepruneError) as caught:
        deliver(shell, model, str(tmp_path / "far"), sha256_of(model), lambda done, total: None)
    assert "here has no room" in caught.value.cause
    assert dict(caught.value.rows) == {"needed": "1.22 MiB", "free": "1.00 KiB"}
    assert shell.sent == 0
    partial(model, tmp_path / "other", CONTENT[:-1024])  # the little that is missing has room
    sent(shell, model, tmp_path / "other")


def test_an_answer_that_is_none_is_explained(model: Path, tmp_path: Path) -> None:
    program(tmp_path, "df", "echo welcome to this machine")
    with pytest.raises(EdgepruneError, match="does not say what its folder"):
        deliver(Here(tmp_path), model, str(tmp_path / "far"), sha256_of(model), lambda done, total: None)
