"""Fetching what fits from a Hub on loopback: which file is chosen, that it arrives whole, what is not believed."""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import toys
from hub_server import Blob, Command, HubServer, Repository, value
from observed import LAUNCH
from runs import Fit

from edgeprune.device.profile import find_profile
from edgeprune.errors import BadFile, DoesNotFit, EdgepruneError, UsageError
from edgeprune.files import file_digest, to_json
from edgeprune.measure import memory
from edgeprune.measure.launch import Launch
from edgeprune.measure.llama import session
from edgeprune.model.architecture import read_architecture
from edgeprune.model.gguf import GgufFile
from edgeprune.model.layout import layout
from edgeprune.share.hub import explained
from edgeprune.share.index import Memory, Stored
from edgeprune.share.pulling import Candidate, Target, choose

pytest_plugins = ("demo_fixtures", "publish_fixtures")
# huggingface_hub gives a file to its HTTP library in a way that the library no longer likes.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPO = "me/tiny-GGUF"
ENOUGH = ("--device", "cpu-16gb")
GIB = 1 << 30


@pytest.fixture
def shelf(far: HubServer, command: Command, tiny_fit: Fit, tmp_path: Path) -> HubServer:
    """A Hub with the tiny model in ``REPO``."""
    done = command("publish", tiny_fit.copy(tmp_path / "run"), REPO, "--license", "mit", "--yes")
    assert done.exception is None
    far.requests.clear()
    return far


def models(far: HubServer) -> dict[str, Blob]:
    return {p: b for p, b in far.repositories[REPO].files.items() if p.endswith(".gguf") and "/" not in p}


def put(far: HubServer, files: dict[str, bytes]) -> None:
    """Change files of ``REPO`` behind its index's back."""
    repository = far.repositories.setdefault(REPO, Repository())
    blobs = {path: Blob(content, large=path.endswith(".gguf")) for path, content in files.items()}
    repository.commit("main", {**repository.files, **blobs})


def index_with(far: HubServer, **changes: Any) -> None:
    """Change the only entry of the index."""
    found = json.loads(far.repositories[REPO].files["edgeprune.json"].content)
    found["files"][0] |= changes
    put(far, {"edgeprune.json": to_json(found).encode()})


def failed(done: Any, kind: type[EdgepruneError]) -> str:
    assert isinstance(done.exception, kind), (done.exception, done.output)
    return str(done.exception)


def test_help(command: Command) -> None:
    text = command("pull", "--help").stdout
    assert all(option in text for option in ("ORG/NAME", "--device", "--dry-run", "-o, --output"))
    assert "pull" in command("--help").stdout and all(len(line) <= 100 for line in text.splitlines())


def test_the_file_arrives_and_is_said_how_to_run(shelf: HubServer, command: Command, tmp_path: Path) -> None:
    ((name, blob),) = models(shelf).items()
    done = value(command("pull", REPO, *ENOUGH, "-o", tmp_path / "here", "--json"))
    assert done["chosen"] == name.removesuffix(".gguf") and done["path"] == str(tmp_path / "here" / name)
    assert Path(done["path"]).read_bytes() == blob.content
    assert done["launch_line"].startswith(f"llama-server -m {done['path']} -c ")
    again = command("pull", REPO, *ENOUGH, "-o", tmp_path / "here")
    assert again.exception is None and f"run it:  {done['launch_line']}\n" in again.stdout
    assert len(shelf.asked("GET", re.escape(name))) == 1


def test_without_a_folder_it_goes_to_the_cache_of_the_hub(shelf: HubServer, command: Command, tmp_path: Path) -> None:
    done = value(command("pull", REPO, *ENOUGH, "--json"))
    assert Path(done["path"]).is_relative_to(tmp_path / "cache" / "models--me--tiny-GGUF")
    assert Path(done["path"]).is_file()


