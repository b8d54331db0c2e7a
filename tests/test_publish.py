"""Publishing to a Hub on loopback: what arrives, what is not sent twice, and what is refused."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from hub_server import READ_ONLY, Blob, Command, Cut, HubServer, Refusal, Repository, value
from runs import Ear, Fit, edgeprune_command, read, settings

from edgeprune import pipeline
from edgeprune.build.builder import digest_of
from edgeprune.errors import BadFile, BrokenPromise, EdgepruneError, UsageError
from edgeprune.files import file_digest, to_json
from edgeprune.model.splitting import file_name, split
from edgeprune.prove.provenance import Provenance
from edgeprune.prove.report import Promise, Report
from edgeprune.share.card import Sheet, model_card, plain
from edgeprune.share.index import read_index
from edgeprune.share.origin import Origin

pytest_plugins = ("demo_fixtures", "publish_fixtures")
# huggingface_hub gives a file to its HTTP library in a way that the library no longer likes.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPO = "me/tiny-GGUF"
LICENCE = ("--license", "apache-2.0")
SMALL = "400kB"  # every file of the tiny model is larger


@pytest.fixture(scope="module")
def larger_fit(tiny_fit: Fit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model fitted to 700 kB. Do not change it."""
    folder = tiny_fit.copy(tmp_path_factory.mktemp("larger") / "run")
    pipeline.fit(settings(tiny_fit, folder, file_bytes=700_000), Ear())
    return folder


@pytest.fixture
def run_folder(tiny_fit: Fit, tmp_path: Path) -> Path:
    return tiny_fit.copy(tmp_path / "run")


def gguf_of(folder: Path) -> Path:
    return folder / str(read(folder / "build.json")["path"])


def published(far: HubServer, name: str = REPO, branch: str = "main") -> dict[str, Blob]:
    return far.repositories[name].branches[branch][-1][1]


def front_matter(card: bytes) -> dict[str, Any]:
    _, front, _ = card.decode().split("---\n", 2)
    metadata: dict[str, Any] = yaml.safe_load(front)
    return metadata


def test_help(command: Command) -> None:
    text = command("publish", "--help").stdout
    assert all(option in text for option in ("DIR... ORG/NAME", "--dry-run", "--create-pr", "--force"))
    assert "publish" in command("--help").stdout and all(len(line) <= 100 for line in text.splitlines())


def test_a_run_arrives_whole(far: HubServer, command: Command, run_folder: Path) -> None:
    done = value(command("publish", run_folder, REPO, *LICENCE, "--yes", "--json"))
    files = published(far)
    assert {row["path"] for row in done["files"]} == files.keys()
    assert {row["path"]: row["nbytes"] for row in done["files"]} == {p: len(b.content) for p, b in files.items()}
    assert done["address"].startswith(f"{far.address}/{REPO}/commit/")
    (name,) = (path for path in files if path.endswith(".gguf") and "/" not in path)
    assert re.fullmatch(r"tiny-K6-\d\.\d\dbpw-IQ4_NL\.gguf", name)
    assert files[name].large and files[name].content == gguf_of(run_folder).read_bytes()
    folder = name.removesuffix(".gguf")
    inside = {path.removeprefix(f"{folder}/") for path in files if path.startswith(f"{folder}/")}
    assert inside == {"plan.json", "report.json", "report.html", "imatrix.gguf", "keep-map.svg"}
    assert files[f"{folder}/imatrix.gguf"].content == (run_folder / "imatrix.gguf").read_bytes()
    assert Report.from_json(json.loads(files[f"{folder}/report.json"].content)).build["path"] == name
    for picture in ("curve.svg", f"{folder}/keep-map.svg"):
        assert ElementTree.fromstring(files[picture].content).tag == "{http://www.w3.org/2000/svg}svg"
    assert str(run_folder) not in "".join(blob.content.decode(errors="ignore") for blob in files.values())


