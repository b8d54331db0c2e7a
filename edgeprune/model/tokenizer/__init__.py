"""A checkpoint's tokenizer as GGUF metadata: vocabulary, merges, special tokens, chat template.

The kind of tokenizer and its pre-tokenizer are recognised from the rules in ``tokenizer.json`` itself, or in a
SentencePiece ``tokenizer.model``; where the rules are in program code, by the name of the tokenizer's class. A rule
that llama.cpp does not know is an error, never a guess. Where llama.cpp knows a rule but works some texts off
otherwise than the original, the file says so under ``DIFFERENCES_KEY``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune.errors import BadFile, Unsupported
from edgeprune.files import read_json
from edgeprune.model.gguf import Entry, make_entry
from edgeprune.model.tokenizer.byte_level import byte_level_entries
from edgeprune.model.tokenizer.found import added_tokens, tokenizer_file
from edgeprune.model.tokenizer.piece_model import UNIGRAM, read_piece_model
from edgeprune.model.tokenizer.pieces import LAST, piece_entries, piece_table
from edgeprune.model.tokenizer.sentencepiece import is_sentencepiece, sentencepiece_entries
from edgeprune.model.tokenizer.special import frame, optional_json, special_entries, special_ids
from edgeprune.model.tokenizer.template import template_entries
from edgeprune.model.tokenizer.tiktoken import KNOWN, tiktoken_definition
from edgeprune.model.tokenizer.tokens import TokenTable, token_table
from edgeprune.model.tokenizer.unigram import Spaces, sound_map, unigram_entries, unigram_spaces, unigram_types

# What llama.cpp does otherwise than the original tokenizer, one sentence each.
DIFFERENCES_KEY = "edgeprune.tokenizer_differences"
# Settings of a BPE model that change what it does and that llama.cpp does not have.
_FOREIGN_SETTINGS = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")


@dataclass(frozen=True)
class _Found:
    """What the files of a tokenizer say before its kind is known."""

    folder: Path
    settings: dict[str, Any]
    config: dict[str, Any]
    vocabulary: int


def tokenizer_entries(folder: Path, config: dict[str, Any], vocabulary: int) -> list[Entry]:
    """GGUF metadata of the tokenizer in ``folder``.

    Args:
        config: the checkpoint's ``config.json``.
        vocabulary: rows of the embedding matrix; the token list is made as long.

    Raises:
        BadFile: no or broken tokenizer files, or more tokens than embeddings.
        Unsupported: a tokenizer that llama.cpp cannot reproduce.
    """
    # Older checkpoints name their special tokens in a file of its own.
    settings = optional_json(folder / "special_tokens_map.json") | optional_json(folder / "tokenizer_config.json")
    found = _Found(folder, settings, config, vocabulary)
    path = tokenizer_file(folder, settings)
    try:
        if path.suffix == ".json":
            return _from_definition(found, read_json(path), path)
        rules = KNOWN.get(str(settings.get("tokenizer_class")))
        if rules is not None and path.name == rules.file:
            named = added_tokens(folder, settings)
            return _from_definition(found, tiktoken_definition(path, rules, vocabulary, named), path)
        return _from_pieces(found, path)
    except KeyError as error:
        raise BadFile(f"{path} is not a tokenizer definition: it lacks {error}"[:300]) from error
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise BadFile(f"{path} or its settings are not a tokenizer definition: {str(error)[:200]!r}") from error


def _from_definition(found: _Found, definition: dict[str, Any], path: Path) -> list[Entry]:
    model, where = definition["model"], str(path)
    kind = model["type"]
    if kind not in ("BPE", "Unigram"):
        raise Unsupported(f"{path}: {kind} tokenizers are not supported; BPE and unigram are")
    if foreign := [name for name in _FOREIGN_SETTINGS if model.get(name)]:
        raise Unsupported(f"{path}: llama.cpp has no BPE with {foreign[0]}")
    ranked = model["vocab"]
    vocabulary = {text: index for index, (text, _) in enumerate(ranked)} if kind == "Unigram" else ranked
    table = token_table(vocabulary, definition.get("added_tokens") or [], found.vocabulary, where)
    special = _special(found, table)
    if kind == "Unigram":
        spaces = unigram_spaces(definition, where)
        table, notes = unigram_types(table, model["unk_id"], spaces)
        scores = [score for _, score in ranked] + [LAST] * (found.vocabulary - len(ranked))
        entries = unigram_entries(table, scores, spaces)
    elif is_sentencepiece(definition):
        entries, notes = sentencepiece_entries(
            definition, table, has_first=special.adds_first, has_template=bool(special.templates), where=where
        )
    else:
        entries, notes = byte_level_entries(definition, table, special.has_first, where)
    return _joined(entries, special, [*table.notes, *special.notes, *notes])


def _from_pieces(found: _Found, path: Path) -> list[Entry]:
    model = read_piece_model(path)
    added = added_tokens(found.folder, found.settings)
    prefix = found.settings.get("add_prefix_space")
    prefix = prefix if isinstance(prefix, bool) else model.space_prefix
    table, scores = piece_table(model, added, found.vocabulary, str(path))
    special = _special(found, table, model.ids)
    if model.kind == UNIGRAM:
        spaces = Spaces(prefix, model.merges_spaces, sound_map(model.characters, str(path)))
        table, notes = unigram_types(table, model.ids["unknown"], spaces)
        entries = unigram_entries(table, scores, spaces)
    else:
        entries, notes = piece_entries(model, table, scores, prefix, str(path))
    return _joined(entries, special, [*table.notes, *special.notes, *notes])


def _joined(entries: list[Entry], special: _Special, told: list[str]) -> list[Entry]:
    differences = [make_entry(DIFFERENCES_KEY, "[str]", told)] if told else []
    return [*entries, *special.entries, *differences, *special.templates]


@dataclass(frozen=True)
class _Special:
    """Entries of the special tokens and the chat template, and what of them the vocabulary's entries depend on."""

    entries: list[Entry]
    templates: list[Entry]
    notes: list[str]
    has_first: bool
    adds_first: bool


def _special(found: _Found, table: TokenTable, known: dict[str, int] | None = None) -> _Special:
    """Special tokens; ``known``: those that the vocabulary itself names, for want of others."""
    ids = {**(known or {}), **special_ids(found.settings, found.config, table.texts)}
    around = frame(found.folder / "tokenizer.json", found.settings, ids)
    generation = optional_json(found.folder / "generation_config.json")
    entries, notes = special_entries(ids, around, found.config, generation, table)
    templates = template_entries(found.folder, found.settings)
    return _Special(entries, templates, notes, "bos" in ids or bool(around[0]), bool(around[0]))