@pytest.mark.parametrize("folder", [True, False], ids=["folder", "cache"])
def test_a_disk_that_is_too_small_is_told_before_anything_is_fetched(
    folder: bool, shelf: HubServer, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (blob,) = models(shelf).values()
    usage, free = namedtuple("usage", ("total", "used", "free")), [len(blob.content) - 1]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(GIB, GIB, free[0]))
    words = ("pull", REPO, *ENOUGH, *(("-o", tmp_path / "new" / "models") if folder else ()))
    assert failed(command(*words), EdgepruneError).startswith("not enough disk space in ")
    assert not [path for path in shelf.asked("GET", r".*/resolve/.*") if path.endswith(".gguf")]
    free[0] = GIB
    assert command(*words).exception is None
    free[0] = 1  # what is there needs no room
    assert command(*words).exception is None
    for path in (tmp_path / "new").rglob("*.gguf"):  # but what replaces another file
        path.write_bytes(b"GGUF of somebody else")
        assert failed(command(*words), EdgepruneError).startswith("not enough disk space in ")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "/cache/blob"), "/cache/blob: Permission denied"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "/cache/blob"), "/cache/blob: Is a directory"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), "the Hub cannot be reached: "),
        (PermissionError(errno.EPERM, "Operation not permitted"), "the Hub cannot be reached: "),  # by a firewall
    ],
)
def test_what_is_wrong_with_a_disk_is_not_said_of_the_hub(error: OSError, said: str) -> None:
    with pytest.raises(EdgepruneError) as caught, explained(REPO):
        raise error
    assert caught.value.cause.startswith(said) and "run the same command again" in caught.value.hint
    assert ("free some space" in caught.value.hint) == (error.errno == errno.ENOSPC)


def test_all_parts_of_a_split_file_arrive_and_load(
    far: HubServer, command: Command, tiny_fit: Fit, tmp_path: Path
) -> None:
    folder = tiny_fit.copy(tmp_path / "run")
    words = ("publish", folder, REPO, "--license", "mit", "--yes", "--max-file-size", "400kB")
    assert command(*words).exception is None
    done = value(command("pull", REPO, *ENOUGH, "-o", tmp_path / "here", "--json"))
    assert done["path"].endswith("-00001-of-00002.gguf") and done["path"] in done["launch_line"]
    assert sorted(path.name for path in (tmp_path / "here").glob("*.gguf")) == sorted(models(far))
    tokens = [1, 5, 9, 3]
    answers = []
    for model in (Path(done["path"]), folder / str(tiny_fit.report.build["path"])):
        with session(model, LAUNCH, None) as opened:
            answers.append(opened.run(tokens).copy())
    assert (answers[0] == answers[1]).all()


def test_what_does_not_fit_is_told_by_how_much(shelf: HubServer, command: Command, tmp_path: Path) -> None:
    done = command("pull", REPO, "--memory", "40MiB", "-o", tmp_path / "here")
    message = failed(done, DoesNotFit)
    assert done.exception is not None and done.exception.exit_code == 3  # type: ignore[attr-defined]
    assert "fits 40.0 MiB of memory with" in message and "KV cache" in message
    assert re.search(r"tiny-K6-\S+-IQ4_NL, short of +\d+\.\d MiB", message)
    assert not (tmp_path / "here").exists() and shelf.asked("GET", r"\.gguf$") == []


def test_a_dry_run_fetches_no_model(shelf: HubServer, command: Command) -> None:
    done = value(command("pull", REPO, *ENOUGH, "--dry-run", "--json"))
    assert [(row["fits"], row["short_bytes"]) for row in done["files"]] == [(True, 0)]
    assert "path" not in done and shelf.asked("GET", r"\.gguf$") == []


def test_a_download_that_broke_off_goes_on_where_it_was(
    shelf: HubServer, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)  # what arrives is written down in these steps
    shelf.cut_after = 200_000
    done = value(command("pull", REPO, *ENOUGH, "-o", tmp_path / "here", "--json"))
    assert shelf.ranges and 0 < max(shelf.ranges) <= 200_000
    assert Path(done["path"]).read_bytes() == next(iter(models(shelf).values())).content


def test_another_file_of_that_name_is_named_before_it_is_replaced(shelf: HubServer, command: Command) -> None:
    ((name, blob),) = models(shelf).items()
    Path(name).write_bytes(b"GGUF of somebody else")
    for said in (True, False):
        done = command("pull", REPO, *ENOUGH, "-o", ".")
        assert done.exception is None and (f"{name} is another file, and is replaced" in done.stderr) is said
        assert Path(name).read_bytes() == blob.content


