"""Tokens and scores of a SentencePiece model, for either of llama.cpp's tokenizers."""

from __future__ import annotations

from typing import Any

from edgeprune.errors import Unsupported
from edgeprune.model.gguf import Entry
from edgeprune.model.tokenizer.piece_model import PAIRS, UNIGRAM, PieceModel
from edgeprune.model.tokenizer.sentencepiece import FOLDS, SPACE, require_bytes, score_entries
from edgeprune.model.tokenizer.tokens import USER_DEFINED, TokenTable, token_table

LAST = -1e9  # the score of what is no piece


def piece_table(
    model: PieceModel, added: list[dict[str, Any]], size: int, where: str
) -> tuple[TokenTable, list[float]]:
    """Tokens of ids 0 to ``size`` - 1, and their scores, [size].

    Args:
        added: from ``added_tokens``; they rule over the model's own pieces.
        size: rows of the embedding matrix.

    Raises:
        Unsupported: a kind of model, or a treatment of text, that llama.cpp does not have.
    """
    if model.kind not in (UNIGRAM, PAIRS):
        raise Unsupported(f"{where}: SentencePiece models of kind {model.kind} are not known to llama.cpp")
    if model.space_suffix:
        raise Unsupported(f"{where}: llama.cpp cannot be told that spaces belong to the word before them")
    ruled = {token["id"] for token in added}
    pieces = {
        # Looked for in a text with its spaces replaced; llama.cpp looks for them in the text as it is.
        text.replace(SPACE, " ") if model.types[index] == USER_DEFINED else text: index
        for index, text in enumerate(model.texts)
        if index not in ruled
    }
    table = token_table(pieces, added, size, where)
    own = {index: model.types[index] for index in pieces.values()}
    types = [own.get(index, kind) for index, kind in enumerate(table.types)]
    scores = [model.scores[index] if index in own else LAST for index in range(size)]
    return TokenTable(table.texts, types, table.notes), scores


def piece_entries(
    model: PieceModel, table: TokenTable, scores: list[float], prefix: bool, where: str
) -> tuple[list[Entry], list[str]]:
    """Entries of a model of pairs, and what llama.cpp does otherwise, one sentence each.

    Args:
        table, scores: from ``piece_table``.
        prefix: a space is put in front of a text.

    Raises:
        Unsupported: a byte has no token.
    """
    require_bytes(table.texts, where)
    notes = []
    if model.characters:
        notes.append(FOLDS)
    if model.merges_spaces:
        notes.append("the tokenizer makes one space of several; llama.cpp keeps them")
    return score_entries(table, scores, prefix), notes