def test_the_card_says_what_the_hub_and_its_readers_want(far: HubServer, command: Command, run_folder: Path) -> None:
    far.repositories["org/base"] = Repository(card={"license": "mit", "language": ["en", "de"]})
    done = command("publish", run_folder, REPO, "--base-model", "org/base", "--yes")
    assert done.exception is None
    card = published(far)["README.md"].content
    assert front_matter(card) == {
        "library_name": "gguf",
        "pipeline_tag": "text-generation",
        "base_model": ["org/base"],
        "base_model_relation": "quantized",
        "quantized_by": "me",
        "license": "mit",  # of the base model's card, as the source says nothing
        "language": ["en", "de"],
        "tags": ["gguf", "mixture-of-experts", "edgeprune", "pruned"],
    }
    text = card.decode()
    report = Report.from_json(read(run_folder / "report.json"))
    name = next(path for path in published(far) if path.endswith(".gguf"))
    dropped = sorted(set(range(8)) - set(report.plan["keep"]["0"]))
    for wanted in (
        f"llama-server -hf {REPO} -hff {name} -c ",
        f"edgeprune pull {REPO} --device auto",
        "6 of 8 experts per layer, chosen by reap",
        f"layer 0: {', '.join(map(str, dropped))}",
        f"SHA-256 `{report.build['sha256']}`",
        f"{report.quality['kl_mean']:.5f}",
        *report.folded,
    ):
        assert wanted in text, wanted
    assert f"| {plain(name)} | {report.build['sha256']} |" in text and report.build["path"] not in text
    sent = read(run_folder / "report.json")["provenance"]["commands"]
    assert any(str(run_folder.anchor) in word for command in sent for word in command.split())
    assert not any(b"/pytest-" in upload.content for path, upload in published(far).items() if "report." in path)
    for target in re.findall(r"\]\((?!https://)([^)]+)\)", text):
        assert target in published(far)


def test_a_hostile_name_is_shown_in_the_card_and_not_obeyed(tiny_fit: Fit) -> None:
    name = 'x\n---\nlicense: mit\n# <script>alert("1")</script> | [a](javascript:1) ```'
    report = replace(
        tiny_fit.report,
        title=name,
        verdict=name,
        folded=[name],
        source={**tiny_fit.report.source, "name": name, "arch": name},
        conditions={name: name},
        provenance=Provenance((name,), {name: name}, {name: name}, {name: name}),
    )
    for sheet in (Sheet(report), Sheet(report, "folder", {}, [("a.gguf", "0" * 64)])):
        text = model_card([sheet], Origin(), "me/x" if sheet.folder else "")
        assert yaml.safe_load(text.split("---\n")[1])["library_name"] == "gguf"
        # Nothing of which the source says nothing; a relation is one to a base model.
        assert not {"license", "base_model", "base_model_relation"} & yaml.safe_load(text.split("---\n")[1]).keys()
        prose = re.sub(r"(?ms)^```$.*?^```$", "", text)
        assert "<script" not in prose and "\n# <" not in prose and "[a](" not in prose
        assert "&lt;script&gt;" in prose


def test_a_dry_run_says_every_size_to_the_byte(far: HubServer, command: Command, run_folder: Path) -> None:
    words = ("publish", run_folder, REPO, *LICENCE, "--dry-run")
    files, shown = value(command(*words, "--json"))["files"], command(*words).stdout
    assert far.received == [] and len(files) > 5
    for row in files:
        (line,) = (line for line in shown.splitlines() if line.startswith(f"{row['path']} "))
        assert line.split() == [row["path"], f"{row['nbytes']:,}", "bytes"]
    assert f"{sum(row['nbytes'] for row in files):,} bytes (" in shown.splitlines()[0]


def test_what_is_there_is_not_sent_again(far: HubServer, command: Command, run_folder: Path) -> None:
    words = ("publish", run_folder, REPO, *LICENCE, "--yes")
    first = command(*words)
    sent, commits = list(far.received), len(far.repositories[REPO].branches["main"])
    again = command(*words)
    assert (first.exception, again.exception) == (None, None)
    assert again.stdout == f"{REPO} holds all of it already\n"
    assert far.received == sent and len(far.repositories[REPO].branches["main"]) == commits
    (run_folder / "imatrix.gguf").write_bytes(b"GGUF" + bytes(100))
    changed = value(command(*words, "--json"))
    assert [row["path"].rpartition("/")[2] for row in changed["files"] if not row["there"]] == ["imatrix.gguf"]
    assert len(far.received) == len(sent) + 1


