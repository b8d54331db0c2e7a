"""The Hub as a source, through the real huggingface_hub and a server on loopback."""

from __future__ import annotations

import json
import re
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import hub_files
import pytest
import torch
import toys
from huggingface_hub import constants
from runs import run_edgeprune
from safetensors.torch import save, save_file

from edgeprune.errors import BadFile, EdgepruneError, Unsupported, UsageError
from edgeprune.inspection import inspect_model
from edgeprune.model import download
from edgeprune.model.checkpoint import INDEX
from edgeprune.model.download import fetch
from edgeprune.model.gguf import GgufFile
from edgeprune.model.hub import Unreachable, repo_folder
from edgeprune.model.location import HubName, endpoint, hub_name, located
from edgeprune.settings import Silent
from edgeprune.stages.source import found_at

pytest_plugins = ("hub_fixtures",)

REPO = "maker/toy-GGUF"
FILE = "toy-Q8_0.gguf"
EXPERT = save({"model.layers.0.mlp.experts.0.up_proj.weight": torch.ones(8, 8)})


def get(name: str, said: list[str] | None = None) -> Path:
    """``name`` downloaded, without anybody who listens."""
    found = hub_name(name)
    assert found is not None
    return fetch(found, lambda done, total: None, (said if said is not None else []).append)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.synthetic_gguf(tmp_path_factory.mktemp("made") / FILE, kind="Q8_0")


@pytest.fixture
def repository(hub: hub_files.Hub, gguf: Path) -> hub_files.Repository:
    return hub.add(REPO, {FILE: gguf, "README.md": b"# toy", "mmproj-Q8_0.gguf": b"x", "imatrix.gguf": b"y"})


NAMES = {
    "maker/toy": HubName("maker/toy"),
    "maker/toy@v1.0": HubName("maker/toy", "", "v1.0"),
    "maker/toy@refs/pr/3": HubName("maker/toy", "", "refs/pr/3"),
    "maker/toy:Q4_K_M": HubName("maker/toy", "Q4_K_M"),
    "maker/toy:sub/x.gguf@abc": HubName("maker/toy", "sub/x.gguf", "abc"),
    "maker/toy.gguf:x.gguf": HubName("maker/toy.gguf", "x.gguf"),
}
NO_NAMES = [
    "toy", "a/b/c", "./a/b", "../a", "/a/b", "models/toy.gguf", "C:/toy", "a/b:../../etc/passwd", "a/b:/etc/passwd",
    "a/b@../x", "a/b:x\\y", "a/..b", "a/b--c", f"a/{'b' * 96}", "a/b:", "a/b@", "a /b", "a/b:x\n",
]  # fmt: skip


@pytest.mark.parametrize("text", NAMES)
def test_name_of_a_model_on_the_hub_is_taken_apart(text: str) -> None:
    assert located(text) == NAMES[text]
    assert str(NAMES[text]) == text


@pytest.mark.parametrize("text", NO_NAMES)
def test_what_is_neither_a_path_nor_a_name_gets_a_hint(text: str) -> None:
    with pytest.raises(UsageError, match="no model at") as refusal:
        located(text)
    assert "ORG/NAME:Q4_K_M" in refusal.value.hint


def test_path_that_exists_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "maker" / "toy").mkdir(parents=True)
    assert located("maker/toy") == Path("maker/toy")
    assert located("maker/other") == HubName("maker/other")


@pytest.mark.parametrize("wanted", ["Q8_0", "q8_0", FILE, "toy-q8_0"])
def test_gguf_is_found_by_file_or_quantisation(
    wanted: str, hub: hub_files.Hub, repository: hub_files.Repository, gguf: Path
) -> None:
    path = get(f"{REPO}:{wanted}")
    assert path.read_bytes() == gguf.read_bytes()
    assert path.is_relative_to(repo_folder(HubName(REPO)) / "snapshots" / ("a" * 40))
    asked = {request.path.split("/")[-1] for request in hub.requests if "/resolve/" in request.path}
    assert asked == {FILE}  # and nothing else of the repository


def test_what_is_here_is_not_fetched_again(hub: hub_files.Hub, repository: hub_files.Repository) -> None:
    said: list[str] = []
    first = get(f"{REPO}:Q8_0", said)
    assert len(said) == 1 and said[0].startswith("download ") and FILE not in said[0]
    before = len([request for request in hub.requests if request.store])
    assert get(f"{REPO}:Q8_0", said) == first
    assert len([request for request in hub.requests if request.store]) == before and len(said) == 1


def test_huggingface_hub_finds_what_was_downloaded(repository: hub_files.Repository) -> None:
    from huggingface_hub import hf_hub_download, scan_cache_dir

    path = get(f"{REPO}:Q8_0")
    assert Path(hf_hub_download(REPO, FILE, local_files_only=True)) == path
    assert scan_cache_dir(constants.HF_HUB_CACHE).warnings == []


