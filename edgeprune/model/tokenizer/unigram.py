"""Unigram models, as in T5: the split of a text into the pieces of the highest probability.

llama.cpp finds it as the original does, over the whole text. What it does otherwise: a character without a piece is
the unknown token, even where the model spells it in bytes; the longest match of the map of characters is folded,
where ``tokenizers`` looks whole clusters of characters up first.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

from edgeprune.errors import BadFile, Unsupported
from edgeprune.model.gguf import Entry, make_entry
from edgeprune.model.tokenizer.sentencepiece import SPACE
from edgeprune.model.tokenizer.tokens import BYTE, UNKNOWN, TokenTable, is_byte


@dataclass(frozen=True)
class Spaces:
    """What happens to a text before it is split.

    Attributes:
        prefix: a space is put in front of it.
        merged: spaces are dropped at its ends, and all but one within it.
        characters: the compiled map by which its characters are folded; empty for none.
    """

    prefix: bool
    merged: bool
    characters: bytes = b""


def unigram_entries(table: TokenTable, scores: list[float], spaces: Spaces) -> list[Entry]:
    """Entries of llama.cpp's unigram tokenizer.

    Args:
        scores: log probability of every token, [vocabulary].
    """
    entries = [
        make_entry("tokenizer.ggml.model", "str", "t5"),
        make_entry("tokenizer.ggml.pre", "str", "default"),
        make_entry("tokenizer.ggml.tokens", "[str]", table.texts),
        make_entry("tokenizer.ggml.scores", "[f32]", scores),
        make_entry("tokenizer.ggml.token_type", "[i32]", table.types),
        make_entry("tokenizer.ggml.add_space_prefix", "bool", spaces.prefix),
        make_entry("tokenizer.ggml.remove_extra_whitespaces", "bool", spaces.merged),
    ]
    if spaces.characters:
        entries.append(make_entry("tokenizer.ggml.precompiled_charsmap", "[u8]", list(spaces.characters)))
    return entries


def unigram_types(table: TokenTable, unknown: int, spaces: Spaces) -> tuple[TokenTable, list[str]]:
    """The tokens with bytes and the unknown one marked, and what llama.cpp does otherwise, one sentence each."""
    types = [BYTE if is_byte(text) else kind for text, kind in zip(table.texts, table.types, strict=True)]
    types[unknown] = UNKNOWN
    notes = []
    if BYTE in types:
        notes.append("the tokenizer spells unknown characters in bytes; llama.cpp takes them for unknown")
    if spaces.prefix and not spaces.merged:
        notes.append("llama.cpp puts a space before a text even where one is")
    return TokenTable(table.texts, types, table.notes), notes


def sound_map(characters: bytes, where: str) -> bytes:
    """The compiled map of characters itself: the length of a trie in bytes, the trie, and the texts it leads to.

    Raises:
        BadFile: it is cut off.
    """
    length = int.from_bytes(characters[:4], "little")
    if characters and (length % 4 or not 0 < length < len(characters) - 4 or characters[-1]):
        raise BadFile(f"{where}: the map of characters is damaged: {len(characters)} bytes, a trie of {length}")
    return characters


def unigram_spaces(definition: dict[str, Any], where: str) -> Spaces:
    """The rules in ``tokenizer.json``.

    Raises:
        BadFile: a damaged map of characters.
        Unsupported: rules that llama.cpp does not have.
    """
    normalizer = definition.get("normalizer") or {}
    merged, characters = False, b""
    for step in normalizer.get("normalizers", [normalizer] if normalizer else []):
        kind = step.get("type")
        if kind == "Precompiled":
            characters = sound_map(base64.b64decode(step["precompiled_charsmap"] or "", validate=True), where)
        elif kind == "Replace" and step.get("pattern") == {"Regex": " {2,}"} and step.get("content") in (" ", SPACE):
            merged = True
        elif kind != "Strip" or step.get("strip_left"):
            raise Unsupported(f"{where}: llama.cpp has no normalizer {kind} for unigram tokenizers")
    rules = definition.get("pre_tokenizer") or {}
    steps = rules.get("pretokenizers", [rules])
    if [step.get("type") for step in steps] == ["WhitespaceSplit", "Metaspace"] and characters:
        merged = True  # the map makes a space of every white space
    elif [step.get("type") for step in steps] != ["Metaspace"]:
        raise Unsupported(f"{where}: pre-tokenizer {[step.get('type') for step in steps]} is not known to llama.cpp")
    return Spaces(prefix=steps[-1].get("prepend_scheme", "always") != "never", merged=merged, characters=characters)
