"""Questions with known answers, in files as they are published: JSON lines of HellaSwag, ARC, MMLU and GSM8K, and the
tables of MMLU: CSV without a head, a question, four answers and a letter in each row, the subject in the file's name.

Prompts and scores follow the habits of EleutherAI's lm-evaluation-harness, without examples in front:

- `hellaswag`: the activity and the beginning of a story; the likeliest ending per byte counts;
- `arc`: `Question: ...` and `Answer:`; the likeliest answer per byte counts;
- `mmlu`: the subject, the question and its lettered answers; the likeliest letter counts;
- `gsm8k`: `Question: ...` and `Answer:`; the model writes, and the last number counts.

A file is read line by line and never held whole.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from edgeprune.errors import BadFile, UsageError

HELLASWAG, ARC, MMLU, GSM8K = "hellaswag", "arc", "mmlu", "gsm8k"
_MOST_LINE_BYTES = 1 << 20
_MOST_CHOICES = 26
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_HEAD = ["question", "a", "b", "c", "d", "answer"]  # of a table, which need not have one
# A minus behind a digit, a letter or a bracket is none of the number's. No answer has three digits in its exponent.
_NUMBER = re.compile(r"(?:(?<![\w)])-)?\$?\d[\d,]*(?:\.\d+)?(?:[eE][+-]?\d{1,2}(?!\w))?")


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        line: of the file, from 1.
        prompt: what the model reads.
        continuations: of which one is right; empty where the model writes its answer.
        right: index of the right continuation.
        per_byte: whether log-likelihoods are divided by the bytes of their continuation.
        number: the right answer where the model writes one, else "".
    """

    line: int
    prompt: str
    continuations: tuple[str, ...] = ()
    right: int = 0
    per_byte: bool = False
    number: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def parse_task(value: str) -> tuple[Path, str]:
    """``FILE`` or ``FILE:FORMAT``: the file and its format, which its first line tells if it is not named.

    Raises:
        UsageError: no such file or format.
        BadFile: the first line fits no format.
    """
    name, separator, form = value.rpartition(":")
    if not separator or form not in FORMATS:
        name, form = value, ""
    path = Path(name)
    if not path.is_file():
        if separator and Path(value.rpartition(":")[0]).is_file():
            raise UsageError(f"--task {value}: no format {value.rpartition(':')[2]!r}", hint=_KNOWN)
        raise UsageError(f"no task file {path}")
    return path, form or _told(path)


def read_questions(path: Path, form: str) -> Iterator[Question]:
    """Every question of ``path``.

    Raises:
        BadFile: a line that is no record of ``form``, named by its number; or no question at all.
    """
    empty = True
    for number, record in _records(path):
        empty = False
        try:
            yield FORMATS[form](number, record)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            missing = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise BadFile(f"{path}, line {number} is no record of {form}: {missing}"[:300]) from error
    if empty:
        raise BadFile(f"{path} is empty")