def test_only_gguf_of_a_repository_needs_no_name(repository: hub_files.Repository) -> None:
    assert get(REPO).name == FILE


def test_ambiguous_and_missing_names_list_what_there_is(hub: hub_files.Hub, gguf: Path) -> None:
    files = {"a-Q4_K_M.gguf": gguf, "UD/b-Q4_K_M.gguf": gguf, "BF16/c-00001-of-00002.gguf": gguf}
    hub.add(REPO, {**files, "BF16/c-00002-of-00002.gguf": gguf})
    for name, cause in (
        (REPO, "holds 3 GGUF models and no checkpoint"),
        (f"{REPO}:Q4_K_M", "2 GGUF models of"),
        (f"{REPO}:IQ1_S", "holds no GGUF IQ1_S"),
    ):
        with pytest.raises(UsageError, match=cause) as refusal:
            get(name)
        assert {"a-Q4_K_M.gguf", "UD/b-Q4_K_M.gguf"} <= dict(refusal.value.rows).keys()
        assert refusal.value.hint


def test_split_model_is_downloaded_whole_and_begins_with_its_first_part(hub: hub_files.Hub, gguf: Path) -> None:
    parts = [f"BF16/c-0000{number}-of-00002.gguf" for number in (1, 2)]
    hub.add(REPO, {parts[0]: gguf.read_bytes() + b"1", parts[1]: gguf.read_bytes() + b"2", "a-Q4_K.gguf": gguf})
    for wanted in ("BF16", "bf16", parts[1]):
        path = get(f"{REPO}:{wanted}")
        assert path.name == "c-00001-of-00002.gguf"
        assert (path.parent / "c-00002-of-00002.gguf").read_bytes()[-1:] == b"2"
    del hub.repositories[REPO].files[parts[1]]
    with pytest.raises(BadFile, match=r"lacks BF16/c-00002-of-00002.gguf, one of the 2 parts"):
        get(f"{REPO}:BF16")


def test_checkpoint_is_downloaded_without_what_it_does_not_need(
    hub: hub_files.Hub, toy_checkpoint: toys.Maker
) -> None:
    repository = hub.add_folder("maker/toy", toy_checkpoint("qwen3_moe"))
    repository.files["README.md"] = hub_files.stored(b"---\nlicense: mit\n---\n")
    needless = {
        "docs/README.md": b"# more",
        "model.py": b"import os",
        "pytorch_model.bin": b"pickle",
        "onnx/model.json": b"{}",
        "x.gguf": b"G",
    }
    repository.files |= {path: hub_files.stored(content) for path, content in needless.items()}
    folder = get("maker/toy")
    whole = {path.name for path in toy_checkpoint("qwen3_moe").iterdir()}
    assert {path.name for path in folder.iterdir()} == whole | {"README.md"}
    assert found_at("maker/toy", Silent()) == folder


@pytest.mark.parametrize(
    "index", [b"{", b"[]", b'{"weight_map": {"a": "../../etc/passwd"}}', b'{"weight_map": {"a": "b"}}']
)
def test_hostile_index_of_a_checkpoint_is_refused(index: bytes, hub: hub_files.Hub) -> None:
    files = {"config.json": b"{}", "model.safetensors.index.json": index, "model-1.safetensors": b"x"}
    hub.add("maker/toy", files)
    with pytest.raises(BadFile):
        get("maker/toy")


def test_pickles_are_not_downloaded(hub: hub_files.Hub) -> None:
    hub.add("maker/toy", {"config.json": b"{}", "pytorch_model.bin": b"x"})
    with pytest.raises(Unsupported, match="as Python pickles"):
        get("maker/toy")
    assert not any("/resolve/" in request.path for request in hub.requests)


def test_revision_is_followed_and_remembered(hub: hub_files.Hub, gguf: Path) -> None:
    hub.add(REPO, {FILE: gguf}, revisions={"main": "a" * 40, "v2": "c" * 40})
    assert ("c" * 40) in str(get(f"{REPO}:Q8_0@v2"))
    assert ("c" * 40) in str(get(f"{REPO}:Q8_0@{'c' * 40}"))
    assert {path.name: path.read_text() for path in (repo_folder(HubName(REPO)) / "refs").iterdir()} == {
        "v2": "c" * 40
    }


def test_cut_connection_goes_on_where_it_was_in_the_same_call(
    hub: hub_files.Hub, repository: hub_files.Repository, gguf: Path
) -> None:
    hub.cut_after, hub.cuts = gguf.stat().st_size // 3, 2
    assert get(f"{REPO}:Q8_0").read_bytes() == gguf.read_bytes()
    assert hub.sent < 1.1 * gguf.stat().st_size