def test_a_file_of_the_same_name_is_not_replaced_without_a_word(
    far: HubServer, command: Command, run_folder: Path
) -> None:
    words = ("publish", run_folder, REPO, *LICENCE)
    assert command(*words, "--yes").exception is None
    name = next(path for path in published(far) if path.endswith(".gguf") and "/" not in path)
    repository = far.repositories[REPO]
    repository.commit("main", {**repository.files, name: Blob(b"GGUF" + bytes(60), large=True)})
    shown = command(*words, "--dry-run")
    (line,) = (line for line in shown.stdout.splitlines() if line.startswith(f"{name} "))
    assert line.endswith("replaces another file") and shown.stdout.count("replaces") == 1
    rows = value(command(*words, "--dry-run", "--json"))["files"]
    assert [row["path"] for row in rows if row["replaces"]] == [name]
    sent = command(*words, "--yes")
    assert f"{name} there is another file, and is replaced" in sent.stderr
    assert published(far)[name].content == gguf_of(run_folder).read_bytes()
    assert "replaces" not in command(*words, "--dry-run").stdout


def test_a_large_file_is_sent_in_parts_that_belong_together(
    far: HubServer, command: Command, run_folder: Path, tmp_path: Path
) -> None:
    done = command("publish", run_folder, REPO, *LICENCE, "--yes", "--max-file-size", SMALL)
    assert done.exception is None
    files = published(far)
    parts = sorted(path for path in files if re.search(r"-\d{5}-of-\d{5}\.gguf$", path))
    assert len(parts) == 2 and all(len(files[path].content) <= 400_000 for path in parts)
    (tmp_path / "edgeprune.json").write_bytes(files["edgeprune.json"].content)
    ((entry,), _) = read_index(tmp_path / "edgeprune.json", "index")
    assert [(part.path, part.sha256) for part in entry.parts] == [(path, files[path].sha256) for path in parts]
    assert parts == [file_name(entry.name, number, 2) for number in (0, 1)]
    assert not (run_folder / "scratch").exists()
    # Whole again: the parts of before go.
    assert command("publish", run_folder, REPO, *LICENCE, "--yes").exception is None
    assert [path for path in published(far) if path.endswith(".gguf") and "/" not in path] == [f"{entry.name}.gguf"]


def test_a_run_that_was_built_in_parts_is_sent_in_those_or_in_smaller_ones(
    far: HubServer, command: Command, run_folder: Path
) -> None:
    whole = gguf_of(run_folder)
    parts = split(whole, run_folder, whole.stem, 400_000)
    whole.unlink()
    built = {
        "path": parts[0].path.name,
        "nbytes": sum(part.nbytes for part in parts),
        "sha256": digest_of([part.path for part in parts]),
    }
    record = read(run_folder / "build.json")
    (run_folder / "build.json").write_text(to_json({**record, **built, "part_bytes": 400_000}), encoding="utf-8")
    made_from = {**read(run_folder / "report.json")["made_from"], "build": built["sha256"]}
    change_report(run_folder, build={**record, **built}, made_from=made_from)
    assert command("publish", run_folder, REPO, *LICENCE, "--yes").exception is None
    sent = {path: blob.sha256 for path, blob in published(far).items() if "-of-" in path and "/" not in path}
    assert sorted(sent.values()) == sorted(part.sha256 for part in parts)
    smaller = ("--max-file-size", "250kB")
    assert command("publish", run_folder, REPO, *LICENCE, "--yes", *smaller).exception is None
    again = {path: blob for path, blob in published(far).items() if "-of-" in path and "/" not in path}
    assert len(again) > len(parts) and not again.keys() & sent.keys()
    assert max(len(blob.content) for blob in again.values()) <= 250_000


def test_a_dry_run_shows_what_would_be_sent_and_sends_nothing(
    far: HubServer, command: Command, run_folder: Path
) -> None:
    words = ("publish", run_folder, REPO, *LICENCE, "--max-file-size", SMALL)
    shown = value(command(*words, "--dry-run", "--json"))
    text = command(*words, "--dry-run").stdout
    assert far.repositories == {} and far.asked("POST", "") == far.asked("PUT", "") == []
    assert value(command(*words, "--yes", "--json"))["files"] == shown["files"]
    assert all(row["path"] in text for row in shown["files"])
    assert "to be made" in text and "library_name" in text
    assert {row["path"]: row["nbytes"] for row in shown["files"]} == {
        path: len(blob.content) for path, blob in published(far).items()
    }


