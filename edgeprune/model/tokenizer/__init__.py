"""A checkpoint's tokenizer as GGUF metadata: vocabulary, merges, special tokens, chat template.

The kind of tokenizer and its pre-tokenizer are recognised from the rules in ``tokenizer.json``
itself; a rule that llama.cpp does not know is an error, never a guess. Where llama.cpp knows a rule but works some
texts off otherwise than the original, the file says so under ``DIFFERENCES_KEY``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgeprune.errors import BadFile, Unsupported
from edgeprune.files import read_json
from edgeprune.model.gguf import Entry, make_entry
from edgeprune.model.tokenizer.byte_level import byte_level_entries
from edgeprune.model.tokenizer.sentencepiece import is_sentencepiece, sentencepiece_entries
from edgeprune.model.tokenizer.special import frame, optional_json, special_entries, special_ids
from edgeprune.model.tokenizer.template import template_entries
from edgeprune.model.tokenizer.tokens import token_table

# What llama.cpp does otherwise than the original tokenizer, one sentence each.
DIFFERENCES_KEY = "edgeprune.tokenizer_differences"
# Settings of a BPE model that change what it does and that llama.cpp does not have.
_FOREIGN_SETTINGS = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")


def tokenizer_entries(folder: Path, config: dict[str, Any], vocabulary: int) -> list[Entry]:
    """GGUF metadata of the tokenizer in ``folder``.

    Args:
        config: the checkpoint's ``config.json``.
        vocabulary: rows of the embedding matrix; the token list is made as long.

    Raises:
        BadFile: no or broken ``tokenizer.json``, or more tokens than embeddings.
        Unsupported: a tokenizer that llama.cpp cannot reproduce.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise BadFile(f"{folder} holds no tokenizer.json", hint="save the tokenizer beside the model")
    definition = read_json(path)
    settings = optional_json(folder / "tokenizer_config.json")
    try:
        return _entries(folder, definition, settings, config, vocabulary)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise BadFile(f"{path} or its settings are not a tokenizer definition: {str(error)[:200]!r}") from error


def _entries(
    folder: Path, definition: dict[str, Any], settings: dict[str, Any], config: dict[str, Any], vocabulary: int
) -> list[Entry]:
    path = folder / "tokenizer.json"
    kind = definition["model"]["type"]
    if kind != "BPE":
        raise Unsupported(f"{path}: {kind} tokenizers are not supported; BPE is")
    if foreign := [name for name in _FOREIGN_SETTINGS if definition["model"].get(name)]:
        raise Unsupported(f"{path}: llama.cpp has no BPE with {foreign[0]}")
    table = token_table(definition, definition["model"]["vocab"], vocabulary, str(path))
    ids = special_ids(settings, config, table.texts)
    around = frame(path, settings, ids)
    generation = optional_json(folder / "generation_config.json")
    special, notes = special_entries(ids, around, config, generation, table.texts)
    templates = template_entries(folder, settings)
    if is_sentencepiece(definition):
        entries, differences = sentencepiece_entries(
            definition, table, has_first=bool(around[0]), has_template=bool(templates), where=str(path)
        )
    else:
        entries, differences = byte_level_entries(definition, table, "bos" in ids or bool(around[0]), str(path))
    if told := [*table.notes, *notes, *differences]:
        special.append(make_entry(DIFFERENCES_KEY, "[str]", told))
    return [*entries, *special, *templates]