def test_file_that_was_cut_off_in_the_cache_is_completed(
    hub: hub_files.Hub, repository: hub_files.Repository, gguf: Path
) -> None:
    blob = get(f"{REPO}:Q8_0").resolve()
    with blob.open("r+b") as stream:
        stream.truncate(gguf.stat().st_size // 2)
    before = hub.sent
    assert get(f"{REPO}:Q8_0").read_bytes() == gguf.read_bytes()
    assert hub.sent - before < 0.6 * gguf.stat().st_size


def test_cut_connection_goes_on_where_it_was_in_the_next_call(
    hub: hub_files.Hub, repository: hub_files.Repository, gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "PATIENCE_SECONDS", ())
    hub.cut_after, hub.cuts = gguf.stat().st_size // 2, 1
    with pytest.raises(Unreachable, match="cannot reach the Hub") as refusal:
        get(f"{REPO}:Q8_0")
    assert "goes on where it was" in refusal.value.hint and "\n" not in refusal.value.cause
    said: list[str] = []
    assert get(f"{REPO}:Q8_0", said).read_bytes() == gguf.read_bytes()
    assert "are here already" in said[0]
    ranges = [request.range for request in hub.requests if request.store]
    assert ranges[1] == f"bytes={gguf.stat().st_size // 2}-{gguf.stat().st_size - 1}"
    assert list(repo_folder(HubName(REPO)).glob("blobs/*.incomplete")) == []


def test_large_file_is_fetched_in_segments(
    hub: hub_files.Hub, repository: hub_files.Repository, gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "SEGMENT", gguf.stat().st_size // 4)
    assert get(f"{REPO}:Q8_0").read_bytes() == gguf.read_bytes()
    assert len([request for request in hub.requests if request.store]) in (4, 5)


@pytest.mark.parametrize("large", [True, False])
def test_wrong_content_is_not_kept(large: bool, hub: hub_files.Hub, gguf: Path) -> None:
    path = FILE if large else "config.json"
    repository = hub.add("maker/toy", {FILE: gguf, "config.json": b'{"a": 1}', "model.safetensors": bytes(5000)})
    wrong = repository.files[path]
    assert isinstance(wrong.content, (bytes, Path))
    right = wrong.content if isinstance(wrong.content, bytes) else wrong.content.read_bytes()
    wrong.content = right[:-1] + bytes((right[-1] ^ 1,))
    name = f"maker/toy:{FILE}" if large else "maker/toy"
    with pytest.raises(BadFile, match=f"{path} of maker/toy arrived with the") as refusal:
        get(name)
    assert "it was deleted" in refusal.value.hint
    wrong.content = right
    found = get(name)
    assert (found if large else found / path).read_bytes() == right


def test_server_that_sends_only_whole_files_cannot_resume(
    hub: hub_files.Hub, repository: hub_files.Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "PATIENCE_SECONDS", ())
    hub.cut_after, hub.cuts, hub.ignores_ranges = 10_000, 1, True
    with pytest.raises(Unreachable):
        get(f"{REPO}:Q8_0")
    with pytest.raises(BadFile, match=r"sends .* only as a whole"):
        get(f"{REPO}:Q8_0")


REFUSALS: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "gated": ({"gated": True}, REPO, "is gated", "hf auth login"),
    "private": ({"token": "hf_secret"}, REPO, f"no model {REPO} on the Hub", "HF_TOKEN"),
    "no repository": ({}, "maker/nothing", "no model maker/nothing on the Hub", "check the spelling"),
    "no revision": ({}, f"{REPO}@v9", "has no revision v9", "see "),
    "no file": ({}, f"{REPO}:other.gguf", "holds no GGUF other.gguf", f"write {REPO}:FILE"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusal_of_the_hub_is_one_line_and_a_way_out(case: str, hub: hub_files.Hub, gguf: Path) -> None:
    options, name, cause, hint = REFUSALS[case]
    hub.add(REPO, {FILE: gguf}, **options)
    with pytest.raises(EdgepruneError, match=cause) as refusal:
        get(name)
    assert hint in refusal.value.hint
    assert "\n" not in refusal.value.cause and len(refusal.value.cause) < 200


def test_token_opens_a_private_repository_and_stays_with_the_hub(
    hub: hub_files.Hub, gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(REPO, {FILE: gguf}, token="hf_secret")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert get(REPO).is_file()
    assert {request.token for request in hub.requests if request.store} == {""}  # a server of another name
    assert {request.token for request in hub.requests if "/resolve/" in request.path} == {"hf_secret"}


@pytest.mark.parametrize("token", ["", "hf_secret"])
def test_gated_repository_is_called_so_with_and_without_a_token(
    token: str, hub: hub_files.Hub, gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(REPO, {FILE: gguf}, gated=True)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    for look in (get, inspect_model):
        with pytest.raises(EdgepruneError, match="is gated"):
            look(REPO)


@pytest.mark.parametrize("status", [403, 404, 429, 500])
def test_trouble_with_a_file_is_told(
    status: int, hub: hub_files.Hub, repository: hub_files.Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_files._Handler, "_from_store", lambda self, path: self._refuse(status, "", "trouble"))
    for look in (get, inspect_model):
        with pytest.raises(EdgepruneError) as refusal:
            look(f"{REPO}:Q8_0")
        assert "\n" not in refusal.value.cause


@pytest.mark.parametrize(("status", "cause"), [(500, "HTTP 500"), (403, "refuses access"), (429, "no more requests")])
def test_trouble_of_the_hub_is_told(
    status: int, cause: str, hub: hub_files.Hub, repository: hub_files.Repository
) -> None:
    hub.status = status
    with pytest.raises(EdgepruneError, match=cause):
        get(REPO)


def test_hub_that_fails_after_the_last_byte_loses_nothing(
    hub: hub_files.Hub, repository: hub_files.Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(hub_files._Handler, "do_HEAD", lambda self: self._refuse(403, "", "trouble"))
        with pytest.raises(Unreachable, match=f"does not say what {FILE} of"):
            get(f"{REPO}:Q8_0")
    before = len([request for request in hub.requests if request.store])
    assert get(f"{REPO}:Q8_0").is_file()
    assert len([request for request in hub.requests if request.store]) == before


def test_without_network_what_was_downloaded_is_used(
    hub: hub_files.Hub, repository: hub_files.Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = "http://127.0.0.1:9"
    monkeypatch.setattr(constants, "ENDPOINT", nowhere)
    with pytest.raises(Unreachable, match=f"cannot reach the Hub at {nowhere}") as refusal:
        get(f"{REPO}:Q8_0")
    assert "check the network" in refusal.value.hint
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    path = get(f"{REPO}:Q8_0")
    monkeypatch.setattr(constants, "ENDPOINT", nowhere)
    said: list[str] = []
    assert get(f"{REPO}:Q8_0", said) == path
    assert "what was downloaded earlier is used" in said[0]


def test_offline_takes_complete_downloads_only(
    hub: hub_files.Hub, toy_checkpoint: toys.Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add_folder("maker/toy", toy_checkpoint("qwen3_moe"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(EdgepruneError, match="HF_HUB_OFFLINE forbids"):
        get("maker/toy")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    folder = get("maker/toy")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    before = len(hub.requests)
    assert get("maker/toy") == folder
    (folder / "model.safetensors").unlink()
    with pytest.raises(EdgepruneError, match="was not downloaded completely"):
        get("maker/toy")
    assert len(hub.requests) == before


def test_disk_that_is_too_small_is_told_before_anything_is_fetched(
    hub: hub_files.Hub, repository: hub_files.Repository, gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 30, 1 << 30, gguf.stat().st_size - 1))
    with pytest.raises(EdgepruneError, match="not enough disk space") as refusal:
        get(f"{REPO}:Q8_0")
    assert [label for label, _ in refusal.value.rows] == ["to download", "free"]
    assert "HF_HOME" in refusal.value.hint
    assert not any("/resolve/" in request.path for request in hub.requests)


@pytest.mark.parametrize(
    "path", ["../escape.gguf", "/etc/cron.d/x.gguf", "a/../../x.gguf", "a\\..\\x.gguf", "C:x.gguf"]
)
def test_file_outside_the_folder_is_refused(path: str, hub: hub_files.Hub, gguf: Path) -> None:
    hub.add(REPO, {FILE: gguf, path: b"x"})
    with pytest.raises(BadFile, match="lists a file outside its folder"):
        get(f"{REPO}:Q8_0")


@pytest.mark.parametrize("change", [{"size": -1}, {"size": 1 << 70, "digest": "../x"}, {"digest": "/etc/passwd"}])
def test_listing_that_makes_no_sense_is_refused(change: dict[str, Any], repository: hub_files.Repository) -> None:
    for key, value in change.items():
        setattr(repository.files[FILE], key, value)
    with pytest.raises(BadFile, match="without size or digest"):
        get(f"{REPO}:Q8_0")


def test_progress_counts_the_bytes_that_were_missing(repository: hub_files.Repository, gguf: Path) -> None:
    seen: list[tuple[int, int]] = []
    name = hub_name(f"{REPO}:Q8_0")
    assert name is not None
    fetch(name, lambda done, total: seen.append((done, total)), lambda text: None)
    assert seen[-1] == (gguf.stat().st_size, gguf.stat().st_size)
    assert seen == sorted(seen)


def test_commands_take_models_of_the_hub(
    hub: hub_files.Hub, repository: hub_files.Repository, tmp_path: Path
) -> None:
    done = run_edgeprune("plan", f"{REPO}:Q8_0", "--device", "cpu-16gb", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "toy-GGUF-Q8_0-cpu-16gb"
    assert (folder / "plan.json").is_file()
    assert (folder / ".edgeprune").read_text() == f"{REPO}:Q8_0\n"
    wrong = run_edgeprune("plan", f"{REPO}:Q2_K", "--device", "cpu-16gb", cwd=tmp_path)
    assert wrong.returncode == 2 and wrong.stderr.startswith(f"error: {REPO} holds no GGUF Q2_K\n")
    assert "Traceback" not in wrong.stderr


def test_checkpoint_of_the_hub_is_converted_under_its_name(
    hub: hub_files.Hub, toy_checkpoint: toys.Maker, tmp_path: Path
) -> None:
    hub.add_folder("maker/toy-moe", toy_checkpoint("qwen3_moe"))
    done = run_edgeprune("convert", "maker/toy-moe", "out.gguf", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert GgufFile(tmp_path / "out.gguf").get("general.name") == "toy-moe"


# What is in the cache is looked at before it is used.


def damaged(path: Path) -> bytes:
    """The file's content with one byte changed, in place."""
    content = path.read_bytes()
    path.write_bytes(content[:-9] + bytes((content[-9] ^ 1,)) + content[-8:])
    return content


def test_file_of_the_cache_that_changed_at_the_same_size_is_fetched_again(
    hub: hub_files.Hub, repository: hub_files.Repository
) -> None:
    path = get(f"{REPO}:Q8_0")
    right = damaged(path.resolve())
    said: list[str] = []
    assert get(f"{REPO}:Q8_0", said).read_bytes() == right
    assert said[0] == f"{FILE} of {REPO}:Q8_0 has changed since it was downloaded; it is fetched again"
    (path.parent / "other").write_bytes(b"x")
    path.unlink()  # the blob alone is here
    right = damaged(repo_folder(HubName(REPO)) / "blobs" / repository.files[FILE].digest)
    assert get(f"{REPO}:Q8_0").read_bytes() == right


def test_configuration_of_the_cache_that_changed_is_fetched_again(
    hub: hub_files.Hub, toy_checkpoint: toys.Maker
) -> None:
    hub.add_folder("maker/toy", toy_checkpoint("qwen3_moe"))
    path = get("maker/toy") / "config.json"
    right = damaged(path.resolve())
    assert (get("maker/toy") / "config.json").read_bytes() == right


@pytest.mark.parametrize("checkpoint", [False, True])
def test_changed_file_is_not_used_without_network(
    checkpoint: bool, hub: hub_files.Hub, gguf: Path, toy_checkpoint: toys.Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    if checkpoint:
        hub.add_folder(REPO, toy_checkpoint("qwen3_moe"))
    else:
        hub.add(REPO, {FILE: gguf})
    found = get(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert get(REPO) == found
    damaged((found / "model.safetensors" if checkpoint else found).resolve())
    with pytest.raises(BadFile, match="has changed since it was downloaded"):
        get(REPO)


def test_a_link_out_of_the_cache_is_not_followed_when_its_target_is_deleted(
    hub: hub_files.Hub, repository: hub_files.Repository, gguf: Path, tmp_path: Path
) -> None:
    path = get(f"{REPO}:Q8_0")
    own = tmp_path / "own"
    own.write_bytes(bytes(gguf.stat().st_size))
    path.unlink()
    path.symlink_to(own)
    assert get(f"{REPO}:Q8_0").read_bytes() == gguf.read_bytes()
    assert own.read_bytes() == bytes(gguf.stat().st_size)


def test_offline_answers_say_what_is_missing(
    hub: hub_files.Hub, gguf: Path, toy_checkpoint: toys.Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(REPO, {FILE: gguf, "toy-Q2_K.gguf": gguf.read_bytes() + b"x"})
    get(f"{REPO}:Q8_0")
    hub.add_folder("maker/moe", toy_checkpoint("qwen3_moe"))
    folder = get("maker/moe")
    (folder / "model.safetensors").unlink()
    cases = {
        "maker/nothing": "maker/nothing: it was never downloaded",
        f"{REPO}:Q8_0@v2": "its revision v2 was never downloaded",
        f"{REPO}:Q2_K": "Q2_K is not among what was downloaded",
        "maker/moe": r"it was not downloaded completely: .* holds no model.safetensors",
    }
    for name, cause in cases.items():
        with monkeypatch.context() as patch:
            patch.setattr(constants, "HF_HUB_OFFLINE", True)
            with pytest.raises(EdgepruneError, match=f"{cause}.*, and HF_HUB_OFFLINE forbids the network") as refusal:
                get(name)
            assert "\n" not in refusal.value.cause
        with monkeypatch.context() as patch:
            patch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
            with pytest.raises(Unreachable, match="cannot reach the Hub") as refusal:
                get(name)
            assert re.search(cause.removeprefix(f"{name}: "), dict(refusal.value.rows)["in the cache"])


# A checkpoint that cannot be used is not downloaded.


def aimed(name: str, tmp_path: Path) -> Path:
    found = hub_name(name)
    assert found is not None
    return fetch(found, lambda done, total: None, lambda text: None, download.Aim(tmp_path / "out.gguf"))


UNUSABLE: dict[str, tuple[dict[str, Any], str]] = {
    "no converter": ({"model_type": "bamba"}, "no converter for checkpoints of type 'bamba'"),
    "AWQ": ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "is quantised already, as 'awq'"),
    "GPTQ": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "is quantised already, as 'gptq'"),
    "bitsandbytes": (
        {"quantization_config": {"quant_method": "bitsandbytes"}},
        "quantised already, as 'bitsandbytes'",
    ),
    "a setting": ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    "other weights": ({"num_hidden_layers": 3}, r"lacks tensor model.layers.2"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_unusable_checkpoint_is_refused_before_its_weights_are_fetched(
    case: str, hub: hub_files.Hub, toy_checkpoint: toys.Maker, tmp_path: Path
) -> None:
    changes, cause = UNUSABLE[case]
    folder = Path(shutil.copytree(toy_checkpoint("qwen3_moe"), tmp_path / "model"))
    toys.change_json(folder / "config.json", **changes)
    hub.add_folder("maker/toy", folder)
    with pytest.raises(Unsupported if case != "other weights" else BadFile, match=cause):
        aimed("maker/toy", tmp_path)
    assert hub.sent < (folder / "model.safetensors").stat().st_size / 5
    assert not list(repo_folder(HubName("maker/toy")).rglob("model.safetensors"))


def test_unusable_tokenizer_is_found_before_weights_are_fetched(
    hub: hub_files.Hub, toy_checkpoint: toys.Maker, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(toy_checkpoint("qwen3_moe"), tmp_path / "model"))
    definition = json.loads((folder / "tokenizer.json").read_text())
    definition["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": "x"}
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    hub.add_folder("maker/toy", folder)
    with pytest.raises(Unsupported, match="unknown pre-tokenizer rules"):
        aimed("maker/toy", tmp_path)
    assert not list(repo_folder(HubName("maker/toy")).rglob("model.safetensors"))


def test_room_is_needed_for_the_weights_and_their_gguf(
    hub: hub_files.Hub, toy_checkpoint: toys.Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add_folder("maker/toy", toy_checkpoint("qwen3_moe"))
    weights = (toy_checkpoint("qwen3_moe") / "model.safetensors").stat().st_size
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 30, 1 << 30, 2 * weights - (1 << 17)))
    with pytest.raises(EdgepruneError, match="not enough disk space") as refusal:
        aimed("maker/toy", tmp_path)
    assert [label for label, _ in refusal.value.rows] == ["to download", "GGUF of it", "free"]
    assert not list(repo_folder(HubName("maker/toy")).rglob("model.safetensors"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 30, 1 << 30, 2 * weights + (1 << 20)))
    assert aimed("maker/toy", tmp_path).is_dir()


def test_server_without_ranges_is_downloaded_from_nevertheless(
    hub: hub_files.Hub, toy_checkpoint: toys.Maker, tmp_path: Path
) -> None:
    hub.add_folder("maker/toy", toy_checkpoint("qwen3_moe"))
    hub.ignores_ranges = True
    assert (aimed("maker/toy", tmp_path) / "model.safetensors").is_file()


def test_index_that_lists_other_tensors_is_found_before_weights_are_fetched(
    hub: hub_files.Hub, tmp_path: Path
) -> None:
    folder = toys.qwen3_moe(tmp_path / "sharded", save={"max_shard_size": "2MB"})
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.layers.9.x"] = index["weight_map"].pop("model.norm.weight")
    (folder / INDEX).write_text(json.dumps(index))
    hub.add_folder("maker/toy", folder)
    with pytest.raises(BadFile, match=r"says that .* holds model.layers.9.x, which no file holds; 2 tensors differ"):
        aimed("maker/toy", tmp_path)
    assert not list(repo_folder(HubName("maker/toy")).rglob("*.safetensors"))


def test_commands_refuse_before_they_download(hub: hub_files.Hub, toy_checkpoint: toys.Maker, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(toy_checkpoint("qwen3_moe"), tmp_path / "model"))
    toys.change_json(folder / "config.json", quantization_config={"quant_method": "awq"})
    hub.add_folder("maker/toy", folder)
    for words in (("fit", "maker/toy", "--file-size", "1MB"), ("convert", "maker/toy", "out.gguf")):
        done = run_edgeprune(*words, cwd=tmp_path)
        assert (
            done.returncode == 1 and "quantised already, as 'awq'" in done.stderr and "Traceback" not in done.stderr
        )
    assert not list(repo_folder(HubName("maker/toy")).rglob("*.safetensors"))


def weights_fetched() -> list[Path]:
    """Files of weights in the cache, or begun."""
    cache = Path(constants.HF_HUB_CACHE)
    return [path for path in cache.rglob("*") if path.is_file() and path.stat().st_size > 1 << 20]


@pytest.mark.parametrize("kind", ["checkpoint", "GGUF"])
@pytest.mark.parametrize("command", ["plan", "calibrate"])
def test_what_llama_cpp_does_not_take_is_refused_before_weights_are_fetched(
    command: str, kind: str, hub: hub_files.Hub, toy_checkpoint: toys.Maker, tmp_path: Path
) -> None:
    """Weights are of another shape than the numbers say."""
    if kind == "checkpoint":
        folder = Path(shutil.copytree(toy_checkpoint("qwen3_moe"), tmp_path / "model"))
        toys.change_json(folder / "config.json", num_attention_heads=8)
        hub.add_folder("maker/toy", folder)
    else:
        more = [("attention.head_count", "u32", 8)]
        hub.add("maker/toy", {"bad.gguf": toys.synthetic_gguf(tmp_path / "bad.gguf", extra=more)})
    target = ["--file-size", "900kB"] if command == "plan" else []
    done = run_edgeprune(command, "maker/toy", *target, "-o", "run", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert ("does not fit config.json" if kind == "checkpoint" else "wrong shape") in done.stderr
    assert "Traceback" not in done.stderr and weights_fetched() == []


@pytest.mark.parametrize("kind", ["checkpoint", "GGUF"])
def test_what_does_not_fit_is_told_before_weights_are_fetched(
    kind: str,
    hub: hub_files.Hub,
    toy_checkpoint: toys.Maker,
    toy_gguf: toys.Maker,
    synthetic: toys.Maker,
    tmp_path: Path,
) -> None:
    if kind == "checkpoint":
        hub.add_folder("maker/toy", toy_checkpoint("qwen3_moe"))
    else:
        hub.add("maker/toy", {"toy-F32.gguf": synthetic("qwen3moe")})
    for command in ("plan", "fit"):
        done = run_edgeprune(command, "maker/toy", "--file-size", "200kB", "-o", "run", cwd=tmp_path)
        assert done.returncode == 3 and "smallest plan" in done.stderr, done.stderr
        assert "error: toy" in done.stderr and weights_fetched() == []
    longer = run_edgeprune(
        "plan", "maker/toy", "--file-size", "900kB", "--context", "4096", "-o", "run", cwd=tmp_path
    )
    assert longer.returncode == 2 and "is longer than the model's" in longer.stderr and weights_fetched() == []
    here = (synthetic if kind == "GGUF" else toy_gguf)("qwen3moe" if kind == "GGUF" else "qwen3_moe")
    local = run_edgeprune("plan", here, "--file-size", "200kB", "-o", "local", cwd=tmp_path)
    least = [re.search(r"--file-size (\d+)B", text) for text in (done.stderr, local.stderr)]
    assert least[0] and least[1]
    # The vocabulary counts, though it was not fetched; the name differs, and so may the alignment.
    assert 0 <= int(least[1][1]) - int(least[0][1]) <= 128


def test_a_gguf_is_not_fetched_to_be_converted(hub: hub_files.Hub, synthetic: toys.Maker, tmp_path: Path) -> None:
    hub.add("maker/toy", {"toy-F32.gguf": synthetic("qwen3moe")})
    done = run_edgeprune("convert", "maker/toy", "out.gguf", cwd=tmp_path)
    assert done.returncode == 2 and "is a GGUF, which needs no conversion" in done.stderr and weights_fetched() == []


def test_how_the_tokenizer_will_differ_is_told_once_and_before_weights_are_fetched(
    hub: hub_files.Hub, toy_checkpoint: toys.Maker, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(toy_checkpoint("qwen3_moe"), tmp_path / "model"))
    definition = json.loads((folder / "tokenizer.json").read_text())
    definition["normalizer"] = {"type": "NFC"}
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    repository = hub.add_folder("maker/toy", folder)
    right = repository.files["model.safetensors"]
    repository.files["model.safetensors"] = hub_files.stored(folder / "model.safetensors", "d" * 64)
    for expected in (1, 0):
        done = run_edgeprune("convert", "maker/toy", "out.gguf", cwd=tmp_path)
        lines = [line for line in done.stderr.splitlines() if line.startswith("tokenizer: ") and "NFC" in line]
        assert (done.returncode, len(lines)) == (expected, 1), done.stderr
        repository.files["model.safetensors"] = right


def test_further_chat_templates_are_fetched_and_converted(
    hub: hub_files.Hub, toy_checkpoint: toys.Maker, tmp_path: Path
) -> None:
    repository = hub.add_folder("maker/toy", toy_checkpoint("qwen3_moe"))
    repository.files["additional_chat_templates/tool_use.jinja"] = hub_files.stored(b"{{ tools }}")
    repository.files["additional_chat_templates/deep/x.jinja"] = hub_files.stored(b"{{ no }}")
    done = run_edgeprune("convert", "maker/toy", "out.gguf", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    file = GgufFile(tmp_path / "out.gguf")
    assert file.get("tokenizer.chat_template.tool_use") == "{{ tools }}"
    assert file.get("tokenizer.chat_templates") == ["tool_use"]


@pytest.mark.parametrize(("output", "cause"), [("notes.txt", "is not a GGUF"), ("notes.txt/a/x.gguf", "is a file")])
def test_where_a_gguf_cannot_be_written_is_told_before_anything_is_fetched(
    output: str, cause: str, hub: hub_files.Hub, toy_checkpoint: toys.Maker, tmp_path: Path
) -> None:
    hub.add_folder("maker/toy", toy_checkpoint("qwen3_moe"))
    (tmp_path / "notes.txt").write_text("my notes")
    done = run_edgeprune("convert", "maker/toy", output, cwd=tmp_path)
    assert done.returncode == 2 and cause in done.stderr and "hint: choose" in done.stderr, done.stderr
    assert hub.requests == [] and (tmp_path / "notes.txt").read_text() == "my notes"


def test_dense_model_is_called_so_whether_it_is_looked_at_or_converted(hub: hub_files.Hub, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama", "hidden_size": 8}')
    save_file({"model.layers.0.mlp.up_proj.weight": torch.ones(8, 8)}, tmp_path / "model" / "model.safetensors")
    hub.add_folder("maker/toy", tmp_path / "model")
    for words in (("inspect", "maker/toy"), ("convert", "maker/toy", "out.gguf")):
        done = run_edgeprune(*words, cwd=tmp_path)
        assert done.returncode == 1 and "is a dense llama model" in done.stderr, done.stderr
        assert "known: " not in done.stderr


def test_model_of_an_unknown_kind_with_experts_is_not_called_dense(hub: hub_files.Hub, tmp_path: Path) -> None:
    hub.add("maker/toy", {"config.json": b'{"model_type": "nonesuch"}', "model.safetensors": EXPERT})
    with pytest.raises(Unsupported, match="no converter for checkpoints of type 'nonesuch'"):
        aimed("maker/toy", tmp_path)


PUBLIC = "https://huggingface.co"
ADDRESSES = {
    "/maker/toy": HubName("maker/toy"),
    "/maker/toy/": HubName("maker/toy"),
    "/maker/toy/tree/main": HubName("maker/toy"),
    "/maker/toy/tree/v1.0": HubName("maker/toy", "", "v1.0"),
    "/maker/toy?library=x#files": HubName("maker/toy"),
    "/maker/toy/blob/main/sub/x.gguf": HubName("maker/toy", "sub/x.gguf"),
    "/maker/toy/resolve/v1.0/x.gguf?download=true": HubName("maker/toy", "x.gguf", "v1.0"),
    "/maker/toy/blob/main/config.json": HubName("maker/toy"),
}


@pytest.mark.parametrize("rest", ADDRESSES)
def test_address_of_a_repository_is_its_name(rest: str, hub: hub_files.Hub) -> None:
    for host in (PUBLIC, endpoint()):
        assert located(host + rest) == ADDRESSES[rest]


@pytest.mark.parametrize(
    "text", [f"{PUBLIC}/maker", f"{PUBLIC}/datasets/maker/toy", "https://example.com/maker/toy", f"{PUBLIC}.evil/a/b"]
)
def test_other_addresses_are_no_names(text: str) -> None:
    with pytest.raises(UsageError, match="no model at"):
        located(text)


def test_checkpoint_in_the_cache_is_shown_by_its_name(hub: hub_files.Hub, toy_checkpoint: toys.Maker) -> None:
    hub.add_folder("maker/toy", toy_checkpoint("qwen3_moe"))
    folder = get("maker/toy")
    assert dict(inspect_model(str(folder)).facts)["checkpoint"].startswith("maker/toy, ")
    (folder / "config.json").unlink()
    done = run_edgeprune("inspect", folder)
    assert done.stderr.startswith("error: maker/toy holds no config.json")
