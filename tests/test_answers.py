"""The model's own answers: the same every time, drawn once, and never what the model is judged on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import toys
from runs import Ear, Running, gone, run_edgeprune

from edgeprune.errors import UsageError
from edgeprune.measure import answers, child
from edgeprune.measure.answers import MOST_TOKENS, Answer, read_answers, shipped_prompts
from edgeprune.measure.text import CHATS, PREPARED, TextFile, parse_texts, read_documents
from edgeprune.pipeline import Settings, opened

pytest_plugins = ("demo_fixtures",)

FEW = {"window": 64, "calibration_tokens": 512, "evaluation_tokens": 256, "sensitivity_tokens": 128}
END = 256  # the token that ends a text in models of bytes
MADE_FROM = {"model": "one", "template": None}


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of bytes that often ends what it says. Do not change it."""
    path = tmp_path_factory.mktemp("talker") / "talker.gguf"
    return toys.synthetic_gguf(path, experts=4, width=64, expert_width=64, vocabulary=257)


def generate(model: Path, folder: Path, count: int, made_from: Any = MADE_FROM, progress: Any = None) -> list[Answer]:
    """``count`` answers to two questions, in ``folder``."""
    arguments = {
        "model": str(model),
        "output": str(folder / "self.jsonl"),
        "unfinished": str(folder / "scratch" / "self.jsonl"),
        "questions": ["Why?", "Where to?"],
        "prompts": ["Why?\n", "Where to?<|endoftext|>"],
        "special": True,
        "count": count,
        "made_from": made_from,
    }
    child.call("edgeprune.measure.generation:generate", arguments, progress)
    assert not list((folder / "scratch").iterdir())
    return read_answers(folder / "self.jsonl")


def test_shipped_prompts_are_short_all_different_and_take_turns() -> None:
    prompts = shipped_prompts()
    kinds = json.loads(answers.PROMPTS.read_text(encoding="utf-8"))
    assert len(prompts) == len(set(prompts)) >= 60
    assert max(map(len, prompts)) < 160 and min(map(len, prompts)) > 10
    assert prompts[: len(kinds)] == [own[0] for own in kinds.values()]
    assert sum(not prompt.isascii() for prompt in prompts) >= 8


def test_answers_are_the_same_every_time_and_end_where_the_model_ends_them(talker: Path, tmp_path: Path) -> None:
    first, second = generate(talker, tmp_path / "a", 8), generate(talker, tmp_path / "b", 8)
    assert first == second
    assert [answer.seed for answer in first] == list(range(8))
    assert {answer.prompt for answer in first[::2]} == {"Why?"}
    ends = 0
    for answer, prompt in zip(first, (list(b"Why?\n"), [*b"Where to?", END]) * 4, strict=True):
        said = answer.tokens[len(prompt) :]
        assert len(answer.tokens) - len(said) == len(prompt)
        assert END not in said[:-1] and len(said) <= MOST_TOKENS
        assert said[-1] == END or len(said) == MOST_TOKENS
        ends += said[-1] == END
    assert 0 < ends < 8
    assert first[1].tokens[9] == END  # a special token of the prompt is one token
    # The same question with another seed has another answer.
    assert len({tuple(answer.tokens) for answer in first}) == 8


def test_the_words_are_those_of_the_tokens(talker: Path, tmp_path: Path) -> None:
    for answer in generate(talker, tmp_path, 3):
        asked = 5 if answer.seed % 2 == 0 else 10
        assert answer.response == words(answer.tokens[asked:])


