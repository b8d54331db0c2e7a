"""Tokenizers that are given as a SentencePiece model, unigram models, and files that are neither."""

from __future__ import annotations

import base64
import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import toy_tokenizers
import toys
from tokenizers import Tokenizer
from toy_tokenizers import HARD_TEXTS, MARKS, field_bytes, piece_model

from edgeprune.errors import BadFile, Unsupported
from edgeprune.measure import child
from edgeprune.model.gguf import GgufFile, make_entry
from edgeprune.model.tokenizer import DIFFERENCES_KEY, tokenizer_entries
from edgeprune.model.tokenizer.piece_model import PAIRS, read_piece_model
from edgeprune.model.tokenizer.tokens import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED

LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}


def write_vocabulary(folder: Path) -> GgufFile:
    entries = tokenizer_entries(folder, {}, toy_tokenizers.SIZE)
    architecture = make_entry("general.architecture", "str", "llama")
    return GgufFile(toys.write_gguf(folder / "vocabulary.gguf", [architecture, *entries], []))


def native_ids(file: GgufFile, texts: list[str], *, special: bool = False) -> list[list[int]]:
    task = "edgeprune.measure.tasks:tokenize"
    ids: list[list[int]] = child.call(task, {"model": str(file.path), "texts": texts, "special": special})
    return ids


