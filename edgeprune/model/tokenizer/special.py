"""Special tokens: their ids, which of them frame a text, and which end an answer.

llama.cpp also has keys for the tokens of fill-in-the-middle. No file of a checkpoint says which they are, and
llama.cpp finds the known ones by their text, so they are left to it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgeprune.errors import BadFile
from edgeprune.files import read_json
from edgeprune.model.gguf import Entry, make_entry
from edgeprune.model.tokenizer.tokens import NORMAL, USER_DEFINED, TokenTable, some

# llama.cpp's names of the tokens (its spelling of "separator" too) and those of the configurations.
_NAMES = (
    ("bos", "bos"),
    ("eos", "eos"),
    ("unknown", "unk"),
    ("padding", "pad"),
    ("seperator", "sep"),
    ("mask", "mask"),
)
# Tokens that llama.cpp takes for the end of an answer by their text (src/llama-vocab.cpp, special_eog_ids).
_ENDS_BY_TEXT = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"),
    *("<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<eos>"),
    *("<end_of_utterance>", "<turn|>", "<|tool_response>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "[e~["),
)


def content(token: Any) -> str | None:
    """The text of a special token, which configurations write as a string or as a table."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def optional_json(path: Path) -> dict[str, Any]:
    """Contents of a settings file that a checkpoint may lack.

    Raises:
        BadFile: it holds something else than a table.
    """
    found = read_json(path) if path.is_file() else {}
    if not isinstance(found, dict):
        raise BadFile(f"{path} does not hold a table")
    return found


def special_ids(settings: dict[str, Any], config: dict[str, Any], texts: list[str]) -> dict[str, int]:
    """Ids of the special tokens by llama.cpp's name: the tokenizer's own, else the model's.

    Args:
        settings: contents of ``tokenizer_config.json``.
        config: contents of ``config.json``.
        texts: the tokens.
    """
    id_of = {text: index for index, text in enumerate(texts)}
    ids = {}
    for ours, theirs in _NAMES:
        index = id_of.get(content(settings.get(f"{theirs}_token")) or "")
        for known in _as_list(config.get(f"{theirs}_token_id")) if index is None else [index]:
            if ours not in ids and _is_id(known, texts):
                ids[ours] = known
    return ids


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _is_id(value: Any, texts: list[str]) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(texts)


def frame(definition_path: Path, settings: dict[str, Any], ids: dict[str, int]) -> tuple[list[int], list[int]]:
    """Ids that the tokenizer puts before and after every text.

    The settings rule over the post-processor in ``tokenizer.json``, as in transformers; where there is neither, a
    Llama or Gemma tokenizer begins every text.

    Raises:
        BadFile: the definition is none.
    """
    bare, framed = _encoded(definition_path, "a") if definition_path.is_file() else ([], [])
    flags = [settings.get("add_bos_token"), settings.get("add_eos_token")]
    if not definition_path.is_file() and flags[0] is None:
        flags[0] = str(settings.get("tokenizer_class")).startswith(("Llama", "Gemma"))
    if any(isinstance(flag, bool) for flag in flags):
        first, last = (
            [ids[name]] if flag and name in ids else [] for flag, name in zip(flags, ("bos", "eos"), strict=True)
        )
        return first, last
    for start in range(len(framed) - len(bare) + 1):
        if bare and framed[start : start + len(bare)] == bare:
            return framed[:start], framed[start + len(bare) :]
    return [], []


def _encoded(path: Path, text: str) -> tuple[list[int], list[int]]:
    """Ids of the text alone, and with what the post-processor adds."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
        return tokenizer.encode(text, add_special_tokens=False).ids, tokenizer.encode(text).ids
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises nothing more specific, and its panics are no Exception
        raise BadFile(f"{path} is not a tokenizer definition: {str(error)[:200]!r}") from error


def special_entries(
    ids: dict[str, int],
    around: tuple[list[int], list[int]],
    config: dict[str, Any],
    generation: dict[str, Any],
    table: TokenTable,
) -> tuple[list[Entry], list[str]]:
    """Entries of the special tokens, and what could not be kept, one sentence each.

    Args:
        ids: from ``special_ids``.
        around: from ``frame``. llama.cpp adds one token at most on either side: the one that begins a text, and the
            one that ends it.
        generation: contents of ``generation_config.json``, whose tokens that end an answer may be more than one.
        table: the tokens.
    """
    texts = table.texts
    ids, notes, added = dict(ids), [], {"bos": False, "eos": False}
    ends = [ids["eos"]] if "eos" in ids else []
    for name, found in zip(("bos", "eos"), around, strict=True):
        if len(found) == 1:
            ids[name], added[name] = found[0], True
        elif found:
            notes.append(
                f"the tokenizer puts {some([texts[index] for index in found])} "
                f"{'before' if name == 'bos' else 'behind'} every text, of which llama.cpp can add one at most: "
                "none is added"
            )
    for source in (generation, config):
        ends += [index for index in _as_list(source.get("eos_token_id")) if _is_id(index, texts)]
    if "eos" not in ids and ends:
        ids["eos"] = ends[0]
    if "eos" not in ids:
        notes.append("no token is known to end a text; llama.cpp takes a default, which is most likely wrong")
    further = [index for index in dict.fromkeys(ends) if index != ids["eos"] and texts[index] not in _ENDS_BY_TEXT]
    for name, index in zip(("eot", "eom"), further, strict=False):
        ids[name] = index
    if further[2:]:
        notes.append(f"llama.cpp does not end an answer at {some([texts[index] for index in further[2:]])}")
    notes += _words_that_end(table, ends)
    entries = [make_entry(f"tokenizer.ggml.{name}_token_id", "u32", index) for name, index in ids.items()]
    entries += [make_entry(f"tokenizer.ggml.add_{name}_token", "bool", flag) for name, flag in added.items()]
    if suppressed := [index for index in _as_list(generation.get("suppress_tokens")) if _is_id(index, texts)]:
        entries.append(make_entry("tokenizer.ggml.suppress_tokens", "[i32]", suppressed))
    return entries, notes


def _words_that_end(table: TokenTable, ends: list[int]) -> list[str]:
    """One sentence on words that llama.cpp takes for the end of an answer, as "</s>" in the vocabularies of Qwen and
    Gemma, which HTML has too; ``ends``: tokens that do end one."""
    named = (index for index, text in enumerate(table.texts) if text in _ENDS_BY_TEXT and index not in ends)
    words = [table.texts[index] for index in named if table.types[index] in (NORMAL, USER_DEFINED)]
    return [f"llama.cpp ends an answer at {some(words)}, which is a word like others here"] if words else []
