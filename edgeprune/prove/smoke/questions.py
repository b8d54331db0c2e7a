"""A dozen questions with checkable answers, and what can be said of any text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgeprune.files import read_json

_FILE = Path(__file__).resolve().with_name("questions.json")
# An answer of so many tokens that knows fewer different ones is a loop.
_LONG, _LEAST_DIFFERENT = 8, 3
REPEATED = 3  # questions that are asked twice


@dataclass(frozen=True)
class Question:
    """A question.

    Attributes:
        name: short.
        ask: as a person asks it.
        plain: the same as a text to be carried on, for models without a chat template.
        accept: words or numbers, one of which a right answer holds.
    """

    name: str
    ask: str
    plain: str
    accept: tuple[str, ...]

    def answered(self, text: str) -> bool:
        """Whether ``text`` holds one of the accepted answers as a word or number of its own, in upper or lower case;
        a single letter has to be a capital."""
        for wanted in self.accept:
            case = re.NOFLAG if len(wanted) == 1 else re.IGNORECASE
            if re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", text, case):
                return True
        return False


def questions() -> list[Question]:
    """The shipped questions, always in the same order."""
    return [Question(row["name"], row["ask"], row["plain"], tuple(row["accept"])) for row in read_json(_FILE)]


def plausible(tokens: Sequence[int], text: str) -> bool:
    """Whether an answer could be one: not empty, and no loop of one or two tokens."""
    said = tokens or text.split()  # a server may tell the text alone
    return bool(text.strip()) and (len(said) < _LONG or len(set(said)) >= _LEAST_DIFFERENT)
