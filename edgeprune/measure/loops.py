"""Long generations, in a child process: does a model lose itself in repetition?"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.errors import BadFile
from edgeprune.measure.answers import TEMPERATURE, TOP_K, TOP_P
from edgeprune.measure.launch import Launch
from edgeprune.measure.llama import Session, session
from edgeprune.measure.repetition import MODES, SAMPLED, ends_in_loop, repeated_share
from edgeprune.measure.tasks import finite

Progress = Callable[[int, int], None]
_BATCH = 512
_SHOWN = 160  # characters of an example


def loops(
    model: str,
    prompts: list[str],
    special: bool,
    length: int,
    threads: int = 0,
    progress: Progress | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """What ``model`` makes of each of ``prompts``, once greedily and once sampled with the prompt's number as seed.

    A task for ``edgeprune.measure.child``.

    Args:
        special: whether special tokens in ``prompts`` are meant as such.
        length: most tokens of a generation.

    Returns:
        by mode and for each prompt ``{"loops", "repeated_share", "tokens", "end"}``, ``end`` being its last words.
    """
    with contextlib.closing(Session(Path(model), Launch(), vocab_only=True)) as vocabulary:
        asked = [vocabulary.tokenize(prompt, special=special) for prompt in prompts]
    if not all(asked):
        raise BadFile(f"{model}: its tokenizer makes nothing of a prompt")
    longest = max(map(len, asked))
    launch = Launch(context=longest + length, batch=min(longest, _BATCH), threads=threads)
    found: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
    with session(Path(model), launch, single_output=True) as opened:
        for number, prompt in enumerate(asked):
            for turn, mode in enumerate(MODES):
                tokens: list[int] = []
                for token in _written(opened, model, prompt, number if mode == SAMPLED else None, length):
                    tokens.append(token)
                    if progress is not None:
                        before = (number * len(MODES) + turn) * length
                        progress(before + len(tokens), len(asked) * len(MODES) * length)
                found[mode].append(_looked_at(opened, tokens, length))
    return found


def _looked_at(opened: Session, tokens: list[int], length: int) -> dict[str, Any]:
    return {
        "loops": len(tokens) == length and ends_in_loop(tokens),
        "repeated_share": repeated_share(tokens),
        "tokens": len(tokens),
        "end": opened.text(tokens)[-_SHOWN:],
    }


def _written(opened: Session, model: str, prompt: Sequence[int], seed: int | None, length: int) -> Iterator[int]:
    """The tokens that follow ``prompt``, ``length`` at most and without the one that ends them; greedily without a
    seed."""
    opened.clear()
    logits = None
    for start in range(0, len(prompt), _BATCH):
        logits = opened.extend(prompt[start : start + _BATCH], start, all_logits=False)
    with opened.sampling(seed or 0, temperature=TEMPERATURE, top_k=TOP_K, top_p=TOP_P) as draw:
        for position in range(len(prompt), len(prompt) + length):
            assert logits is not None
            finite(model, logits)
            token = int(np.argmax(logits[-1])) if seed is None else draw()
            if opened.ends(token):
                return
            yield token
            logits = opened.extend([token], position, all_logits=False)