def test_a_dry_run_needs_neither_token_nor_network(
    real_command: Callable[..., subprocess.CompletedProcess[str]], run_folder: Path
) -> None:
    done = real_command("publish", run_folder, REPO, *LICENCE, "--dry-run", HF_HUB_OFFLINE="1")
    assert done.returncode == 0 and "HF_HUB_OFFLINE" in done.stderr and REPO in done.stdout


def test_a_family_is_one_repository_and_grows(
    far: HubServer, command: Command, run_folder: Path, larger_fit: Path
) -> None:
    assert command("publish", run_folder, REPO, *LICENCE, "--yes").exception is None
    alone = published(far)["README.md"].content
    assert command("publish", larger_fit, REPO, *LICENCE, "--yes").exception is None
    grown = published(far)
    names = sorted(path for path in grown if path.endswith(".gguf") and "/" not in path)
    assert len(names) == 2
    table = grown["README.md"].content.decode().split("## Files")[1].split("## Run")[0]
    assert all(f"`{name}`" in table for name in names) and alone != grown["README.md"].content
    assert [entry["parts"][0]["path"] for entry in json.loads(grown["edgeprune.json"].content)["files"]] == sorted(
        names, key=lambda name: -len(grown[name].content)
    )
    both = command("publish", run_folder, larger_fit, "me/other", *LICENCE, "--yes")
    assert both.exception is None
    assert {p: b.sha256 for p, b in published(far, "me/other").items() if p.endswith(".gguf")} == {
        p: b.sha256 for p, b in grown.items() if p.endswith(".gguf")
    }


def test_figures_of_different_texts_are_not_put_beside_each_other_without_a_word(
    far: HubServer, command: Command, run_folder: Path, larger_fit: Path
) -> None:
    words = ("publish", run_folder, larger_fit, REPO, *LICENCE, "--dry-run", "--json")
    assert "figures of different texts" not in value(command(*words))["card"]
    made_from = read(run_folder / "report.json")["made_from"]
    change_report(run_folder, made_from={**made_from, "evaluation": "of another text"})
    assert "figures of different texts" in value(command(*words))["card"]
    assert command(*words[:-2], "--yes").exception is None
    index = json.loads(published(far)["edgeprune.json"].content)
    assert [entry["text"] for entry in index["files"]] == [made_from["evaluation"], "of another text"]
    assert "figures cannot be compared" in published(far)["family.html"].content.decode().replace("\n", " ")


def test_the_same_run_twice_is_one_file(far: HubServer, command: Command, run_folder: Path, tiny_fit: Fit) -> None:
    twin = tiny_fit.copy(run_folder.with_name("twin"))
    done = value(command("publish", run_folder, twin, run_folder, REPO, *LICENCE, "--yes", "--json"))
    assert sum(row["path"].endswith(".gguf") and "/" not in row["path"] for row in done["files"]) == 1


# Private repositories, branches, pull requests, cards of others.


def test_a_private_repository_a_branch_and_a_pull_request(far: HubServer, command: Command, run_folder: Path) -> None:
    words = ("publish", run_folder, REPO, *LICENCE, "--yes")
    assert command(*words, "--private", "--revision", "next").exception is None
    repository = far.repositories[REPO]
    assert repository.private and repository.files == {} and "README.md" in published(far, branch="next")
    done = command(*words, "--create-pr")
    assert done.exception is None and done.stdout == f"{far.address}/{REPO}/discussions/1\n"
    assert repository.files == {}
    assert published(far, branch="refs/pr/1") == published(far, branch="next")
    assert len(far.received) == len(set(far.received))


def test_an_open_pull_request_of_the_same_is_gone_on_with(far: HubServer, command: Command, run_folder: Path) -> None:
    far.repositories[REPO] = repository = Repository()
    words = ("publish", run_folder, REPO, *LICENCE, "--yes", "--create-pr")
    first = command(*words)
    assert first.stdout == f"{far.address}/{REPO}/discussions/1\n"
    again = command(*words)
    assert (again.exception, again.stdout) == (None, first.stdout)
    assert "pull request that is open already" in again.stderr
    assert len(repository.pulls) == 1 and len(repository.branches["refs/pr/1"]) == 2  # nothing was new
    (run_folder / "imatrix.gguf").write_bytes(b"GGUF" + bytes(100))
    assert command(*words).stdout == first.stdout
    assert len(repository.pulls) == 1 and len(repository.branches["refs/pr/1"]) == 3
    # One of another title, of somebody else, or to another branch, or that is closed, is not meant.
    other = {"base": "refs/heads/next", "author": "you", "title": "another", "status": "closed"}
    for number, (key, value_there) in enumerate(other.items()):
        repository.pulls = [
            {**own, key: value_there} if own is repository.pulls[-1] else own for own in repository.pulls
        ]
        assert command(*words).stdout == f"{far.address}/{REPO}/discussions/{number + 2}\n"
    assert repository.files == {}


