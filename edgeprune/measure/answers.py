"""A model's own answers to a list of questions, as calibration text that no collection holds.

EASY-EP (arXiv 2504.06792) calibrates on what the model itself writes. Questions and answers are kept as token ids,
since words that are cut into tokens anew need not give the same ones. ``generation`` draws them.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from edgeprune.files import read_json

PROMPTS = Path(__file__).resolve().with_name("prompts.json")
MOST_TOKENS, TOP_K, TOP_P, TEMPERATURE = 256, 40, 0.95, 0.7
# Raised when answers would be other ones for the same model and prompts.
FORMAT = 1


@dataclass(frozen=True)
class Answer:
    """One answer, a line of JSON.

    Attributes:
        prompt: the question.
        response: the answer without special tokens, to be read by people.
        tokens: of both as the model had them, special ones included.
        seed: of the draws; also the number of the answer.
        made_from: model, prompts and ``recipe``.
    """

    prompt: str
    response: str
    tokens: list[int]
    seed: int
    made_from: dict[str, Any]

    def line(self) -> bytes:
        return json.dumps(asdict(self), ensure_ascii=False).encode() + b"\n"


def shipped_prompts() -> list[str]:
    """Questions of all kinds, which take turns."""
    by_kind = read_json(PROMPTS).values()
    return [prompt for turn in zip_longest(*by_kind) for prompt in turn if prompt is not None]


def recipe() -> str:
    """How answers are drawn."""
    return f"format {FORMAT}, {MOST_TOKENS} tokens, top-k {TOP_K}, top-p {TOP_P}, temperature {TEMPERATURE}"


def read_answers(path: Path) -> list[Answer]:
    """The answers in ``path`` up to the first that is cut off or damaged; none if there is no such file."""
    found: list[Answer] = []
    with contextlib.suppress(OSError, ValueError, TypeError, RecursionError), path.open("rb") as stream:
        for line in stream:
            answer = Answer(**json.loads(line))
            whole = isinstance(answer.tokens, list) and all(type(token) is int for token in answer.tokens)
            if not whole or answer.seed != len(found) or not line.endswith(b"\n"):
                break
            found.append(answer)
    return found


def fitting(found: list[Answer], made_from: Mapping[str, Any]) -> int:
    """How many of the first answers were made from ``made_from``."""
    return next((index for index, answer in enumerate(found) if answer.made_from != made_from), len(found))
