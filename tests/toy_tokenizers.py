"""Toy vocabularies under the real rules of tokenizers: those of the families' published ``tokenizer.json`` files.

Every vocabulary is trained on the shipped text and on the hard texts, so that tokens reach across whatever a wrong
cut would cut: accents, spaces, digits, scripts.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import toys

SIZE = 2600  # rows of the embedding matrix, more than there are tokens

HARD_TEXTS = {
    "code": 'def f(x: int) -> str:\n\t"""Doc."""\n    return f"{x!r:>10}" if x != 0 else \'\'\n\n\n#  so\r\n\r\n@a\n',
    "paths": "https://a.example/b/c?d=1&e=%20 // C:\\x\\y /usr/lib/../z.so\n/\n//\r\n/* a */ a/b a / b",
    "names": "camelCase PascalCase snake_case HTTPServer iOS McDonald ABCdef XMLHttpRequest2 userID's OKs",
    "alphabets": "Größe, façade — Ελληνικά, Русский, עברית, العربية, ქართული, አማርኛ",
    "capitals beyond ASCII": "ЯзыкРусский ÉcoleÀParis ΕλληνικάΑβγ ǅǈ ﬁ ªº ʰʲ Աբգ",
    "scripts without spaces": "中文字符, 日本語テキスト, 한국어, 漢字かな交じり文。「引用」、全角！？ＡＢＣ１２３",
    "beside CJK": "我想在apple工作1314151天～ 第3章 東京2020！a中b1文 ，中。,a 龥龦ゟヿ",
    "digits": "0 1 12 123 1234 12345 1234567890123456789 3.14159 1,000,000 ½ ² ٣٤٥٦ Ⅷ १२३४ 1e-5 0xFF v2.10.3a4",
    "contractions": "I'm you're he'll WE'VE they'd it's can't I'M y'all'd've ’s 's 'S 'tis 'RE you 'Ll ''s'' d'D",
    "punctuation": "!!! ... ??? --- === ***  (a)[b]{c}<d> @#$%^&*~`|\\/ “q” ‘q’ …—– $a _b -c +d .e ,f\n.\n;\r\n",
    "kinds of space": " a  b   c    d     e\t\tf\t g \n\n\n h \n \n  i\u00a0j\u2003k\u200bl   \n\x85m\x0b\x0c",
    "white space": "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n        x\t\t\t\ty                 z",
    "spaces first": "    indented",
    "spaces last": "trailing    ",
    "nothing but spaces": "   ",
    "nothing but tabs": "\t\t\t",
    "nothing but line ends": "\n\n\r\n\r\r\n",
    "many line ends": "a" + "\n" * 40 + "b" + "\r\n" * 9,
    "emoji": "\U0001f44d \U0001f680\U0001f680 x\U0001f999y \U0001f1e9\U0001f1ea \U0001f469\u200d\U0001f680 \u2705",
    "private and unassigned": "\ue000\uf8ff \U0010ffff \u0378",
    "control characters": "a\x00b\x01c\x7fd\x1b[0m",
    "direction marks": "\u202eabc\u202c \u200fאב\u200e ב1ג \u2066x\u2069",
    "beyond the basic plane": "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 𓀀 𠀀𪛖",
    "not characters": "\ufffd\ufffe\uffff \ufeffbom a\ufdd0b",
    "the look of byte tokens": "<0x41> <0x0A> <0xFF>",
    "the look of spaces": "a\u2581b _c_ \u2581\u2581 \u0120d \u010ae",
    "special tokens": "<|im_start|>user\nhi<|im_end|>\n<|endoftext|> <s> </s> <unk> a<s>b <think>c</think> [gMASK]",
    "long words": "internationalisation antidisestablishmentarianism " + "ab" * 300 + " hello world the The THE",
    "one letter": "a",
    "nothing": "",
}
# What some of llama.cpp's rules have no notion of.
MARKS = {
    "combining marks": "e\u0301 a\u0308 n\u0303 Z\u0351\u036b\u0343 \u0928\u093f \u0e01\u0e33 cafe\u0301s E\u0301A",
    "scripts with marks": "हिन्दी नमस्ते, বাংলা, ภาษาไทย, தமிழ், עִבְרִית, العَرَبِيَّة, កាន់តែពិសេសអាច",
    "presentation marks": "\u270c\ufe0f 1\ufe0f\u20e3 \U0001f3f3\ufe0f\u200d\U0001f308 \U0001f32b\ufe0f",
}
# Where llama.cpp is known to cut otherwise under some rules.
DIFFERENT = {
    "an accent that NFC would compose": "cafe\u0301s",
    "a combining mark": "\u0928\u092e\u0938\u094d\u0924\u0947",
    "a capital beyond ASCII": "\u00c9cole\u00c0Paris",
    "a long s": "a'\u017fb",
    "a wide space": "\u4f60\u597d\u3000\u4e16\u754c",
    "a strange space": "\u4e2d\u2003\u6587",
}

_S = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
QWEN2 = rf"{_S}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN35 = (
    rf"{_S}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = rf"{_S}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
KIMI = (
    r"[\p{Han}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BAILING = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
SEED = (  # with the control characters themselves, not their escapes
    _S
    + "|[^\r\n"
    + r"\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}"
    + "\r\n]+|"
    + r"\s*["
    + "\r\n"
    + r"]+|\s+(?!\S)|\s+"
)
DEEPSEEK_LETTERS = (
    r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝ"
    r"Ὗ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ"
    r"𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+"
)
DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^"""
    + "\r\n"
    + r"\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+["
    + "\r\n"
    + r"]*|\s*["
    + "\r\n"
    + r"]+|\s+(?!\S)|\s+"
)
CJK = "[一-龥ࠀ-一가-퟿]+"
Json = dict[str, Any]
DIGITS: Json = {"type": "Digits", "individual_digits": True}


