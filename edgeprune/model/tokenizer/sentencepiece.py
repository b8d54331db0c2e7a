"""SentencePiece BPE in ``tokenizer.json``, as in Llama 2, Mixtral, Phi-3.5, Ernie and Gemma.

A text's spaces are replaced by U+2581, and the whole text is one word, of which neighbouring pieces are joined.
llama.cpp has two ways for it. In ``llama`` the pair is joined whose union has the highest score; merges made from the
scores of a SentencePiece model say the same. In ``gemma4`` merges are worked off as they are, but never across line
ends, a token begins every text, and no space is put in front.

What llama.cpp does otherwise: like SentencePiece itself it puts a space in front of a text even where one is, and it
puts one behind every special token. ``Metaspace`` puts none where one is, and with ``first`` none but at the very
start. The map of characters that a SentencePiece model may have is left out.
"""

from __future__ import annotations

from collections import Counter
from itertools import groupby
from typing import Any

from edgeprune.errors import Unsupported
from edgeprune.model.gguf import Entry, make_entry
from edgeprune.model.tokenizer.byte_level import merges
from edgeprune.model.tokenizer.tokens import BYTE, NORMAL, UNKNOWN, USER_DEFINED, TokenTable, is_byte, some

SPACE = "\u2581"
FOLDS = "the tokenizer folds characters, such as full-width ones; llama.cpp takes them as they are"


def is_sentencepiece(definition: dict[str, Any]) -> bool:
    """Whether what is not in the vocabulary is spelled in tokens of single bytes."""
    return bool(definition["model"].get("byte_fallback"))


def sentencepiece_entries(
    definition: dict[str, Any], table: TokenTable, *, has_first: bool, has_template: bool, where: str
) -> tuple[list[Entry], list[str]]:
    """Entries of llama.cpp's SentencePiece BPE, and what it does otherwise, one sentence each.

    Args:
        definition: contents of ``tokenizer.json``.
        has_first: whether the tokenizer puts a token before every text.
        has_template: whether there is a chat template, so that texts will be chats.
        where: the file, for messages.

    Raises:
        Unsupported: rules that llama.cpp does not have.
    """
    prefix, notes = _spaces(definition, has_template, where)
    added = definition.get("added_tokens") or []
    normalized = {token["content"] for token in added if token.get("normalized")}
    table = sentencepiece_types(table, definition["model"].get("unk_token"), normalized, where)
    pairs = merges(definition["model"])
    strange = _joined_without_merge(pairs, table)
    if strange and has_first and not prefix and not any(_crosses_lines(text) for text in table.texts):
        entries = [
            make_entry("tokenizer.ggml.model", "str", "gemma4"),
            make_entry("tokenizer.ggml.tokens", "[str]", table.texts),
            make_entry("tokenizer.ggml.token_type", "[i32]", table.types),
            make_entry("tokenizer.ggml.merges", "[str]", pairs),
        ]
        return entries, notes
    if strange:
        notes.append(f"llama.cpp joins pieces by the scores of tokens, and not as the merges say for {some(strange)}")
    return score_entries(table, _scores(pairs, table), prefix), notes


def sentencepiece_types(table: TokenTable, unknown: str | None, normalized: set[str], where: str) -> TokenTable:
    """The tokens with byte tokens and the unknown token marked.

    Args:
        unknown: text of the unknown token.
        normalized: added tokens that are looked for in the text with its spaces replaced; llama.cpp looks for them
            in the text as it is.

    Raises:
        Unsupported: a byte without a token, at which llama.cpp would abort.
    """
    texts, types = list(table.texts), list(table.types)
    for index, text in enumerate(texts):
        if is_byte(text):
            types[index] = BYTE
        elif text == unknown:
            types[index] = UNKNOWN
        elif types[index] == USER_DEFINED and text in normalized:
            texts[index] = text.replace(SPACE, " ")
    require_bytes(texts, where)
    return TokenTable(texts, types, table.notes)


def require_bytes(texts: list[str], where: str) -> None:
    """llama.cpp spells what has no token in bytes, by tokens for bytes or by letters.

    Raises:
        Unsupported: a byte has neither, at which llama.cpp would abort.
    """
    known = set(texts)
    missing = [
        f"<0x{byte:02X}>"
        for byte in range(256)
        if f"<0x{byte:02X}>" not in known and not (byte < 128 and chr(byte) in known)
    ]
    if missing:
        raise Unsupported(f"{where}: {len(missing)} of the 256 byte tokens are missing, the first one {missing[0]}")


