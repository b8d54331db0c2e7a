"""How far a model moves on a text, in a child process, and what other tasks share that read texts.

The tasks are pure functions of files and numbers that ``edgeprune.measure.child.call`` runs; they return JSON-like
values.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeprune.errors import NotFinite
from edgeprune.files import require_space, room_for
from edgeprune.measure.channels import Channels
from edgeprune.measure.divergence import Quality, Reference, TokenScores, summarise
from edgeprune.measure.documents import Document
from edgeprune.measure.launch import Launch
from edgeprune.measure.llama import EvalCallback, Session, session
from edgeprune.measure.observers import ChannelMask, Disturbance, Masks, RouterMask
from edgeprune.measure.text import LeftOut, TextFile, Window, windows
from edgeprune.model.gguf import GgufFile
from edgeprune.model.soundness import first_not_finite

Progress = Callable[[int, int], None]


def _texts(rows: list[dict[str, str]]) -> list[TextFile]:
    return [TextFile(**row) for row in rows]


def window_launch(window: int, threads: int) -> Launch:
    """Settings to decode windows of so many tokens at once."""
    return Launch(context=window, batch=window, threads=threads)


def chosen_windows(
    opened: Session,
    texts: list[dict[str, str]],
    split: str,
    window: int,
    most: int,
    left_out: dict[str, LeftOut] | None = None,
) -> list[Window]:
    """The windows of ``split``, in the model's tokens; ``left_out`` as for ``text.windows``."""

    def ids(document: Document) -> Sequence[int]:
        return document.tokens or opened.tokenize(document.text, special=document.special)

    return windows(_texts(texts), split, window, most, ids, left_out)


