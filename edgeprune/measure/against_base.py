"""Reading and writing llama.cpp's files of reference log-probabilities with a model at hand, in a child process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeprune.errors import BadFile
from edgeprune.files import atomic_writer, require_space
from edgeprune.measure.divergence import summarise
from edgeprune.measure.kld_base import CHUNK, BaseFile, encoded, scores
from edgeprune.measure.launch import Launch
from edgeprune.measure.llama import Session, session
from edgeprune.measure.tasks import chosen_windows, finite

Progress = Callable[[int, int], None]
_BATCH = 256  # rows of logits that are held at a time


def compare(model: str, base: str, threads: int = 0, progress: Progress | None = None) -> dict[str, Any]:
    """``Quality`` of ``model`` against the file ``base``, as JSON.

    A task for ``edgeprune.measure.child``.

    Raises:
        BadFile: the file is of another vocabulary, or damaged.
    """
    file, found = BaseFile.read(Path(base)), []
    launch = Launch(context=file.context, batch=min(file.context, _BATCH), threads=threads)
    with session(Path(model), launch) as opened:
        if opened.vocabulary_size != file.vocabulary:
            raise BadFile(
                f"{base} is of another model than {model}",
                rows=[("its vocabulary", f"{file.vocabulary:,}"), ("the model's", f"{opened.vocabulary_size:,}")],
            )
        for chunk, tokens in enumerate(file.tokens()):
            for start, logits in _second_half(opened, model, tokens):
                reference = file.log_probabilities(chunk, start - file.context // 2, len(logits))
                found.append(scores(reference, logits, tokens[start + 1 : start + 1 + len(logits)]))
            if progress is not None:
                progress(chunk + 1, file.chunks)
    return summarise(found).to_json()


def write(
    model: str,
    output: str,
    texts: list[dict[str, str]],
    split: str,
    window: int,
    most_tokens: int,
    context: int = CHUNK,
    threads: int = 0,
    progress: Progress | None = None,
) -> dict[str, int]:
    """Write the log-probabilities of ``model`` over a split of the text, its windows joined and cut into chunks.

    A task for ``edgeprune.measure.child``.

    Args:
        context: tokens per chunk; fewer where the text is shorter.

    Returns:
        ``chunks`` and ``nbytes``.
    """
    path = Path(output)
    launch = Launch(context=context, batch=min(context, _BATCH), threads=threads)
    with session(Path(model), launch) as opened:
        parts = chosen_windows(opened, texts, split, window, most_tokens)
        joined = np.array([token for part in parts for token in part.tokens], "<i4")
        length = min(context, len(joined))
        file = BaseFile(path, length, opened.vocabulary_size, len(joined) // length)
        chunks = joined[: file.chunks * length].reshape(file.chunks, length)
        require_space(path.parent, file.nbytes)
        with atomic_writer(path) as stream:
            stream.write(file.head(chunks))
            for number, tokens in enumerate(chunks):
                for _, logits in _second_half(opened, model, tokens):
                    stream.write(encoded(logits))
                if progress is not None:
                    progress(number + 1, file.chunks)
    return {"chunks": file.chunks, "nbytes": file.nbytes}


def _second_half(
    opened: Session, model: str, tokens: npt.NDArray[np.int32]
) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
    """Position of the first row, and logits, block by block, from the middle of a chunk to its last token but one."""
    first, end = len(tokens) // 2, len(tokens) - 1
    ids = tokens.tolist()
    if (start := opened.begins_with) is not None:
        ids[0] = start
    batch = min(opened.launch.batch, _BATCH)
    opened.clear()
    for position in range(0, first, batch):
        opened.extend(ids[position : min(position + batch, first)], position, all_logits=False)
    for position in range(first, end, batch):
        yield position, finite(model, opened.extend(ids[position : min(position + batch, end)], position))
