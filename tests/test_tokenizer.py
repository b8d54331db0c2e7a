"""Tokenizers: llama.cpp cuts every text exactly as the checkpoint's own tokenizer, or conversion is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import toys
from tokenizers import Tokenizer

from edgeprune.errors import BadFile, Unsupported
from edgeprune.measure import child
from edgeprune.model.gguf import GgufFile, make_entry
from edgeprune.model.tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, tokenizer_entries

HARD_TEXTS = {
    "code": 'def f(x: int) -> str:\n\t"""Doc."""\n    return f"{x!r:>10}" if x != 0 else \'\'\n\n\n#  so\r\n\r\n@a\n',
    "alphabets": "Größe, façade — Ελληνικά, Русский, עברית, العربية, ქართული, አማርኛ",
    "scripts without spaces": "हिन्दी, বাংলা, ไทย, 中文字符, 日本語テキスト, 한국어",
    "combining marks": "e\u0301 a\u0308 n\u0303 Z\u0351\u036b\u0343 \u0928\u093f \u0e01\u0e33",
    # Families and flags are several characters, joined by U+200D or by nothing.
    "emoji": "\U0001f44d \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f3f3\ufe0f\u200d\U0001f308 "
    "\U0001f469\U0001f3fd\u200d\U0001f680 \U0001f1e9\U0001f1ea \u270c\ufe0f 1\ufe0f\u20e3",
    "kinds of space": " a  b   c    d     e\t\tf\t g \n\n\n h \n \n  i\u00a0j\u2003k\u200bl\u3000m   \n",
    "spaces first": "    indented",
    "spaces last": "trailing    ",
    "nothing but spaces": "   ",
    "nothing but tabs": "\t\t\t",
    "nothing but line ends": "\n\n\r\n\r\r\n",
    "digits": "0 1 12 123 1234 12345 3.14159 1,000,000 ½ ² ٣ Ⅷ १२३ 1e-5 0xFF",
    "contractions": "I'm you're he'll WE'VE they'd it's can't I'M ’s 's",
    "punctuation": "!!! ... ??? --- === ***  (a)[b]{c}<d> @#$%^&*~`|\\/ “q” ‘q’ …—–",
    "special tokens": "<|im_start|>user\nhi<|im_end|>\n<|endoftext|> <s> </s> <unk> a<s>b <|padding|>",
    "private and unassigned": "\ue000\uf8ff \U0010ffff \u0378",
    "control characters": "a\x00b\x01c\x7fd\x1b[0m",
    "beyond the basic plane": "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 𓀀",
    "the look of byte tokens": "<0x41> <0x0A>",
    "the look of spaces": "a\u2581b _c_ \u2581\u2581",
    "long words": "internationalisation antidisestablishmentarianism hello world the The THE",
    "one letter": "a",
}

BEGIN = ["<|begin|>", "<|im_start|>", "<|im_end|>"]
TOKENIZERS: dict[str, Callable[[Path], None]] = {
    "qwen2": lambda folder: toys.byte_level_tokenizer(
        folder, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], toys.QWEN2_PATTERN
    ),
    "gpt-2": lambda folder: toys.byte_level_tokenizer(folder, ["<|padding|>", "<|endoftext|>"], None),
    "llama-bpe": lambda folder: toys.byte_level_tokenizer(
        folder, BEGIN, toys.LLAMA3_PATTERN, words_first=True, first="<|begin|>"
    ),
    "qwen35": lambda folder: toys.byte_level_tokenizer(folder, BEGIN, toys.QWEN35_PATTERN),
    "sentencepiece": toys.sentencepiece_tokenizer,
}


def write_vocabulary(folder: Path, config: dict[str, Any] | None = None) -> GgufFile:
    """A GGUF with nothing but the tokenizer in ``folder``, which is all that tokenizing needs."""
    entries = tokenizer_entries(folder, config or {}, toys.VOCABULARY)
    architecture = make_entry("general.architecture", "str", "llama")
    return GgufFile(toys.write_gguf(folder / "vocabulary.gguf", [architecture, *entries], []))


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], GgufFile]:
    """Vocabulary of one of ``TOKENIZERS``, its tokenizer beside it."""
    made: dict[str, GgufFile] = {}

    def make(name: str) -> GgufFile:
        if name not in made:
            folder = tmp_path_factory.mktemp("tokenizers") / name
            folder.mkdir()
            TOKENIZERS[name](folder)
            made[name] = write_vocabulary(folder)
        return made[name]

    return make


def native_ids(path: Path, texts: list[str], *, special: bool) -> list[list[int]]:
    task = "edgeprune.measure.tasks:tokenize"
    ids: list[list[int]] = child.call(task, {"model": str(path), "texts": texts, "special": special})
    return ids


def own_tokenizer(file: GgufFile) -> Tokenizer:
    return Tokenizer.from_file(str(file.path.parent / "tokenizer.json"))


def assert_same_ids(tokenizer: Tokenizer, path: Path) -> None:
    texts = dict(HARD_TEXTS) | {f"shipped line {n}": line for n, line in enumerate(toys.training_lines()[::40])}
    for (what, text), ids in zip(texts.items(), native_ids(path, list(texts.values()), special=True), strict=True):
        expected = tokenizer.encode(text)
        assert ids == expected.ids, (what, expected.tokens, [tokenizer.id_to_token(index) for index in ids])


@pytest.mark.parametrize("name", ["llama-bpe", "qwen35"])  # the other kinds: with their models, below
def test_llama_cpp_cuts_hard_text_like_the_original(name: str, vocabulary: Callable[[str], GgufFile]) -> None:
    assert_same_ids(own_tokenizer(vocabulary(name)), vocabulary(name).path)


@pytest.mark.parametrize("family", toys.CHECKPOINTS)
def test_converted_model_cuts_text_like_its_checkpoint(
    family: str, toy_checkpoint: toys.Maker, toy_gguf: toys.Maker
) -> None:
    tokenizer = Tokenizer.from_file(str(toy_checkpoint(family) / "tokenizer.json"))
    assert_same_ids(tokenizer, toy_gguf(family))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_text_is_framed_only_where_the_original_frames_it(name: str, vocabulary: Callable[[str], GgufFile]) -> None:
    file, tokenizer = vocabulary(name), own_tokenizer(vocabulary(name))
    first = {"llama-bpe": "<|begin|>", "sentencepiece": "<s>"}.get(name)
    assert file.get("tokenizer.ggml.add_bos_token") == (first is not None)
    assert not file.get("tokenizer.ggml.add_eos_token")
    if first is not None:
        assert file.get("tokenizer.ggml.bos_token_id") == tokenizer.token_to_id(first)
        assert native_ids(file.path, ["hello"], special=True)[0][0] == tokenizer.token_to_id(first)
        bare = tokenizer.encode("hello", add_special_tokens=False).ids
        assert native_ids(file.path, ["hello"], special=False) == [bare]


def test_special_tokens_in_plain_text_are_not_parsed_unless_asked(vocabulary: Callable[[str], GgufFile]) -> None:
    file = vocabulary("qwen2")
    mark = own_tokenizer(file).token_to_id("<|im_end|>")
    (parsed,) = native_ids(file.path, ["a<|im_end|>"], special=True)
    (plain,) = native_ids(file.path, ["a<|im_end|>"], special=False)
    assert parsed[-1] == mark and mark not in plain


def test_token_list_is_as_long_as_the_embeddings_and_knows_its_kinds(
    vocabulary: Callable[[str], GgufFile],
) -> None:
    file = vocabulary("sentencepiece")
    texts, types = file.get("tokenizer.ggml.tokens"), file.get("tokenizer.ggml.token_type").tolist()
    assert len(texts) == len(types) == len(file.get("tokenizer.ggml.scores")) == toys.VOCABULARY
    kinds = dict(zip(texts, types, strict=True))
    assert (kinds["<unk>"], kinds["<s>"], kinds["<0x41>"], kinds["e"]) == (UNKNOWN, CONTROL, BYTE, NORMAL)
    byte_level = vocabulary("qwen2")
    texts, types = byte_level.get("tokenizer.ggml.tokens"), byte_level.get("tokenizer.ggml.token_type").tolist()
    assert len(texts) == toys.VOCABULARY and len(set(texts)) == toys.VOCABULARY
    assert types[-8:] == [UNUSED] * 8 and types[-11:-8] == [CONTROL] * 3
    assert texts[byte_level.get("tokenizer.ggml.eos_token_id")] == "<|im_end|>"
    assert texts[byte_level.get("tokenizer.ggml.padding_token_id")] == "<|endoftext|>"


# The rest works on a copy of a real tokenizer folder, changed in one place.

Change = Callable[[dict[str, Any]], None]


@pytest.fixture
def folder(vocabulary: Callable[[str], GgufFile], tmp_path: Path) -> Path:
    source = vocabulary("qwen2").path.parent
    return Path(shutil.copytree(source, tmp_path / "tokenizer"))


def change_definition(folder: Path, change: Change) -> None:
    definition = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    change(definition)
    (folder / "tokenizer.json").write_text(json.dumps(definition), encoding="utf-8")


TEMPLATES = {
    "plain": toys.CHAT_TEMPLATE,
    "line ends of every kind": "{{ 'a\\r\\n' }}\r\n{# b #}\n\r\t{{ messages }}\n\n",
    "any script and quotes": '{{ "\'\\"\\\\" }} 日本語 👨‍👩‍👧 {{ bos_token }}',
    "empty": "",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("place", ["file", "settings"])
def test_chat_template_survives_byte_for_byte(name: str, place: str, folder: Path) -> None:
    template = TEMPLATES[name]
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    if place == "file":
        (folder / "chat_template.jinja").write_bytes(template.encode())
    else:
        toys.change_json(folder / "tokenizer_config.json", chat_template=template)
    assert write_vocabulary(folder).get("tokenizer.chat_template") == template


def test_named_chat_templates_are_kept_beside_the_default(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    toys.change_json(folder / "tokenizer_config.json", chat_template=named)
    file = write_vocabulary(folder)
    assert file.get("tokenizer.chat_template") == "D"
    assert file.get("tokenizer.chat_template.tool_use") == "T"
    assert file.get("tokenizer.chat_templates") == ["tool_use"]


def test_no_chat_template_is_no_entry(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    toys.change_json(folder / "tokenizer_config.json", chat_template=...)
    assert write_vocabulary(folder).get("tokenizer.chat_template") is None


def test_special_ids_come_from_the_model_when_the_tokenizer_has_none(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    file = write_vocabulary(folder, {"eos_token_id": [7, 8], "bos_token_id": 9, "pad_token_id": None})
    assert file.get("tokenizer.ggml.eos_token_id") == 7
    assert file.get("tokenizer.ggml.bos_token_id") == 9
    assert file.get("tokenizer.ggml.padding_token_id") is None


def test_merges_may_be_texts_or_pairs(folder: Path) -> None:
    pairs = write_vocabulary(folder).get("tokenizer.ggml.merges")

    def as_texts(definition: dict[str, Any]) -> None:
        definition["model"]["merges"] = [" ".join(merge) for merge in definition["model"]["merges"]]

    change_definition(folder, as_texts)
    assert write_vocabulary(folder).get("tokenizer.ggml.merges") == pairs
    assert len(pairs) > 100


def set_path(*keys: str | int, value: Any) -> Change:
    def change(definition: dict[str, Any]) -> None:
        target: Any = definition
        for key in keys[:-1]:
            target = target[key]
        target[keys[-1]] = value

    return change


SPLIT = ("pre_tokenizer", "pretokenizers", 0)
UNSUPPORTED: dict[str, tuple[Change, str]] = {
    "an unknown pattern": (set_path(*SPLIT, "pattern", value={"Regex": r"\w+|\s+"}), "unknown pre-tokenizer rules"),
    "a split at a text": (set_path(*SPLIT, "pattern", value={"String": " "}), "unknown pre-tokenizer rules"),
    "splits that are removed": (set_path(*SPLIT, "behavior", value="Removed"), "splits that are Removed"),
    "the pattern turned round": (set_path(*SPLIT, "invert", value=True), "splits that are Isolated"),
    "a step of digits": (set_path(*SPLIT, value={"type": "Digits", "individual_digits": True}), "step Digits"),
    "no step at all": (set_path("pre_tokenizer", value=None), "step None"),
    "both patterns": (set_path("pre_tokenizer", "pretokenizers", 1, "use_regex", value=True), "unknown pre-token"),
    "a space in front": (
        set_path("pre_tokenizer", "pretokenizers", 1, "add_prefix_space", value=True),
        "adds a space",
    ),
    "lower case": (set_path("normalizer", value={"type": "Lowercase"}), "no normalizer Lowercase"),
    "words before merges": (set_path("model", "ignore_merges", value=True), "words before merges"),
    "dropout": (set_path("model", "dropout", value=0.1), "no BPE with dropout"),
    "suffixes of words": (set_path("model", "end_of_word_suffix", value="</w>"), "no BPE with end_of_word_suffix"),
    "another algorithm": (set_path("model", "type", value="Unigram"), "Unigram tokenizers are not supported"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_rule_that_llama_cpp_lacks_is_an_error_and_never_a_guess(case: str, folder: Path) -> None:
    change, cause = UNSUPPORTED[case]
    change_definition(folder, change)
    with pytest.raises(Unsupported, match=cause) as refusal:
        write_vocabulary(folder)
    assert "tokenizer.json" in refusal.value.cause and "\n" not in refusal.value.cause


def test_unknown_pattern_says_where_patterns_live(folder: Path) -> None:
    change_definition(folder, UNSUPPORTED["an unknown pattern"][0])
    with pytest.raises(Unsupported) as refusal:
        write_vocabulary(folder)
    assert "PRE_TOKENIZERS" in refusal.value.hint


def test_composed_accents_are_what_qwen_asks_for(folder: Path) -> None:
    change_definition(folder, set_path("normalizer", value={"type": "NFC"}))
    file = write_vocabulary(folder)
    tokenizer = own_tokenizer(file)
    assert native_ids(file.path, ["Größe é"], special=True) == [tokenizer.encode("Größe é").ids]


BROKEN: dict[str, tuple[Change, str]] = {
    "more tokens than embeddings": (
        set_path("model", "vocab", "zzz", value=toys.VOCABULARY),
        f"token id {toys.VOCABULARY}, the model {toys.VOCABULARY} embeddings",
    ),
    "no model": (set_path("model", value=None), "not a tokenizer definition"),
    "a vocabulary that is a list": (set_path("model", "vocab", value=["a"]), "not a tokenizer definition"),
    "ids that are texts": (set_path("model", "vocab", "zzz", value="7"), "not a tokenizer definition"),
    "merges that are numbers": (set_path("model", "merges", value=[1, 2]), "not a tokenizer definition"),
    "merges of unknown tokens": (set_path("model", "merges", 0, value=["日", "本"]), "not a tokenizer definition"),
    "added tokens without an id": (set_path("added_tokens", 0, value={"content": "x"}), "not a tokenizer definition"),
    "half a character": (set_path("model", "vocab", "\ud83d", value=5), "not a tokenizer definition"),
    "an unknown post-processor": (set_path("post_processor", value={"type": "X"}), "not a tokenizer definition"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_tokenizer_is_refused_in_one_line(case: str, folder: Path) -> None:
    change, cause = BROKEN[case]
    change_definition(folder, change)
    with pytest.raises(BadFile, match=cause) as refusal:
        write_vocabulary(folder)
    assert "\n" not in refusal.value.cause and len(refusal.value.cause) < 500


CONTENTS = {
    "tokenizer.json": {"cut off": b'{"model": {', "a list": b"[]", "not UTF-8": b"\xff\xfe", "a number": b"1"},
    "tokenizer_config.json": {"cut off": b'{"eos', "a list": b"[]", "no templates": b'{"chat_template": [1]}'},
    "chat_template.jinja": {"not UTF-8": b"\xff\xfe"},
}
FILES = [(name, what) for name, cases in CONTENTS.items() for what in cases]


@pytest.mark.parametrize(("name", "what"), FILES, ids=[f"{name}: {what}" for name, what in FILES])
def test_broken_tokenizer_file_is_refused_in_one_line(name: str, what: str, folder: Path) -> None:
    if name == "tokenizer_config.json":
        (folder / "chat_template.jinja").unlink(missing_ok=True)
    (folder / name).write_bytes(CONTENTS[name][what])
    with pytest.raises(BadFile) as refusal:
        write_vocabulary(folder)
    assert "\n" not in refusal.value.cause


def test_checkpoint_without_a_tokenizer_is_refused_with_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match=r"no tokenizer\.json") as refusal:
        tokenizer_entries(tmp_path, {}, 10)
    assert refusal.value.hint
