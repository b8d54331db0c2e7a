"""How far an output distribution has moved: KL divergence, top-1 agreement and perplexity per token.

The reference log-probabilities are kept on disk as 16-bit steps below each token's maximum, so that a
large vocabulary over thousands of tokens is a file and not memory. A step is 24 / 65535 nats: rounding
moves one token's KL divergence D by at most about 1.8e-4 sqrt(2 D) nats, up or down, and the mean over a
few thousand tokens by less than 1e-6. Probabilities below e^-24 of the largest count as e^-24 of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

RANGE_NATS = 24.0
_STEP = RANGE_NATS / 65535
_BLOCK_VALUES = 1 << 23  # values per block of rows, which bounds the memory of a comparison

Floats = npt.NDArray[np.float32]


def log_softmax(logits: Floats) -> Floats:
    """Log-probabilities float32 [T, V] of ``logits`` float32 [T, V]."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    total: Floats = np.log(np.exp(shifted, dtype=np.float32).sum(axis=1, keepdims=True, dtype=np.float64))
    result: Floats = (shifted - total).astype(np.float32)
    return result


@dataclass(frozen=True)
class TokenScores:
    """One window compared with the reference; every array is float32 [T], or bool for ``same_top``.

    Attributes:
        divergence: KL(reference || candidate), nats.
        same_top: whether both rank the same token first.
        nll: negative log-likelihood of the actual next token under the candidate, nats; [T - 1].
        reference_nll: the same under the reference.
    """

    divergence: Floats
    same_top: npt.NDArray[np.bool_]
    nll: Floats
    reference_nll: Floats


@dataclass(frozen=True)
class Quality:
    """Summary over tokens.

    Attributes:
        kl_mean, kl_99, kl_999, kl_max: KL divergence, nats per token; mean, quantiles at 99 and 99.9 %, largest.
        same_top: fraction of tokens whose most likely successor is unchanged.
        perplexity: of the text under the candidate.
        reference_perplexity: of the text under the reference.
        tokens: how many tokens were compared.
    """

    kl_mean: float
    kl_99: float
    kl_999: float
    kl_max: float
    same_top: float
    perplexity: float
    reference_perplexity: float
    tokens: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Reference:
    """Log-probabilities of the original model over a list of windows, on disk.

    The file holds, window after window, uint16 [T, V]: round((max - logp) / step), and a float32 [T]
    of the maxima.
    """

    def __init__(self, path: Path, vocabulary: int) -> None:
        self.path, self.vocabulary = path, vocabulary
        self._position = 0

    def append(self, logits: Floats) -> None:
        """Add one window's logits [T, V]."""
        with self.path.open("ab") as stream:
            for block in _blocks(logits):
                logp = log_softmax(block)
                top = logp.max(axis=1, keepdims=True)
                steps = np.minimum((top - logp) / _STEP + 0.5, 65535)
                stream.write(top.astype(np.float32).tobytes())
                stream.write(steps.astype(np.uint16).tobytes())

    def nbytes(self, windows: Iterable[Sequence[int]]) -> int:
        """Bytes of the file for windows of these tokens."""
        return sum(len(tokens) * (2 * self.vocabulary + 4) for tokens in windows)

    def rewind(self) -> None:
        self._position = 0

    def next_block(self, rows: int) -> Floats:
        """Reference log-probabilities float32 [rows, V] of the next block, normalised."""
        with self.path.open("rb") as stream:
            stream.seek(self._position)
            top = np.frombuffer(stream.read(4 * rows), np.float32).reshape(rows, 1)
            count = 2 * rows * self.vocabulary
            steps = np.frombuffer(stream.read(count), np.uint16).reshape(rows, self.vocabulary)
            self._position = stream.tell()
        logp = top - steps.astype(np.float32) * np.float32(_STEP)
        total = np.log(np.exp(logp).sum(axis=1, keepdims=True, dtype=np.float64))
        normalised: Floats = (logp - total).astype(np.float32)
        return normalised

    def compare(self, logits: Floats, tokens: tuple[int, ...]) -> TokenScores:
        """The next window of the reference against ``logits`` [T, V] of the same ``tokens`` [T]."""
        divergence, same, nll, reference_nll = [], [], [], []
        successors = np.array([*tokens[1:], 0])
        start = 0
        for block in _blocks(logits):
            rows = len(block)
            expected, got = self.next_block(rows), log_softmax(block)
            divergence.append((np.exp(expected) * (expected - got)).sum(axis=1, dtype=np.float64))
            same.append(expected.argmax(axis=1) == got.argmax(axis=1))
            picked = successors[start : start + rows]
            nll.append(-got[np.arange(rows), picked])
            reference_nll.append(-expected[np.arange(rows), picked])
            start += rows
        return TokenScores(
            np.concatenate(divergence).astype(np.float32),
            np.concatenate(same),
            np.concatenate(nll)[:-1],
            np.concatenate(reference_nll)[:-1],
        )


def _blocks(logits: Floats) -> list[Floats]:
    rows = max(1, _BLOCK_VALUES // logits.shape[1])
    return [logits[start : start + rows] for start in range(0, len(logits), rows)]


def summarise(scores: list[TokenScores]) -> Quality:
    """One ``Quality`` over all windows in ``scores``."""
    divergence = np.concatenate([score.divergence for score in scores]).astype(np.float64)
    same = np.concatenate([score.same_top for score in scores])
    nll = np.concatenate([score.nll for score in scores])
    reference_nll = np.concatenate([score.reference_nll for score in scores])
    return Quality(
        kl_mean=float(divergence.mean()),
        kl_99=float(np.quantile(divergence, 0.99)),
        kl_999=float(np.quantile(divergence, 0.999)),
        kl_max=float(divergence.max()),
        same_top=float(same.mean()),
        perplexity=float(np.exp(nll.mean(dtype=np.float64))),
        reference_perplexity=float(np.exp(reference_nll.mean(dtype=np.float64))),
        tokens=len(divergence),
    )