@pytest.mark.parametrize("words", [(), ("-o", "here")], ids=["cache", "folder"])
def test_what_arrives_damaged_is_not_kept(words: tuple[str, ...], shelf: HubServer, command: Command) -> None:
    shelf.damaged = True
    # Where the folder is the home folder, huggingface_hub keeps its notes, the token and all models in one place.
    others = [Path("here/.cache/huggingface") / name for name in ("token", "hub/models--a--b/blobs/0123")]
    for other in others:
        other.parent.mkdir(parents=True, exist_ok=True)
        other.write_text("mine")
    assert "arrived damaged" in failed(command("pull", REPO, *ENOUGH, *words), BadFile)
    assert not list(Path("here").rglob("*.gguf"))
    assert all(other.read_text() == "mine" for other in others)
    shelf.damaged = False
    done = value(command("pull", REPO, *ENOUGH, *words, "--json"))
    assert Path(done["path"]).read_bytes() == next(iter(models(shelf).values())).content


# Repositories of others.


def needed_bytes(path: Path) -> int:
    """What llama.cpp takes for the file with 64 tokens of context."""
    file = GgufFile(path)
    shape = read_architecture(file)
    needs = memory.price(layout(file, shape, shape.experts, {}, []), Launch(context=64), shape)
    parts = (needs.kv_bytes, needs.compute_bytes, needs.runtime_bytes, needs.host_compute_bytes)
    return sum(parts) + sum(tensor.nbytes for tensor in shape.tensors)


def test_where_the_chosen_file_is_too_large_after_all_the_next_smaller_one_is_taken(
    shelf: HubServer, command: Command, synthetic: toys.Maker, tmp_path: Path
) -> None:
    ((name, blob),) = models(shelf).items()
    small, large = tmp_path / name, synthetic("qwen3moe")
    small.write_bytes(blob.content)
    needs = [needed_bytes(path) for path in (small, large)]
    assert len(blob.content) < large.stat().st_size and needs[0] + (2 << 20) < needs[1]
    index = json.loads(shelf.repositories[REPO].files["edgeprune.json"].content)
    (entry,) = index["files"]
    # The index makes light of what both need; the larger one is the nearer to its source.
    entry["memory"] |= dict.fromkeys(("kv_bytes", "compute_bytes", "host_compute_bytes", "runtime_bytes"), 1)
    part = {"path": "large.gguf", "nbytes": large.stat().st_size, "sha256": file_digest(large)}
    other = {**entry, "name": "large", "parts": [part], "memory": {**entry["memory"], "weights_bytes": 1}}
    other["quality"] = {**entry["quality"], "kl_mean": 0.0}
    index["files"] = [entry, other]
    put(shelf, {"edgeprune.json": to_json(index).encode(), "large.gguf": large.read_bytes()})
    words = ("pull", REPO, "--context", "64", "-o", tmp_path / "here", "--memory")
    done = command(*words, f"{(needs[0] + needs[1]) // 2}B")
    assert done.exception is None, done.output
    stem = name.removesuffix(".gguf")
    assert "large.gguf does not fit" in done.stderr and f"{stem} is tried, which is smaller" in done.stderr
    assert f"llama-server -m {tmp_path / 'here' / name} -c 64" in done.stdout
    rows = {line.split()[0]: line for line in done.stdout.splitlines() if " bytes " in line}
    assert rows[stem].endswith("chosen") and rows["large"].endswith("too large after all")
    assert f"{name} does not fit" in failed(command(*words, f"{needs[0] - (1 << 20)}B"), DoesNotFit)


def test_without_an_index_names_and_sizes_are_looked_at(shelf: HubServer, command: Command) -> None:
    content = next(iter(models(shelf).values())).content
    shelf.repositories[REPO] = Repository()
    put(
        shelf,
        {
            "Tiny-Q4_K_M.gguf": content,
            "Tiny-Q8_0-00001-of-00002.gguf": content + bytes(64),
            "Tiny-Q8_0-00002-of-00002.gguf": content,
            "Tiny-BF16-00001-of-00003.gguf": content + bytes(99),
            "mmproj-Tiny-F16.gguf": content * 4,
            "Tiny-imatrix.gguf": content * 4,
            "README.md": b"Theirs.",
        },
    )
    done = command("pull", REPO, *ENOUGH, "--dry-run", "--json")
    assert "no edgeprune.json: files are judged by their names and sizes" in done.stderr
    assert {row["name"] for row in value(done)["files"]} == {"Tiny-Q4_K_M", "Tiny-Q8_0"}
    assert value(done)["chosen"] == "Tiny-Q8_0"  # the larger of those that fit
    tight = command("pull", REPO, "--memory", "256.7MiB", "-o", "here", "--json")
    # By its size it might have fitted; llama.cpp's own price is the last word.
    assert value(tight)["chosen"] == "Tiny-Q4_K_M" and Path("here/Tiny-Q4_K_M.gguf").read_bytes() == content