def test_a_card_that_somebody_wrote_stays(far: HubServer, command: Command, run_folder: Path) -> None:
    theirs = Blob(b"---\nlicense: mit\n---\nMine.\n", large=False)
    far.repositories[REPO] = Repository()
    far.repositories[REPO].commit("main", {"README.md": theirs})
    words = ("publish", run_folder, REPO, *LICENCE, "--yes")
    done = command(*words)
    assert done.exception is None and "README.md there was written" in done.stderr
    assert published(far)["README.md"] == theirs and "edgeprune.json" in published(far)
    assert command(*words, "--force").exception is None
    assert b"Mine." not in published(far)["README.md"].content


# Refusals. Nothing may have been sent after any of them.


def refused(done: Any, kind: type[EdgepruneError]) -> str:
    assert isinstance(done.exception, kind), (done.exception, done.output)
    return str(done.exception)


def test_nobody_is_asked_where_nobody_is(
    far: HubServer, real_command: Callable[..., subprocess.CompletedProcess[str]], run_folder: Path
) -> None:
    done = real_command("publish", run_folder, REPO, *LICENCE)
    assert (done.returncode, done.stdout) == (2, "")
    assert "README.md" in done.stderr and "nothing was sent" in done.stderr and "--yes" in done.stderr
    assert far.repositories == {}


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals")
def test_at_a_terminal_the_user_is_asked(
    far: HubServer, hub_environment: dict[str, str], command: Command, run_folder: Path
) -> None:
    import pty  # there is none on Windows

    def answer(word: str) -> int:
        terminal, end = pty.openpty()
        process = subprocess.Popen(
            edgeprune_command("publish", run_folder, REPO, *LICENCE),
            stdin=end,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=hub_environment,
        )
        os.close(end)
        assert process.stderr is not None
        os.write(terminal, f"{word}\n".encode())
        asked = process.stderr.read().decode()
        process.stderr.close()
        code = process.wait()
        os.close(terminal)
        assert "README.md" in asked and "send it? [y/N]" in asked
        return code

    assert answer("n") == 1 and far.repositories == {}
    assert answer("y") == 0 and "README.md" in published(far)


