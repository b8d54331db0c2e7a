"""llama.cpp's files of reference log-probabilities, those of ``llama-perplexity --kl-divergence-base``.

Little-endian, without padding (tools/perplexity/perplexity.cpp):

- ``_logits_``, then int32 tokens per chunk (c), size of the vocabulary (v), chunks (n); int32 [n, c] tokens;
- of every chunk, for positions c // 2 to c - 2, a row: float32 step, float32 log-probability of code 0, and
  uint16 [v] codes, one more where v is odd. A code stands for step * code + that log-probability; codes reach down
  to e^-16 of the largest probability.

Each chunk is decoded for itself, with BOS in place of its first token where the model wants one. What lies below
e^-16 takes no part in a divergence, as in llama.cpp. ``against_base`` runs the model.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgeprune.errors import BadFile
from edgeprune.measure.divergence import TokenScores, log_softmax

Floats = npt.NDArray[np.float32]
MAGIC = b"_logits_"
CHUNK = 512  # tokens per chunk, llama-perplexity's own default
_HEADER = struct.Struct("<8s3i")
_LOWEST = np.float32(-16)
_MOST_CONTEXT, _MOST_VOCABULARY = 1 << 20, 1 << 24


@dataclass(frozen=True)
class BaseFile:
    """The head of such a file.

    Attributes:
        context: tokens per chunk.
        vocabulary: log-probabilities per row.
        chunks: how many.
    """

    path: Path
    context: int
    vocabulary: int
    chunks: int

    @property
    def rows(self) -> int:
        """Rows per chunk."""
        return self.context - 1 - self.context // 2

    @property
    def _row_bytes(self) -> int:
        return 8 + 2 * (self.vocabulary + self.vocabulary % 2)

    @property
    def _rows_offset(self) -> int:
        return _HEADER.size + 4 * self.context * self.chunks

    @property
    def nbytes(self) -> int:
        """Bytes of the whole file."""
        return self._rows_offset + self.chunks * self.rows * self._row_bytes

    def head(self, tokens: npt.NDArray[np.int32]) -> bytes:
        """What stands in front of the rows of ``tokens`` int32 [chunks, context]."""
        return _HEADER.pack(MAGIC, self.context, self.vocabulary, self.chunks) + tokens.astype("<i4").tobytes()

    @classmethod
    def read(cls, path: Path) -> BaseFile:
        """The head of ``path``.

        Raises:
            BadFile: it is no such file, or cut off.
        """
        try:
            with path.open("rb") as stream:
                head = stream.read(_HEADER.size)
            size = path.stat().st_size
        except OSError as error:
            raise BadFile(f"cannot read {path}: {error.strerror or error}") from error
        if len(head) < _HEADER.size or not head.startswith(MAGIC):
            raise BadFile(f"{path} is no file of log-probabilities of llama-perplexity")
        _, context, vocabulary, chunks = _HEADER.unpack(head)
        sound = 4 <= context <= _MOST_CONTEXT and 1 <= vocabulary <= _MOST_VOCABULARY and chunks >= 1
        if not sound:
            raise BadFile(f"{path} claims {chunks:,} chunks of {context:,} tokens of {vocabulary:,}")
        found = cls(path, context, vocabulary, chunks)
        if found.nbytes != size:
            raise BadFile(f"{path} has {size:,} bytes; {chunks:,} chunks of {context:,} tokens take {found.nbytes:,}")
        return found

    def tokens(self) -> npt.NDArray[np.int32]:
        """Of every chunk, int32 [chunks, context].

        Raises:
            BadFile: one that is beyond the vocabulary.
        """
        count = self.context * self.chunks
        tokens = np.fromfile(self.path, "<i4", count, offset=_HEADER.size)
        if ((tokens < 0) | (tokens >= self.vocabulary)).any():
            raise BadFile(f"{self.path} holds tokens that are not of its vocabulary of {self.vocabulary:,}")
        return tokens.reshape(self.chunks, self.context)

    def log_probabilities(self, chunk: int, start: int, count: int) -> Floats:
        """Rows ``start`` to ``start + count`` of a chunk, float32 [count, vocabulary].

        Raises:
            BadFile: they are not finite, or larger than 1.
        """
        offset = self._rows_offset + (chunk * self.rows + start) * self._row_bytes
        raw = np.fromfile(self.path, np.uint8, count * self._row_bytes, offset=offset).reshape(count, -1)
        step, lowest = raw[:, :8].copy().view("<f4").T[:, :, None]
        codes = raw[:, 8 : 8 + 2 * self.vocabulary].copy().view("<u2")
        with np.errstate(all="ignore"):
            found: Floats = step * codes.astype(np.float32) + lowest
        if not (np.isfinite(found) & (found <= 1e-3)).all():
            raise BadFile(f"{self.path}: chunk {chunk + 1} holds what are no log-probabilities")
        return found


def encoded(logits: Floats) -> bytes:
    """Rows of such a file for ``logits`` float32 [T, V], in llama.cpp's own single precision."""
    most = logits.max(axis=1, keepdims=True)
    least = np.maximum(logits.min(axis=1, keepdims=True), most + _LOWEST)
    total = np.log(np.exp(logits - most).sum(axis=1, keepdims=True, dtype=np.float64)).astype(np.float32)
    step = (most - least) / np.float32(65535)
    inverse = np.divide(np.float32(1), step, out=np.zeros_like(step), where=step > 0)
    codes = np.rint(inverse * np.maximum(logits - least, 0)).astype("<u2")
    if codes.shape[1] % 2:
        codes = np.pad(codes, ((0, 0), (0, 1)))
    head = np.concatenate([step, least - most - total], axis=1).astype("<f4")
    return np.concatenate([head.view(np.uint8), np.ascontiguousarray(codes).view(np.uint8)], axis=1).tobytes()


def scores(reference: Floats, logits: Floats, successors: npt.NDArray[np.int32]) -> TokenScores:
    """``logits`` [T, V] against log-probabilities ``reference`` [T, V], the tokens that followed being known."""
    got, rows = log_softmax(logits), np.arange(len(logits))
    terms = np.where(reference > _LOWEST, np.exp(reference) * (reference - got), 0)
    divergence = terms.sum(axis=1, dtype=np.float64).astype(np.float32)
    same = reference.argmax(axis=1) == got.argmax(axis=1)
    return TokenScores(divergence, same, -got[rows, successors], -reference[rows, successors])
