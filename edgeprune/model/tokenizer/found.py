"""The files that a checkpoint's tokenizer is in."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from edgeprune.errors import BadFile, Unsupported
from edgeprune.model.tokenizer.special import optional_json
from edgeprune.model.tokenizer.tiktoken import KNOWN

# tiktoken's files: lines of a token in base64 and its rank.
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")
_WAYS_OUT = (
    "save it as tokenizer.json with transformers, or convert the checkpoint with llama.cpp's convert_hf_to_gguf.py "
    "and give that GGUF"
)


def tokenizer_file(folder: Path, settings: dict[str, Any]) -> Path:
    """``tokenizer.json``; if there is none, tiktoken's file of a tokenizer whose rules are known, or
    ``tokenizer.model`` if that is a SentencePiece model.

    Args:
        settings: contents of ``tokenizer_config.json``.

    Raises:
        BadFile: there is neither.
        Unsupported: what there is has its rules in program code, as tiktoken's files have.
    """
    if (folder / "tokenizer.json").is_file():
        return folder / "tokenizer.json"
    known = KNOWN.get(str(settings.get("tokenizer_class")))
    if known is not None and (folder / known.file).is_file():
        return folder / known.file
    pieces = folder / "tokenizer.model"
    if pieces.is_file() and not _is_tiktoken(pieces):
        return pieces
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.suffix in (".tiktoken", ".model") and path.is_file() and _is_tiktoken(path):
            raise Unsupported(
                f"{path} is a tiktoken vocabulary, whose rules and special tokens are in program code", hint=_WAYS_OUT
            )
    for name in ("tekken.json", "vocab.json"):
        if (folder / name).is_file():
            raise Unsupported(f"{folder} holds {name} but no tokenizer.json, which has the rules too", hint=_WAYS_OUT)
    raise BadFile(f"{folder} holds no tokenizer.json", hint="save the tokenizer beside the model")


def _is_tiktoken(path: Path) -> bool:
    with path.open("rb") as stream:
        return _TIKTOKEN_LINE.match(stream.read(1 << 12)) is not None


def added_tokens(folder: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Added tokens of a tokenizer without ``tokenizer.json``, in its way of writing them."""
    older = optional_json(folder / "added_tokens.json")
    added: dict[int, dict[str, Any]] = {int(index): {"content": text} for text, index in older.items()}
    for index, token in (settings.get("added_tokens_decoder") or {}).items():
        added[int(index)] = dict(token)
    return [{**token, "id": index} for index, token in added.items()]