def words(tokens: list[int]) -> str:
    """Of the toy's tokens, whose texts are the letters that stand for bytes in GPT-2's vocabulary, sorted."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = sorted([(chr(byte), byte) for byte in printable] + [(chr(256 + n), b) for n, b in enumerate(others)])
    return bytes(alphabet[token][1] for token in tokens if token != END).decode(errors="replace")


def drawn(model: Path, folder: Path, count: int, made_from: Any = MADE_FROM) -> tuple[list[Answer], int]:
    """The answers, and how many of them were drawn for that."""
    totals = {0}
    found = generate(model, folder, count, made_from, lambda done, total: totals.add(total))
    return found, max(totals) // MOST_TOKENS


def test_only_what_is_missing_is_drawn(talker: Path, tmp_path: Path) -> None:
    whole, number = drawn(talker, tmp_path, 5)
    assert number == 5
    path = tmp_path / "self.jsonl"
    assert drawn(talker, tmp_path, 3) == (whole[:3], 0)
    assert drawn(talker, tmp_path, 5) == (whole, 2)
    # As a kill leaves them: finished ones gathered, and the next one half-written.
    gathering = tmp_path / "scratch" / "self.jsonl"
    gathering.write_bytes(b"".join(answer.line() for answer in whole[:4]) + whole[4].line()[:-9])
    path.unlink()
    assert drawn(talker, tmp_path, 5) == (whole, 1)
    assert drawn(talker, tmp_path, 5, made_from={"model": "other"})[1] == 5
    assert {answer.made_from["model"] for answer in read_answers(path)} == {"other"}


@pytest.mark.parametrize(
    "damage",
    [b"{", b"[]\n", b'{"prompt": 1}\n', b"\xff\n", b"[" * 99999 + b"\n"],
    ids=["cut off", "a list", "half an answer", "not UTF-8", "deep"],
)
def test_answers_are_read_up_to_the_damage(damage: bytes, tmp_path: Path) -> None:
    whole = [Answer("a?", "é", [1, 2], seed, MADE_FROM) for seed in range(3)]
    path = tmp_path / "self.jsonl"
    path.write_bytes(b"".join(answer.line() for answer in whole) + damage)
    assert read_answers(path) == whole
    path.write_bytes(whole[0].line() + whole[2].line())
    assert read_answers(path) == whole[:1]
    assert read_answers(tmp_path / "none.jsonl") == []


def test_answers_are_read_token_by_token_and_by_others_as_chats(talker: Path, tmp_path: Path) -> None:
    found = generate(talker, tmp_path, 3)
    path = str(tmp_path / "self.jsonl")
    documents = read_documents(TextFile("self", path, "calibration", PREPARED))
    assert [list(document.tokens) for document in documents] == [answer.tokens for answer in found]
    assert parse_texts([path])[0].form == CHATS


# In a run.


def settings(source: Path | str, text: Path, folder: Path, count: int = 3, **more: Any) -> Settings:
    wishes: dict[str, Any] = {"texts": (str(text),), "self_answers": count, "output": str(folder), **FEW, **more}
    return Settings(str(source), device="auto", **wishes)


def test_answers_calibrate_are_drawn_once_and_again_when_something_changed(
    tiny_checkpoint: Path, small_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, ear = tmp_path / "run", Ear()
    with opened(settings(tiny_checkpoint, small_text, folder), ear) as run:
        assert run.statistics.domains == ["small", "self"]
        found = read_answers(run.folder.answers)
        assert len(found) == 3 and found[0].prompt == shipped_prompts()[0]
        # Through the model's own template.
        arguments = {"model": str(run.source), "texts": [f"<|im_start|>user\n{found[0].prompt}<|im_end|>\n"]}
        (prompt,) = child.call("edgeprune.measure.tasks:tokenize", {**arguments, "special": True})
        assert found[0].tokens[: len(prompt)] == prompt
        # The model is not judged by its own words.
        assert [text["domain"] for text in run._text_arguments("held_out")["texts"]] == ["small"]
        assert [text["domain"] for text in run._text_arguments("sensitivity")["texts"]] == ["small", "self"]
    assert [stage for stage in ear.stages if "self" in stage or "answers" in stage] == [
        "chats of self",
        "3 answers of the model",
    ]

    again = Ear()
    with opened(settings(tiny_checkpoint, small_text, folder), again) as run:
        assert run.statistics.tokens
    assert not {"calibrate", "chats of self", "3 answers of the model"} & set(again.stages) and not again.said

    more = Ear()
    with opened(settings(tiny_checkpoint, small_text, folder, 4), more) as run:
        assert run.statistics.tokens
    assert read_answers(folder / "self.jsonl")[:3] == found
    assert [line.split(":")[:2] for line in more.said] == [["calibration changed", " text"]]

    other = tmp_path / "prompts.json"
    other.write_text(json.dumps({"all": ["Who are you?"]}), encoding="utf-8")
    monkeypatch.setattr(answers, "PROMPTS", other)
    changed = Ear()
    with opened(settings(tiny_checkpoint, small_text, folder, 4), changed) as run:
        assert run.statistics.tokens
    assert changed.said[0].startswith("the model's answers changed: prompts: ")
    assert changed.said[0].endswith("; doing it again")
    assert changed.said[1].startswith("calibration changed: text: ")
    assert {answer.prompt for answer in read_answers(folder / "self.jsonl")} == {"Who are you?"}


def test_another_model_answers_anew(talker: Path, small_text: Path, tmp_path: Path) -> None:
    source, folder = tmp_path / "model.gguf", tmp_path / "run"
    source.write_bytes(talker.read_bytes())
    with opened(settings(source, small_text, folder), Ear()) as run:
        assert run.text_digest
    first = read_answers(folder / "self.jsonl")
    assert first[0].tokens[: len(first[0].prompt) + 1] == tokens_of(source, f"{first[0].prompt}\n")  # no template
    toys.synthetic_gguf(source, experts=4, width=64, expert_width=64, vocabulary=257, seed=9)
    ear = Ear()
    with opened(settings(source, small_text, folder), ear) as run:
        assert run.text_digest
    assert [line.partition(": ")[0] for line in ear.said] == ["the model's answers changed"]
    assert ear.said[0].startswith("the model's answers changed: model: ")
    assert [answer.tokens for answer in read_answers(folder / "self.jsonl")] != [answer.tokens for answer in first]


def tokens_of(model: Path, text: str) -> list[int]:
    (tokens,) = child.call("edgeprune.measure.tasks:tokenize", {"model": str(model), "texts": [text]})
    return list(tokens)


def test_answers_are_not_drawn_before_they_are_needed(
    tiny_checkpoint: Path, small_text: Path, tmp_path: Path
) -> None:
    ear = Ear()
    with opened(settings(tiny_checkpoint, small_text, tmp_path / "run"), ear) as run:
        run.check_source()
    assert "reference (held-out text that reports)" in ear.stages and "3 answers of the model" not in ear.stages


def test_answers_beside_a_text_of_their_name_or_as_held_out_text_are_refused(
    talker: Path, small_text: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    named = settings(talker, small_text, folder, texts=(f"self={small_text}",))
    with opened(named, Ear()) as run, pytest.raises(UsageError, match="a text is named self"):
        _ = run.given_texts
    folder.mkdir(exist_ok=True)
    (folder / "self.jsonl").write_text('"held out?"\n', encoding="utf-8")
    judged = settings(talker, small_text, folder, evaluation_texts=(str(folder / "self.jsonl"),))
    (folder / ".edgeprune").write_text(judged.owner + "\n", encoding="utf-8")
    with opened(judged, Ear()) as run, pytest.raises(UsageError, match="what was calibrated on is not held out"):
        _ = run.given_texts


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_killed_while_it_answers_the_same_command_goes_on(
    tiny_checkpoint: Path, small_text: Path, tmp_path: Path
) -> None:
    words = ("calibrate", tiny_checkpoint, "--text", small_text, "--self", "40", "--tokens", "256")
    run = Running(*words, "-o", tmp_path / "killed")
    worker = run.wait_for("generation:generate")
    assert worker is not None
    scratch = tmp_path / "killed" / "scratch"
    while not any(read_answers(path) for path in scratch.glob("self-*.jsonl")):
        assert run.process.poll() is None and not (tmp_path / "killed" / "self.jsonl").exists()
    run.process.kill()
    run.end()
    assert gone(worker)
    (gathering,) = scratch.glob("self-*.jsonl")
    assert 0 < len(read_answers(gathering)) < 40
    for folder in ("killed", "whole"):
        assert run_edgeprune(*words, "-o", tmp_path / folder).returncode == 0
    assert not gathering.exists()
    ends = [(tmp_path / folder / "self.jsonl").read_bytes() for folder in ("killed", "whole")]
    assert ends[0] == ends[1]


def test_the_demo_calibrates_on_its_own_answers(tmp_path: Path) -> None:
    words = ("calibrate", "demo", "--self", "4", "--tokens", "4096", "-o", tmp_path / "run")
    done = run_edgeprune(*words)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0].endswith(
        "tokens in 8 domains: code, dialogue, encyclopaedic, languages, mathematics, prose, structured, self"
    )
    found = read_answers(tmp_path / "run" / "self.jsonl")
    assert len(found) == 4 and all(answer.response.strip() for answer in found)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        ".edgeprune",
        ".lock",
        "imatrix.gguf",
        "self.jsonl",
        "source.gguf",
        "statistics.safetensors",
    }
