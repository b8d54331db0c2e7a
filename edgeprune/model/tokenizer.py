"""A checkpoint's tokenizer as GGUF metadata: vocabulary, merges, special tokens, chat template.

The kind of tokenizer and its pre-tokenizer are recognised from the rules in ``tokenizer.json``
itself; a rule that llama.cpp does not know is an error, never a guess.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgeprune.errors import BadFile, Unsupported
from edgeprune.files import read_json
from edgeprune.model.gguf import Entry, make_entry

# enum llama_token_type (llama.h)
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Pre-tokenizer rules (the split patterns in order, whether ByteLevel applies GPT-2's own pattern, and whether
# a word that is a token is taken before any merge) to the name under which llama.cpp has them
# (src/llama-vocab.cpp).
PRE_TOKENIZERS: dict[tuple[tuple[str, ...], bool, bool], str] = {
    ((), True, False): "gpt-2",
    ((_QWEN2,), False, False): "qwen2",
    ((_QWEN35,), False, False): "qwen35",
    ((_LLAMA3,), False, True): "llama-bpe",
}
# Settings of a BPE model that change what it does and that llama.cpp does not have.
_FOREIGN_SETTINGS = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")


def _content(token: Any) -> str | None:
    """The text of a special token, which configurations write as a string or as a table."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _pre_tokenizer(definition: dict[str, Any], path: Path) -> str:
    """llama.cpp's name for the pre-tokenizer rules of a byte-level BPE tokenizer.

    Raises:
        Unsupported: rules that are not in the table.
    """
    rules = definition.get("pre_tokenizer") or {}
    steps = rules.get("pretokenizers", [rules]) if rules.get("type") == "Sequence" else [rules]
    patterns, own_pattern = [], False
    # llama.cpp leaves out the composition of accents, which NFC is: only text in decomposed form is affected.
    normalizer = (definition.get("normalizer") or {}).get("type", "NFC")
    if normalizer != "NFC":
        raise Unsupported(f"{path}: llama.cpp has no normalizer {normalizer} for byte-level tokenizers")
    for step in steps:
        if step.get("type") == "Split":
            if (step.get("behavior"), bool(step.get("invert"))) not in (("Isolated", False), ("Removed", True)):
                raise Unsupported(f"{path}: pre-tokenizer splits that are {step.get('behavior')}")
            patterns.append(str(step.get("pattern", {}).get("Regex", step.get("pattern"))))
        elif step.get("type") == "ByteLevel":
            own_pattern = bool(step.get("use_regex", True))
            if step.get("add_prefix_space"):
                raise Unsupported(f"{path}: a byte-level tokenizer that adds a space in front of the text")
        else:
            raise Unsupported(f"{path}: pre-tokenizer step {step.get('type')} is not known to llama.cpp")
    words_first = bool(definition["model"].get("ignore_merges"))
    name = PRE_TOKENIZERS.get((tuple(patterns), own_pattern, words_first))
    if name is None:
        raise Unsupported(
            f"{path}: unknown pre-tokenizer rules {patterns}" + ", words before merges" * words_first,
            hint="if llama.cpp has this pattern, add it to PRE_TOKENIZERS in edgeprune/model/tokenizer.py",
        )
    return name


