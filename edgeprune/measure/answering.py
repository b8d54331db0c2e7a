"""A model answers questions, in a child process: by the likelihood of given answers, or in its own words."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.errors import BadFile
from edgeprune.measure.divergence import log_softmax
from edgeprune.measure.launch import Launch
from edgeprune.measure.llama import Session, session
from edgeprune.measure.questions import Question, last_number
from edgeprune.measure.tasks import finite

Progress = Callable[[int, int], None]
_BATCH = 512
_MOST_TOKENS = 16_384  # of a question with its answers
_WRITTEN = 320  # tokens of an answer in the model's own words
_NEXT = "Question:"  # a model that writes this has begun to ask the next one


def answer(
    model: str, questions: list[dict[str, Any]], name: str, threads: int = 0, progress: Progress | None = None
) -> list[bool]:
    """Whether ``model`` answers each of ``questions`` rightly.

    A task for ``edgeprune.measure.child``. Of a question with given answers, what they have in common is decoded
    once; that with the largest log-likelihood, or log-likelihood per byte, is the model's. Of two as likely, the
    first is. Other questions are answered greedily.

    Args:
        questions: as ``Question`` writes them.
        name: of the file, for messages.

    Raises:
        BadFile: a question that is too long, or of which no token stands in front of the answers.
    """
    asked = [Question(**{**value, "continuations": tuple(value["continuations"])}) for value in questions]
    with contextlib.closing(Session(Path(model), Launch(), vocab_only=True)) as vocabulary:
        sheets = [_Sheet.of(vocabulary, question) for question in asked]
    for question, sheet in zip(asked, sheets, strict=True):
        sheet.check(f"{name}, line {question.line}")
    needed = max(sheet.tokens for sheet in sheets)
    launch = Launch(context=max(needed, _BATCH), batch=_BATCH, threads=threads)
    sequences = 1 + max(len(sheet.continuations) for sheet in sheets)
    found = []
    with session(Path(model), launch, sequences=sequences) as opened:
        for number, (question, sheet) in enumerate(zip(asked, sheets, strict=True)):
            if question.continuations:
                found.append(_most_likely(opened, model, question, sheet) == question.right)
            else:
                found.append(last_number(_written(opened, model, sheet)) == question.number)
            if progress is not None:
                progress(number + 1, len(asked))
    return found


class _Sheet:
    """A question in tokens: what its continuations share, and the rest of each."""

    def __init__(self, shared: list[int], continuations: list[list[int]]) -> None:
        self.shared, self.continuations = shared, continuations

    @property
    def tokens(self) -> int:
        own = sum(map(len, self.continuations)) if self.continuations else _WRITTEN
        return len(self.shared) + own

    def check(self, where: str) -> None:
        """Refuse what no context or batch of ours holds.

        Raises:
            BadFile: names the line.
        """
        if not self.shared:
            raise BadFile(f"{where}: no token of the question stands in front of its answers")
        if max(map(len, self.continuations), default=0) > _BATCH or self.tokens > _MOST_TOKENS:
            raise BadFile(
                f"{where} is too long: {self.tokens:,} tokens",
                hint=f"the most are {_MOST_TOKENS:,}, and {_BATCH} of an answer",
            )

    @classmethod
    def of(cls, vocabulary: Session, question: Question) -> _Sheet:
        """Cut where the texts are still the same in tokens, as words at the seam may be joined in a token; each rest
        has a token at least."""
        prompt = vocabulary.tokenize(question.prompt)
        wholes = [vocabulary.tokenize(question.prompt + more) for more in question.continuations]
        common = min([len(prompt), *(_common(prompt, whole) for whole in wholes)])
        if wholes:
            common = min(common, *(len(whole) - 1 for whole in wholes))
        return cls(prompt[:common], [whole[common:] for whole in wholes])


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def _read(opened: Session, tokens: Sequence[int]) -> Any:
    """Decode ``tokens`` from an empty context; logits [1, vocabulary] of the last."""
    opened.clear()
    logits = None
    for start in range(0, len(tokens), _BATCH):
        logits = opened.extend(tokens[start : start + _BATCH], start, all_logits=False)
    return logits


def _most_likely(opened: Session, model: str, question: Question, sheet: _Sheet) -> int:
    """Index of the continuation that the model takes for the most likely one."""
    first = log_softmax(finite(model, _read(opened, sheet.shared)))[0]
    scores = [float(first[own[0]]) for own in sheet.continuations]
    longer = [index for index, own in enumerate(sheet.continuations) if len(own) > 1]
    for group in _groups(sheet.continuations, longer):
        logits = opened.branch([sheet.continuations[index][:-1] for index in group], len(sheet.shared))
        start = 0
        for index in group:
            rest = sheet.continuations[index][1:]
            rows = log_softmax(finite(model, logits[start : start + len(rest)]))
            scores[index] += float(rows[np.arange(len(rest)), rest].sum(dtype=np.float64))
            start += len(rest)
    if question.per_byte:
        scores = [
            score / len(text.strip().encode()) for score, text in zip(scores, question.continuations, strict=True)
        ]
    return int(np.argmax(scores))


def _groups(continuations: Sequence[Sequence[int]], indices: Sequence[int]) -> list[list[int]]:
    """``indices`` in groups that a batch holds."""
    groups: list[list[int]] = []
    room = 0
    for index in indices:
        size = len(continuations[index]) - 1
        if size > room:
            groups.append([])
            room = _BATCH
        groups[-1].append(index)
        room -= size
    return groups


def _written(opened: Session, model: str, sheet: _Sheet) -> str:
    """The model's own answer, up to the question that it may ask next."""
    logits, tokens, text = _read(opened, sheet.shared), list[int](), ""
    for position in range(len(sheet.shared), len(sheet.shared) + _WRITTEN):
        token = int(np.argmax(finite(model, logits)[-1]))
        if opened.ends(token):
            break
        tokens.append(token)
        text = opened.text(tokens)
        if _NEXT in text:
            break
        logits = opened.extend([token], position, all_logits=False)
    return text.partition(_NEXT)[0]
