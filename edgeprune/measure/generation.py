"""Drawing a model's own answers, in a child process."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from edgeprune.errors import BadFile
from edgeprune.files import room_for
from edgeprune.measure.answers import MOST_TOKENS, TEMPERATURE, TOP_K, TOP_P, Answer, fitting, read_answers
from edgeprune.measure.launch import Launch
from edgeprune.measure.llama import Session, session
from edgeprune.measure.tasks import finite

Progress = Callable[[int, int], None]
_BATCH = 512


def generate(
    model: str,
    output: str,
    unfinished: str,
    questions: list[str],
    prompts: list[str],
    special: bool,
    count: int,
    made_from: dict[str, Any],
    threads: int = 0,
    progress: Progress | None = None,
) -> None:
    """Write ``count`` answers of ``model`` to ``output``.

    A task for ``edgeprune.measure.child``. Each answer is drawn for itself, whatever came before it; so those that
    ``output`` or ``unfinished``, the file in which they gather, already hold are kept.

    Args:
        questions: as a person asks them.
        prompts: the same as the model reads them; they are used in turn, each time with another seed.
        special: whether special tokens in ``prompts`` are meant as such.
    """
    found = [read_answers(Path(path)) for path in (output, unfinished)]
    kept = max((known[: fitting(known, made_from)] for known in found), key=len)[:count]
    gathering = Path(unfinished)
    gathering.parent.mkdir(parents=True, exist_ok=True)
    with room_for(gathering), gathering.open("wb") as stream:
        stream.writelines(answer.line() for answer in kept)
        for seed, tokens, response in _answers(model, prompts, special, range(len(kept), count), threads, progress):
            stream.write(Answer(questions[seed % len(questions)], response, tokens, seed, made_from).line())
            stream.flush()
        os.fsync(stream.fileno())
    gathering.replace(output)


def _answers(
    model: str, prompts: list[str], special: bool, seeds: range, threads: int, progress: Progress | None
) -> Iterator[tuple[int, list[int], str]]:
    """For each of ``seeds``: the seed, the tokens of prompt and answer, and the answer's words."""
    if not seeds:
        return
    with contextlib.closing(Session(Path(model), Launch(), vocab_only=True)) as vocabulary:
        asked = [vocabulary.tokenize(prompt, special=special) for prompt in prompts]
    if not all(asked):
        raise BadFile(f"{model}: its tokenizer makes nothing of a prompt")
    longest = max(map(len, asked))
    launch = Launch(context=longest + MOST_TOKENS, batch=min(longest, _BATCH), threads=threads)
    with session(Path(model), launch, single_output=True) as opened:
        for index, seed in enumerate(seeds):
            prompt, answer = asked[seed % len(asked)], list[int]()
            for token in _drawn(opened, model, prompt, seed):
                answer.append(token)
                if progress is not None:
                    progress(index * MOST_TOKENS + len(answer), len(seeds) * MOST_TOKENS)
            yield seed, prompt + answer, opened.text(answer)


def _drawn(opened: Session, model: str, prompt: list[int], seed: int) -> Iterator[int]:
    """The tokens of one answer, with the one that ends it."""
    opened.clear()
    logits = None
    for start in range(0, len(prompt), _BATCH):
        logits = opened.extend(prompt[start : start + _BATCH], start, all_logits=False)
    with opened.sampling(seed, temperature=TEMPERATURE, top_k=TOP_K, top_p=TOP_P) as draw:
        for position in range(len(prompt), len(prompt) + MOST_TOKENS):
            assert logits is not None
            finite(model, logits)
            token = draw()
            yield token
            if opened.ends(token):
                return
            logits = opened.extend([token], position, all_logits=False)
