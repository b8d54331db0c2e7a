"""Files: atomic writes that survive anything, strict tables, stable digests."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import edgeprune
from edgeprune.errors import BadFile, EdgepruneError
from edgeprune.files import (
    PARTIAL_SUFFIX,
    atomic_writer,
    check_keys,
    data_folder,
    digest,
    file_digest,
    read_json,
    read_toml,
    remove_partials,
    require_space,
    to_json,
    write_text,
)

posix = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX resource limits and signals")


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``code`` in a process of its own, with this checkout's package."""
    environment = {**os.environ, "PYTHONPATH": str(Path(edgeprune.__file__).parents[1])}
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def old_file(tmp_path: Path) -> Path:
    path = tmp_path / "result.bin"
    path.write_bytes(b"old")
    return path


def test_atomic_write_makes_folders_and_leaves_only_the_file(tmp_path: Path) -> None:
    with atomic_writer(tmp_path / "a" / "b" / "result.bin") as stream:
        stream.write(b"new")
    assert names(tmp_path / "a" / "b") == ["result.bin"]
    assert (tmp_path / "a" / "b" / "result.bin").read_bytes() == b"new"


def test_readers_see_the_old_file_until_the_new_one_is_complete(old_file: Path) -> None:
    with atomic_writer(old_file) as stream:
        stream.write(b"new" * 100_000)
        stream.flush()
        assert old_file.read_bytes() == b"old"
    assert old_file.read_bytes() == b"new" * 100_000


@pytest.mark.parametrize("error", [ValueError("bad weights"), KeyboardInterrupt(), OSError(5, "input/output error")])
def test_failure_within_the_block_leaves_the_old_file_and_no_partial(old_file: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), atomic_writer(old_file) as stream:
        stream.write(b"half of the new")
        raise error
    assert names(old_file.parent) == ["result.bin"]
    assert old_file.read_bytes() == b"old"


# The kernel refuses to let the process's files grow beyond the limit, as a full disk would.
_OUT_OF_ROOM = """
import resource, sys
from pathlib import Path
from edgeprune.errors import EdgepruneError
from edgeprune.files import atomic_writer
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
try:
    with atomic_writer(Path(sys.argv[1])) as stream:
        for _ in range(int(sys.argv[2])):
            stream.write(bytes(1000))
except EdgepruneError as error:
    print(error)
    sys.exit(error.exit_code)
"""


@posix
@pytest.mark.parametrize("thousands", [70, 5000], ids=["noticed at the flush", "noticed while writing"])
def test_running_out_of_room_is_explained_and_leaves_the_old_file(old_file: Path, thousands: int) -> None:
    done = run_python(_OUT_OF_ROOM, str(old_file), str(thousands))
    assert (done.returncode, done.stderr) == (1, "")
    assert f"writing {old_file} failed" in done.stdout
    assert "free  " in done.stdout
    assert names(old_file.parent) == ["result.bin"]
    assert old_file.read_bytes() == b"old"


_KILLED = """
import os, signal, sys
from pathlib import Path
from edgeprune.files import atomic_writer
with atomic_writer(Path(sys.argv[1])) as stream:
    stream.write(bytes(100_000))
    os.kill(os.getpid(), signal.SIGKILL)
"""


@posix
def test_what_a_killed_writer_leaves_is_a_partial_that_is_cleared_away(old_file: Path) -> None:
    done = run_python(_KILLED, str(old_file))
    assert done.returncode == -signal.SIGKILL
    assert names(old_file.parent) == ["result.bin", "result.bin" + PARTIAL_SUFFIX]
    assert old_file.read_bytes() == b"old"
    remove_partials(old_file.parent)
    assert names(old_file.parent) == ["result.bin"]


def test_folder_that_cannot_be_is_explained(old_file: Path) -> None:
    with pytest.raises(EdgepruneError, match=r"cannot write .*inside\.txt"):
        write_text(old_file / "inside.txt", "text")
    assert old_file.read_bytes() == b"old"


def test_text_is_written_as_utf_8_with_its_own_line_ends(tmp_path: Path) -> None:
    write_text(tmp_path / "text.txt", "naïve\r\n日本\n")
    assert (tmp_path / "text.txt").read_bytes() == "naïve\r\n日本\n".encode()