def test_a_damaged_file_that_is_not_in_large_storage_is_not_kept(
    far: HubServer, command: Command, tiny_fit: Fit
) -> None:
    """Of such a file the Hub lists git's digest."""
    repository = far.repositories[REPO] = Repository()
    content = (tiny_fit.folder / str(tiny_fit.report.build["path"])).read_bytes()
    repository.commit("main", {"tiny.gguf": Blob(content, large=False)})
    far.damaged = True
    assert "arrived damaged" in failed(command("pull", REPO, *ENOUGH, "-o", "here"), BadFile)
    assert not list(Path("here").rglob("*.gguf"))
    far.damaged = False
    done = value(command("pull", REPO, *ENOUGH, "-o", "here", "--json"))
    assert Path(done["path"]).read_bytes() == content


def test_names_that_people_give_files_are_taken_and_others_are_named(far: HubServer, command: Command) -> None:
    names = [
        "My Model (Q4_K).gguf",
        "[v2] a, b & c/x=1.gguf",
        "con/x.gguf",
        "sub/NUL.Q4.gguf",
        "a:b.gguf",
        "x .gguf ",
    ]
    names += ["a\\b.gguf", "end./x.gguf", "line\nbreak.gguf"]
    far.repositories[REPO] = Repository()
    put(far, {name: b"GGUF" + bytes(60) for name in names})
    done = command("pull", REPO, *ENOUGH, "--dry-run", "--json")
    assert {row["name"] for row in value(done)["files"]} == {name.removesuffix(".gguf") for name in names[:2]}
    refused = [line for line in done.stderr.splitlines() if "left out" in line]
    assert len(refused) == 6 and "con/x.gguf" in refused[1] + refused[2] + refused[0]
    assert "sub/NUL.Q4.gguf" in done.stderr and "'line\\nbreak.gguf'" in done.stderr