def split(pattern: str, behavior: str = "Isolated", invert: bool = False) -> Json:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert}


def byte_level(own_words: bool = False) -> Json:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": own_words}


def template(*first: str) -> Json:
    """A post-processor that puts tokens before every text."""
    shown = [{"SpecialToken": {"id": token, "type_id": 0}} for token in first]
    return {"single": [*shown, {"Sequence": {"id": "A", "type_id": 0}}]}


@dataclass(frozen=True)
class Rules:
    """What a family's tokenizer files say, but for the vocabulary.

    Attributes:
        special, added: tokens behind the vocabulary, special or not.
        first: tokens that its post-processor puts before every text.
        settings: of ``tokenizer_config.json``.
        generation: of ``generation_config.json``; token texts stand for ids.
        pre: llama.cpp's name for the rules.
    """

    pre: str
    steps: tuple[Json, ...]
    special: tuple[str, ...]
    added: tuple[str, ...] = ()
    words_first: bool = False
    normalizer: Json | None = None
    first: tuple[str, ...] = ()
    settings: Json = field(default_factory=dict)
    ends: tuple[str, ...] = ()


NFC = {"type": "NFC"}
_CHAT = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_THINK = ("<think>", "</think>", "<tool_call>", "</tool_call>")
_QWEN_SETTINGS = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None, "add_bos_token": False}
_DEEPSEEK_SPECIAL = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>")
_DEEPSEEK_SETTINGS = {
    "bos_token": {"content": "<｜begin▁of▁sentence｜>", "__type": "AddedToken"},
    "eos_token": {"content": "<｜end▁of▁sentence｜>", "__type": "AddedToken"},
    "add_bos_token": True,
    "add_eos_token": False,
}
_GLM = (
    "<|endoftext|>",
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "<sop>",
    "<eop>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
)
BYTE_LEVEL: dict[str, Rules] = {
    "qwen2_moe": Rules(
        "qwen2",
        (split(QWEN2), byte_level()),
        _CHAT,
        _THINK,
        normalizer=NFC,
        settings=_QWEN_SETTINGS,
        ends=_CHAT[::-2],
    ),
    "qwen3_5_moe": Rules(
        "qwen35", (split(QWEN35), byte_level()), _CHAT, _THINK, normalizer=NFC, settings=_QWEN_SETTINGS
    ),
    "olmoe": Rules(
        "gpt-2",
        (byte_level(own_words=True),),
        ("<|padding|>", "<|endoftext|>"),
        tuple(" " * count for count in range(24, 1, -1)),
        normalizer=NFC,
        settings={"eos_token": "<|endoftext|>", "pad_token": "<|padding|>"},
    ),
    "granitemoe": Rules(
        "refact",
        (DIGITS, byte_level(own_words=True)),
        ("<|end_of_text|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<|start_of_role|>"),
        settings={"bos_token": "<|end_of_text|>", "eos_token": "<|end_of_text|>", "add_bos_token": False},
    ),
    "granitemoehybrid": Rules(
        "dbrx",
        (split(LLAMA3, "Removed", invert=True), byte_level()),
        ("<|pad|>", "<|end_of_text|>", "<|start_of_role|>"),
        settings={"bos_token": "<|end_of_text|>", "eos_token": "<|end_of_text|>", "add_bos_token": False},
    ),
    "glm4_moe": Rules(
        "glm4",
        (split(LLAMA3), byte_level()),
        _GLM,
        ("<think>", "</think>"),
        words_first=True,
        settings={"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
        ends=("<|endoftext|>", "<|user|>", "<|observation|>"),
    ),
    "lfm2_moe": Rules(
        "llama-bpe",
        (split(LLAMA3), byte_level()),
        ("<|pad|>", "<|startoftext|>", *_CHAT),
        words_first=True,
        first=("<|startoftext|>",),
        settings={"bos_token": "<|startoftext|>", "eos_token": "<|im_end|>"},
    ),
    "gpt_oss": Rules(
        "granite-embed-multi-97m",
        (split(O200K), byte_level()),
        ("<|startoftext|>", "<|endoftext|>", "<|return|>", "<|channel|>", "<|start|>", "<|end|>", "<|call|>"),
        words_first=True,
        settings={"bos_token": "<|startoftext|>", "eos_token": "<|return|>", "pad_token": "<|endoftext|>"},
        ends=("<|return|>", "<|endoftext|>", "<|call|>"),
    ),
    "llama4": Rules(
        "granite-embed-multi-97m",
        (split(O200K), byte_level()),
        ("<|begin_of_text|>", "<|end_of_text|>", "<|eom|>", "<|eot|>"),
        first=("<|begin_of_text|>",),
        settings={"bos_token": "<|begin_of_text|>", "eos_token": "<|eot|>"},
        ends=("<|end_of_text|>", "<|eom|>", "<|eot|>"),
    ),
    "minimax_m2": Rules(
        "granite-embed-multi-97m",
        (split(O200K, "Removed", invert=True), byte_level()),
        ("]!p~[", "]~!b[", "[e~[", "]~b]"),
        _THINK,
        settings={"bos_token": "]~!b[", "eos_token": "[e~[", "add_prefix_space": False},
    ),
    "nemotron_h": Rules(
        "tekken",
        (split(TEKKEN), byte_level()),
        ("<unk>", "<s>", "</s>", "[INST]", "<|im_start|>", "<|im_end|>"),
        ("<think>", "</think>"),
        words_first=True,
        first=("<s>",),
        settings={"bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>"},
    ),
    "deepseek_v2": Rules(
        "deepseek-llm",
        (
            *(
                split("[\r\n]"),
                split(DEEPSEEK_LETTERS),
                split(r"\s?[!-/:-~！-／：-～‘-‟　-。]+"),
                split(r"\s+$"),
                split(CJK),
            ),
            *(DIGITS, byte_level()),
        ),
        _DEEPSEEK_SPECIAL,
        settings=_DEEPSEEK_SETTINGS,
    ),
    "deepseek_coder": Rules(
        "deepseek-coder",
        (split("[\r\n]"), split(r"\s?\p{L}+"), split(r"\s?\p{P}+"), split(CJK), DIGITS, byte_level()),
        _DEEPSEEK_SPECIAL,
        ("<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>", "<|User|>", "<|EOT|>"),
        settings=_DEEPSEEK_SETTINGS,
    ),
    "deepseek_v3": Rules(
        "deepseek-v3",
        (split(r"\p{N}{1,3}"), split("[一-龥぀-ゟ゠-ヿ]+"), split(DEEPSEEK3), byte_level()),
        _DEEPSEEK_SPECIAL,
        ("<think>", "</think>", "<｜User｜>", "<｜Assistant｜>"),
        normalizer={"type": "Sequence", "normalizers": []},
        settings=_DEEPSEEK_SETTINGS,
    ),
    "kimi_k2": Rules(
        "kimi-k2",
        (split(KIMI), byte_level()),
        ("[BOS]", "[EOS]", "<|im_end|>", "[PAD]"),
        settings={"bos_token": "[BOS]", "eos_token": "[EOS]"},
        ends=("<|im_end|>",),
    ),
    "bailing_moe": Rules(
        "bailingmoe",
        (split(BAILING), byte_level()),
        ("<|startoftext|>", "<|endoftext|>", "<role>", "</role>"),
        settings={"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"},
    ),
    "seed": Rules(
        "seed-coder", (split(SEED), byte_level()), ("<[begin]>", "<[end]>"), settings={"eos_token": "<[end]>"}
    ),
}
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] }}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
)