def test_missing_disk_space_is_refused_with_both_figures(tmp_path: Path) -> None:
    require_space(tmp_path, 0)
    with pytest.raises(EdgepruneError, match="not enough disk space") as raised:
        require_space(tmp_path, 2**62)
    assert dict(raised.value.rows)["needed"] == "4294967296 GiB"
    assert {label for label, _ in raised.value.rows} == {"needed", "free"}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"name": 1}, "toy lacks total"),
        ({}, "toy lacks name, total"),
        ({"name": 1, "total": 2, "totl": 3}, "toy has unknown keys: totl"),
        ({"name": 1, "toal": 2}, "toy lacks total"),
        ([1, 2], "toy is not a table"),
        (3, "toy is not a table"),
    ],
    ids=["missing", "empty", "unknown", "typo", "list", "number"],
)
def test_table_with_wrong_keys_is_refused(table: object, message: str) -> None:
    with pytest.raises(BadFile, match=message):
        check_keys("toy", table, {"name", "total"}, {"extra"})  # type: ignore[arg-type]


def test_refused_table_says_which_keys_are_known() -> None:
    with pytest.raises(BadFile) as raised:
        check_keys("toy", {"name": 1, "x": 2}, {"name"}, {"extra"})
    assert raised.value.hint == "known keys: extra, name"
    check_keys("toy", {"name": 1, "extra": 2}, {"name"}, {"extra"})
    check_keys("toy", {"name": 1}, {"name"}, {"extra"})


@pytest.mark.parametrize("read", [read_toml, read_json], ids=["toml", "json"])
@pytest.mark.parametrize(
    "content",
    [None, b"", b"\xff\xfe", b"[[[", b"[" * 200_000, b"a = " + b"[" * 200_000],
    ids=["missing", "empty", "not UTF-8", "bad syntax", "deep JSON", "deep TOML"],
)
def test_unreadable_file_is_a_bad_file_that_is_named(tmp_path: Path, read: object, content: bytes | None) -> None:
    path = tmp_path / "table.data"
    if content is not None:
        path.write_bytes(content)
    if content == b"" and read is read_toml:
        assert read_toml(path) == {}
        return
    with pytest.raises(BadFile, match=r"cannot read .*table\.data"):
        read(path)  # type: ignore[operator]


def test_json_is_equal_for_equal_values_and_reads_back(tmp_path: Path) -> None:
    value = {"b": [1, 2.5, None], "a": {"ü": "日本"}}
    text = to_json(value)
    assert text == to_json({"a": {"ü": "日本"}, "b": [1, 2.5, None]})
    assert text.endswith("}\n")
    write_text(tmp_path / "value.json", text)
    assert read_json(tmp_path / "value.json") == value


def test_digest_is_that_of_the_canonical_json() -> None:
    canonical = b'{"a": [1, 2], "b": null}'
    assert digest({"b": None, "a": [1, 2]}) == hashlib.sha256(canonical).hexdigest()
    # Kept in files between versions: it must never change.
    assert digest({"b": None, "a": [1, 2]}) == digest({"a": (1, 2), "b": None})
    assert digest([]) == "4f53cda18c2baa0c0354bb5f9a3ecbe5ed12ab4d8e11ba873c2f11161202b945"
    assert len({digest(value) for value in ({}, [], 0, "", None, {"a": 1}, {"a": 2}, [1, 2], [2, 1])}) == 9


def test_file_digest_is_sha_256_of_the_content(tmp_path: Path) -> None:
    path = tmp_path / "abc"
    path.write_bytes(b"abc")
    assert file_digest(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    content, seen = bytes(range(256)) * 10_000, list[tuple[int, int]]()
    path.write_bytes(content)
    assert file_digest(path, lambda done, total: seen.append((done, total))) == hashlib.sha256(content).hexdigest()
    assert seen == [(1 << 20, 2_560_000), (2 << 20, 2_560_000), (2_560_000, 2_560_000)]


@pytest.mark.parametrize("name", ["profiles", "converters", "devices"])
def test_data_folders_are_found(name: str) -> None:
    assert list(data_folder(name).glob("*.toml"))