@pytest.mark.parametrize("family", ["mixtral", "ernie4_5_moe"])
def test_piece_model_cuts_text_like_the_tokenizer_that_is_made_of_it(family: str, tmp_path: Path) -> None:
    for name in ("definition", "pieces"):
        (tmp_path / name).mkdir()
    toy_tokenizers.write_sentencepiece(tmp_path / "definition", family)
    toy_tokenizers.write_piece_model(tmp_path / "pieces", family, **LLAMA, add_prefix_space=family == "mixtral")
    file = write_vocabulary(tmp_path / "pieces")
    tokenizer = Tokenizer.from_file(str(tmp_path / "definition" / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    # The definition of Ernie's has added tokens, which the text of special tokens shows.
    texts = [text for what, text in (HARD_TEXTS | MARKS).items() if what != "special tokens"] + toys.training_lines()[
        ::60
    ]
    assert native_ids(file, texts) == [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    assert native_ids(file, ["a</s>b"], special=True) == [tokenizer_with_special(tmp_path).encode("a</s>b").ids]
    assert file.get(DIFFERENCES_KEY) is None


def tokenizer_with_special(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(folder / "definition" / "tokenizer.json"))
    if tokenizer.post_processor is None:  # Ernie's begins no text, a plain Llama's does
        from tokenizers.processors import TemplateProcessing

        tokenizer.post_processor = TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    return tokenizer


def test_piece_model_is_read_with_types_scores_and_added_tokens(tmp_path: Path) -> None:
    toy_tokenizers.write_piece_model(
        tmp_path, "mixtral", added_tokens_decoder={"2500": {"content": "<think>", "special": False}}
    )
    (tmp_path / "added_tokens.json").write_text('{"[extra]": 2501, "<think>": 2500}', encoding="utf-8")
    file = write_vocabulary(tmp_path)
    kinds = dict(zip(file.get("tokenizer.ggml.tokens"), file.get("tokenizer.ggml.token_type").tolist(), strict=True))
    assert [kinds[text] for text in ("<unk>", "<s>", "<0x41>", "e")] == [UNKNOWN, CONTROL, BYTE, NORMAL]
    assert [kinds[text] for text in ("<think>", "[extra]")] == [USER_DEFINED, USER_DEFINED]
    assert [file.get(f"tokenizer.ggml.{name}_token_id") for name in ("unknown", "bos", "eos", "padding")] == [
        *(0, 1, 2, None)
    ]
    assert not file.get("tokenizer.ggml.add_bos_token")  # not of a class that begins texts
    scores = file.get("tokenizer.ggml.scores")
    assert len(scores) == toy_tokenizers.SIZE and scores[300] > scores[301] and scores[2500] < scores[1900]


def test_runs_of_spaces_that_are_pieces_of_the_user_are_found(tmp_path: Path) -> None:
    tokens, _ = toy_tokenizers.pieces_of("mixtral")
    model = read_piece_model(written(tmp_path, [("\u2581\u2581", 0.0, 4)]))
    assert model.types[-1] == USER_DEFINED
    file = write_vocabulary(tmp_path)
    (ids,) = native_ids(file, ["a  b"])
    assert ids.count(len(tokens)) == 1


def written(
    folder: Path, more: list[tuple[str, float, int]], trainer: Any = None, normalizer: Any = None, drop: int = 0
) -> Path:
    """The toy Mixtral's piece model with more pieces, ``drop`` pieces less at the end, or other specifications."""
    toy_tokenizers.write_piece_model(folder, "mixtral")
    model = read_piece_model(folder / "tokenizer.model")
    pieces = list(zip(model.texts, model.scores, model.types, strict=True))
    pieces = [*pieces[: len(pieces) - drop], *more]
    data = piece_model(pieces, trainer or {3: 2, 43: -1}, normalizer or {3: 1, 4: 0})
    (folder / "tokenizer.model").write_bytes(data)
    return folder / "tokenizer.model"


def test_what_a_piece_model_leaves_out_is_as_its_definition_says(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(
        field_bytes(1, field_bytes(1, "a")) * 3 + field_bytes(99, "later versions") + field_bytes(98, 1.0)
    )
    model = read_piece_model(path)
    assert (model.kind, model.space_prefix, model.merges_spaces, model.space_suffix) == (1, True, True, False)
    assert model.ids == {"unknown": 0, "bos": 1, "eos": 2} and model.types == [NORMAL] * 3
    assert read_piece_model(written(tmp_path, [])).kind == PAIRS


def test_spaces_that_the_original_merges_and_characters_that_it_folds_are_told(tmp_path: Path) -> None:
    written(tmp_path, [], normalizer={2: character_map(FOLDED), 3: 1, 4: 1})
    folds, merges = write_vocabulary(tmp_path).get(DIFFERENCES_KEY)
    assert "folds characters" in folds and "makes one space of several" in merges


REFUSED = {
    "words": ({"trainer": {3: 3}}, "kind 3"),
    "spaces behind words": ({"trainer": {3: 2, 24: 1}}, "spaces belong to the word before"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_piece_models_that_llama_cpp_cannot_follow_are_refused(case: str, tmp_path: Path) -> None:
    specifications, cause = REFUSED[case]
    written(tmp_path, [], **specifications)
    with pytest.raises(Unsupported, match=cause):
        write_vocabulary(tmp_path)


PIECE = field_bytes(1, field_bytes(1, "a"))
BROKEN = {
    "empty": (b"", "no pieces"),
    "no pieces": (field_bytes(2, field_bytes(3, 2)), "no pieces"),
    "a text file": (b"hello world, this is a text\n", "no protocol buffer|cut off"),
    "zeros": (bytes(64), "field without a number"),
    "a number without an end": (PIECE + b"\x08" + b"\xff" * 20, "number without an end"),
    "a piece that is a number": (PIECE + field_bytes(1, 7), "number where a message should be"),
    "a text that is a number": (field_bytes(1, field_bytes(1, 7)), "number where a message should be"),
    "a score that is no number": (field_bytes(1, field_bytes(1, "a") + field_bytes(2, float("nan"))), "score nan"),
    "a score that is a text": (field_bytes(1, field_bytes(1, "a") + field_bytes(2, "higher")), "score nan"),
    "a type that is none": (field_bytes(1, field_bytes(1, "a") + field_bytes(3, 9)), "kind 9"),
    "a type that is a text": (field_bytes(1, field_bytes(1, "a") + field_bytes(3, "x")), "message where a number"),
    "not UTF-8": (field_bytes(1, field_bytes(1, b"\xff\xfe")), "not UTF-8"),
    "a group": (PIECE + b"\x0b", "value of kind 3"),
    "more claimed than there is": (PIECE + b"\x0a\xff\xff\xff\xff\x7f" + b"x", "claimed at byte"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_damaged_piece_model_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    content, cause = BROKEN[case]
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(BadFile, match=cause) as refusal:
        write_vocabulary(tmp_path)
    assert "\n" not in refusal.value.cause and len(refusal.value.cause) < 400


def test_no_damage_is_more_than_an_explained_error(tmp_path: Path) -> None:
    path = written(tmp_path, [])
    whole, chance = path.read_bytes(), random.Random(5)
    outcomes = set()
    for _ in range(60):
        damaged = bytearray(whole[: chance.randrange(len(whole))] if chance.random() < 0.5 else whole)
        for _ in range(chance.randrange(4)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        path.write_bytes(damaged)
        try:
            read_piece_model(path)
            outcomes.add("read")
        except BadFile:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


OTHERS = {
    "tiktoken.model": (b"IQ== 0\nIg== 1\n", "tiktoken vocabulary"),
    "tokenizer.model": (b"IQ== 0\nIg== 1\n", "tiktoken vocabulary"),
    "qwen.tiktoken": (b"IQ== 0\r\nIg== 1\r\n", "tiktoken vocabulary"),
    "tekken.json": (b"{}", "tekken.json but no tokenizer.json"),
    "vocab.json": (b"{}", "vocab.json but no tokenizer.json"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_rules_in_program_code_are_refused_with_the_way_out(name: str, tmp_path: Path) -> None:
    content, cause = OTHERS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Unsupported, match=cause) as refusal:
        write_vocabulary(tmp_path)
    assert "convert_hf_to_gguf.py" in refusal.value.hint


# Unigram models.


def double_array(words: dict[bytes, int]) -> list[int]:
    """Units of a double-array trie as darts-clone writes it: each word, and the value it leads to.

    The children of a node lie at its base, each moved by exclusive or with its byte; byte 0 is the value.
    """
    tree: dict[int, Any] = {}
    for word, value in words.items():
        node = tree
        for byte in word:
            node = node.setdefault(byte, {})
        node[0] = value
    units, taken, free = {0: 0}, {0}, 1

    def place(index: int, node: dict[int, Any]) -> None:
        nonlocal free
        base = next(b for b in range(free, 1 << 20) if all(b ^ byte not in taken for byte in node) and b ^ index)
        taken.update(base ^ byte for byte in node)
        units[index] |= (base ^ index) << 10 | (0 in node) << 8
        for byte, below in node.items():
            if byte:
                units[base ^ byte] = byte
                place(base ^ byte, below)
            else:
                units[base] = 1 << 31 | below

    place(0, tree)
    return [units.get(index, 0) for index in range(max(taken) + 256)]


def character_map(folded: dict[str, str]) -> bytes:
    """The compiled map of a SentencePiece normalizer: length of the trie, the trie, and the texts it leads to."""
    texts, words = b"", {}
    for source, target in folded.items():
        words[source.encode()] = len(texts)
        texts += target.encode() + b"\0"
    units = double_array(words)
    return struct.pack(f"<I{len(units)}I", 4 * len(units), *units) + texts


FOLDED = {"\ufb01": "fi", "\uff21": "A", "\t": " ", "\n": " ", "\u00bd": "1/2", "\u200b": ""}


def unigram_definition(folder: Path, *, fold: bool = True, merge: bool = True, scheme: str = "always") -> Tokenizer:
    from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.Unigram())
    steps = [normalizers.Precompiled(character_map(FOLDED))] if fold else []
    steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip(left=False)] if merge else []
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    trainer = trainers.UnigramTrainer(
        vocab_size=900, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(toys.training_lines()[::4], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = '{"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "add_eos_token": true}'
    (folder / "tokenizer_config.json").write_text(settings, encoding="utf-8")
    return tokenizer


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("merge", [True, False])
def test_unigram_model_cuts_text_like_the_original(fold: bool, merge: bool, tmp_path: Path) -> None:
    tokenizer = unigram_definition(tmp_path, fold=fold, merge=merge)
    file = write_vocabulary(tmp_path)
    assert file.get("tokenizer.ggml.add_eos_token") and not file.get("tokenizer.ggml.add_bos_token")
    texts = [
        "hello world",
        "two  spaces   here",
        "\ufb01ne \uff21\u00bd x\u200by",
        "日本 \U0001f44d\U0001f44d a",
        "a",
        "",
    ]
    texts += [" one first", "at the end  "] if merge else []
    texts += [line.rstrip() for line in toys.training_lines()[::60] if line[:1] > " "]
    assert len(texts) > 10
    for text, ids in zip(texts, native_ids(file, texts, special=True), strict=True):
        assert ids == [*tokenizer.encode(text).ids, file.get("tokenizer.ggml.eos_token_id")], text
    told = [] if merge else ["llama.cpp puts a space before a text even where one is"]
    assert file.get(DIFFERENCES_KEY, []) == told
    assert (native_ids(file, [" a"]) == [tokenizer.encode(" a").ids]) == merge


def test_unigram_model_of_pieces_is_read(tmp_path: Path) -> None:
    (tmp_path / "definition").mkdir()
    tokenizer = unigram_definition(tmp_path / "definition")
    definition = json.loads((tmp_path / "definition" / "tokenizer.json").read_text(encoding="utf-8"))
    types = {"<unk>": 2, "<pad>": 3, "</s>": 3}
    pieces = [(text, score, types.get(text, 1)) for text, score in definition["model"]["vocab"]]
    trainer = {3: 1, 40: 2, 41: -1, 42: 1, 43: 0}
    (tmp_path / "tokenizer.model").write_bytes(piece_model(pieces, trainer, {2: character_map(FOLDED)}))
    file = write_vocabulary(tmp_path)
    texts = ["hello world", " two  spaces   here ", "\ufb01ne \uff21\u00bd x\u200by\tz", "日本 a"]
    assert native_ids(file, texts) == [tokenizer.encode(text).ids for text in texts]
    assert file.get("tokenizer.ggml.padding_token_id") == 0 and file.get("tokenizer.ggml.bos_token_id") is None


UNIGRAM_REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "lower case": ({"normalizer": {"type": "Lowercase"}}, "no normalizer Lowercase"),
    "words cut out": ({"pre_tokenizer": {"type": "Whitespace"}}, "pre-tokenizer .'Whitespace'"),
    "nothing cut": ({"pre_tokenizer": None}, "pre-tokenizer"),
}


@pytest.mark.parametrize("case", UNIGRAM_REFUSED)
def test_unigram_rules_that_llama_cpp_lacks_are_an_error(case: str, tmp_path: Path) -> None:
    change, cause = UNIGRAM_REFUSED[case]
    unigram_definition(tmp_path)
    toys.change_json(tmp_path / "tokenizer.json", **change)
    with pytest.raises(Unsupported, match=cause):
        write_vocabulary(tmp_path)


def test_characters_spelled_in_bytes_are_told(tmp_path: Path) -> None:
    unigram_definition(tmp_path)
    definition = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    definition["model"]["vocab"] += [[f"<0x{byte:02X}>", -20.0] for byte in range(256)]
    definition["model"]["byte_fallback"] = True
    toys.change_json(tmp_path / "tokenizer.json", model=definition["model"])
    assert "spells unknown characters in bytes" in write_vocabulary(tmp_path).get(DIFFERENCES_KEY)[0]


DAMAGED_MAPS = {
    "cut off": b"\0\0\0",
    "no texts": struct.pack("<II", 4, 0),
    "a wild trie": struct.pack("<II", 4, 1 << 30) + b"a\0",
}


@pytest.mark.parametrize("what", DAMAGED_MAPS)
def test_damaged_map_of_characters_is_refused(what: str, tmp_path: Path) -> None:
    unigram_definition(tmp_path)
    definition = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    content = base64.b64encode(DAMAGED_MAPS[what]).decode()
    definition["normalizer"]["normalizers"][0]["precompiled_charsmap"] = content
    toys.change_json(tmp_path / "tokenizer.json", normalizer=definition["normalizer"])
    with pytest.raises(BadFile) as refusal:
        write_vocabulary(tmp_path)
    assert "\n" not in refusal.value.cause