@cache
def training_texts() -> list[str]:
    return [*toys.training_lines()[::4], *(20 * [*HARD_TEXTS.values(), *MARKS.values(), *DIFFERENT.values()])]


def write_byte_level(folder: Path, family: str) -> Rules:
    """The tokenizer files of one of ``BYTE_LEVEL`` in ``folder``."""
    from tokenizers import Tokenizer, pre_tokenizers, trainers

    rules = BYTE_LEVEL[family]
    definition: Json = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": rules.normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": list(rules.steps)},
        "post_processor": None,
        "decoder": byte_level(),
        "model": {"type": "BPE", "vocab": {}, "merges": []},
    }
    tokenizer = Tokenizer.from_str(json.dumps(definition))
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE - len(rules.special) - len(rules.added) - 8,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_texts(), trainer)
    definition = json.loads(tokenizer.to_str())
    definition["model"]["ignore_merges"] = rules.words_first
    _write(folder, rules, definition)
    return rules


def _write(folder: Path, rules: Rules | Pieces, definition: Json) -> None:
    """Add what stands around the vocabulary, and write the files."""
    start = len(definition["model"]["vocab"])
    before: tuple[str, ...] = getattr(rules, "before", ())
    swallowing: tuple[str, ...] = getattr(rules, "swallowing", ())
    ids = {text: index for index, text in enumerate(before)}
    ids |= {text: start + offset for offset, text in enumerate((*rules.special, *rules.added))}
    definition["added_tokens"] = [
        {
            "id": index,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": text in swallowing,
            "normalized": text in rules.added,
            "special": text not in rules.added,
        }
        for text, index in ids.items()
    ]
    if rules.first:
        tokens = {text: {"id": text, "ids": [ids[text]], "tokens": [text]} for text in rules.first}
        single = template(*rules.first)["single"]
        definition["post_processor"] = {
            "type": "TemplateProcessing",
            "single": single,
            "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": tokens,
        }
    files = {
        "tokenizer.json": definition,
        "tokenizer_config.json": {**rules.settings, "chat_template": CHAT_TEMPLATE},
        "generation_config.json": {"eos_token_id": [ids[text] for text in getattr(rules, "ends", ())]},
    }
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