def score_entries(table: TokenTable, scores: list[float], prefix: bool) -> list[Entry]:
    """Entries of the tokenizer that joins by scores.

    Args:
        scores: of every token, [vocabulary]; the pair whose union has the highest is joined first.
        prefix: a space is put in front of a text, and after every special token.
    """
    return [
        make_entry("tokenizer.ggml.model", "str", "llama"),
        make_entry("tokenizer.ggml.pre", "str", "default"),
        make_entry("tokenizer.ggml.tokens", "[str]", table.texts),
        make_entry("tokenizer.ggml.scores", "[f32]", scores),
        make_entry("tokenizer.ggml.token_type", "[i32]", table.types),
        make_entry("tokenizer.ggml.add_space_prefix", "bool", prefix),
    ]


def _made(pair: str) -> str:
    return pair.replace(" ", "", 1)


def _scores(pairs: list[str], table: TokenTable) -> list[float]:
    """Minus the rank of the first merge that makes a token; last come tokens that none makes, and special ones."""
    rank_of: dict[str, int] = {}
    for rank, pair in enumerate(pairs):
        rank_of.setdefault(_made(pair), rank)
    last = len(pairs) + len(table.texts)
    return [
        -float(rank_of.get(text, len(pairs) + index if kind == NORMAL else last))
        for index, (text, kind) in enumerate(zip(table.texts, table.types, strict=True))
    ]


def _joined_without_merge(pairs: list[str], table: TokenTable) -> list[str]:
    """Tokens for which joining by score is something else than merging: two tokens make them that no merge joins,
    or their merges do not follow each other."""
    made = [_made(pair) for pair in pairs]
    torn = {text for text, groups in Counter(text for text, _ in groupby(made)).items() if groups > 1}
    known = {text for text, kind in zip(table.texts, table.types, strict=True) if kind == NORMAL}.union(made)
    merged = set(pairs)
    return [
        text
        for text in table.texts
        if text in known
        and (
            text in torn
            or any(
                text[:cut] in known and text[cut:] in known and f"{text[:cut]} {text[cut:]}" not in merged
                for cut in range(1, len(text))
            )
        )
    ]


def _crosses_lines(text: str) -> bool:
    return "\n" in text.strip("\n")


def _spaces(definition: dict[str, Any], has_template: bool, where: str) -> tuple[bool, list[str]]:
    """Whether to put a space in front of a text, and what that is other than in the original, one sentence each."""
    normalizer = definition.get("normalizer") or {}
    replaced = prepended = False
    notes = []
    for step in normalizer.get("normalizers", [normalizer] if normalizer else []):
        if step.get("type") == "Prepend" and step.get("prepend") == SPACE:
            prepended = True
        elif (
            step.get("type") == "Replace" and step.get("content") == SPACE and step.get("pattern") == {"String": " "}
        ):
            replaced = True
        elif step.get("type") == "Precompiled":
            notes.append(FOLDS)
        else:
            raise Unsupported(f"{where}: llama.cpp has no normalizer {step.get('type')} for SentencePiece tokenizers")
    rules = definition.get("pre_tokenizer") or {}
    kind = rules.get("type")
    if kind == "Metaspace" and not rules.get("split", True):
        prefix, told = _metaspace(rules, has_template)
        return prefix, notes + told
    # A cut at spaces of which none are left.
    cuts_nothing = kind == "Split" and replaced and rules.get("pattern") in ({"String": " "}, {"Regex": " "})
    if kind is not None and not cuts_nothing:
        raise Unsupported(
            f"{where}: pre-tokenizer step {kind} is not known to llama.cpp for SentencePiece tokenizers"
        )
    if not replaced:
        raise Unsupported(f"{where}: a SentencePiece tokenizer that does not replace spaces")
    return prepended, notes


def _metaspace(rules: dict[str, Any], has_template: bool) -> tuple[bool, list[str]]:
    """A chat begins with a special token, behind which ``first`` puts no space; other text begins with a word."""
    scheme = rules.get("prepend_scheme", "always" if rules.get("add_prefix_space", True) else "never")
    if scheme == "first" and has_template:
        return False, [
            "the tokenizer puts a space before the first word of a text; llama.cpp, as told for chats, does not"
        ]
    if scheme != "never":
        return True, ["llama.cpp puts a space before a text and behind every special token, even where one is"]
    return False, []
