"""The list of tokens: every id's text and type."""

from __future__ import annotations

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


def token_table(definition: dict[str, Any], vocabulary: dict[str, int], size: int, where: str) -> TokenTable:
    """Tokens of ids 0 to ``size`` - 1: those of the model, over them the added ones; ids without a token are unused.

    Special tokens are control tokens, which llama.cpp finds in a text only when it is asked to parse them; the other
    added tokens are user-defined, which it always finds, as the original does. Some tokens llama.cpp makes control or
    user-defined ones by their text, whatever is written here (``src/llama-vocab.cpp``): those of fill-in-the-middle
    and gpt-oss's marks of channels. It shows only in plain text in which special tokens are not to be parsed.

    Args:
        definition: contents of ``tokenizer.json``.
        vocabulary: text to id of the tokens of the model.
        size: rows of the embedding matrix.
        where: the file, for messages.

    Raises:
        BadFile: a token of the model without an embedding, or one text with two ids.
    """
    largest = max(vocabulary.values(), default=-1)
    if largest >= size:
        raise BadFile(f"{where} has token id {largest}, the model {size} embeddings")
    texts: list[str | None] = [None] * size
    types = [UNUSED] * size
    for text, index in vocabulary.items():
        if index < 0:
            raise BadFile(f"{where} has token id {index}")
        texts[index], types[index] = text, NORMAL
    beyond, notes = [], []
    for added in definition.get("added_tokens") or []:
        index, text = added["id"], str(added["content"])
        if not 0 <= index < size:
            beyond.append(text)
            continue
        if vocabulary.get(text, index) != index:
            raise BadFile(f"{where} has the token {text[:40]!r} as id {vocabulary[text]} and as id {index}")
        texts[index], types[index] = text, CONTROL if added.get("special") else USER_DEFINED
    # llama.cpp reads a text up to its first zero character.
    if cut := [text for text in texts if text is not None and "\0" in text]:
        notes.append(f"tokens with a zero character are left out: {some(cut)}")
        texts = [None if text is not None and "\0" in text else text for text in texts]
        types = [UNUSED if text is None else kind for text, kind in zip(texts, types, strict=True)]
    taken = {text for text in texts if text is not None}
    if len(taken) != sum(text is not None for text in texts):
        raise BadFile(f"{where} has one added token under two ids")
    if beyond:
        notes.append(f"added tokens beyond the {size} embeddings are left out: {some(beyond)}")
    if padded := [added["content"] for added in definition.get("added_tokens") or [] if _swallows(added)]:
        # In llama.cpp only the name of the model switches it on (src/llama-vocab.cpp, per token attributes).
        notes.append(
            f"the tokenizer drops white space beside {some(padded)}; llama.cpp keeps it, except behind the special "
            "tokens of models with phi-3 in their name"
        )
    return TokenTable(
        [_unused(index, taken) if text is None else text for index, text in enumerate(texts)], types, tuple(notes)
    )


def _swallows(added: dict[str, Any]) -> bool:
    return bool(added.get("lstrip") or added.get("rstrip"))


def _unused(index: int, taken: set[str]) -> str:
    """A text for an id without a token, other than that of any token."""
    text = f"[UNUSED{index}]"
    while text in taken:
        text = f"[{text}]"
    return text