# SentencePiece BPE.

SPACE = "\u2581"
REPLACE: Json = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
PREPEND: Json = {"type": "Prepend", "prepend": SPACE}


def metaspace(scheme: str) -> Json:
    return {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False}


@dataclass(frozen=True)
class Pieces:
    """What a family's SentencePiece tokenizer files say, but for the vocabulary; fields as in ``Rules``.

    Attributes:
        before: special tokens at the start of the vocabulary, the unknown one among them.
        swallowing: special tokens that swallow the spaces behind them.
        runs: whether runs of spaces and of line ends are tokens.
    """

    before: tuple[str, ...]
    special: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    swallowing: tuple[str, ...] = ()
    normalizer: Json | None = None
    pre_tokenizer: Json | None = None
    first: tuple[str, ...] = ()
    settings: Json = field(default_factory=dict)
    runs: bool = False


_LLAMA = ("<unk>", "<s>", "</s>")
_LLAMA_SETTINGS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
LEGACY: Json = {"type": "Sequence", "normalizers": [PREPEND, REPLACE]}
SENTENCEPIECE: dict[str, Pieces] = {
    "mixtral": Pieces(_LLAMA, normalizer=LEGACY, first=("<s>",), settings=_LLAMA_SETTINGS),
    "mistral v3": Pieces(
        _LLAMA,
        ("[INST]", "[/INST]", "[TOOL_CALLS]"),
        pre_tokenizer=metaspace("first"),
        settings={**_LLAMA_SETTINGS, "add_bos_token": True, "add_eos_token": False},
    ),
    "phimoe": Pieces(
        _LLAMA,
        ("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"),
        swallowing=("</s>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"),
        normalizer=LEGACY,
        settings={**_LLAMA_SETTINGS, "eos_token": "<|endoftext|>", "add_bos_token": False, "add_eos_token": False},
    ),
    "ernie4_5_moe": Pieces(
        _LLAMA,
        ("<|end_of_sentence|>", "<|begin_of_sentence|>", "<mask:1>"),
        ("<|IMAGE_PLACEHOLDER|>", "<think>"),
        normalizer=REPLACE,
        settings={**_LLAMA_SETTINGS, "add_bos_token": False},
        runs=True,
    ),
    "gemma4": Pieces(
        ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>"),
        ("<|turn>", "<turn|>", "<|channel>", "<channel|>"),
        normalizer=REPLACE,
        pre_tokenizer={
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        first=("<bos>",),
        settings={"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"},
        runs=True,
    ),
}


@cache
def _trained_pieces() -> tuple[list[str], list[str]]:
    """Pieces of several letters, and single letters, in the order in which they were learned."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", SPACE)
    trained.pre_tokenizer = pre_tokenizers.Split(SPACE, "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=1800, limit_alphabet=300, show_progress=False)
    trained.train_from_iterator((text.rstrip("\n") for text in training_texts()), trainer)
    vocabulary = trained.get_vocab()
    # Line ends are pieces only among themselves, and what looks like a special token or a byte is none.
    strange = ("\n", "\0", "<0x", "s>", "k>", "|>")
    pieces = [each for each in sorted(vocabulary, key=vocabulary.__getitem__) if not any(s in each for s in strange)]
    return [each for each in pieces if len(each) > 1], [each for each in pieces if len(each) == 1]


def pieces_of(family: str) -> tuple[list[str], list[str]]:
    """The tokens of one of ``SENTENCEPIECE`` by id, without those added behind, and those of them that are joined."""
    joined, single = _trained_pieces()
    if SENTENCEPIECE[family].runs:
        runs = [SPACE * count for count in range(2, 17)] + ["\n" * count for count in range(2, 12)]
        joined = [*runs, *(each for each in joined if each not in runs)]
        single = ["\n", *single]
    return [*SENTENCEPIECE[family].before, *(f"<0x{byte:02X}>" for byte in range(256)), *joined, *single], joined


def write_sentencepiece(folder: Path, family: str) -> Pieces:
    """The tokenizer files of one of ``SENTENCEPIECE`` in ``folder``.

    Merges are made from the ranked pieces as transformers makes them: every split of a piece into two.
    """
    rules = SENTENCEPIECE[family]
    tokens, joined = pieces_of(family)
    ids = {text: index for index, text in enumerate(tokens)}
    merges = []
    for piece in joined:
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        merges += sorted((p for p in pairs if p[0] in ids and p[1] in ids), key=lambda p: (ids[p[0]], ids[p[1]]))
    definition: Json = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": rules.normalizer,
        "pre_tokenizer": rules.pre_tokenizer,
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "vocab": ids,
            "merges": merges,
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
        },
    }
    _write(folder, rules, definition)
    return rules


def field_bytes(number: int, value: int | float | str | bytes) -> bytes:
    """One field of a protocol buffer."""

    def varint(rest: int) -> bytes:
        rest %= 1 << 64
        return bytes([rest & 0x7F | 0x80]) + varint(rest >> 7) if rest > 0x7F else bytes([rest])

    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    raw = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(raw)) + raw


def piece_model(pieces: list[tuple[str, float, int]], trainer: dict[int, Any], normalizer: dict[int, Any]) -> bytes:
    """A SentencePiece model: text, score and type of each piece, and fields of its specifications."""
    message = b""
    for text, score, kind in pieces:
        piece = field_bytes(1, text) + field_bytes(2, float(score)) + (field_bytes(3, kind) if kind != 1 else b"")
        message += field_bytes(1, piece)
    message += field_bytes(2, b"".join(field_bytes(*each) for each in trainer.items()))
    return message + field_bytes(3, b"".join(field_bytes(*each) for each in normalizer.items()))


def write_piece_model(folder: Path, family: str, **settings: Any) -> None:
    """The family's tokenizer as ``tokenizer.model``, with no ``tokenizer.json``."""
    tokens, joined = pieces_of(family)
    rank = {text: -float(index) for index, text in enumerate(joined)}
    types = [3] * len(SENTENCEPIECE[family].before) + [6] * 256
    types += [1] * (len(tokens) - len(types))
    types[tokens.index("<unk>")] = 2
    pieces = [(text, rank.get(text, -float(len(tokens) + n)), types[n]) for n, text in enumerate(tokens)]
    trainer = {3: 2, 40: tokens.index("<unk>"), 41: 1, 42: 2, 43: -1}
    (folder / "tokenizer.model").write_bytes(piece_model(pieces, trainer, {1: "identity", 3: 1, 4: 0}))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
