"""Looking for damage in a file of weights: values that are no numbers.

What a model computes does not always show them. llama.cpp rounds what goes into a product with quantised weights to
eight bits, by comparisons that NaN never wins: a norm that holds NaN then leaves finite logits behind, of nonsense.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from edgeprune.model import ggml
from edgeprune.model.gguf import GgufFile

_STEP = 1 << 26  # bytes looked at together


def first_not_finite(file: GgufFile, progress: Callable[[int, int], None] | None = None) -> str:
    """Name of the first tensor that holds NaN or infinity, in its weights or in the scales of its blocks, or "".

    ggml's own check of a row says so, for every type that it knows. Every byte is read.

    Args:
        progress: called with the bytes that were looked at and all there are.
    """
    total = sum(info.nbytes for info in file.tensors.values())
    done = 0
    for info in file.tensors.values():
        kind, raw = ggml.BY_NAME[info.type], file.raw(info.name)
        step = _STEP // kind.block_bytes * kind.block_bytes
        for start in range(0, raw.size, step):
            part = raw[start : start + step]
            if not ggml.is_sound(kind, part):
                return info.name
            done += part.size
            if progress is not None:
                progress(done, total)
        file.release(info.name)
    return ""


def look(model: str, progress: Callable[[int, int], None] | None = None) -> str:
    """``first_not_finite`` of the file ``model``, as a task for ``edgeprune.measure.child``."""
    return first_not_finite(GgufFile(Path(model)), progress)
