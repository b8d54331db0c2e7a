"""Tokenizers of the known families: under the rules of their published files, llama.cpp's ids are the original's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import toy_tokenizers
import toys
from tokenizers import Tokenizer
from toy_tokenizers import BYTE_LEVEL, HARD_TEXTS, MARKS, SENTENCEPIECE

import edgeprune
from edgeprune.errors import Unsupported
from edgeprune.measure import child
from edgeprune.model.gguf import GgufFile, make_entry
from edgeprune.model.tokenizer import DIFFERENCES_KEY, tokenizer_entries
from edgeprune.model.tokenizer.tokens import CONTROL, USER_DEFINED

# Texts, or what stands in texts, on which llama.cpp is known to differ: pinned below, and told to the user or not.
ROOT = str(Path(edgeprune.__file__).parent.parent)
ALL = BYTE_LEVEL | SENTENCEPIECE
PRE = "tokenizer.ggml.pre"
WITHOUT_NFC = ("qwen2_moe", "qwen3_5_moe", "olmoe")
WITHOUT_MARKS = ("nemotron_h", "kimi_k2")
RETYPED = ("gpt_oss", "deepseek_coder")  # llama.cpp changes the types of some added tokens, by their text
WITHOUT_CAPITALS = ("gpt_oss", "llama4", "minimax_m2", "nemotron_h")


def write_vocabulary(folder: Path, name: str = "toy") -> GgufFile:
    """A GGUF of a model of that name with nothing but the tokenizer in ``folder``."""
    entries = tokenizer_entries(folder, {}, toy_tokenizers.SIZE)
    entries += [make_entry("general.architecture", "str", "llama"), make_entry("general.name", "str", name)]
    return GgufFile(toys.write_gguf(folder / "vocabulary.gguf", entries, []))


@pytest.fixture(scope="module")
def family_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], GgufFile]:
    """Vocabulary of one of ``BYTE_LEVEL`` or ``SENTENCEPIECE``, its tokenizer beside it, made when first asked for.

    Do not change it.
    """
    made: dict[str, GgufFile] = {}

    def make(family: str) -> GgufFile:
        if family not in made:
            folder = tmp_path_factory.mktemp("families") / family
            folder.mkdir()
            write = toy_tokenizers.write_byte_level if family in BYTE_LEVEL else toy_tokenizers.write_sentencepiece
            write(folder, family)
            # llama.cpp knows by the name that special tokens swallow spaces.
            made[family] = write_vocabulary(folder, "Phi-3.5-MoE" if family == "phimoe" else "toy")
        return made[family]

    return make


def native_ids(file: GgufFile, texts: list[str], *, special: bool = False) -> list[list[int]]:
    """llama.cpp's ids, without the token that begins every text."""
    task = "edgeprune.measure.tasks:tokenize"
    ids: list[list[int]] = child.call(task, {"model": str(file.path), "texts": texts, "special": special})
    first = [file.get("tokenizer.ggml.bos_token_id")] if special and file.get("tokenizer.ggml.add_bos_token") else []
    assert all(each[: len(first)] == first for each in ids)
    return [each[len(first) :] for each in ids]


def original_ids(file: GgufFile, texts: list[str], *, special: bool = False) -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(file.path.parent / "tokenizer.json"))
    tokenizer.encode_special_tokens = not special
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


def texts_for(family: str) -> dict[str, str]:
    """The texts on which llama.cpp and the original agree."""
    texts = HARD_TEXTS | MARKS
    if family in WITHOUT_NFC:
        del texts["combining marks"]
    if family in WITHOUT_MARKS:
        texts = {what: text for what, text in texts.items() if what not in MARKS}
    if family in WITHOUT_CAPITALS:
        del texts["capitals beyond ASCII"]
    rules = ALL[family]
    marks = (*getattr(rules, "before", ()), *rules.special, *rules.added)
    texts["its own special tokens"] = "x" + "y".join(marks) + " z\n" + " ".join(marks) + "".join(marks) + "\n\n"
    return texts | {f"shipped line {n}": line for n, line in enumerate(toys.training_lines()[::60])}


