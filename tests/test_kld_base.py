"""llama.cpp's files of log-probabilities: a file put together by hand, and one of a model against itself."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toys

from edgeprune.errors import BadFile
from edgeprune.measure import child
from edgeprune.measure.divergence import log_softmax
from edgeprune.measure.kld_base import BaseFile, encoded, scores
from edgeprune.measure.launch import Launch
from edgeprune.measure.llama import session

pytest_plugins = ("demo_fixtures",)

# Two chunks of four tokens over a vocabulary of five: one row each, of position 2, with a code of padding.
HALF, QUARTER, EIGHTH = math.log(0.5), math.log(0.25), math.log(0.125)
STEP = (HALF - EIGHTH) / 65535
CODES = (65535, 65535 // 2, 0, 0, 0, 0)
CONTENT = (
    b"_logits_"
    + struct.pack("<3i", 4, 5, 2)
    + struct.pack("<8i", 0, 1, 2, 3, 4, 3, 2, 1)
    + struct.pack("<2f6H", STEP, EIGHTH, *CODES)
    + struct.pack("<2f6H", 0.0, math.log(0.2), 0, 0, 0, 0, 0, 0)
)


def write(folder: Path, content: bytes) -> Path:
    path = folder / "small.kld"
    path.write_bytes(content)
    return path


def test_a_file_made_by_hand_says_what_was_put_in(tmp_path: Path) -> None:
    found = BaseFile.read(write(tmp_path, CONTENT))
    assert (found.context, found.vocabulary, found.chunks, found.rows) == (4, 5, 2, 1)
    assert found.nbytes == len(CONTENT) == 8 + 12 + 32 + 2 * 20
    assert found.tokens().tolist() == [[0, 1, 2, 3], [4, 3, 2, 1]]
    assert found.head(found.tokens()) == CONTENT[:52]
    assert found.log_probabilities(0, 0, 1)[0] == pytest.approx([HALF, QUARTER, EIGHTH, EIGHTH, EIGHTH], abs=2e-5)
    assert found.log_probabilities(1, 0, 1)[0] == pytest.approx([math.log(0.2)] * 5, abs=1e-6)


def test_rows_are_encoded_to_the_bytes_computed_by_hand() -> None:
    """Log-probabilities as logits; the second row is flat, and has no steps."""
    logits = np.array([[HALF, QUARTER, EIGHTH, EIGHTH, EIGHTH], [3, 3, 3, 3, 3]], np.float32)
    logits[0] += np.float32(1)  # shifted, they are the same
    logits[0, 0] = np.float32(math.log(0.375) + 1)  # sum of all: 1
    raw = np.frombuffer(encoded(logits), np.uint8).reshape(2, 20)
    step, lowest = struct.unpack("<2f", raw[0, :8].tobytes())
    assert step == pytest.approx((math.log(0.375) - EIGHTH) / 65535, rel=1e-5)
    assert lowest == pytest.approx(EIGHTH, abs=1e-6)
    codes = struct.unpack("<6H", raw[0, 8:].tobytes())
    assert codes == (65535, round((QUARTER - EIGHTH) / step), 0, 0, 0, 0)
    assert struct.unpack("<2f6H", raw[1].tobytes()) == pytest.approx((0.0, math.log(0.2), *[0] * 6), abs=1e-6)


@pytest.mark.parametrize("vocabulary", [7, 320])
def test_rows_are_read_as_they_were_encoded(tmp_path: Path, vocabulary: int) -> None:
    logits = (4 * np.random.default_rng(0).standard_normal((6, vocabulary))).astype(np.float32)
    logits[:, 0] -= 60  # beyond reach
    tokens = np.zeros((2, 8), np.int32)
    head = BaseFile(tmp_path / "x", 8, vocabulary, 2).head(tokens)
    found = BaseFile.read(write(tmp_path, head + encoded(logits)))
    expected = log_softmax(logits)
    floor = expected.max(axis=1, keepdims=True) - 16
    for chunk in range(2):
        rows = np.concatenate([found.log_probabilities(chunk, 0, 2), found.log_probabilities(chunk, 2, 1)])
        own = slice(3 * chunk, 3 * chunk + 3)
        assert rows == pytest.approx(np.maximum(expected[own], floor[own]), abs=16 / 65535)


def test_divergence_leaves_out_what_is_below_e_to_the_minus_16() -> None:
    reference = np.array([[HALF, HALF + 1e-7, -16.5]], np.float32)
    logits = np.log(np.array([[0.25, 0.25, 0.5]], np.float32))
    found = scores(reference, logits, np.array([1], np.int32))
    assert found.divergence[0] == pytest.approx(math.log(2), abs=1e-5)
    assert not found.same_top[0]
    assert found.nll[0] == pytest.approx(-QUARTER, abs=1e-5)
    assert found.reference_nll[0] == pytest.approx(-HALF, abs=1e-5)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"_logits_",
        b"GGUF" + CONTENT[4:],
        CONTENT[:-1],
        CONTENT + b"\0",
        CONTENT[:8] + struct.pack("<3i", 4, 5, 1 << 30) + CONTENT[20:],
        CONTENT[:8] + struct.pack("<3i", -4, 5, 2) + CONTENT[20:],
        CONTENT[:8] + struct.pack("<3i", 1 << 30, 1 << 30, 1 << 30) + CONTENT[20:],
    ],
    ids=["empty", "only the magic", "another file", "cut off", "longer", "too many chunks", "negative", "huge"],
)
def test_damaged_files_are_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(BadFile, match=r"small\.kld"):
        BaseFile.read(write(tmp_path, content))


def test_hostile_numbers_in_a_sound_frame_are_refused(tmp_path: Path) -> None:
    far = CONTENT[:20] + struct.pack("<i", 5) + CONTENT[24:]
    with pytest.raises(BadFile, match="tokens that are not of its vocabulary"):
        BaseFile.read(write(tmp_path, far)).tokens()
    for step in (math.nan, math.inf, 1e38, 1.0):
        path = write(tmp_path, CONTENT[:52] + struct.pack("<f", step) + CONTENT[56:])
        with pytest.raises(BadFile, match="chunk 1 holds what are no log-probabilities"):
            BaseFile.read(path).log_probabilities(0, 0, 1)


def compare(model: Path, base: Path) -> dict[str, float]:
    found: dict[str, float] = child.call(
        "edgeprune.measure.against_base:compare", {"model": str(model), "base": str(base), "threads": 1}
    )
    return found


@pytest.fixture(scope="module")
def base(demo_gguf: Path, small_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the demo on the held-out text, in chunks of 32 tokens. Do not change it."""
    path = tmp_path_factory.mktemp("base") / "demo.kld"
    texts = [{"domain": "small", "path": str(small_text)}]
    arguments: dict[str, Any] = {"texts": texts, "split": "held_out", "window": 512, "most_tokens": 4096}
    arguments |= {"model": str(demo_gguf), "output": str(path), "context": 32, "threads": 1}
    made = child.call("edgeprune.measure.against_base:write", arguments)
    assert made["nbytes"] == path.stat().st_size and made["chunks"] == BaseFile.read(path).chunks > 2
    return path