def _token_table(definition: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Token texts and token types for ids 0 to ``size`` - 1; ids without a token are unused."""
    texts = [f"[UNUSED{index}]" for index in range(size)]
    types = [UNUSED] * size
    for text, index in definition["model"]["vocab"].items():
        if 0 <= index < size:
            texts[index], types[index] = text, NORMAL
    for added in definition.get("added_tokens", []):
        if 0 <= added["id"] < size:
            texts[added["id"]] = added["content"]
            types[added["id"]] = CONTROL if added.get("special") else USER_DEFINED
    return texts, types


def _merges(model: dict[str, Any]) -> list[str]:
    """Merges as "left right", from either of the two forms in use."""
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges", [])]


def _is_sentencepiece(definition: dict[str, Any]) -> bool:
    return bool(definition["model"].get("byte_fallback"))


def _sentencepiece_entries(definition: dict[str, Any], texts: list[str], types: list[int]) -> list[Entry]:
    """Entries of llama.cpp's SentencePiece-BPE tokenizer.

    It joins the neighbouring pair whose union has the highest score. The merges of ``tokenizer.json``
    are ranked, so the score of a token is minus the rank of the first merge that makes it.
    """
    scores = [0.0] * len(texts)
    rank_of: dict[str, int] = {}
    for rank, merge in enumerate(_merges(definition["model"])):
        rank_of.setdefault(merge.replace(" ", "", 1), rank)
    unknown = definition["model"].get("unk_token")
    for index, text in enumerate(texts):
        if types[index] == NORMAL:
            scores[index] = -float(rank_of.get(text, len(rank_of) + index))
        if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            types[index] = BYTE
        elif text == unknown:
            types[index] = UNKNOWN
    return [
        make_entry("tokenizer.ggml.model", "str", "llama"),
        make_entry("tokenizer.ggml.pre", "str", "default"),
        make_entry("tokenizer.ggml.tokens", "[str]", texts),
        make_entry("tokenizer.ggml.scores", "[f32]", scores),
        make_entry("tokenizer.ggml.token_type", "[i32]", types),
        make_entry("tokenizer.ggml.add_space_prefix", "bool", _adds_space(definition)),
    ]


def _adds_space(definition: dict[str, Any]) -> bool:
    """Whether the tokenizer puts a space in front of the text."""
    normalizer = definition.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    if any(step.get("type") == "Prepend" for step in steps):
        return True
    rules = definition.get("pre_tokenizer") or {}
    return rules.get("type") == "Metaspace" and rules.get("prepend_scheme", "always") != "never"


def _byte_level_entries(definition: dict[str, Any], texts: list[str], types: list[int], path: Path) -> list[Entry]:
    return [
        make_entry("tokenizer.ggml.model", "str", "gpt2"),
        make_entry("tokenizer.ggml.pre", "str", _pre_tokenizer(definition, path)),
        make_entry("tokenizer.ggml.tokens", "[str]", texts),
        make_entry("tokenizer.ggml.token_type", "[i32]", types),
        make_entry("tokenizer.ggml.merges", "[str]", _merges(definition["model"])),
    ]


def _special_entries(folder: Path, settings: dict[str, Any], config: dict[str, Any], texts: list[str]) -> list[Entry]:
    """Ids of the special tokens, and which of them frame every text."""
    id_of = {text: index for index, text in enumerate(texts)}
    entries = []
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        index = id_of.get(_content(settings.get(f"{theirs}_token")) or "", config.get(f"{theirs}_token_id"))
        index = index[0] if isinstance(index, list) and index else index
        if isinstance(index, int) and 0 <= index < len(texts):
            entries.append(make_entry(f"tokenizer.ggml.{ours}_token_id", "u32", index))
    first, last = _frame(folder / "tokenizer.json")
    entries.append(make_entry("tokenizer.ggml.add_bos_token", "bool", first))
    entries.append(make_entry("tokenizer.ggml.add_eos_token", "bool", last))
    return entries


def _frame(path: Path) -> tuple[bool, bool]:
    """Whether the tokenizer's own post-processor puts a token before, and after, every text."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more specific
        raise BadFile(f"{path} is not a tokenizer definition: {str(error)[:200]!r}") from error
    framed = tokenizer.encode("a").ids
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    if not bare or len(framed) == len(bare):
        return False, False
    return framed[0] != bare[0], framed[-1] != bare[-1]


def _template_entries(folder: Path, settings: dict[str, Any]) -> list[Entry]:
    """The chat template, from its own file or from the configuration; named ones beside the default."""
    template = settings.get("chat_template")
    if (folder / "chat_template.jinja").is_file():
        # Not read_text, which would change line ends.
        template = (folder / "chat_template.jinja").read_bytes().decode("utf-8")
    if isinstance(template, str):
        return [make_entry("tokenizer.chat_template", "str", template)]
    if not isinstance(template, list):
        return []
    named = {str(item["name"]): str(item["template"]) for item in template}
    entries = [make_entry("tokenizer.chat_templates", "[str]", [n for n in named if n != "default"])]
    for name, text in named.items():
        key = "tokenizer.chat_template" if name == "default" else f"tokenizer.chat_template.{name}"
        entries.append(make_entry(key, "str", text))
    return entries


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
    settings_path = folder / "tokenizer_config.json"
    settings = read_json(settings_path) if settings_path.is_file() else {}
    try:
        kind = definition["model"]["type"]
        if kind != "BPE":
            raise Unsupported(f"{path}: {kind} tokenizers are not supported; BPE is")
        if foreign := [name for name in _FOREIGN_SETTINGS if definition["model"].get(name)]:
            raise Unsupported(f"{path}: llama.cpp has no BPE with {foreign[0]}")
        largest = max(definition["model"]["vocab"].values(), default=-1)
        if largest >= vocabulary:
            raise BadFile(f"{path} has token id {largest}, the model {vocabulary} embeddings")
        texts, types = _token_table(definition, vocabulary)
        if _is_sentencepiece(definition):
            entries = _sentencepiece_entries(definition, texts, types)
        else:
            entries = _byte_level_entries(definition, texts, types, path)
        return [
            *entries,
            *_special_entries(folder, settings, config, texts),
            *_template_entries(folder, settings),
        ]
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise BadFile(f"{path} or its settings are not a tokenizer definition: {str(error)[:200]!r}") from error