@pytest.mark.parametrize("family", BYTE_LEVEL)
def test_pre_tokenizer_is_recognised_by_its_rules(family: str, family_file: Callable[[str], GgufFile]) -> None:
    assert family_file(family).get(PRE) == BYTE_LEVEL[family].pre


@pytest.mark.parametrize("family", ALL)
def test_llama_cpp_cuts_hard_text_like_the_original(family: str, family_file: Callable[[str], GgufFile]) -> None:
    file, texts = family_file(family), texts_for(family)
    if family == "mistral v3":  # without the space that begins a text, as chats are without it
        texts = {what: "[INST]" + text for what, text in texts.items()}
    for special in (True,) if family == "mistral v3" else (True, False):
        if not special and family in RETYPED:
            del texts["its own special tokens"]
        originals = original_ids(file, list(texts.values()), special=special)
        natives = native_ids(file, list(texts.values()), special=special)
        for what, original, native in zip(texts, originals, natives, strict=True):
            assert native == original, (what, special)


# Rules that are nearly the family's.
MISTAKES = {
    "bailing_moe": "gpt-2",
    "seed": "gpt-2",
    "granitemoehybrid": "qwen2",
    "granitemoe": "gpt-2",
    "gpt_oss": "gpt-4o",
    "deepseek_coder": "deepseek-llm",
}


@pytest.mark.parametrize("family", MISTAKES)
def test_rules_taken_for_others_would_be_seen(
    family: str, family_file: Callable[[str], GgufFile], tmp_path: Path
) -> None:
    """The test above is worth as much as its texts and vocabularies."""
    folder = family_file(family).path.parent
    entries = [entry for entry in tokenizer_entries(folder, {}, toy_tokenizers.SIZE) if entry.key != PRE]
    entries += [make_entry("general.architecture", "str", "llama"), make_entry(PRE, "str", MISTAKES[family])]
    file = GgufFile(toys.write_gguf(tmp_path / "wrong.gguf", entries, []))
    texts = list(texts_for(family).values())
    assert native_ids(file, texts) != original_ids(family_file(family), texts)


DIFFERENCES = {
    "an accent that NFC would compose": WITHOUT_NFC,
    "a combining mark": WITHOUT_MARKS,
    "a capital beyond ASCII": WITHOUT_CAPITALS,
    "a long s": ("gpt_oss",),
    "a wide space": ("deepseek_coder",),
    "a strange space": ("deepseek_v2", "deepseek_coder"),
}
TOLD = {
    "mistral v3": "a space before the first word",
    "phimoe": "drops white space beside",
    "nemotron_h": "combining marks are cut off",
    "kimi_k2": "combining marks are cut off",
    "deepseek_coder": "wide spaces are cut off",
}


@pytest.fixture(scope="module")
def differing(family_file: Callable[[str], GgufFile]) -> Callable[[str], set[str]]:
    """Which of the texts llama.cpp and the original cut differently."""

    @cache
    def find(family: str) -> set[str]:
        texts = toy_tokenizers.DIFFERENT
        natives, originals = (each(family_file(family), list(texts.values())) for each in (native_ids, original_ids))
        return {what for what, a, b in zip(texts, natives, originals, strict=True) if a != b}

    return find


@pytest.mark.parametrize("what", DIFFERENCES)
def test_known_differences_are_still_there(what: str, differing: Callable[[str], set[str]]) -> None:
    """When one is gone, the module's list of them, and what users are told, can be shortened."""
    for family in DIFFERENCES[what]:
        assert what in differing(family), family
    assert what not in differing("deepseek_v3")


def test_llama_cpp_parses_some_tokens_by_their_text_and_not_by_their_type(
    family_file: Callable[[str], GgufFile],
) -> None:
    """Where special tokens are not to be parsed: gpt-oss's always are, those of fill-in-the-middle never."""
    for family, text in (("gpt_oss", "<|channel|>"), ("deepseek_coder", "<｜fim▁hole｜>")):
        file = family_file(family)
        (plain,), (parsed,) = native_ids(file, [text]), native_ids(file, [text], special=True)
        assert parsed == original_ids(file, [text], special=True)[0] and len(parsed) == 1
        assert (plain == parsed) == (family == "gpt_oss")
        assert (plain == original_ids(file, [text])[0]) is False