def test_the_machine_is_not_measured_for_a_repository_that_is_not_there(
    far: HubServer, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgeprune.device import probe

    looked: list[Any] = []
    real = probe.this_machine
    monkeypatch.setattr(probe, "this_machine", lambda *given: looked.append(given) or real(*given))
    assert "no me/nothing that may be seen" in failed(command("pull", "me/nothing"), EdgepruneError)
    assert looked == []


@pytest.mark.parametrize(
    "changes",
    [
        {"parts": [{"path": "../../evil.gguf", "nbytes": 10, "sha256": "0" * 64}]},
        {"parts": [{"path": "/etc/evil.gguf", "nbytes": 10, "sha256": "0" * 64}]},
        {"parts": [{"path": "a\\..\\evil.gguf", "nbytes": 10, "sha256": "0" * 64}]},
        {"parts": [{"path": "CON.gguf", "nbytes": 10, "sha256": "0" * 64}]},
        {"parts": [{"path": "README.md", "nbytes": 10, "sha256": "0" * 64}]},
        {"parts": []},
        {"launch": {"kv_type": "$(reboot)"}},
        {"kept": 9},
        {"quality": {"kl_mean": "small", "kl_99": 0, "same_top": 0, "perplexity": 0}},
        {"more": 1},
    ],
    ids=[
        "way out",
        "root",
        "backslash",
        "device",
        "no model",
        "no parts",
        "shell",
        "more than all",
        "text",
        "unknown key",
    ],
)
def test_a_hostile_index_is_refused(changes: dict[str, Any], shelf: HubServer, command: Command) -> None:
    index_with(shelf, **changes)
    message = failed(command("pull", REPO, *ENOUGH, "-o", "here"), BadFile)
    assert message.startswith("edgeprune.json of me/tiny-GGUF") and not Path("here").exists()


def test_an_index_about_another_file_is_not_believed(shelf: HubServer, command: Command) -> None:
    put(shelf, {next(iter(models(shelf))): b"GGUF" + bytes(499_964)})
    done = command("pull", REPO, *ENOUGH, "-o", "here")
    assert "holds no GGUF model" in failed(done, EdgepruneError) and "is left out" in done.stderr


@pytest.mark.parametrize("token", ["", "hf_wrong"])
def test_a_private_repository_is_not_there_for_strangers(
    token: str, shelf: HubServer, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf.repositories[REPO].private = True
    assert command("pull", REPO, *ENOUGH, "--dry-run").exception is None
    monkeypatch.setenv("HF_TOKEN", token)
    assert "no me/tiny-GGUF that may be seen" in failed(command("pull", REPO, *ENOUGH), EdgepruneError)


def test_slips_of_the_pen(shelf: HubServer, command: Command) -> None:
    assert "not a repository" in failed(command("pull", "tiny"), UsageError)
    assert "no revision 'next'" in failed(command("pull", REPO, *ENOUGH, "--revision", "next"), UsageError)
    assert "say two things" in failed(command("pull", REPO, *ENOUGH, "--memory", "8GiB"), UsageError)
    assert "did you mean" in failed(command("pull", REPO, "--device", "cpu-9gb"), UsageError)
    assert "is the longest" in failed(command("pull", REPO, *ENOUGH, "--context", "999999"), UsageError)


# Choosing, by figures alone.


def candidate(name: str, weights: float, nats: float | None, **changes: Any) -> Candidate:
    """One of so many GiB of weights, with 1 GiB of cache at 4,096 tokens."""
    made = Candidate(
        name=name,
        parts=(Stored(f"{name}.gguf", int(weights * GIB), "0" * 64),),
        memory=Memory(int(weights * GIB), GIB, 300 << 20, 0, 100 << 20),
        launch=Launch(context=4096),
        types=("Q4_K",),
        nats=nats,
        context_length=32768,
        known=nats is not None,
        text="one text",
    )
    return replace(made, **changes)


def test_the_nearest_to_its_source_is_chosen_of_those_that_fit() -> None:
    profile = find_profile("cpu-16gb")
    target = Target(profile, context=4096)
    ladder = [candidate("a", 20, 0.01), candidate("b", 9, 0.05), candidate("c", 8, 0.04), candidate("d", 3, 0.2)]
    assert choose([target.judge(each) for each in ladder], profile, REPO).candidate.name == "c"
    said: list[str] = []
    for others in (replace(ladder[2], text="another"), replace(ladder[2], text="")):
        verdicts = [target.judge(each) for each in (*ladder[:2], others, ladder[3])]
        assert choose(verdicts, profile, REPO, said.append).candidate.name == "b"  # the largest that fits
    assert choose([target.judge(replace(each, text="")) for each in ladder], profile, REPO).candidate.name == "b"
    assert len(said) == 2 and "not of one text" in said[0]
    unknown = [replace(each, nats=None) for each in ladder]
    assert choose([target.judge(each) for each in unknown], profile, REPO).candidate.name == "b"


def test_types_that_the_device_runs_badly_are_the_last_resort() -> None:
    profile = replace(find_profile("cpu-16gb"), avoid=("IQ3_S",))
    target = Target(profile, context=4096)
    better, other = candidate("better", 8, 0.01, types=("IQ3_S", "Q4_K")), candidate("other", 8, 0.02)
    assert choose([target.judge(better), target.judge(other)], profile, REPO).candidate.name == "other"
    assert choose([target.judge(better)], profile, REPO).candidate.name == "better"


def test_the_cache_grows_with_the_context_and_shrinks_with_its_type() -> None:
    profile = find_profile("cpu-16gb")
    one = candidate("a", 8, 0.1)
    free = [
        Target(profile, context=context, kv_type=kind).judge(one).short_bytes
        for context, kind in ((4096, "f16"), (8192, "f16"), (8192, "q8_0"))
    ]
    assert free[1] - free[0] == pytest.approx(GIB, abs=2)
    assert free[2] - free[0] == pytest.approx(2 * GIB * 34 / 64 - GIB, abs=2)


def test_both_memories_of_a_machine_with_a_card_count() -> None:
    profile = find_profile("rtx-4060-8gb")
    assert profile.vram is not None
    target = Target(profile, context=4096)
    both = profile.usable_bytes / GIB - 1.5
    assert target.judge(candidate("a", both, 0.1)).fits
    assert both > profile.vram.total_bytes / GIB
    assert not target.judge(candidate("a", both + 0.5, 0.1)).fits
