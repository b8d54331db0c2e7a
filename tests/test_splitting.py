"""Files split for a limit of size: llama.cpp loads the parts as one and answers the same."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import toys
from observed import LAUNCH, token_windows

from edgeprune.errors import EdgepruneError
from edgeprune.measure.llama import session
from edgeprune.model.gguf import GgufFile, TensorShape, align, header, make_entry
from edgeprune.model.splitting import file_name, split, split_sizes

LIMIT = 2_300_000


def logits(model: Path) -> npt.NDArray[Any]:
    with session(model, LAUNCH, None) as opened:
        return opened.run(token_windows(64)[0]).copy()


def test_llama_cpp_loads_the_parts_and_answers_the_same(toy_gguf: toys.Maker, tmp_path: Path) -> None:
    model = toy_gguf("qwen3_moe")
    parts = split(model, tmp_path, "toy", LIMIT)
    assert len(parts) > 2
    assert [part.path.name for part in parts] == [file_name("toy", n, len(parts)) for n in range(len(parts))]
    assert parts[0].path.name == f"toy-00001-of-{len(parts):05}.gguf"
    np.testing.assert_array_equal(logits(parts[0].path), logits(model))


def test_every_part_is_a_sound_file_with_its_number(toy_gguf: toys.Maker, tmp_path: Path) -> None:
    """As the gguf package reads them, which is not ours."""
    model = toy_gguf("olmoe")
    whole, told = GgufFile(model), []
    parts = split(model, tmp_path, "toy", LIMIT, lambda done, total: told.append((done, total)))
    names: list[str] = []
    for number, part in enumerate(parts):
        reader = gguf.GGUFReader(part.path)
        marks = {key: int(reader.fields[f"split.{key}"].contents()) for key in ("no", "count", "tensors.count")}
        assert marks == {"no": number, "count": len(parts), "tensors.count": len(whole.tensors)}
        own = {key for key in reader.fields if not key.startswith(("split.", "GGUF."))}
        assert own == (set(whole.entries) if number == 0 else set())
        names += [tensor.name for tensor in reader.tensors]
        for tensor in reader.tensors:
            assert tensor.data.tobytes() == whole.raw(tensor.name).tobytes()
        assert part.nbytes == part.path.stat().st_size <= LIMIT
        assert part.sha256 == hashlib.sha256(part.path.read_bytes()).hexdigest()
    assert names == list(whole.tensors)
    assert split_sizes(model, LIMIT) == [part.nbytes for part in parts]
    assert told[-1] == (sum(part.nbytes for part in parts),) * 2


def test_an_unusual_alignment_is_kept(toy_gguf: toys.Maker, tmp_path: Path) -> None:
    file = GgufFile(toy_gguf("qwen3_moe"))
    entries = [*file.entries.values(), make_entry("general.alignment", "u32", 256)]
    shapes = [TensorShape(t.name, t.shape, t.type) for t in file.tensors.values()]
    model = tmp_path / "aligned.gguf"
    with model.open("wb") as stream:
        stream.write(header(entries, shapes, 256))
        for shape in shapes:
            stream.write(file.raw(shape.name).tobytes())
            stream.write(bytes(align(shape.nbytes, 256) - shape.nbytes))
    parts = split(model, tmp_path / "parts", "toy", LIMIT)
    assert all(gguf.GGUFReader(part.path).alignment == 256 for part in parts)
    np.testing.assert_array_equal(logits(parts[0].path), logits(toy_gguf("qwen3_moe")))


def test_splitting_again_gives_the_same_bytes(toy_gguf: toys.Maker, tmp_path: Path) -> None:
    first, second = (split(toy_gguf("mixtral"), tmp_path / name, "toy", LIMIT) for name in "ab")
    assert [part.sha256 for part in first] == [part.sha256 for part in second]


def test_a_tensor_that_is_larger_than_a_part_is_refused(toy_gguf: toys.Maker, tmp_path: Path) -> None:
    with pytest.raises(EdgepruneError, match="alone exceeds a part") as error:
        split(toy_gguf("qwen3_moe"), tmp_path / "parts", "toy", 20_000)
    assert dict(error.value.rows)["largest part"] == "19.5 KiB"
    assert not (tmp_path / "parts").exists()
