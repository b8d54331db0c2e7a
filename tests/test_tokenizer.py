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
from toy_tokenizers import HARD_TEXTS, MARKS

from edgeprune.errors import BadFile, Unsupported
from edgeprune.measure import child
from edgeprune.model.gguf import GgufFile, make_entry
from edgeprune.model.tokenizer import DIFFERENCES_KEY, tokenizer_entries
from edgeprune.model.tokenizer.tokens import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED

BEGIN = ["<|begin|>", "<|im_start|>", "<|im_end|>"]
TOKENIZERS: dict[str, Callable[[Path], None]] = {
    "qwen2": lambda folder: toys.byte_level_tokenizer(
        folder, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], toys.QWEN2_PATTERN
    ),
    "gpt-2": lambda folder: toys.byte_level_tokenizer(folder, ["<|padding|>", "<|endoftext|>"], None),
    "llama-bpe": lambda folder: toys.byte_level_tokenizer(
        folder, BEGIN, toys.LLAMA3_PATTERN, words_first=True, first="<|begin|>"
    ),
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
    texts = HARD_TEXTS | MARKS | {f"shipped line {n}": line for n, line in enumerate(toys.training_lines()[::40])}
    for (what, text), ids in zip(texts.items(), native_ids(path, list(texts.values()), special=True), strict=True):
        expected = tokenizer.encode(text)
        assert ids == expected.ids, (what, expected.tokens, [tokenizer.id_to_token(index) for index in ids])


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


@pytest.mark.parametrize("flag", [True, False])
def test_settings_rule_over_the_post_processor_as_in_transformers(flag: bool, folder: Path) -> None:
    toys.change_json(folder / "tokenizer_config.json", bos_token="<|im_start|>", add_bos_token=flag)
    change_definition(folder, framed("<|endoftext|>"))
    file = write_vocabulary(folder)
    assert file.get("tokenizer.ggml.add_bos_token") is flag
    assert file.get("tokenizer.ggml.bos_token_id") == own_tokenizer(file).token_to_id("<|im_start|>")


def framed(*first: str, last: str = "") -> Change:
    """A post-processor that puts tokens around every text."""

    def change(definition: dict[str, Any]) -> None:
        ids = {token["content"]: token["id"] for token in definition["added_tokens"]}
        special = [{"SpecialToken": {"id": text, "type_id": 0}} for text in (*first, last) if text]
        definition["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [*special[: len(first)], {"Sequence": {"id": "A", "type_id": 0}}, *special[len(first) :]],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {
                text: {"id": text, "ids": [ids[text]], "tokens": [text]} for text in (*first, last) if text
            },
        }

    return change


def test_token_behind_every_text_is_the_one_that_ends_it(folder: Path) -> None:
    change_definition(folder, framed("<|im_start|>", last="<|endoftext|>"))
    file = write_vocabulary(folder)
    assert native_ids(file.path, ["hello"], special=True) == [own_tokenizer(file).encode("hello").ids]
    assert file.get("tokenizer.ggml.add_eos_token") and file.get("tokenizer.ggml.add_bos_token")
    assert file.get(DIFFERENCES_KEY) is None


def test_two_tokens_before_every_text_are_left_to_the_template_and_told(folder: Path) -> None:
    change_definition(folder, framed("<|im_start|>", "<|im_end|>"))
    file = write_vocabulary(folder)
    assert not file.get("tokenizer.ggml.add_bos_token")
    (told,) = file.get(DIFFERENCES_KEY)
    assert "'<|im_start|>', '<|im_end|>' before every text" in told