def test_a_model_is_nothing_away_from_its_own_file(base: Path, demo_gguf: Path) -> None:
    found, file = compare(demo_gguf, base), BaseFile.read(base)
    assert found["tokens"] == file.chunks * file.rows
    assert abs(found["kl_mean"]) < 1e-6 and found["same_top"] > 0.995
    assert found["perplexity"] == pytest.approx(found["reference_perplexity"], rel=1e-4)


def test_chunks_are_decoded_as_llama_perplexity_does(base: Path, demo_gguf: Path) -> None:
    file = BaseFile.read(base)
    with session(demo_gguf, Launch(context=32, batch=32, threads=1)) as opened:
        tokens = file.tokens()[1].tolist()
        if opened.begins_with is not None:
            tokens[0] = opened.begins_with
        expected = log_softmax(opened.run(tokens)[16:31])
    found = file.log_probabilities(1, 0, file.rows)
    near = expected > expected.max(axis=1, keepdims=True) - 15
    assert found[near] == pytest.approx(expected[near], abs=2e-3)


def test_a_file_of_another_vocabulary_is_refused(base: Path, synthetic: toys.Maker) -> None:
    with pytest.raises(BadFile, match="of another model") as error:
        compare(synthetic("qwen3moe"), base)
    assert dict(error.value.rows)["the model's"] == "320"


def test_short_text_is_a_single_chunk(demo_gguf: Path, small_text: Path, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"texts": [{"domain": "small", "path": str(small_text)}], "split": "held_out"}
    arguments |= {"window": 32, "most_tokens": 64, "model": str(demo_gguf), "output": str(tmp_path / "x.kld")}
    assert child.call("edgeprune.measure.against_base:write", arguments)["chunks"] == 1
    assert 16 <= BaseFile.read(tmp_path / "x.kld").context <= 64
