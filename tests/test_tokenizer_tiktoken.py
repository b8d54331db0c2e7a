"""Vocabularies in tiktoken's form: llama.cpp's ids are those of tiktoken's algorithm under the published rules."""

from __future__ import annotations

import base64
import json
import unicodedata
from itertools import pairwise
from pathlib import Path
from typing import Any

import hub_files
import pytest
import regex
import toy_tokenizers
import toys
from huggingface_hub import constants
from runs import run_edgeprune
from test_tokenizer_pieces import native_ids, write_vocabulary
from tokenizers import pre_tokenizers
from toy_tokenizers import HARD_TEXTS, MARKS, SIZE

from edgeprune.errors import BadFile, Unsupported
from edgeprune.model.gguf import GgufFile
from edgeprune.model.tokenizer import DIFFERENCES_KEY
from edgeprune.model.tokenizer.pretokenizer import COMPOSES
from edgeprune.model.tokenizer.tokens import CONTROL, USER_DEFINED

pytest_plugins = ("hub_fixtures",)

# As in tokenization_hy.py of Hunyuan-A13B.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ("<|endoftext|>", "<|startoftext|>", "<|bos|>", "<|eos|>", "<|pad|>")
SETTINGS = {"tokenizer_class": "HYTokenizer", "bos_token": "<|startoftext|>", "eos_token": "<|eos|>"}
# One of these is cut into its letters; tiktoken takes it as a word of its own and never within another.
UNMADE = b"qzqzq"


def tokens_of(folder: Path, family: str = "qwen2_moe") -> list[bytes]:
    """Tokens that were trained under the same rules, and one that no merges make."""
    folder.mkdir()
    toy_tokenizers.write_byte_level(folder, family)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    byte_of = {pre_tokenizers.ByteLevel(False, False).pre_tokenize_str(chr(n))[0][0]: n for n in range(128)}
    letters = {letter for letter in pre_tokenizers.ByteLevel.alphabet()} - byte_of.keys()
    shown = sorted(letter for letter in letters if ord(letter) < 0x100)  # these stand for themselves
    byte_of |= {letter: ord(letter) for letter in shown}
    hidden = [n for n in range(128, 256) if n not in byte_of.values()]
    byte_of |= dict(zip(sorted(letters - set(shown)), hidden, strict=True))
    texts = sorted(vocabulary, key=lambda text: int(vocabulary[text]))
    return [*(bytes(byte_of[letter] for letter in text) for text in texts), UNMADE]


def write_hunyuan(folder: Path, tokens: list[bytes], **settings: Any) -> None:
    lines = [b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens)]
    (folder / "hy.tiktoken").write_bytes(b"".join(lines))
    whole = {**SETTINGS, "chat_template": "{{ messages }}", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(whole))


def tiktoken_ids(
    text: str, rank_of: dict[bytes, int], words: str = WORDS, special: tuple[str, ...] = SPECIAL
) -> list[int]:
    """What tiktoken makes of a text: words that are tokens as they are, and neighbours joined by the lowest rank."""
    marks = "|".join(map(regex.escape, special))
    ids = []
    for part in regex.split(f"({marks})", text):
        if part in special:
            ids.append(len(rank_of) + special.index(part))
            continue
        for word in regex.findall(words, part, regex.V1):
            pieces = [bytes([byte]) for byte in word.encode()]
            if word.encode() in rank_of:
                pieces = [word.encode()]
            while len(pieces) > 1:
                joined = [rank_of.get(left + right, SIZE) for left, right in pairwise(pieces)]
                best = min(joined)
                if best == SIZE:
                    break
                at = joined.index(best)
                pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
            ids += [rank_of[piece] for piece in pieces]
    return ids


@pytest.fixture(scope="module")
def hunyuan(tmp_path_factory: pytest.TempPathFactory) -> tuple[GgufFile, list[bytes]]:
    """A vocabulary file, and its tokens. Do not change it."""
    folder = tmp_path_factory.mktemp("tiktoken")
    tokens = tokens_of(folder / "trained")
    write_hunyuan(folder, tokens)
    return write_vocabulary(folder), tokens


def test_ids_are_those_of_tiktoken(hunyuan: tuple[GgufFile, list[bytes]]) -> None:
    file, tokens = hunyuan
    rank_of = {token: rank for rank, token in enumerate(tokens)}
    texts = {**HARD_TEXTS, **MARKS, "special": "x".join(SPECIAL), "unmade": "aqzqzq qzqzq"}
    texts |= {f"line {n}": line for n, line in enumerate(toys.training_lines()[::60])}
    del texts["combining marks"]  # NFC, which is told
    found = native_ids(file, list(texts.values()), special=True)
    for (what, text), own in zip(texts.items(), found, strict=True):
        assert own == tiktoken_ids(unicodedata.normalize("NFC", text), rank_of), what
    assert COMPOSES in file.get(DIFFERENCES_KEY)


# As in tokenization_moonshot.py of Moonlight and tokenization_kimi.py of Kimi-K2: special tokens are what the
# settings name, and numbers elsewhere.
MOONSHOT = {0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 3: "<|im_user|>", 5: "<|tool_calls_section_begin|>"}


