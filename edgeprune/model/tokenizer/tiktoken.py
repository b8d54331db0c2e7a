"""Vocabularies in tiktoken's form, of tokenizers whose rules are in program code and therefore stand here.

The result has the form of ``tokenizer.json``. tiktoken takes a word that is a token as it is; else it joins, again
and again, the two neighbours whose union has the lowest rank. As merges these are all ways of cutting a token into
two tokens, in the order of the tokens' ranks.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune.errors import BadFile
from edgeprune.model.tokenizer.pretokenizer import KIMI, QWEN2

_MOST_BYTES = 1 << 28
_LONGEST = 1 << 10  # bytes of a token; the longest known ones have 128


@dataclass(frozen=True)
class Rules:
    """What the code of a tokenizer says.

    Attributes:
        file: with the vocabulary.
        pattern: regular expression of its words.
        composes: whether texts are brought to the composed form (NFC) first.
        special: texts of the special tokens, whose ids follow the vocabulary.
        numbered: of those behind them, up to the last row of the embedding matrix; with a place for ``{number}``,
            which counts from 0, or for the ``{id}``. The settings may name them otherwise.
    """

    file: str
    pattern: str
    composes: bool
    special: tuple[str, ...]
    numbered: str


# By "tokenizer_class" in tokenizer_config.json. Hunyuan's: tokenization_hy.py, in the repositories of Hunyuan-A13B;
# Moonshot's: tokenization_moonshot.py and tokenization_kimi.py, in those of Moonlight and Kimi.
KNOWN = {
    "HYTokenizer": Rules(
        file="hy.tiktoken",
        pattern=QWEN2,
        composes=True,
        special=("<|endoftext|>", "<|startoftext|>", "<|bos|>", "<|eos|>", "<|pad|>"),
        numbered="<|extra_{number}|>",
    ),
    "TikTokenTokenizer": Rules(
        file="tiktoken.model",
        pattern=KIMI,
        composes=False,
        special=(),
        numbered="<|reserved_token_{id}|>",
    ),
}


def tiktoken_definition(path: Path, rules: Rules, size: int, named: list[dict[str, Any]]) -> dict[str, Any]:
    """The vocabulary in ``path`` under ``rules``, as ``tokenizer.json`` would have it.

    Args:
        size: rows of the embedding matrix.
        named: added tokens that the settings name, in the same form.

    Raises:
        BadFile: it is no such vocabulary.
    """
    ranks = _ranks(path)
    return {
        "normalizer": {"type": "NFC"} if rules.composes else None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": rules.pattern}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        },
        "added_tokens": _added(rules, len(ranks), size, named),
        "model": {
            "type": "BPE",
            "vocab": {_spelt(token): rank for token, rank in ranks.items()},
            "merges": [[_spelt(left), _spelt(right)] for left, right in _merges(ranks)],
            "ignore_merges": True,
        },
    }


def _added(rules: Rules, first: int, size: int, named: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The tokens behind a vocabulary of ``first`` ones, as in ``tokenizer.json``."""
    texts = dict(enumerate(rules.special, first))
    for index in range(first + len(rules.special), size):
        texts[index] = rules.numbered.format(number=index - first - len(rules.special), id=index)
    added: dict[int, dict[str, Any]] = {i: {"id": i, "content": text, "special": True} for i, text in texts.items()}
    return list((added | {token["id"]: token for token in named if token["id"] >= first}).values())


def _ranks(path: Path) -> dict[bytes, int]:
    """The tokens of lines of base64 and a number, which is the line's own."""
    if path.stat().st_size > _MOST_BYTES:
        raise BadFile(f"{path} is larger than {_MOST_BYTES >> 20} MiB, and no tokenizer")
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines()):
        try:
            coded, rank = line.split()
            token = base64.b64decode(coded, validate=True)
            right = int(rank) == number and 0 < len(token) <= _LONGEST and token not in ranks
        except (ValueError, binascii.Error):
            right = False
        if not right:
            raise BadFile(f"{path}: line {number + 1} is not a new token in base64 and the number {number}")
        ranks[token] = number
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise BadFile(f"{path} lacks {len(missing)} of the 256 single bytes, so that it cannot encode every text")
    return ranks


def _merges(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    for token in ranks:  # in their order
        cuts = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        yield from ((left, right) for left, right in cuts if left in ranks and right in ranks)


def _letters() -> list[str]:
    """GPT-2's way of writing every byte as a letter that can be seen, [256]."""
    seen = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in seen else next(others)) for byte in range(256)]


_LETTERS = _letters()


def _spelt(token: bytes) -> str:
    return "".join(map(_LETTERS.__getitem__, token))
