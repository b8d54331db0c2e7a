"""Byte-level BPE, as in GPT-2, Llama 3, Qwen and DeepSeek."""

from __future__ import annotations

from typing import Any

from edgeprune.model.gguf import Entry, make_entry
from edgeprune.model.tokenizer.pretokenizer import pre_tokenizer
from edgeprune.model.tokenizer.tokens import TokenTable


def merges(model: dict[str, Any]) -> list[str]:
    """Merges as "left right", from either of the two forms in use."""
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges", [])]


def byte_level_entries(
    definition: dict[str, Any], table: TokenTable, has_first: bool, where: str
) -> tuple[list[Entry], list[str]]:
    """Entries of llama.cpp's byte-level BPE, and what it cuts otherwise, one sentence each.

    Args:
        definition: contents of ``tokenizer.json``.
        has_first: whether the tokenizer knows a token that begins a text.
        where: the file, for messages.

    Raises:
        Unsupported: rules that llama.cpp does not have.
    """
    name, notes = pre_tokenizer(definition, has_first, where)
    entries = [
        make_entry("tokenizer.ggml.model", "str", "gpt2"),
        make_entry("tokenizer.ggml.pre", "str", name),
        make_entry("tokenizer.ggml.tokens", "[str]", table.texts),
        make_entry("tokenizer.ggml.token_type", "[i32]", table.types),
        make_entry("tokenizer.ggml.merges", "[str]", merges(definition["model"])),
    ]
    return entries, notes