def test_ids_are_those_of_tiktoken_under_the_rules_of_kimi(tmp_path: Path) -> None:
    tokens = tokens_of(tmp_path / "trained", "kimi_k2")[:-1]
    first = len(tokens)
    named = {str(first + place): {"content": text, "special": "tool" not in text} for place, text in MOONSHOT.items()}
    settings = {"tokenizer_class": "TikTokenTokenizer", "bos_token": "[BOS]", "eos_token": "[EOS]"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "added_tokens_decoder": named}))
    lines = [b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens)]
    (tmp_path / "tiktoken.model").write_bytes(b"".join(lines))
    file = write_vocabulary(tmp_path)
    special = tuple(MOONSHOT.get(place, f"<|reserved_token_{first + place}|>") for place in range(SIZE - first))
    assert tuple(file.get("tokenizer.ggml.tokens")[first:]) == special
    assert list(file.get("tokenizer.ggml.token_type")[first : first + 6]) == [*[CONTROL] * 5, USER_DEFINED]
    assert file.get("tokenizer.ggml.pre") == "kimi-k2" and not file.get("tokenizer.ggml.add_bos_token")
    assert (file.get("tokenizer.ggml.bos_token_id"), file.get("tokenizer.ggml.eos_token_id")) == (first, first + 1)
    assert file.get(DIFFERENCES_KEY) == [
        "llama.cpp's pre-tokenizer kimi-k2 cuts some words otherwise: combining marks are cut off their letters"
    ]
    texts = {**HARD_TEXTS, "special": "x".join(special[:7])}
    texts |= {f"line {n}": line for n, line in enumerate(toys.training_lines()[::60])}
    rank_of = {token: rank for rank, token in enumerate(tokens)}
    found = native_ids(file, list(texts.values()), special=True)
    for (what, text), own in zip(texts.items(), found, strict=True):
        assert own == tiktoken_ids(text, rank_of, toy_tokenizers.KIMI, special), what


def test_a_word_that_no_merges_make_is_told(hunyuan: tuple[GgufFile, list[bytes]]) -> None:
    file, tokens = hunyuan
    assert any("1 tokens are not what merges make" in note for note in file.get(DIFFERENCES_KEY))
    rank_of = {token: rank for rank, token in enumerate(tokens)}
    assert native_ids(file, ["qzqzq"]) != [tiktoken_ids("qzqzq", rank_of)] == [[rank_of[UNMADE]]]


def test_special_tokens_follow_the_vocabulary(hunyuan: tuple[GgufFile, list[bytes]]) -> None:
    file, tokens = hunyuan
    texts = file.get("tokenizer.ggml.tokens")
    start = len(tokens)
    assert tuple(texts[start : start + 5]) == SPECIAL and texts[start + 5] == "<|extra_0|>"
    assert texts[-1] == f"<|extra_{SIZE - start - 6}|>" and len(texts) == SIZE
    assert set(file.get("tokenizer.ggml.token_type")[start:]) == {CONTROL}
    assert file.get("tokenizer.ggml.bos_token_id") == start + 1
    assert file.get("tokenizer.ggml.eos_token_id") == start + 3
    assert file.get("tokenizer.chat_template") == "{{ messages }}" and file.get("tokenizer.ggml.pre") == "qwen2"


BAD = {
    "another number": (b"IQ== 1\n", "line 1 is not"),
    "no base64": (b"IQ== 0\n!!!! 1\n", "line 2 is not"),
    "twice": (b"IQ== 0\nIQ== 1\n", "line 2 is not"),
    "too long": (base64.b64encode(bytes(2000)) + b" 0\n", "line 1 is not"),
    "few bytes": (b"IQ== 0\n", "lacks 255 of the 256"),
    "nothing": (b"", "lacks 256 of the 256"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_is_none_is_refused(case: str, tmp_path: Path) -> None:
    content, cause = BAD[case]
    write_hunyuan(tmp_path, [])
    (tmp_path / "hy.tiktoken").write_bytes(content)
    with pytest.raises(BadFile, match=cause):
        write_vocabulary(tmp_path)


def test_the_rules_of_other_classes_are_not_guessed(tmp_path: Path) -> None:
    write_hunyuan(tmp_path, [bytes([byte]) for byte in range(256)], tokenizer_class="OtherTokenizer")
    with pytest.raises(Unsupported, match="is a tiktoken vocabulary"):
        write_vocabulary(tmp_path)


def test_more_tokens_than_embeddings_are_refused(tmp_path: Path) -> None:
    more = [bytes([byte]) for byte in range(256)] + [b"%04d" % n for n in range(SIZE)]
    write_hunyuan(tmp_path, more)
    with pytest.raises(BadFile, match=f"has token id {len(more) - 1}, the model {SIZE} embeddings"):
        write_vocabulary(tmp_path)


def test_the_file_is_fetched_from_the_hub(hub: hub_files.Hub, toy_checkpoint: toys.Maker, tmp_path: Path) -> None:
    repository = hub.add_folder("maker/toy", toy_checkpoint("qwen3_moe"))
    for name in [name for name in repository.files if "token" in name]:
        del repository.files[name]
    write_hunyuan(tmp_path, [bytes([byte]) for byte in range(256)])
    for path in (tmp_path / "hy.tiktoken", tmp_path / "tokenizer_config.json"):
        repository.files[path.name] = hub_files.stored(path)
    done = run_edgeprune("convert", "maker/toy", "out.gguf", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert GgufFile(tmp_path / "out.gguf").get("tokenizer.ggml.tokens")[256] == "<|endoftext|>"
    assert list(Path(constants.HF_HUB_CACHE).rglob("hy.tiktoken"))