def chosen_questions(path: Path, form: str, most: int) -> tuple[list[Question], int]:
    """At most ``most`` questions, spread over the file, since files are often sorted by subject; and how many it has.

    Raises:
        BadFile: as ``read_questions``; every line is looked at.
    """
    count = sum(1 for _ in read_questions(path, form))
    taken = min(count, most)
    wanted = {position * count // taken for position in range(taken)}
    return [question for index, question in enumerate(read_questions(path, form)) if index in wanted], count


def last_number(text: str) -> str:
    """The last number in ``text`` in its plainest form, "" if there is none: ``"so $1,200.00."`` gives ``"1200"``.

    Two numbers are the same if these texts are.
    """
    found = _NUMBER.findall(text)
    if not found:
        return ""
    plain = format(Decimal(found[-1].replace(",", "").replace("$", "")), "f")
    sign, digits = ("-", plain[1:]) if plain.startswith("-") else ("", plain)
    whole, _, fraction = digits.partition(".")
    whole, fraction = whole.lstrip("0") or "0", fraction.rstrip("0")
    number = f"{whole}.{fraction}" if fraction else whole
    return f"{sign}{number}" if number != "0" else "0"


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of every line, none of which is long enough to fill the memory."""
    try:
        with path.open("rb") as stream:
            number = 0
            while raw := stream.readline(_MOST_LINE_BYTES + 1):
                number += 1
                if len(raw) > _MOST_LINE_BYTES:
                    raise BadFile(f"{path}, line {number} is longer than {_MOST_LINE_BYTES:,} bytes")
                yield number, raw
    except OSError as error:
        raise BadFile(f"cannot read {path}: {error.strerror or error}") from error


def _records(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Number of the line and JSON object of every line that is not blank; of a table, the last line and the row."""
    if _is_table(path):
        yield from _rows(path)
        return
    for number, raw in _lines(path):
        if raw.strip():
            yield number, _record(raw, f"{path}, line {number}")


def _is_table(path: Path) -> bool:
    return path.suffix.lower() == ".csv"


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The rows of a table of MMLU, as the records that its JSON lines have."""
    subject = re.sub(r"_(test|val|dev)$", "", path.stem)
    reader = csv.reader(_decoded(path), strict=True)
    try:
        for row in reader:
            if not row or (reader.line_num == 1 and [cell.strip().lower() for cell in row] == _HEAD):
                continue
            if len(row) != len(_HEAD):
                raise BadFile(
                    f"{path}, line {reader.line_num} has {len(row)} columns",
                    hint="a table of MMLU has six: the question, answers A to D, and the letter of the right one",
                )
            question, *choices, answer = row
            yield (
                reader.line_num,
                {"question": question, "choices": choices, "answer": answer.strip(), "subject": subject},
            )
    except csv.Error as error:
        raise BadFile(f"{path}, line {reader.line_num} is no row of a table: {error}") from error


def _decoded(path: Path) -> Iterator[str]:
    for number, raw in _lines(path):
        try:
            yield raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise BadFile(f"{path}, line {number} is not in UTF-8: {error}"[:300]) from error


def _record(raw: bytes, where: str) -> Mapping[str, Any]:
    try:
        value = json.loads(raw.decode("utf-8-sig"))
        json.dumps(value, ensure_ascii=False).encode()  # half a character is JSON, but no text
    except ValueError as error:
        raise BadFile(f"{where} is not JSON in UTF-8: {error}"[:300]) from error
    except RecursionError:
        raise BadFile(f"{where} is nested too deeply to be honest JSON") from None
    if not isinstance(value, dict):
        raise BadFile(f"{where} is no JSON object")
    return value


def _told(path: Path) -> str:
    """The format of the first record, by the keys that only it has."""
    for number, record in _records(path):
        for form, keys in _KEYS.items():
            if keys <= record.keys():
                return form
        raise BadFile(f"{path}, line {number} is a record of no known task", hint=f"name it: FILE:FORMAT; {_KNOWN}")
    raise BadFile(f"{path} is empty")


def _text(record: Mapping[str, Any], key: str) -> str:
    value = record[key]
    if not isinstance(value, str):
        raise TypeError(f"{key} is no text")
    return value


def _texts(values: Any, what: str) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(value, str) and value.strip() for value in values):
        raise TypeError(f"{what} is no list of texts")
    if not 2 <= len(values) <= _MOST_CHOICES:
        raise ValueError(f"{len(values)} {what}")
    return tuple(values)


def _index(value: Any, count: int) -> int:
    """A position, as a number or in digits, of ``count`` things."""
    if isinstance(value, bool) or not str(value).isdecimal() or not int(value) < count:
        raise ValueError(f"the right answer is {str(value)[:40]!r}, of {count}")
    return int(value)


def _tidied(text: str) -> str:
    """HellaSwag's own tidying: ``[title]`` ends a sentence, other words in brackets are the annotators'."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _hellaswag(line: int, record: Mapping[str, Any]) -> Question:
    begun = f"{_text(record, 'ctx_a')} {_text(record, 'ctx_b').capitalize()}"
    endings = tuple(_tidied(ending) for ending in _texts(record["endings"], "endings"))
    prompt = _tidied(f"{_text(record, 'activity_label')}: {begun}").rstrip()
    right = _index(record["label"], len(endings))
    return Question(line, prompt, tuple(f" {ending}" for ending in endings), right, per_byte=True)


def _arc(line: int, record: Mapping[str, Any]) -> Question:
    """As AI2 publishes it, the question in a table with its ``stem``; or as the Hub has it, in columns."""
    asked = record["question"]
    if isinstance(asked, dict):
        stem, labels = _text(asked, "stem"), [choice["label"] for choice in asked["choices"]]
        answers = _texts([choice["text"] for choice in asked["choices"]], "choices")
    else:
        stem, labels = _text(record, "question"), record["choices"]["label"]
        answers = _texts(record["choices"]["text"], "choices")
    if not isinstance(labels, list) or len(labels) != len(answers):
        raise ValueError(f"{len(answers)} choices have not as many labels")
    right = labels.index(_text(record, "answerKey"))
    continuations = tuple(f" {answer.strip()}" for answer in answers)
    return Question(line, f"Question: {stem.strip()}\nAnswer:", continuations, right, per_byte=True)


def _mmlu(line: int, record: Mapping[str, Any]) -> Question:
    choices, answer = _texts(record["choices"], "choices"), record["answer"]
    if isinstance(answer, str) and len(answer) == 1 and answer in _LETTERS:
        answer = _LETTERS.index(answer)
    subject = record.get("subject") or ""
    about = f" about {subject.replace('_', ' ')}" if isinstance(subject, str) and subject else ""
    lettered = "\n".join(f"{letter}. {choice}" for letter, choice in zip(_LETTERS, choices, strict=False))
    prompt = (
        f"The following are multiple choice questions (with answers){about}.\n\n"
        f"{_text(record, 'question').strip()}\n{lettered}\nAnswer:"
    )
    letters = tuple(f" {letter}" for letter in _LETTERS[: len(choices)])
    return Question(line, prompt, letters, _index(answer, len(choices)))


def _gsm8k(line: int, record: Mapping[str, Any]) -> Question:
    _, separator, final = _text(record, "answer").rpartition("####")
    number = last_number(final)
    if not separator or not number:
        raise ValueError("the answer ends in no '#### number'")
    return Question(line, f"Question: {_text(record, 'question').strip()}\nAnswer:", number=number)


FORMATS: dict[str, Callable[[int, Mapping[str, Any]], Question]] = {
    HELLASWAG: _hellaswag,
    ARC: _arc,
    MMLU: _mmlu,
    GSM8K: _gsm8k,
}
_KEYS = {
    HELLASWAG: {"endings", "ctx_a"},
    ARC: {"question", "answerKey"},
    MMLU: {"question", "choices", "answer"},
    GSM8K: {"question", "answer"},
}
_KNOWN = f"known are {', '.join(FORMATS)}"