@pytest.mark.parametrize(
    ("token", "said"),
    [
        ("hf_wrong", "the Hub refuses the token"),
        (READ_ONLY, f"the token may not do this to {REPO}"),
        ("", "no token"),
    ],
    ids=["bad", "may only read", "none"],
)
def test_a_token_that_will_not_do(
    token: str, said: str, far: HubServer, command: Command, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    message = refused(command("publish", run_folder, REPO, *LICENCE, "--yes"), EdgepruneError)
    assert said in message.splitlines()[0] and "hint: " in message
    assert far.repositories == {}


def change_report(folder: Path, **changes: Any) -> None:
    report = Report.from_json(read(folder / "report.json"))
    (folder / "report.json").write_text(to_json(replace(report, **changes).to_json()), encoding="utf-8")


def test_broken_promises_are_published_by_force_alone_and_told(
    far: HubServer, command: Command, run_folder: Path
) -> None:
    change_report(run_folder, promises=[Promise("peak memory", "10 MiB", "11 MiB", "broken")])
    words = ("publish", run_folder, REPO, *LICENCE, "--yes")
    assert "peak memory" in refused(command(*words), BrokenPromise)
    assert far.repositories == {}
    assert command(*words, "--force").exception is None
    card = published(far)["README.md"].content.decode()
    assert "**Broken promises:**" in card and "| peak memory | 10 MiB | 11 MiB |" in card


def test_a_run_that_was_not_verified_is_refused(far: HubServer, command: Command, run_folder: Path) -> None:
    (run_folder / "report.json").unlink()
    assert "has no report.json" in refused(command("publish", run_folder, REPO, "--yes", "--force"), UsageError)
    assert "not a run directory" in refused(command("publish", run_folder.parent, REPO, "--yes"), UsageError)
    assert far.repositories == {}


def test_a_report_of_another_file_is_refused(far: HubServer, command: Command, run_folder: Path) -> None:
    build = read(run_folder / "build.json")
    (run_folder / "build.json").write_text(to_json({**build, "sha256": "0" * 64}), encoding="utf-8")
    message = refused(command("publish", run_folder, REPO, *LICENCE, "--yes", "--force"), BadFile)
    assert "about another file" in message and build["sha256"][:12] in message
    assert far.repositories == {}


def test_a_file_that_changed_since_it_was_measured_is_refused(
    far: HubServer, command: Command, run_folder: Path
) -> None:
    path = gguf_of(run_folder)
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(content)
    message = refused(command("publish", run_folder, REPO, *LICENCE, "--yes", "--force"), BadFile)
    assert "not the file that was measured" in message and file_digest(path)[:12] in message
    assert far.repositories == {}


@pytest.mark.parametrize(
    ("words", "card", "gated", "said"),
    [
        ((), {}, False, "names no licence"),
        ((), {"license": "cc-by-nc-nd-4.0"}, False, "forbids to pass on changed copies"),
        (("--license", "cc-by-nd-4.0"), {}, False, "forbids to pass on changed copies"),
        ((), {"license": "other", "license_name": "model-terms"}, False, "other (model-terms)"),
        ((), {"license": "mit"}, "manual", "org/base is gated"),
    ],
    ids=["none", "no derivatives", "no derivatives, by option", "terms of its own", "gated"],
)
def test_licences_that_ask_for_a_person(
    words: tuple[str, ...],
    card: dict[str, str],
    gated: str | bool,
    said: str,
    far: HubServer,
    command: Command,
    run_folder: Path,
) -> None:
    far.repositories["org/base"] = Repository(card=card, gated=gated)
    every = ("publish", run_folder, REPO, "--base-model", "org/base", "--yes", *words)
    assert said in refused(command(*every), EdgepruneError)
    assert REPO not in far.repositories
    forced = command(*every, "--force")
    assert forced.exception is None and said in forced.stderr


def test_a_licence_that_is_not_the_sources_is_not_called_so(
    far: HubServer, command: Command, run_folder: Path
) -> None:
    far.repositories["org/base"] = Repository(card={"license": "llama3"})
    words = ("publish", run_folder, REPO, "--base-model", "org/base", "--yes")
    message = refused(command(*words, "--license", "mit"), EdgepruneError)
    assert "--license says mit, and the source says llama3" in message and REPO not in far.repositories

    def card(*more: str) -> str:
        assert command(*words, *more).exception is None
        return published(far)["README.md"].content.decode()

    assert "- Licence, that of the source: llama3\n" in card("--license", "llama3")
    forced = card("--license", "mit", "--force")
    assert "- Licence, as given by the publisher: mit\n" in forced and "that of the source" not in forced
    for silent in ({}, {"license": "other"}):
        far.repositories["org/base"].card = silent
        assert "- Licence, as given by the publisher: mit\n" in card("--license", "mit")


def test_a_licence_that_was_read_is_enough(far: HubServer, command: Command, run_folder: Path) -> None:
    far.repositories["org/base"] = Repository(card={"license": "other"}, gated="auto")
    words = ("--license", "other", "--license-name", "model-terms", "--license-link", "https://example.org/terms")
    done = command("publish", run_folder, REPO, "--base-model", "org/base", "--yes", *words)
    assert done.exception is None
    metadata = front_matter(published(far)["README.md"].content)
    assert metadata["license"] == "other"
    assert (metadata["license_name"], metadata["license_link"]) == ("model-terms", "https://example.org/terms")


def test_a_base_model_that_is_not_there_is_a_slip_of_the_pen(
    far: HubServer, command: Command, run_folder: Path
) -> None:
    words = ("publish", run_folder, REPO, *LICENCE, "--yes", "--base-model")
    assert "the Hub has no org/bass" in refused(command(*words, "org/bass"), EdgepruneError)
    assert "'bass' is not a repository" in refused(command(*words, "bass"), UsageError)
    assert far.repositories == {}


def test_runs_of_two_models_are_no_family(command: Command, run_folder: Path, larger_fit: Path) -> None:
    plan = read(run_folder / "plan.json")
    plan["made_from"]["source"] = "0" * 64
    change_report(run_folder, plan=plan)
    message = refused(command("publish", run_folder, larger_fit, REPO, *LICENCE, "--yes"), UsageError)
    assert "different models" in message


# Accidents on the way.


def test_a_change_by_somebody_else_meanwhile_loses_nothing(
    far: HubServer, command: Command, run_folder: Path
) -> None:
    far.repositories[REPO] = Repository()
    theirs = Blob(b"theirs", large=False)

    def interfere(method: str, path: str) -> None:
        if "/objects/" in path and method == "PUT" and "notes.txt" not in published(far):
            far.repositories[REPO].commit("main", {"notes.txt": theirs})

    far.before = interfere
    words = ("publish", run_folder, REPO, *LICENCE, "--yes")
    message = refused(command(*words), EdgepruneError)
    assert "changed by somebody else" in message and "run the same command again" in message
    assert published(far) == {"notes.txt": theirs}
    sent = list(far.received)
    assert command(*words).exception is None
    assert published(far)["notes.txt"] == theirs and "README.md" in published(far)
    assert far.received == sent


def test_a_connection_that_is_cut_is_taken_up_again(far: HubServer, command: Command, run_folder: Path) -> None:
    cuts = []

    def cut(method: str, path: str) -> None:
        if method == "PUT" and not cuts:
            cuts.append(path)
            raise Cut

    far.before = cut
    assert command("publish", run_folder, REPO, *LICENCE, "--yes").exception is None
    assert len(cuts) == 1 and f"/objects/{far.received[0]}" in far.asked("PUT", "")[0]
    assert len(far.asked("PUT", "")) == len(far.received) + 1


def test_a_refused_file_is_explained_and_what_arrived_is_not_sent_again(
    far: HubServer, command: Command, run_folder: Path
) -> None:
    def refuse(method: str, path: str) -> None:
        if method == "PUT" and far.received:
            raise Refusal(413, "Your storage is full")

    far.before = refuse
    words = ("publish", run_folder, REPO, *LICENCE, "--yes", "--max-file-size", SMALL)
    message = refused(command(*words), EdgepruneError)
    assert "413" in message and "Your storage is full" in message and len(message.splitlines()) == 2
    (first,) = far.received
    assert published(far) == {}
    far.before = lambda method, path: None
    assert command(*words).exception is None
    assert far.received.count(first) == 1 and len(far.received) == 3


def test_a_publication_that_was_killed_goes_on(
    far: HubServer, hub_environment: dict[str, str], command: Command, run_folder: Path
) -> None:
    words = ("publish", run_folder, REPO, *LICENCE, "--yes", "--max-file-size", SMALL)
    process = subprocess.Popen(edgeprune_command(*words), env=hub_environment, stderr=subprocess.DEVNULL)

    def kill(method: str, path: str) -> None:
        if method == "PUT" and far.received:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            raise Cut

    far.before = kill
    assert process.wait(timeout=60) == -signal.SIGKILL
    (first,) = far.received
    assert published(far) == {}
    far.before = lambda method, path: None
    assert command(*words).exception is None
    assert far.received.count(first) == 1 and "README.md" in published(far)


def test_no_hub_at_all(far: HubServer, command: Command, run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    message = refused(command("publish", run_folder, REPO, *LICENCE, "--yes"), EdgepruneError)
    assert message.startswith("the Hub cannot be reached: ")


def test_private_is_no_promise_for_a_repository_that_everybody_sees(
    far: HubServer, command: Command, run_folder: Path
) -> None:
    far.repositories[REPO] = Repository()
    words = ("publish", run_folder, REPO, *LICENCE, "--private")
    for way in ("--dry-run", "--yes"):
        assert "everybody can see it" in refused(command(*words, way), UsageError)
    assert far.repositories[REPO].files == {}


def test_a_licence_named_by_hand_does_not_undo_one_that_forbids_derivatives(
    far: HubServer, command: Command, run_folder: Path
) -> None:
    far.repositories["org/nd"] = Repository(card={"license": "cc-by-nc-nd-4.0"})
    words = ("publish", run_folder, REPO, "--license", "mit", "--base-model", "org/nd", "--yes")
    assert "forbids to pass on changed copies" in refused(command(*words), EdgepruneError)
    assert command(*words, "--force").exception is None