@pytest.mark.parametrize("family", ALL)
def test_differences_in_ordinary_text_are_told(family: str, family_file: Callable[[str], GgufFile]) -> None:
    told = family_file(family).get(DIFFERENCES_KEY, [])
    assert len(told) == (family in TOLD) + (family in WITHOUT_NFC)
    assert any("does not compose characters (NFC)" in line for line in told) == (family in WITHOUT_NFC)
    assert TOLD.get(family, "") in "".join(told)


@pytest.mark.parametrize("family", ALL)
def test_special_tokens_are_those_of_the_files(family: str, family_file: Callable[[str], GgufFile]) -> None:
    file, rules = family_file(family), ALL[family]
    texts, types = file.get("tokenizer.ggml.tokens"), file.get("tokenizer.ggml.token_type").tolist()
    kinds = dict(zip(texts, types, strict=True))
    assert {kinds[text] for text in rules.special} <= {CONTROL}
    assert {kinds[text] for text in rules.added} <= {USER_DEFINED}
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("padding", "pad"), ("unknown", "unk")):
        expected = rules.settings.get(f"{theirs}_token")
        expected = expected["content"] if isinstance(expected, dict) else expected
        index = file.get(f"tokenizer.ggml.{ours}_token_id")
        assert (None if index is None else texts[index]) == expected
    assert file.get("tokenizer.ggml.add_bos_token") == bool(rules.first or rules.settings.get("add_bos_token"))
    assert file.get("tokenizer.ggml.add_eos_token") is False
    assert file.get("tokenizer.chat_template") == toy_tokenizers.CHAT_TEMPLATE


