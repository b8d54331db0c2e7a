"""The list of tokens: every id's text and type."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from edgeprune.errors import BadFile

# enum llama_token_type (llama.h)
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_SHOWN = 3


@dataclass(frozen=True)
class TokenTable:
    """Tokens by id.

    Attributes:
        texts: text of every id, [vocabulary]; no text occurs twice, for which llama.cpp would abort.
        types: one of the types above, [vocabulary].
        notes: what of the tokenizer could not be kept, one sentence each.
    """

    texts: list[str]
    types: list[int]
    notes: tuple[str, ...] = ()


def is_byte(text: str) -> bool:
    """Whether a token stands for one byte, in SentencePiece's way of writing it."""
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def some(texts: list[str]) -> str:
    """The first few of ``texts``, for a sentence."""
    shown = ", ".join(repr(text) for text in texts[:_SHOWN])
    return shown + f" and {len(texts) - _SHOWN} more" * (len(texts) > _SHOWN)


def token_table(vocabulary: dict[str, int], added: list[dict[str, Any]], size: int, where: str) -> TokenTable:
    """Tokens of ids 0 to ``size`` - 1: those of the model, over them the added ones; ids without a token are unused.

    Special tokens are control tokens, which llama.cpp finds in a text only when it is asked to parse them; the other
    added tokens are user-defined, which it always finds, as the original does. Some tokens llama.cpp makes control or
    user-defined ones by their text, whatever is written here (``src/llama-vocab.cpp``): those of fill-in-the-middle
    and gpt-oss's marks of channels. It shows only in plain text in which special tokens are not to be parsed.

    Args:
        vocabulary: text to id of the tokens of the model.
        added: the added tokens, as ``tokenizer.json`` has them.
        size: rows of the embedding matrix.
        where: the file, for messages.

    Raises:
        BadFile: a token of the model without an embedding, or one text with two ids.
    """
    for index in vocabulary.values():
        if index >= size:
            raise BadFile(f"{where} has token id {max(vocabulary.values())}, the model {size} embeddings")
        if index < 0:
            raise BadFile(f"{where} has token id {index}")
    text_of = {index: text for text, index in vocabulary.items()}
    type_of = dict.fromkeys(text_of, NORMAL)
    for token in added:
        index, text = token["id"], str(token["content"])
        if vocabulary.get(text, index) != index:
            raise BadFile(f"{where} has the token {text[:40]!r} as id {vocabulary[text]} and as id {index}")
        text_of[index], type_of[index] = text, CONTROL if token.get("special") else USER_DEFINED
    kept = {index: text for index, text in text_of.items() if 0 <= index < size and "\0" not in text}
    taken = set(kept.values())
    if len(taken) < len(kept):
        raise BadFile(f"{where} has one added token under two ids")
    return TokenTable(
        [kept[index] if index in kept else _unused(index, taken) for index in range(size)],
        [type_of[index] if index in kept else UNUSED for index in range(size)],
        tuple(_remarks(text_of, added, size)),
    )


def _remarks(text_of: dict[int, str], added: list[dict[str, Any]], size: int) -> Iterator[str]:
    if beyond := [text for index, text in text_of.items() if not 0 <= index < size]:
        yield f"added tokens beyond the {size} embeddings are left out: {some(beyond)}"
    if cut := [text for text in text_of.values() if "\0" in text]:  # llama.cpp reads a text up to there
        yield f"tokens with a zero character are left out: {some(cut)}"
    if padded := [token["content"] for token in added if token.get("lstrip") or token.get("rstrip")]:
        # In llama.cpp only the name of the model switches it on (src/llama-vocab.cpp, per token attributes).
        yield (
            f"the tokenizer drops white space beside {some(padded)}; llama.cpp keeps it, except behind the special "
            "tokens of models with phi-3 in their name"
        )
    if words := [token["content"] for token in added if token.get("single_word")]:
        yield f"the tokenizer looks for {some(words)} as whole words only; llama.cpp finds them within words too"


def _unused(index: int, taken: set[str]) -> str:
    """A text for an id without a token, other than that of any token."""
    text = f"[UNUSED{index}]"
    while text in taken:
        text = f"[{text}]"
    return text
