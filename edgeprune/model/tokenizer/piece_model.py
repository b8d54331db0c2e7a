"""``tokenizer.model``: a SentencePiece model (``sentencepiece_model.proto`` of google/sentencepiece)."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune.errors import BadFile
from edgeprune.model.tokenizer.protobuf import fields
from edgeprune.model.tokenizer.tokens import BYTE, NORMAL

UNIGRAM, PAIRS = 1, 2  # TrainerSpec.ModelType: unigram and BPE
_MOST_BYTES = 1 << 28
# Field numbers.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_TEXT, _SCORE, _TYPE = 1, 2, 3
_MODEL_TYPE, _SUFFIX = 3, 24
_IDS = {40: "unknown", 41: "bos", 42: "eos", 43: "padding"}
_CHARACTERS, _DUMMY_PREFIX, _EXTRA_SPACES = 2, 3, 4


@dataclass(frozen=True)
class PieceModel:
    """A SentencePiece model.

    Attributes:
        texts: pieces by id.
        scores: of the pieces, [pieces]: log probabilities of a unigram model, minus the rank in a model of pairs.
        types: of the pieces, numbered as llama.cpp numbers them, [pieces].
        kind: ``UNIGRAM`` or ``PAIRS``.
        ids: special tokens by llama.cpp's name.
        characters: the compiled map by which characters are folded; empty for none.
        space_prefix: a space is put in front of the text.
        merges_spaces: spaces are dropped at the ends of the text, and all but one within it.
        space_suffix: spaces belong to the word before them.
    """

    texts: list[str]
    scores: list[float]
    types: list[int]
    kind: int
    ids: dict[str, int]
    characters: bytes
    space_prefix: bool
    merges_spaces: bool
    space_suffix: bool


def read_piece_model(path: Path) -> PieceModel:
    """Read a SentencePiece model.

    Raises:
        BadFile: it is damaged, too large or something else.
    """
    where = str(path)
    if path.stat().st_size > _MOST_BYTES:
        raise BadFile(f"{path} is larger than {_MOST_BYTES >> 20} MiB, and no tokenizer")
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for number, value in fields(path.read_bytes(), where):
        if number == _PIECES:
            pieces.append(_piece(_message(value, where), where))
        elif number == _TRAINER:
            trainer = dict(fields(_message(value, where), where))
        elif number == _NORMALIZER:
            normalizer = dict(fields(_message(value, where), where))
    if not pieces:
        raise BadFile(f"{path} holds no pieces, and is no SentencePiece model")
    # Numbers that the file leaves out have the values of the definition.
    ids = {"unknown": 0, "bos": 1, "eos": 2} | {
        name: _signed(trainer[number], where) for number, name in _IDS.items() if number in trainer
    }
    return PieceModel(
        texts=[text for text, _, _ in pieces],
        scores=[score for _, score, _ in pieces],
        types=[kind for _, _, kind in pieces],
        kind=_signed(trainer.get(_MODEL_TYPE, UNIGRAM), where),
        ids={name: index for name, index in ids.items() if 0 <= index < len(pieces)},
        characters=_message(normalizer.get(_CHARACTERS, b""), where),
        space_prefix=bool(normalizer.get(_DUMMY_PREFIX, True)),
        merges_spaces=bool(normalizer.get(_EXTRA_SPACES, True)),
        space_suffix=bool(trainer.get(_SUFFIX, False)),
    )


def _piece(message: bytes, where: str) -> tuple[str, float, int]:
    text, score, kind = "", 0.0, NORMAL
    for number, value in fields(message, where):
        if number == _TEXT:
            try:
                text = _message(value, where).decode("utf-8")
            except UnicodeDecodeError as error:
                raise BadFile(f"{where} has a piece that is not UTF-8: {message[:40]!r}") from error
        elif number == _SCORE:
            raw = _message(value, where)
            score = struct.unpack("<f", raw)[0] if len(raw) == 4 else math.nan
        elif number == _TYPE:
            kind = _signed(value, where)
    if not math.isfinite(score) or not NORMAL <= kind <= BYTE:
        raise BadFile(f"{where} has a piece {text[:40]!r} of score {score} and kind {kind}")
    return text, score, kind


def _message(value: Any, where: str) -> bytes:
    if not isinstance(value, bytes):
        raise BadFile(f"{where} is no SentencePiece model: a number where a message should be")
    return value


def _signed(value: Any, where: str) -> int:
    if not isinstance(value, int):
        raise BadFile(f"{where} is no SentencePiece model: a message where a number should be")
    return value - 2**64 if value >= 2**63 else value