@pytest.mark.parametrize("family", [family for family, rules in BYTE_LEVEL.items() if rules.ends])
def test_answers_end_at_every_token_that_the_model_ends_them_with(
    family: str, family_file: Callable[[str], GgufFile]
) -> None:
    file = family_file(family)
    program = (
        "import sys; from pathlib import Path; from edgeprune.measure.llama import Session, Launch\n"
        "session = Session(Path(sys.argv[1]), Launch(), vocab_only=True)\n"
        "print([token for token in range(session.vocabulary_size) if session.ends(token)])"
    )
    command = [sys.executable, "-c", program, str(file.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": ROOT})
    texts = file.get("tokenizer.ggml.tokens")
    assert set(BYTE_LEVEL[family].ends) <= {texts[index] for index in json.loads(done.stdout)}


# SentencePiece: what is not the same in all families.


def copied(source: GgufFile, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The tokenizer files beside ``source`` in ``folder``, the definition changed."""
    for path in source.path.parent.glob("*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    definition = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    change(definition)
    (folder / "tokenizer.json").write_text(json.dumps(definition), encoding="utf-8")
    return folder


def without_a_merge(definition: dict[str, Any]) -> None:
    """Take away the only merge of the longest token that "hello world" is made with."""
    model = definition["model"]
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) != "\u2581hello"]


def test_merges_that_are_no_scores_are_worked_off_as_they_are_where_llama_cpp_can(
    family_file: Callable[[str], GgufFile], tmp_path: Path
) -> None:
    file = write_vocabulary(copied(family_file("gemma4"), tmp_path, without_a_merge))
    assert file.get("tokenizer.ggml.model") == "gemma4"
    texts = [text for what, text in texts_for("gemma4").items() if what != "its own special tokens"]
    assert native_ids(file, texts, special=True) == original_ids(file, texts, special=True)
    assert file.get(DIFFERENCES_KEY) is None


def test_two_texts_of_one_id_are_the_token_that_both_are(
    family_file: Callable[[str], GgufFile], tmp_path: Path
) -> None:
    """Gemma's tab is the token of its byte."""

    def change(definition: dict[str, Any]) -> None:
        definition["model"]["vocab"]["\t"] = definition["model"]["vocab"]["<0x09>"]

    file = write_vocabulary(copied(family_file("gemma4"), tmp_path, change))
    texts = ["a\tb", "\t\t\tx\t", "<0x09>\t"]
    assert native_ids(file, texts) == original_ids(file, texts)


def test_merges_that_are_no_scores_are_told_where_llama_cpp_has_only_scores(
    family_file: Callable[[str], GgufFile], tmp_path: Path
) -> None:
    file = write_vocabulary(copied(family_file("mixtral"), tmp_path, without_a_merge))
    assert file.get("tokenizer.ggml.model") == "llama"
    (told,) = file.get(DIFFERENCES_KEY)
    assert "not as the merges say for '\u2581hello'" in told
    assert native_ids(file, ["hello"]) != original_ids(file, ["hello"])


def test_base_model_of_mistral_keeps_the_space_that_begins_a_text(
    family_file: Callable[[str], GgufFile], tmp_path: Path
) -> None:
    folder = copied(family_file("mistral v3"), tmp_path, lambda definition: None)
    toys.change_json(folder / "tokenizer_config.json", chat_template=...)
    file = write_vocabulary(folder)
    texts = ["hello world", "one line\nand another", "a"]
    assert native_ids(file, texts) == original_ids(file, texts)
    assert native_ids(file, [" two"]) != original_ids(file, [" two"])  # one space more
    assert "a space before a text" in file.get(DIFFERENCES_KEY)[0]


def test_special_tokens_swallow_spaces_only_in_models_with_the_right_name(
    family_file: Callable[[str], GgufFile], tmp_path: Path
) -> None:
    folder = copied(family_file("phimoe"), tmp_path, lambda definition: None)
    text = "<|user|>\n hello<|end|>\n<|assistant|>\n"
    originals = original_ids(family_file("phimoe"), [text], special=True)
    assert native_ids(family_file("phimoe"), [text], special=True) == originals
    assert native_ids(write_vocabulary(folder, "another name"), [text], special=True) != originals


def refused(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda definition: definition.update({key: value})


UNSUPPORTED = {
    "folded characters": (refused("normalizer", {"type": "NFKC"}), "no normalizer NFKC"),
    "spaces kept": (refused("normalizer", None), "does not replace spaces"),
    "words cut out": (refused("pre_tokenizer", {"type": "Whitespace"}), "step Whitespace is not known"),
    "a cut at another text": (
        refused(
            "pre_tokenizer", {"type": "Split", "pattern": {"String": "e"}, "behavior": "Isolated", "invert": False}
        ),
        "step Split is not known",
    ),
    "words cut at spaces": (
        refused("pre_tokenizer", {**toy_tokenizers.metaspace("always"), "split": True}),
        "step Metaspace is not known",
    ),
    "a missing byte": (lambda definition: definition["model"]["vocab"].pop("<0xFF>"), "1 of the 256 byte tokens"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_sentencepiece_rules_that_llama_cpp_lacks_are_an_error(
    case: str, family_file: Callable[[str], GgufFile], tmp_path: Path
) -> None:
    change, cause = UNSUPPORTED[case]
    folder = copied(family_file("mixtral"), tmp_path, change)
    with pytest.raises(Unsupported, match=cause) as refusal:
        write_vocabulary(folder)
    assert "tokenizer.json" in refusal.value.cause and "\n" not in refusal.value.cause


def test_a_zero_character_in_a_token_is_left_out_and_told(
    family_file: Callable[[str], GgufFile], tmp_path: Path
) -> None:
    """llama.cpp would read its text up to there, and abort when another token has that text."""
    folder = copied(
        family_file("mixtral"), tmp_path, lambda definition: definition["model"]["vocab"].update({"a\0": 2300})
    )
    file = write_vocabulary(folder)
    assert "zero character" in file.get(DIFFERENCES_KEY)[0]
    assert native_ids(file, ["hello a\0"]) == original_ids(file, ["hello a\0"])