def test_tokens_that_end_an_answer_and_have_no_place_are_told(folder: Path) -> None:
    toys.change_json(folder / "tokenizer_config.json", eos_token=...)
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 6, 7, 8], "suppress_tokens": [9, 99999]}')
    file = write_vocabulary(folder)
    texts = file.get("tokenizer.ggml.tokens")
    ids = [file.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    assert ids == [5, 6, 7]
    assert file.get("tokenizer.ggml.suppress_tokens").tolist() == [9]
    assert file.get(DIFFERENCES_KEY) == [f"llama.cpp does not end an answer at {texts[8]!r}"]


def test_word_that_llama_cpp_takes_for_an_end_is_told(folder: Path) -> None:
    """Qwen's vocabulary has "</s>" among its words, which is the end of what is struck out in HTML."""

    def with_word(definition: dict[str, Any]) -> None:
        vocabulary = definition["model"]["vocab"]
        last = max(vocabulary, key=vocabulary.__getitem__)
        vocabulary["</s>"] = vocabulary.pop(last)
        definition["model"]["merges"] = [m for m in definition["model"]["merges"] if "".join(m) != last]

    change_definition(folder, with_word)
    file = write_vocabulary(folder)
    word = file.get("tokenizer.ggml.tokens").index("</s>")
    assert native_ids(file.path, ["<s>a</s>"], special=True)[0][-1] == word
    told = "llama.cpp ends an answer at '</s>', which is a word like others here"
    assert told in file.get(DIFFERENCES_KEY)
    added = {**NO_FLAGS, "id": word, "content": "</s>", "special": False}  # as in Gemma's
    change_definition(folder, lambda definition: definition["added_tokens"].append(added))
    assert told in write_vocabulary(folder).get(DIFFERENCES_KEY)
    toys.change_json(folder / "tokenizer_config.json", eos_token="</s>")
    assert not any("ends an answer" in told for told in write_vocabulary(folder).get(DIFFERENCES_KEY) or [])


def test_no_end_of_text_is_told(folder: Path) -> None:
    toys.change_json(folder / "tokenizer_config.json", eos_token=...)
    assert "no token is known to end a text" in write_vocabulary(folder).get(DIFFERENCES_KEY)[0]


def test_added_tokens_without_an_embedding_are_left_out_and_told(folder: Path) -> None:
    token = {"id": toys.VOCABULARY, "content": "<extra>", "special": True}
    change_definition(folder, lambda definition: definition["added_tokens"].append({**NO_FLAGS, **token}))
    file = write_vocabulary(folder)
    assert "<extra>" not in file.get("tokenizer.ggml.tokens")
    assert file.get(DIFFERENCES_KEY) == [
        f"added tokens beyond the {toys.VOCABULARY} embeddings are left out: '<extra>'"
    ]


NO_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def test_tokens_that_are_words_only_as_a_whole_are_told(folder: Path) -> None:
    change_definition(folder, set_path("added_tokens", 2, "single_word", value=True))
    (told,) = write_vocabulary(folder).get(DIFFERENCES_KEY)
    assert "'<|im_end|>' as whole words only" in told


def test_special_tokens_may_be_named_in_the_older_file(folder: Path) -> None:
    toys.change_json(folder / "tokenizer_config.json", eos_token=..., bos_token=...)
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<|im_start|>", "bos_token": null}')
    file = write_vocabulary(folder)
    assert file.get("tokenizer.ggml.tokens")[file.get("tokenizer.ggml.eos_token_id")] == "<|im_start|>"
    assert file.get("tokenizer.ggml.bos_token_id") is None


def test_white_space_that_tokens_swallow_is_told(folder: Path) -> None:
    change_definition(folder, set_path("added_tokens", 2, "rstrip", value=True))
    (told,) = write_vocabulary(folder).get(DIFFERENCES_KEY)
    assert "drops white space beside '<|im_end|>'" in told


def test_holes_get_a_text_that_no_token_has(folder: Path) -> None:
    """llama.cpp aborts when two ids have one text."""
    last = toys.VOCABULARY - 1
    change_definition(folder, set_path("model", "vocab", f"[UNUSED{last}]", value=last - 3))
    file = write_vocabulary(folder)
    texts = file.get("tokenizer.ggml.tokens")
    assert texts[last] == f"[[UNUSED{last}]]" and texts[last - 3] == f"[UNUSED{last}]"
    assert native_ids(file.path, ["a"], special=True) == [own_tokenizer(file).encode("a").ids]


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
    "a step of digits": (set_path(*SPLIT, value={"type": "Digits", "individual_digits": True}), "unknown pre-token"),
    "no step at all": (set_path("pre_tokenizer", value=None), "step None"),
    "both patterns": (set_path("pre_tokenizer", "pretokenizers", 1, "use_regex", value=True), "unknown pre-token"),
    "a space in front": (
        set_path("pre_tokenizer", "pretokenizers", 1, "add_prefix_space", value=True),
        "adds a space",
    ),
    "lower case": (set_path("normalizer", value={"type": "Lowercase"}), "no normalizer Lowercase"),
    "nothing but letters": (set_path("pre_tokenizer", "pretokenizers", value=[]), "not end in bytes"),
    "compatible characters": (
        set_path("normalizer", value={"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "NFKC"}]}),
        "no normalizer NFKC",
    ),
    "dropout": (set_path("model", "dropout", value=0.1), "no BPE with dropout"),
    "suffixes of words": (set_path("model", "end_of_word_suffix", value="</w>"), "no BPE with end_of_word_suffix"),
    "another algorithm": (set_path("model", "type", value="WordPiece"), "WordPiece tokenizers are not supported"),
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


# A token that merges do not make: its letters are merged into other tokens first.
def without_merge(definition: dict[str, Any]) -> None:
    model = definition["model"]
    text = max(model["vocab"], key=len)
    model["merges"] = [merge for merge in model["merges"] if "".join(merge) != text]


@pytest.mark.parametrize("whole", [True, False])
def test_words_taken_before_merges_matter_only_where_merges_do_not_make_them(whole: bool, folder: Path) -> None:
    change_definition(folder, set_path("model", "ignore_merges", value=True))
    if not whole:
        change_definition(folder, without_merge)
    file = write_vocabulary(folder)
    told = file.get(DIFFERENCES_KEY, [])
    assert told == [] if whole else "1 tokens are not what merges make" in told[0]
    word = max(json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"], key=len)
    text = word.replace("\u0120", " ")
    assert (native_ids(file.path, [text], special=False)[0] == own_tokenizer(file).encode(text).ids) == whole


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
    "an empty model": (set_path("model", value={}), "is not a tokenizer definition: it lacks 'type'"),
    "a vocabulary that is a list": (set_path("model", "vocab", value=["a"]), "not a tokenizer definition"),
    "pieces without scores": (set_path("model", "type", value="Unigram"), "not a tokenizer definition"),
    "ids that are texts": (set_path("model", "vocab", "zzz", value="7"), "not a tokenizer definition"),
    "merges that are numbers": (set_path("model", "merges", value=[1, 2]), "not a tokenizer definition"),
    "merges of unknown tokens": (set_path("model", "merges", 0, value=["日", "本"]), "not a tokenizer definition"),
    "added tokens without an id": (set_path("added_tokens", 0, value={"content": "x"}), "not a tokenizer definition"),
    "a special token under two ids": (
        set_path("added_tokens", 1, "content", value="<|im_end|>"),
        "not a tokenizer definition|one added token under two ids",
    ),
    "an added token with the text of another": (
        set_path("added_tokens", 1, "content", value="e"),
        "the token 'e' as id|not a tokenizer definition",
    ),
    "a negative id": (set_path("model", "vocab", "zzz", value=-1), "token id -1|not a tokenizer definition"),
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
