"""SentencePiece BPE, as in Llama 2, Mixtral, Phi-3.5 and Ernie."""

from __future__ import annotations

from typing import Any

from edgeprune.model.gguf import Entry, make_entry
from edgeprune.model.tokenizer.byte_level import merges
from edgeprune.model.tokenizer.tokens import BYTE, NORMAL, UNKNOWN, TokenTable, is_byte


def is_sentencepiece(definition: dict[str, Any]) -> bool:
    """Whether what is not in the vocabulary is spelled in tokens of single bytes."""
    return bool(definition["model"].get("byte_fallback"))


def sentencepiece_entries(definition: dict[str, Any], table: TokenTable) -> list[Entry]:
    """Entries of llama.cpp's SentencePiece-BPE tokenizer.

    It joins the neighbouring pair whose union has the highest score. The merges of ``tokenizer.json``
    are ranked, so the score of a token is minus the rank of the first merge that makes it.
    """
    texts, types = table.texts, list(table.types)
    scores = [0.0] * len(texts)
    rank_of: dict[str, int] = {}
    for rank, merge in enumerate(merges(definition["model"])):
        rank_of.setdefault(merge.replace(" ", "", 1), rank)
    unknown = definition["model"].get("unk_token")
    for index, text in enumerate(texts):
        if types[index] == NORMAL:
            scores[index] = -float(rank_of.get(text, len(rank_of) + index))
        if is_byte(text):
            types[index] = BYTE
        elif text == unknown:
            types[index] = UNKNOWN
    return [
        make_entry("tokenizer.ggml.model", "str", "llama"),
        make_entry("tokenizer.ggml.pre", "str", "default"),
        make_entry("tokenizer.ggml.tokens", "[str]", texts),
        make_entry("tokenizer.ggml.scores", "[f32]", scores),
        make_entry("tokenizer.ggml.token_type", "[i32]", types),
        make_entry("tokenizer.ggml.add_space_prefix", "bool", _adds_space(definition)),
    ]


def _adds_space(definition: dict[str, Any]) -> bool:
    """Whether the tokenizer puts a space in front of the text."""
    normalizer = definition.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    if any(step.get("type") == "Prepend" for step in steps):
        return True
    rules = definition.get("pre_tokenizer") or {}
    return rules.get("type") == "Metaspace" and rules.get("prepend_scheme", "always") != "never"
