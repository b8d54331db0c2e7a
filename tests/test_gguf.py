"""The GGUF reader and header writer: exact round trips, and hostile files refused in one line each."""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import toys

from edgeprune.errors import BadFile, EdgepruneError, Unsupported
from edgeprune.measure import child
from edgeprune.model.architecture import read_architecture
from edgeprune.model.gguf import (
    Entry,
    GgufFile,
    TensorShape,
    align,
    file_bytes,
    header,
    make_entry,
    replaced,
)
from edgeprune.model.headers import ARRAY, F32, I8, STRING, U8, U16, U32

MIB = 1 << 20


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def entry(key: bytes, kind: int, payload: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + payload


def array(element: int, count: int, payload: bytes) -> bytes:
    return struct.pack("<IQ", element, count) + payload


def tensor(name: bytes, shape: Sequence[int], kind: int = 0, offset: int = 0, dimensions: int | None = None) -> bytes:
    count = len(shape) if dimensions is None else dimensions
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", count, *shape, kind, offset)


def gguf(
    entries: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: int = 1024,
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    """A GGUF as anyone may write it; ``counts`` are the numbers of tensors and entries that it claims."""
    claimed = counts or (len(tensors), len(entries))
    head = magic + struct.pack("<IQQ", version, *claimed) + b"".join(entries) + b"".join(tensors)
    return head + bytes(align(len(head), 32) - len(head) + data)


NAMED = entry(b"general.architecture", STRING, text(b"llama"))

HOSTILE: dict[str, tuple[bytes, type[EdgepruneError], str]] = {
    "nothing": (b"", BadFile, "too few"),
    "ends in the preamble": (gguf()[:23], BadFile, "too few"),
    "another kind of file": (gguf(magic=b"PK\3\4"), BadFile, "not a GGUF file"),
    "version 0": (gguf(version=0), Unsupported, "version 0"),
    "version 1": (gguf(version=1), Unsupported, "version 1"),
    "version 4": (gguf(version=4), Unsupported, "version 4"),
    "the other byte order": (gguf(version=3 << 24), Unsupported, "version"),
    "2^60 tensors": (gguf(counts=(1 << 60, 0)), BadFile, "claims"),
    "2^60 entries": (gguf(counts=(0, 1 << 60)), BadFile, "claims"),
    "one entry more than there are": (gguf([NAMED], data=0, counts=(0, 2)), BadFile, "empty|truncated"),
    "a repeated key": (gguf([NAMED, NAMED]), BadFile, "general.architecture twice"),
    "an empty key": (gguf([entry(b"", U8, b"\1")]), BadFile, "empty or overlong metadata key"),
    "a key of 64 KiB": (gguf([entry(b"k" * 65536, U8, b"\1")]), BadFile, "empty or overlong metadata key"),
    "a key that is not UTF-8": (gguf([entry(b"\xff\xfe", U8, b"\1")]), BadFile, "not UTF-8"),
    "a key longer than the file": (gguf([struct.pack("<Q", 1 << 62)]), BadFile, "a string of"),
    "an unknown value type": (gguf([entry(b"k", 13, bytes(8))]), BadFile, "unknown value type 13"),
    "line breaks in a key": (gguf([entry(b"a\n\x1b[31mb", 99, b"")]), BadFile, r"'a\\n\\x1b\[31mb'"),
    "a text beyond the end": (gguf([entry(b"k", STRING, struct.pack("<Q", 4096))]), BadFile, "beyond the end"),
    "a text of 2^63 bytes": (gguf([entry(b"k", STRING, struct.pack("<Q", 1 << 63))]), BadFile, "a string of"),
    "an array of arrays": (gguf([entry(b"k", ARRAY, array(ARRAY, 1, array(U8, 1, b"\1")))]), BadFile, "an array of"),
    "an array of unknown type": (gguf([entry(b"k", ARRAY, array(77, 1, bytes(8)))]), BadFile, "an array of"),
    "2^60 bytes in an array": (gguf([entry(b"k", ARRAY, array(U8, 1 << 60, b""))]), BadFile, "an array of"),
    "2^30 numbers in an array": (gguf([entry(b"k", ARRAY, array(F32, 1 << 30, b""))]), BadFile, "beyond the end"),
    "2^60 texts in an array": (gguf([entry(b"k", ARRAY, array(STRING, 1 << 60, b""))]), BadFile, "an array of"),
    "2^30 texts in an array": (gguf([entry(b"k", ARRAY, array(STRING, 1 << 30, b""))]), BadFile, "runs beyond"),
    "a long text in an array": (
        gguf([entry(b"k", ARRAY, array(STRING, 1, struct.pack("<Q", (1 << 64) - 8)))]),
        BadFile,
        "runs beyond",
    ),
    "alignment 0": (gguf([entry(b"general.alignment", U32, bytes(4))]), BadFile, "power of two"),
    "alignment 48": (gguf([entry(b"general.alignment", U32, b"\x30\0\0\0")]), BadFile, "power of two"),
    "alignment as a text": (gguf([entry(b"general.alignment", STRING, text(b"32"))]), BadFile, "power of two"),
    "alignment of another type": (gguf([entry(b"general.alignment", I8, b"\x20")]), BadFile, "power of two"),
    "an empty tensor name": (gguf([], [tensor(b"", [4])]), BadFile, "empty or overlong tensor name"),
    "a tensor name of 64 bytes": (gguf([], [tensor(b"n" * 64, [4])]), BadFile, "empty or overlong tensor name"),
    "a repeated tensor": (gguf([], [tensor(b"t", [8]), tensor(b"t", [8], 0, 32)]), BadFile, "tensor t twice"),
    "0 dimensions": (gguf([], [tensor(b"t", [])]), BadFile, "0 dimensions"),
    "5 dimensions": (gguf([], [tensor(b"t", [1] * 5)]), BadFile, "5 dimensions"),
    "2^32 - 1 dimensions": (gguf([], [tensor(b"t", [4], dimensions=2**32 - 1)]), BadFile, "dimensions"),
    "an extent of 0": (gguf([], [tensor(b"t", [4, 0])]), BadFile, "impossible shape"),
    "an extent of 2^63": (gguf([], [tensor(b"t", [4, 1 << 63])]), BadFile, "impossible shape"),
    "extents whose product wraps to 0": (gguf([], [tensor(b"t", [1 << 32, 1 << 32])]), BadFile, "impossible shape"),
    "extents whose product wraps to 4": (
        gguf([], [tensor(b"t", [4, (1 << 62) + 1, 1, 1])]),
        BadFile,
        "impossible shape",
    ),
    "a removed type": (gguf([], [tensor(b"t", [32], 4)]), BadFile, "unknown type"),
    "a type of the future": (gguf([], [tensor(b"t", [32], 4000)]), BadFile, "unknown type"),
    "a row of half a block": (gguf([], [tensor(b"t", [128], 12)]), BadFile, "impossible shape .* Q4_K"),
    "the first tensor not at 0": (gguf([], [tensor(b"t", [8], 0, 32)]), BadFile, "offset 32 where 0 is due"),
    "tensors that overlap": (gguf([], [tensor(b"t", [64]), tensor(b"u", [64], 0, 32)]), BadFile, "256 is due"),
    "a gap between tensors": (gguf([], [tensor(b"t", [8]), tensor(b"u", [8], 0, 64)]), BadFile, "32 is due"),
    "an unaligned tensor": (gguf([], [tensor(b"t", [9]), tensor(b"u", [8], 0, 36)]), BadFile, "64 is due"),
    "data beyond the end": (gguf([], [tensor(b"t", [1 << 20])]), BadFile, "is truncated"),
    "one byte too few": (gguf([], [tensor(b"t", [8])], 31), BadFile, "is truncated"),
    "one part of several": (gguf([entry(b"split.count", U16, b"\2\0")]), BadFile, "which its name does not say"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file_is_refused_at_once_in_one_line(name: str, tmp_path: Path) -> None:
    content, kind, cause = HOSTILE[name]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    started = time.perf_counter()
    with pytest.raises(kind, match=cause) as refusal:
        GgufFile(path)
    assert time.perf_counter() - started < 1
    assert "\n" not in refusal.value.cause
    assert len(refusal.value.cause) < 200 + len(str(path))


def test_files_that_cannot_be_opened_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.gguf", tmp_path):
        with pytest.raises(BadFile, match="cannot read"):
            GgufFile(path)


@pytest.mark.parametrize(
    "value",
    [entry(b"split.count", STRING, text(b"x")), entry(b"split.count", ARRAY, array(U8, 2, b"\2\2"))],
    ids=["text", "array"],
)
def test_senseless_split_count_does_not_count(value: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf([value]))
    assert list(GgufFile(path).entries) == ["split.count"]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real model of every header feature, with little data."""
    path = tmp_path_factory.mktemp("small") / "small.gguf"
    return toys.synthetic_gguf(path, "deepseek2", width=64, expert_width=32, vocabulary=260, groups=2, groups_used=1)


def test_file_cut_off_anywhere_is_refused(small: Path, tmp_path: Path) -> None:
    content = small.read_bytes()
    whole = GgufFile(small)
    cuts = {len(content) * part // 20 for part in range(20)} | {len(content) - 1}
    cuts |= {whole.data_offset * part // 20 for part in range(20)}
    path = tmp_path / "cut.gguf"
    for cut in sorted(cuts):
        path.write_bytes(content[:cut])
        with pytest.raises(BadFile, match=r"truncated|too few"):
            GgufFile(path)


def test_flipped_header_bytes_never_raise_anything_unexplained(small: Path, tmp_path: Path) -> None:
    content = small.read_bytes()
    header_bytes = GgufFile(small).data_offset
    path = tmp_path / "flipped.gguf"
    path.write_bytes(content)
    chance = random.Random(20)
    outcomes = {"read": 0, "refused": 0}
    for _ in range(400):
        flips = [(chance.randrange(header_bytes), chance.randrange(256)) for _ in range(chance.choice((1, 1, 3)))]
        with path.open("r+b") as stream:
            for place, byte in flips:
                stream.seek(place)
                stream.write(bytes((byte,)))
        try:
            file = GgufFile(path)
            for item in file.entries.values():
                item.value()
            read_architecture(file).allowed_counts()
            outcomes["read"] += 1
        except EdgepruneError as refusal:
            assert "\n" not in refusal.cause and len(refusal.cause) < 300 + len(str(path))
            outcomes["refused"] += 1
        with path.open("r+b") as stream:
            stream.write(content[:header_bytes])
    assert min(outcomes.values()) > 20  # both kinds of flips were met


def test_header_survives_reading_and_writing_byte_for_byte(small: Path) -> None:
    file = GgufFile(small)
    shapes = [TensorShape(info.name, info.shape, info.type) for info in file.tensors.values()]
    written = header(file.entries.values(), shapes, file.alignment)
    assert written == small.read_bytes()[: file.data_offset]
    assert file_bytes(len(written), shapes, file.alignment) == small.stat().st_size


VALUES = [
    ("u8", 200), ("i8", -3), ("u16", 65535), ("i16", -5), ("u32", 4000000000), ("i32", -7), ("u64", 1 << 63),
    ("i64", -(1 << 62)), ("f32", 0.5), ("f64", 1e300), ("bool", True), ("str", "naïve\n日本\0"), ("str", ""),
    ("[u8]", [1, 255]), ("[i32]", [-1, 2, 3]), ("[f32]", [0.5, -2.0]), ("[bool]", [True, False]),
    ("[str]", ["", "a", "日本"]), ("[u32]", []), ("[str]", []),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "value"), VALUES, ids=[f"{kind} {value!r:.12}" for kind, value in VALUES])
def test_metadata_value_is_read_as_it_was_written(kind: str, value: object, tmp_path: Path) -> None:
    path = toys.write_gguf(tmp_path / "one.gguf", [make_entry("key", kind, value)], [])
    read = GgufFile(path).get("key")
    assert (read.tolist() if isinstance(read, np.ndarray) else read) == value


def test_missing_metadata_gives_the_default(small: Path) -> None:
    assert GgufFile(small).get("no.such.key", 5) == 5


def test_tensor_bytes_are_those_of_the_file(tmp_path: Path) -> None:
    first, second = np.arange(10, dtype=np.float32), np.arange(7, dtype=np.float32)
    pairs = [(TensorShape("a", (10,), "F32"), first), (TensorShape("b", (7, 1), "F32"), second)]
    entries = [make_entry("general.alignment", "u32", 64)]
    file = GgufFile(toys.write_gguf(tmp_path / "two.gguf", entries, pairs, 64))
    assert file.alignment == 64
    assert file.tensors["b"].offset - file.tensors["a"].offset == 64
    assert file.raw("b").tobytes() == second.tobytes()
    assert not file.raw("b").flags.writeable
    file.release("a")
    file.release("a", 1, 2)
    assert file.raw("a").tobytes() == first.tobytes()


def test_last_tensor_needs_no_padding(tmp_path: Path) -> None:
    path = tmp_path / "unpadded.gguf"
    path.write_bytes(gguf([], [tensor(b"t", [9])], 36))
    assert GgufFile(path).tensors["t"].nbytes == 36


def test_replaced_entries_keep_their_place_and_new_ones_come_last() -> None:
    old = {item.key: item for item in (make_entry(key, "u32", 1) for key in "abc")}
    changed = replaced(old, [make_entry("b", "str", "x"), make_entry("d", "u32", 4)])
    assert [(item.key, item.value()) for item in changed] == [("a", 1), ("b", "x"), ("c", 1), ("d", 4)]


def test_fingerprint_sees_header_size_and_weights(small: Path, tmp_path: Path) -> None:
    content = bytearray(small.read_bytes())
    file = GgufFile(small)
    last = list(file.tensors.values())[-1]
    prints = {file.fingerprint()}
    for change in (content.index(b"toy"), file.data_offset, last.offset + last.nbytes - 1):
        changed = bytearray(content)
        changed[change] ^= 1
        (tmp_path / "changed.gguf").write_bytes(changed)
        prints.add(GgufFile(tmp_path / "changed.gguf").fingerprint())
    assert len(prints) == 4
    (tmp_path / "copy.gguf").write_bytes(content)
    assert GgufFile(tmp_path / "copy.gguf").fingerprint() == file.fingerprint()


def test_fingerprint_sees_a_change_anywhere_within_the_weights(synthetic: toys.Maker, tmp_path: Path) -> None:
    file = GgufFile(synthetic("qwen3moe"))
    content = bytearray(file.path.read_bytes())
    experts = file.tensors["blk.1.ffn_down_exps.weight"]
    for share in (0.03, 0.3, 0.55, 0.9):
        changed = bytearray(content)
        start = experts.offset + int(experts.nbytes * share)
        changed[start : start + experts.nbytes // 50] = bytes(experts.nbytes // 50)
        (tmp_path / "changed.gguf").write_bytes(changed)
        assert GgufFile(tmp_path / "changed.gguf").fingerprint() != file.fingerprint(), share


def test_header_of_a_large_vocabulary_is_read_in_a_moment(tmp_path: Path) -> None:
    entries: list[Entry] = [
        make_entry("tokenizer.ggml.tokens", "[str]", [f"token{index}" for index in range(152_000)]),
        make_entry("tokenizer.ggml.token_type", "[i32]", [1] * 152_000),
        make_entry("tokenizer.ggml.merges", "[str]", [f"tok en{index}" for index in range(151_000)]),
    ]
    path = toys.write_gguf(tmp_path / "large.gguf", entries, [])
    assert path.stat().st_size > 5 * MIB
    times = []
    for _ in range(3):
        started = time.perf_counter()
        file = GgufFile(path)
        times.append(time.perf_counter() - started)
    assert min(times) < 1  # about 0.05 s on one idle core
    assert file.get("tokenizer.ggml.tokens")[-1] == "token151999"


def test_llama_cpp_reads_what_the_writer_writes(synthetic: toys.Maker) -> None:
    # The synthetic model goes through header() and back; llama.cpp is the judge of its bytes.
    ids = child.call(
        "edgeprune.measure.tasks:tokenize",
        {"model": str(synthetic("qwen3moe")), "texts": ["ab é"], "special": False},
    )
    names = GgufFile(synthetic("qwen3moe")).get("tokenizer.ggml.tokens")
    assert [names[index] for index in ids[0]] == ["a", "b", "Ġ", "Ã", "©"]
