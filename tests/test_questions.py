"""Task files in their published forms, and what models answer: against scores that are computed the long way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toys

from edgeprune.errors import BadFile, UsageError
from edgeprune.measure import child
from edgeprune.measure.launch import Launch
from edgeprune.measure.llama import session
from edgeprune.measure.questions import (
    FORMATS,
    Question,
    chosen_questions,
    last_number,
    parse_task,
    read_questions,
)

pytest_plugins = ("demo_fixtures",)

HELLASWAG: dict[str, Any] = {
    "ind": 14,
    "activity_label": "Wakeboarding",
    "ctx_a": "A man is being pulled on a water ski  as he floats in the water casually.",
    "ctx_b": "he",
    "ctx": "A man is being pulled on a water ski as he floats in the water casually. he",
    "split": "val",
    "split_type": "indomain",
    "label": 1,
    "endings": ["mounts the water ski.", "goes over [substeps] high speed.", "floats.", "waves [title] Ends."],
    "source_id": "activitynet~v_-5KAycAQlC4",
}
ARC: dict[str, Any] = {
    "id": "MCAS_2000_4_6",
    "question": {
        "stem": "Which is a complete circuit? ",
        "choices": [
            {"text": "a wire", "label": "1"},
            {"text": "a loop", "label": "2"},
            {"text": "a gap", "label": "3"},
        ],
    },
    "answerKey": "2",
}
ARC_HUB = {
    "id": "Mercury_7175875",
    "question": "Which is a complete circuit?",
    "choices": {"text": ["a wire", "a loop", "a gap"], "label": ["A", "B", "C"]},
    "answerKey": "B",
}
MMLU: dict[str, Any] = {
    "question": "Find the degree of Q(sqrt(2)) over Q.",
    "subject": "abstract_algebra",
    "choices": ["0", "4", "2", "6"],
    "answer": 2,
}
GSM8K = {"question": "Ann has 3 pens and buys 2. How many?", "answer": "3+2=<<3+2=5>>5\nSo 5.\n#### 5"}
RECORDS = {"hellaswag": HELLASWAG, "arc": ARC, "mmlu": MMLU, "gsm8k": GSM8K}


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def only(tmp_path: Path, form: str, record: Any) -> Question:
    (found,) = read_questions(write(tmp_path / "one.jsonl", record), form)
    return found


def test_hellaswag_is_read_as_the_harness_reads_it(tmp_path: Path) -> None:
    found = only(tmp_path, "hellaswag", HELLASWAG)
    expected = "Wakeboarding: A man is being pulled on a water ski as he floats in the water casually. He"
    assert found.prompt == expected
    assert found.continuations == (" mounts the water ski.", " goes over high speed.", " floats.", " waves. Ends.")
    assert (found.right, found.per_byte) == (1, True)
    assert only(tmp_path, "hellaswag", {**HELLASWAG, "label": "3"}).right == 3  # as the Hub has it


def test_arc_is_read_in_both_of_its_forms(tmp_path: Path) -> None:
    for record in (ARC, ARC_HUB):
        found = only(tmp_path, "arc", record)
        assert found.prompt == "Question: Which is a complete circuit?\nAnswer:"
        assert found.continuations == (" a wire", " a loop", " a gap")
        assert (found.right, found.per_byte) == (1, True)


def test_mmlu_is_answered_in_letters(tmp_path: Path) -> None:
    found = only(tmp_path, "mmlu", MMLU)
    assert found.prompt == (
        "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
        "Find the degree of Q(sqrt(2)) over Q.\nA. 0\nB. 4\nC. 2\nD. 6\nAnswer:"
    )
    assert (found.continuations, found.right, found.per_byte) == ((" A", " B", " C", " D"), 2, False)
    assert only(tmp_path, "mmlu", {**MMLU, "answer": "D"}).right == 3
    assert "answers).\n" in only(tmp_path, "mmlu", {**MMLU, "subject": None}).prompt


def table(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8", newline="")
    return path


def test_tables_of_mmlu_say_what_its_json_lines_say(tmp_path: Path) -> None:
    """As hendrycks/test has them: no head, quotes where commas, quotes or ends of lines are within."""
    written = (
        'Find the degree of Q(sqrt(2)) over Q.,0,4,2,6,C\r\n"Which, of these, is ""it""?\nSay.",a,"b, c",d,e,B\r\n'
    )
    path = table(tmp_path / "abstract_algebra_test.csv", written)
    assert parse_task(str(path)) == parse_task(f"{path}:mmlu") == (path, "mmlu")
    first, second = read_questions(path, "mmlu")
    assert first == only(tmp_path, "mmlu", MMLU)
    assert 'Which, of these, is "it"?\nSay.\nA. a\nB. b, c\n' in second.prompt and second.right == 1
    assert (first.line, second.line) == (1, 3)
    headed = table(tmp_path / "virology_val.csv", "\ufeffquestion,A,B,C,D,answer\n" + written)
    assert [one.right for one in read_questions(headed, "mmlu")] == [2, 1]
    assert next(read_questions(headed, "mmlu")).prompt.startswith(
        "The following are multiple choice questions (with answers) about virology.\n"
    )


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("Why?,a,b,c,A\n", "line 1 has 5 columns"),
        ("Why?,a,b,c,d,E\n", "line 1 is no record of mmlu"),
        ("Why?,a,b,c,d,A\nWhy?,a,,c,d,A\n", "line 2 is no record of mmlu"),
        ('Why?,a,b,c,d,A\n"Why?,a,b,c,d,A\n' + "x\n" * 100_000, "no row of a table"),
        ('"Why?" not,a,b,c,d,A\n', "line 1 is no row of a table"),
        ("question,A,B,C,D,answer\n", "is empty"),
        ("", "is empty"),
    ],
)
def test_a_table_that_is_none_is_refused(tmp_path: Path, written: str, message: str) -> None:
    path = table(tmp_path / "x_test.csv", written)
    with pytest.raises(BadFile, match=message):
        list(read_questions(*parse_task(str(path))))
    (tmp_path / "bytes.csv").write_bytes(b"Why\xff,a,b,c,d,A\n")
    with pytest.raises(BadFile, match="line 1 is not in UTF-8"):
        parse_task(str(tmp_path / "bytes.csv"))


def test_gsm8k_keeps_the_number_behind_the_marks(tmp_path: Path) -> None:
    found = only(tmp_path, "gsm8k", {**GSM8K, "answer": "2 and 3\n#### -1,200.50"})
    assert (found.continuations, found.number) == ((), "-1200.5")
    assert found.prompt == "Question: Ann has 3 pens and buys 2. How many?\nAnswer:"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("nothing", ""),
        ("", ""),
        ("it is 5.", "5"),
        ("$1,200.00", "1200"),
        ("-$7", "-7"),
        ("3 + 4 = 07", "7"),
        ("0.50 of them", "0.5"),
        ("-0", "0"),
        ("000", "0"),
        ("first 8, then 12,", "12"),
        ("ages 5-7", "7"),
        ("about 1e3", "1000"),
        ("1.5E+2 or 15e-1", "1.5"),
        ("1e3x", "3"),
        ("x = -7", "-7"),
        ("(3)-7", "7"),
        ("9e999", "999"),
    ],
)
def test_numbers_are_compared_in_their_plainest_form(text: str, number: str) -> None:
    assert last_number(text) == number


@pytest.mark.parametrize("form", sorted(FORMATS))
def test_the_first_line_tells_the_format(tmp_path: Path, form: str) -> None:
    path = write(tmp_path / "task.jsonl", RECORDS[form])
    assert parse_task(str(path)) == (path, form)
    assert parse_task(f"{path}:gsm8k") == (path, "gsm8k")


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "task.jsonl", {"text": "a tale"})
    with pytest.raises(UsageError, match="no task file"):
        parse_task("elsewhere.jsonl")
    with pytest.raises(UsageError, match="no format 'trivia'"):
        parse_task(f"{path}:trivia")
    with pytest.raises(BadFile, match="line 1 is a record of no known task"):
        parse_task(str(path))
    path.write_text("\n\n", encoding="utf-8")
    with pytest.raises(BadFile, match="is empty"):
        parse_task(str(path))


def changed(form: str, **changes: Any) -> bytes:
    return json.dumps({**RECORDS[form], **changes}).encode()


@pytest.mark.parametrize(
    ("form", "line"),
    [
        ("hellaswag", b'{"endings": '),
        ("hellaswag", b"[1]"),
        ("hellaswag", b"\xff\xfe{}"),
        ("hellaswag", b"[" * 100_000),
        ("hellaswag", b'{"endings": "\\ud800"}'),
        ("hellaswag", changed("hellaswag", label="")),
        ("hellaswag", changed("hellaswag", label=4)),
        ("hellaswag", changed("hellaswag", label=True)),
        ("hellaswag", changed("hellaswag", endings=["one"])),
        ("hellaswag", changed("hellaswag", endings=["one", 2])),
        ("hellaswag", changed("hellaswag", ctx_b=None)),
        ("arc", changed("arc", answerKey="E")),
        ("arc", changed("arc", question={"stem": "Why?"})),
        ("arc", changed("arc", question="Why?", choices={"text": ["a", "b"], "label": ["A"]})),
        ("arc", changed("arc", question="Why?", choices=[])),
        ("mmlu", changed("mmlu", answer=-1)),
        ("mmlu", changed("mmlu", answer="E")),
        ("mmlu", changed("mmlu", choices=["x"] * 27)),
        ("gsm8k", changed("gsm8k", answer="5")),
        ("gsm8k", changed("gsm8k", answer="#### five")),
        ("gsm8k", b'{"question": "' + b"x" * (1 << 20) + b'"}'),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, form: str, line: bytes) -> None:
    path = tmp_path / "task.jsonl"
    path.write_bytes(changed(form) + b"\n\n" + line + b"\n")
    with pytest.raises(BadFile, match=r"task\.jsonl, line 3 ") as error:
        chosen_questions(path, form, 1)
    assert "\n" not in error.value.cause and len(error.value.cause) < 400


def test_questions_are_spread_over_the_file_and_all_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "task.jsonl", *({**MMLU, "question": f"Number {n}?"} for n in range(10)))
    questions, count = chosen_questions(path, "mmlu", 4)
    assert count == 10
    assert [question.line for question in questions] == [1, 3, 6, 8]
    assert [question.line for question in chosen_questions(path, "mmlu", 99)[0]] == list(range(1, 11))


def answer(model: Path, questions: list[Question], name: str = "task.jsonl") -> list[bool]:
    arguments = {"model": str(model), "questions": [one.to_json() for one in questions], "name": name, "threads": 1}
    found: list[bool] = child.call("edgeprune.measure.answering:answer", arguments)
    return found


def likelihoods(model: Path, question: Question) -> list[float]:
    """Of each continuation, the whole text decoded for itself, in double precision."""
    scores = []
    with session(model, Launch(context=512, threads=1)) as opened:
        prompt = opened.tokenize(question.prompt)
        for continuation in question.continuations:
            tokens = opened.tokenize(question.prompt + continuation)
            start = next(i for i in range(len(tokens)) if tokens[: i + 1] != prompt[: i + 1])
            logits = opened.run(tokens).astype(np.float64)
            logp = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
            logp -= logits.max(1, keepdims=True)
            scores.append(sum(float(logp[i - 1, tokens[i]]) for i in range(start, len(tokens))))
    return scores


@pytest.mark.parametrize("record", [HELLASWAG, ARC_HUB, MMLU], ids=["hellaswag", "arc", "mmlu"])
def test_the_answer_is_the_most_likely_continuation(demo_gguf: Path, tmp_path: Path, record: dict[str, Any]) -> None:
    form = parse_task(str(write(tmp_path / "task.jsonl", record)))[1]
    question = only(tmp_path, form, record)
    scores = np.array(likelihoods(demo_gguf, question))
    if question.per_byte:
        scores /= [len(text.strip().encode()) for text in question.continuations]
    best = int(scores.argmax())
    every = [Question(**{**question.__dict__, "right": right}) for right in range(len(scores))]
    assert answer(demo_gguf, every) == [right == best for right in range(len(scores))]


def test_division_by_bytes_can_change_the_answer(demo_gguf: Path) -> None:
    """A long answer is less likely than a short one whatever it says, and so loses unless that is made up for."""
    short, long = " x", " the house and the garden"
    (per_byte,) = answer(demo_gguf, [Question(1, "He went into", (short, long), right=1, per_byte=True)])
    (whole,) = answer(demo_gguf, [Question(1, "He went into", (short, long), right=1)])
    scores = likelihoods(demo_gguf, Question(1, "He went into", (short, long)))
    assert whole == (scores[1] > scores[0]) is False
    assert per_byte == (scores[1] / 24 > scores[0] / 1) is True


def test_written_answers_are_greedy_and_compared_by_their_number(demo_gguf: Path) -> None:
    prompt = "Question: 2 + 2 is 4 and 3 + 3 is 6 and 4 + 4 is\nAnswer:"
    with session(demo_gguf, Launch(context=512, threads=1)) as opened:
        tokens = opened.tokenize(prompt)
        start, logits = len(tokens), opened.run(tokens)
        while len(tokens) < start + 320:
            token = int(logits[-1].argmax())
            if opened.ends(token):
                break
            tokens.append(token)
            if "Question:" in opened.text(tokens[start:]):
                break
            logits = opened.extend([token], len(tokens) - 1)
        said = last_number(opened.text(tokens[start:]).partition("Question:")[0])
    questions = [Question(1, prompt, number=said or "none"), Question(2, prompt, number="123456789")]
    assert answer(demo_gguf, questions) == [said != "", False]


def test_what_no_batch_holds_is_refused_with_its_line(synthetic: toys.Maker) -> None:
    model = synthetic("qwen3moe")
    with pytest.raises(BadFile, match=r"task\.jsonl, line 7 is too long"):
        answer(model, [Question(7, "Why?", (" so", " " + "x" * 600))])
    with pytest.raises(BadFile, match=r"task\.jsonl, line 8 is too long"):
        answer(model, [Question(8, "x" * 20_000, (" so", " no"))])
    with pytest.raises(BadFile, match="line 9: no token"):
        answer(model, [Question(9, "", (" so", " no"))])