def finite(model: str, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """``logits`` of a window, of which the last row has seen every token.

    Raises:
        NotFinite: they are not; names the tensor that is to blame, if one can be found.
    """
    if np.isfinite(logits[-1]).all():
        return logits
    blamed = first_not_finite(GgufFile(Path(model)))
    raise NotFinite(
        f"{model} computes values that are not finite",
        rows=[("holds NaN or infinity", blamed)] if blamed else [],
        hint="the file is damaged, or overflowed when it was made; get it again",
    )


def reference(
    model: str,
    output: str,
    texts: list[dict[str, str]],
    split: str,
    window: int,
    most_tokens: int,
    threads: int = 0,
    progress: Progress | None = None,
) -> dict[str, int]:
    """Log-probabilities of ``model`` over the ``split`` of the text, for later comparisons."""
    partial = Path(output + ".partial")
    partial.unlink(missing_ok=True)
    with room_for(Path(output)), session(Path(model), window_launch(window, threads)) as opened:
        chosen = chosen_windows(opened, texts, split, window, most_tokens)
        kept = Reference(partial, opened.vocabulary_size)
        require_space(partial.parent, kept.nbytes(part.tokens for part in chosen))
        for index, part in enumerate(chosen):
            kept.append(finite(model, opened.run(part.tokens)))
            if progress is not None:
                progress(index + 1, len(chosen))
    partial.replace(output)
    return {"tokens": sum(len(part.tokens) for part in chosen), "windows": len(chosen)}


def compared(
    opened: Session, chosen: list[Window], kept: Reference, progress: Progress | None
) -> Iterator[TokenScores]:
    """Scores of every one of the ``chosen`` windows against what is ``kept`` of them."""
    kept.rewind()
    for index, part in enumerate(chosen):
        yield kept.compare(opened.run(part.tokens), part.tokens)
        if progress is not None:
            progress(index + 1, len(chosen))


def divergence(
    model: str,
    reference: str,
    texts: list[dict[str, str]],
    split: str,
    window: int,
    most_tokens: int,
    masks: list[dict[str, list[int]] | None],
    experts: int = 0,
    narrowed: list[dict[str, Any] | None] | None = None,
    threads: int = 0,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Quality of ``model`` against the stored reference, once for each router mask.

    Args:
        masks: each None, or kept expert ids by layer (as text, JSON has no integer keys).
        narrowed: beside each mask None, or ``{"width": kept channels of every expert, "channels": file with their
            order}``.

    Returns:
        for each mask ``{"all": Quality, "domains": {name: Quality}, "windows": [[tokens, nats], ...], "undivided":
        [domains that are in both halves of the held-out text]}`` as JSON.
    """
    results = []
    observer = Switch()
    with session(Path(model), window_launch(window, threads), observer) as opened:
        chosen = chosen_windows(opened, texts, split, window, most_tokens)
        kept = Reference(Path(reference), opened.vocabulary_size)
        for number, mask in enumerate(masks):
            current = _masks(mask, experts, narrowed[number] if narrowed else None)
            observer.current = current
            report = _scaled(progress, number, len(masks))
            scores = list(compared(opened, chosen, kept, report))
            current.check()
            results.append(_by_domain(scores, chosen))
    return results


def _masks(mask: dict[str, list[int]] | None, experts: int, narrowed: dict[str, Any] | None) -> Masks:
    """Observers that take out what is not in ``mask`` and ``narrowed``, as for ``divergence``."""
    found: list[RouterMask | ChannelMask] = []
    if mask:
        found.append(RouterMask({int(layer): ids for layer, ids in mask.items()}, experts))
    if narrowed:
        found.append(ChannelMask(Channels.load(Path(narrowed["channels"])), narrowed["width"]))
    return Masks(found)


def _by_domain(scores: list[TokenScores], chosen: list[Window]) -> dict[str, Any]:
    domains: dict[str, list[TokenScores]] = {}
    for score, part in zip(scores, chosen, strict=True):
        domains.setdefault(part.domain, []).append(score)
    return {
        "all": summarise(scores).to_json(),
        "domains": {name: summarise(own).to_json() for name, own in domains.items()},
        "windows": [[len(score.divergence), float(score.divergence.sum(dtype=np.float64))] for score in scores],
        "undivided": sorted({part.domain for part in chosen if part.undivided}),
    }


class Switch:
    """An observer whose behaviour can be exchanged between passes of one session."""

    def __init__(self) -> None:
        self.current: EvalCallback | None = None

    def __call__(self, node: Any, ask: bool) -> bool:
        return self.current is not None and self.current(node, ask)


def _scaled(progress: Progress | None, number: int, count: int) -> Progress | None:
    if progress is None:
        return None
    return lambda done, total: progress(number * total + done, count * total)


def disturb(
    model: str,
    reference: str,
    texts: list[dict[str, str]],
    split: str,
    window: int,
    most_tokens: int,
    sites: list[dict[str, Any]],
    threads: int = 0,
    progress: Progress | None = None,
) -> list[float | None]:
    """Mean KL divergence in nats per token, for noise at each of ``sites`` in turn; None where the graph
    has no such product.

    Args:
        sites: each ``{"weight": name, "lookup": bool, "relative_square": size of the error}``.
    """
    results = []
    observer = Switch()
    with session(Path(model), window_launch(window, threads), observer) as opened:
        chosen = chosen_windows(opened, texts, split, window, most_tokens)
        kept = Reference(Path(reference), opened.vocabulary_size)
        for number, site in enumerate(sites):
            disturbance = Disturbance(
                site["weight"],
                lookup=site["lookup"],
                relative_square=site["relative_square"],
                seed=number,
            )
            observer.current = disturbance
            quality: Quality = summarise(list(compared(opened, chosen, kept, None)))
            results.append(quality.kl_mean if disturbance.touched else None)
            if progress is not None:
                progress(number + 1, len(sites))
    return results


def tokenize(model: str, texts: list[str], special: bool = False) -> list[list[int]]:
    """llama.cpp's token ids of each text, from the vocabulary alone; ``special``: framed, special tokens parsed."""
    opened = Session(Path(model), Launch(), vocab_only=True)
    with contextlib.closing(opened):
        return [opened.tokenize(text, framed=special, special=special) for text in texts]
