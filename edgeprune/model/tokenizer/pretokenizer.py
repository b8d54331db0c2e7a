"""Byte-level BPE: the rules that cut a text into words, and llama.cpp's names for them.

llama.cpp has a fixed list of rules, each under one or more names (``src/llama-vocab.cpp``, ``llm_tokenizer_bpe``). It
is looked up here by the rules that ``tokenizer.json`` gives, in order; rules that are not in the list are an error.

llama.cpp writes some of the rules in its own way. The two were compared on hard texts and on thousands of random ones
with characters of every Unicode category. What llama.cpp cuts otherwise:

- all rules with ``(?i:'s|...)``: an apostrophe and U+017F, the long s, which the original takes for an s;
- ``tekken``: a combining mark is not part of the word, so that words of Indic scripts, Thai, vowelled Arabic and
  Hebrew, and letters with decomposed accents fall apart; and letters beyond ASCII are capital and small at once;
- ``gpt-4o``: as ``tekken``. ``granite-embed-multi-97m`` is the same rule with marks, and is taken where it can be; a
  llama.cpp from before pull request 22716 of May 2026 does not know the name, and refuses the file;
- ``kimi-k2``: combining marks as in ``tekken``; no letters have case, so that "camelCase" is one word;
- ``deepseek-coder``: white space from U+2000 on, the wide space U+3000 too, is not part of the word of Chinese,
  Japanese or Korean letters beside it;
- ``deepseek-llm``: as ``deepseek-coder``, but for U+3000.

A cut more or less matters only where a token reaches across it, so a cut less never does to a vocabulary that was
trained under the rule.

Rules that llama.cpp does not work off in code of its own but by ``std::regex`` overflow the stack on more than some
20,000 letters (or spaces) without a break: all but ``gpt-2``, ``qwen2``, ``qwen35``, ``llama-bpe``, ``glm4``,
``dbrx``, ``chatglm-bpe`` and ``kimi-k2``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from edgeprune.errors import Unsupported

_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
_LLAMA3 = _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_QWEN35 = (
    _ENDINGS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Words that begin with capitals or not: "camelCase" is two. OpenAI's o200k, and Mistral's tekken.
_CAPITALS = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_SMALL = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_REST_SLASH = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_O200K = f"{_CAPITALS}*{_SMALL}+{_ENDINGS}?|{_CAPITALS}+{_SMALL}*{_ENDINGS}?" + r"|\p{N}{1,3}" + _REST_SLASH
_TEKKEN = f"{_CAPITALS}*{_SMALL}+|{_CAPITALS}+{_SMALL}*" + r"|\p{N}" + _REST_SLASH
_NOT_HAN = r"&&[^\p{Han}]]"
KIMI = (
    r"[\p{Han}]+|"
    + f"{_CAPITALS[:-1]}{_NOT_HAN}*{_SMALL[:-1]}{_NOT_HAN}+{_ENDINGS}?|"
    + f"{_CAPITALS[:-1]}{_NOT_HAN}+{_SMALL[:-1]}{_NOT_HAN}*{_ENDINGS}?"
    + r"|\p{N}{1,3}"
    + _REST
)
_BAILING = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
# DeepSeek's letters: those with case, written out.
_DEEPSEEK_LETTERS = (
    "A-Za-z\xb5\xc0-\xd6\xd8-\xf6\xf8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377"
    "\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb"
    "\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4"
    "\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf"
    "\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_DEEPSEEK_MARKS = "[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
_DEEPSEEK3_WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SEED = _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"

_MOST_SHOWN = 400
# Steps that are no regular expression of the tokenizer's own: each digit alone, and GPT-2's rule within ByteLevel.
DIGIT, GPT2 = "each digit", "GPT-2's words"
_NO_MARKS = "combining marks are cut off their letters, and only English letters have case"


@dataclass(frozen=True)
class PreTokenizer:
    """Rules of llama.cpp.

    Attributes:
        name: the value of ``tokenizer.ggml.pre``.
        words_first: a word that is a token is taken before any merge.
        differs: what it cuts otherwise than the rule asks for, where ordinary text is concerned.
    """

    name: str
    words_first: bool = False
    differs: str = ""


# The steps of a tokenizer, in order, to the rules of llama.cpp that do the same, the best ones first.
PRE_TOKENIZERS: dict[tuple[str, ...], tuple[PreTokenizer, ...]] = {
    (GPT2,): (PreTokenizer("gpt-2"),),
    (DIGIT, GPT2): (PreTokenizer("refact"),),
    (QWEN2,): (PreTokenizer("qwen2"),),
    (_QWEN35,): (PreTokenizer("qwen35"),),
    (_LLAMA3,): (PreTokenizer("llama-bpe", words_first=True), PreTokenizer("dbrx")),
    (_O200K,): (
        PreTokenizer("granite-embed-multi-97m", words_first=True),
        PreTokenizer("gpt-4o", differs=_NO_MARKS),
    ),
    (_TEKKEN,): (PreTokenizer("tekken", words_first=True, differs=_NO_MARKS),),
    (KIMI,): (PreTokenizer("kimi-k2", differs="combining marks are cut off their letters"),),
    ("[\\r\\n]", rf"\s?[{_DEEPSEEK_LETTERS}]+", rf"\s?{_DEEPSEEK_MARKS}", r"\s+$", _CJK, DIGIT): (
        PreTokenizer("deepseek-llm"),
    ),
    (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, DIGIT): (
        PreTokenizer("deepseek-coder", differs="wide spaces are cut off Chinese, Japanese and Korean words"),
    ),
    (r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", _DEEPSEEK3_WORDS): (PreTokenizer("deepseek-v3"),),
    (_BAILING,): (PreTokenizer("bailingmoe"),),
    (_SEED,): (PreTokenizer("seed-coder"),),
}
# The same rules without a default for the token that begins a text, for tokenizers that have none.
_WITHOUT_FIRST = {"llama-bpe": "glm4", "dbrx": "chatglm-bpe"}


COMPOSES = (
    "llama.cpp does not compose characters (NFC) as the original does: a letter and its accent that are written as "
    "two characters become other tokens"
)


def pre_tokenizer(definition: dict[str, Any], has_first: bool, where: str) -> tuple[str, list[str]]:
    """llama.cpp's name for the rules of a byte-level BPE tokenizer, and how they differ, one sentence each.

    Args:
        definition: contents of ``tokenizer.json``.
        has_first: whether the tokenizer knows a token that begins a text.
        where: the file, for messages.

    Raises:
        Unsupported: rules that are not in the table.
    """
    composes = _composes(definition, where)
    steps = _steps(definition, where)
    known = PRE_TOKENIZERS.get(steps)
    if known is None:
        raise Unsupported(
            f"{where}: unknown pre-tokenizer rules {str(list(steps))[:_MOST_SHOWN]}",
            hint="if llama.cpp has them, add them to PRE_TOKENIZERS in edgeprune/model/tokenizer/pretokenizer.py",
        )
    words_first = bool(definition["model"].get("ignore_merges"))
    alike = [rules for rules in known if rules.words_first == words_first]
    exact = [rules for rules in alike if not rules.differs]
    notes = [COMPOSES] if composes else []
    if exact:
        chosen = exact[0]
    else:
        # Whether words are taken first is all the same where merges make every token out of its letters.
        unmade = _tokens_without_merges(definition)
        chosen = (known if not unmade else alike or known)[0]
        if unmade and not alike:
            notes.append(
                f"{unmade} tokens are not what merges make of their text, and llama.cpp's {chosen.name} looks "
                + ("words up before it merges" if chosen.words_first else "no words up before it merges")
            )
    if chosen.differs:
        notes.append(f"llama.cpp's pre-tokenizer {chosen.name} cuts some words otherwise: {chosen.differs}")
    return chosen.name if has_first else _WITHOUT_FIRST.get(chosen.name, chosen.name), notes


def _composes(definition: dict[str, Any], where: str) -> bool:
    """Whether the text is brought to the composed form (NFC) before it is cut, which llama.cpp leaves out.

    Raises:
        Unsupported: another normalizer.
    """
    normalizer = definition.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    for step in steps:
        if step.get("type") != "NFC":
            raise Unsupported(f"{where}: llama.cpp has no normalizer {step.get('type')} for byte-level tokenizers")
    return bool(steps)


def _steps(definition: dict[str, Any], where: str) -> tuple[str, ...]:
    """The steps that cut a text, as ``PRE_TOKENIZERS`` has them."""
    rules = definition.get("pre_tokenizer") or {}
    listed = rules.get("pretokenizers", [rules]) if rules.get("type") == "Sequence" else [rules]
    steps = []
    for step in listed:
        kind = step.get("type")
        if kind == "Split":
            steps.append(_split(step, alone=sum(other.get("type") == "Split" for other in listed) == 1, where=where))
        elif kind == "Digits" and step.get("individual_digits"):
            steps.append(DIGIT)
        elif kind != "ByteLevel":
            raise Unsupported(f"{where}: pre-tokenizer step {kind} is not known to llama.cpp")
        elif step.get("add_prefix_space"):
            raise Unsupported(f"{where}: a byte-level tokenizer that adds a space in front of the text")
        elif step.get("use_regex", True):
            steps.append(GPT2)
    if not listed or listed[-1].get("type") != "ByteLevel":
        raise Unsupported(f"{where}: the pre-tokenizer does not end in bytes")
    return tuple(steps)


def _split(step: dict[str, Any], alone: bool, where: str) -> str:
    """The regular expression of a step that makes every match a word.

    Dropping all but the matches is the same when the expression matches every text as a whole, as every expression
    in the table does that stands alone.
    """
    behavior = (step.get("behavior"), bool(step.get("invert")))
    if behavior != ("Isolated", False) and not (alone and behavior == ("Removed", True)):
        raise Unsupported(f"{where}: pre-tokenizer splits that are {step.get('behavior')}")
    pattern = str(step.get("pattern", {}).get("Regex", step.get("pattern")))
    return pattern.replace("\r", r"\r").replace("\n", r"\n")


def _tokens_without_merges(definition: dict[str, Any]) -> int:
    """How many tokens of the model are not what merges alone make of their text."""
    from tokenizers import Tokenizer

    plain: dict[str, Any] = {
        "model": {**definition["model"], "ignore_merges": False},
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
    }
    try:
        model = Tokenizer.from_str(json.dumps(plain)).model
    except Exception as error:  # the library raises nothing more specific
        raise ValueError(str(error)) from error
    return sum(len(model.tokenize(text)) != 1 for text in definition["model"]["vocab"])
