"""Hugging Face checkpoints on disk: complete ones are read, all others refused in one line each."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from safetensors.torch import save_file

from edgeprune.errors import BadFile, EdgepruneError, Unsupported
from edgeprune.model.checkpoint import INDEX, SINGLE, open_checkpoint

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
A, B = torch.arange(6.0).reshape(2, 3), torch.arange(8.0).to(torch.bfloat16)


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """A checkpoint in one file."""
    (tmp_path / "config.json").write_text('{"model_type": "x"}')
    save_file({"a": A, "b": B}, tmp_path / SINGLE, {"format": "pt"})
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The same in two files with an index."""
    (tmp_path / "config.json").write_text('{"model_type": "x"}')
    save_file({"a": A}, tmp_path / FIRST)
    save_file({"b": B}, tmp_path / SECOND)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": FIRST, "b": SECOND}}))
    return tmp_path


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_shapes_types_and_values_are_those_on_disk(layout: str, request: pytest.FixtureRequest) -> None:
    checkpoint = open_checkpoint(request.getfixturevalue(layout))
    assert checkpoint.config == {"model_type": "x"}
    assert checkpoint.shape("a") == (2, 3) and checkpoint.shape("b") == (8,)
    assert (checkpoint.stored["a"].type, checkpoint.stored["b"].type) == ("F32", "BF16")
    for name, expected in (("a", A), ("b", B), ("a", A)):  # back and forth between files
        assert torch.equal(checkpoint.tensor(name), expected)


def header(table: Any) -> bytes:
    encoded = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(encoded)) + encoded


def entry(shape: list[int], begin: int, end: int, kind: str = "F32") -> dict[str, Any]:
    return {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}


CORRUPT: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a safetensors file"),
    "seven bytes": (b"1234567", "not a safetensors file"),
    "a page of HTML": (b"<!DOCTYPE html><html><body>Not found</body></html>" * 20, "not a safetensors file"),
    "a header of 2^63 bytes": (struct.pack("<Q", 1 << 63) + b"{}", "not a safetensors file"),
    "no header": (struct.pack("<Q", 0) + bytes(64), "not a safetensors file"),
    "a header that is no JSON": (header(b"{" * 40) + bytes(64), "corrupt header"),
    "a header that is not UTF-8": (header(b"\xff" * 40) + bytes(64), "corrupt header"),
    "a header of 100,000 brackets": (header(b"[" * 100_000), "corrupt header"),
    "a header that is a list": (header([1, 2]), "corrupt header"),
    "an entry that is a number": (header({"a": 1}), "corrupt header"),
    "no offsets": (header({"a": {"dtype": "F32", "shape": [2]}}), "corrupt header"),
    "offsets of nothing": (header({"a": {"dtype": "F32", "shape": [2], "data_offsets": []}}), "corrupt header"),
    "offsets that are texts": (header({"a": {**entry([2], 0, 8), "data_offsets": ["a", "b"]}}), "corrupt header"),
    "offsets that are digits": (
        header({"a": {**entry([2], 0, 8), "data_offsets": ["0", "8"]}}) + bytes(8),
        "corrupt",
    ),
    "an offset of 1e30": (header({"a": {**entry([2], 0, 8), "data_offsets": [0, 1e30]}}) + bytes(8), "corrupt"),
    "a negative offset": (header({"a": entry([2], -8, 8)}) + bytes(8), "corrupt header"),
    "three offsets": (header({"a": {**entry([2], 0, 8), "data_offsets": [0, 4, 8]}}) + bytes(8), "corrupt header"),
    "offsets from back to front": (header({"a": entry([2], 8, 0)}) + bytes(8), "corrupt header"),
    "a negative extent": (header({"a": entry([-2], 0, 8)}) + bytes(8), "corrupt header"),
    "a shape beyond all data": (header({"a": entry([10**30], 0, 8)}) + bytes(8), "corrupt header"),
    "a type that is a number": (header({"a": {**entry([2], 0, 8), "dtype": 7}}) + bytes(8), "corrupt header"),
    "a shape that is a text": (header({"a": {**entry([2], 0, 8), "shape": "two"}}) + bytes(8), "corrupt header"),
    "data beyond the end": (header({"a": entry([2], 0, 8)}) + bytes(7), "is truncated: its header describes"),
    "2^60 bytes of data": (header({"a": entry([1 << 58], 0, 1 << 60)}), "is truncated: its header describes"),
}


@pytest.mark.parametrize("case", CORRUPT)
@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_corrupt_file_of_weights_is_named_and_refused(case: str, layout: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(layout)
    content, cause = CORRUPT[case]
    name = SINGLE if layout == "single" else SECOND
    (folder / name).write_bytes(content)
    with pytest.raises(BadFile, match=cause) as refusal:
        open_checkpoint(folder)
    assert name in refusal.value.cause and "\n" not in refusal.value.cause
    assert refusal.value.hint


def test_file_of_weights_cut_off_anywhere_is_refused(single: Path) -> None:
    content = (single / SINGLE).read_bytes()
    for cut in range(len(content)):
        (single / SINGLE).write_bytes(content[:cut])
        with pytest.raises(BadFile, match=r"not a safetensors file|truncated"):
            open_checkpoint(single)


def test_metadata_of_nothing_are_no_obstacle(single: Path) -> None:
    (single / SINGLE).write_bytes(header({"__metadata__": None, "a": entry([2], 0, 8)}) + bytes(8))
    checkpoint = open_checkpoint(single)
    assert checkpoint.shape("a") == (2,) and len(checkpoint.origin()) == 64


LYING = {
    "a shape larger than its data": {"a": entry([4], 0, 8)},
    "tensors that overlap": {"a": entry([2], 0, 8), "b": entry([2], 4, 12)},
    "an unknown type": {"a": entry([2], 0, 8, "X99")},
}


@pytest.mark.parametrize("case", LYING)
def test_header_that_lies_about_its_data_is_refused_before_reading(case: str, single: Path) -> None:
    (single / SINGLE).write_bytes(header(LYING[case]) + bytes(64))
    with pytest.raises(BadFile) as refusal:
        open_checkpoint(single).tensor("a")
    assert SINGLE in refusal.value.cause and "\n" not in refusal.value.cause


def test_missing_file_of_weights_is_named(sharded: Path) -> None:
    (sharded / SECOND).unlink()
    with pytest.raises(BadFile, match=f"lacks {SECOND}, one of its 2 files") as refusal:
        open_checkpoint(sharded)
    assert "incomplete" in refusal.value.hint


OUTSIDE = ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "a/../../x.safetensors"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_index_cannot_point_outside_its_folder(name: str, sharded: Path) -> None:
    save_file({"b": B}, sharded.parent / "x.safetensors")
    (sharded / INDEX).write_text(json.dumps({"weight_map": {"a": FIRST, "b": name}}))
    with pytest.raises(BadFile, match=r"points outside its folder|lacks \.\.") as refusal:
        open_checkpoint(sharded)
    assert "\n" not in refusal.value.cause


@pytest.mark.parametrize("place", ["../elsewhere.safetensors", "../blobs/elsewhere", "../../blobs/elsewhere"])
def test_link_to_weights_outside_the_folder_is_refused(place: str, tmp_path: Path, sharded: Path) -> None:
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    for name in ("config.json", INDEX, FIRST, SECOND):
        (tmp_path / name).rename(folder / name)
    target = folder / place
    target.parent.mkdir(exist_ok=True)
    (folder / SECOND).rename(target)
    (folder / SECOND).symlink_to(place)
    with pytest.raises(BadFile, match=f"{SECOND} is a link that leaves the checkpoint's folder") as refusal:
        open_checkpoint(folder)
    assert str(target.resolve()) in refusal.value.cause and "move the file" in refusal.value.hint


SMALL = [
    "config.json",
    "tokenizer.json",
    "chat_template.jinja",
    "tokenizer.model",
    "additional_chat_templates/x.jinja",
]


@pytest.mark.parametrize("name", SMALL)
def test_link_to_another_file_of_the_user_is_refused(name: str, tmp_path: Path, sharded: Path) -> None:
    """What a template says ends up in the GGUF, and in what is published."""
    secret = tmp_path.parent / f"{tmp_path.name}-secret"
    content = (sharded / name).read_text() if (sharded / name).is_file() else "hf_SECRET"
    secret.write_text(content)
    (sharded / name).parent.mkdir(exist_ok=True)
    (sharded / name).unlink(missing_ok=True)
    (sharded / name).symlink_to(secret)
    with pytest.raises(BadFile, match="is a link that leaves the checkpoint's folder"):
        open_checkpoint(sharded)


def test_one_file_of_weights_counts_where_there_are_shards_too(sharded: Path) -> None:
    """As for transformers."""
    save_file({"a": A + 1, "b": B}, sharded / SINGLE)
    assert torch.equal(open_checkpoint(sharded).tensor("a"), A + 1)


def test_reading_a_checkpoint_for_its_fingerprint_tells_how_far_it_is(sharded: Path) -> None:
    told: list[tuple[int, int]] = []
    for shard in sharded.glob("*.safetensors"):
        os.utime(shard)  # whatever was remembered of it
    checkpoint = open_checkpoint(sharded)
    assert checkpoint.origin(progress=lambda done, total: told.append((done, total))) == checkpoint.origin()
    whole = sum(path.stat().st_size for path in sharded.glob("*.safetensors"))
    shards = len(list(sharded.glob("*.safetensors")))
    assert told == sorted(told) and told[-1] == (whole, whole) and shards > 1
    assert len({done for done, _ in told}) >= shards


def test_a_further_chat_template_is_part_of_the_fingerprint(sharded: Path) -> None:
    before = open_checkpoint(sharded).fingerprint()
    (sharded / "additional_chat_templates").mkdir()
    (sharded / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    assert open_checkpoint(sharded).fingerprint() != before


def in_the_cache(repository: Path, source: Path) -> Path:
    """``source`` as the Hugging Face cache lays it out: blobs, and a snapshot of links to them."""
    snapshot = repository / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted(source.glob("*.*"))):
        path.rename(repository / "blobs" / f"{number:064x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:064x}")
    return snapshot


def test_snapshot_of_the_cache_is_opened_through_its_links(tmp_path: Path, sharded: Path) -> None:
    folder = in_the_cache(tmp_path / "models--x--y", sharded)
    (tmp_path / "short").symlink_to(folder)
    for path in (folder, tmp_path / "short"):
        checkpoint = open_checkpoint(path)
        assert torch.equal(checkpoint.tensor("a"), A) and torch.equal(checkpoint.tensor("b"), B)


@pytest.mark.parametrize("place", ["../../elsewhere", "../../../models--x--z/blobs/elsewhere"])
def test_snapshot_cannot_link_beyond_the_blobs_of_its_repository(place: str, tmp_path: Path, sharded: Path) -> None:
    folder = in_the_cache(tmp_path / "models--x--y", sharded)
    target = folder / place
    target.parent.mkdir(parents=True, exist_ok=True)
    (folder / SECOND).resolve().rename(target)
    (folder / SECOND).unlink()
    (folder / SECOND).symlink_to(place)
    with pytest.raises(BadFile, match="leaves the checkpoint's folder"):
        open_checkpoint(folder)


def test_link_within_the_folder_is_followed(sharded: Path) -> None:
    (sharded / SECOND).rename(sharded / "second")
    (sharded / SECOND).symlink_to("second")
    assert torch.equal(open_checkpoint(sharded).tensor("b"), B)


INDEXES = ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": "a"}', "1"]


@pytest.mark.parametrize("content", INDEXES)
def test_broken_index_is_refused(content: str, sharded: Path) -> None:
    (sharded / INDEX).write_text(content)
    with pytest.raises(BadFile, match=r"model\.safetensors\.index\.json"):
        open_checkpoint(sharded)


CONFIGS: dict[str, Callable[[Path], object]] = {
    "none": Path.unlink,
    "cut off": lambda path: path.write_text('{"model_type'),
    "a list": lambda path: path.write_text("[]"),
    "not UTF-8": lambda path: path.write_bytes(b"\xff\xfe"),
    "200,000 brackets": lambda path: path.write_text("[" * 200_000),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_broken_configuration_is_refused(case: str, single: Path) -> None:
    CONFIGS[case](single / "config.json")
    with pytest.raises(BadFile, match=r"config\.json"):
        open_checkpoint(single)


class _Trap:
    """Unpickling this writes a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(Path("sprung").resolve()), "w")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_pickles_are_refused_and_never_opened(name: str, single: Path) -> None:
    (single / SINGLE).unlink()
    (single / name).write_bytes(pickle.dumps(_Trap()))
    with pytest.raises(Unsupported, match="Python pickles") as refusal:
        open_checkpoint(single)
    assert "safe_serialization" in refusal.value.hint
    assert not Path("sprung").exists()


def test_pickles_beside_safetensors_do_not_matter(single: Path) -> None:
    (single / "pytorch_model.bin").write_bytes(pickle.dumps(_Trap()))
    assert set(open_checkpoint(single).stored) == {"a", "b"}
    assert not Path("sprung").exists()


def test_folder_without_weights_is_refused(single: Path) -> None:
    (single / SINGLE).unlink()
    with pytest.raises(BadFile, match=r"holds no model\.safetensors"):
        open_checkpoint(single)


def test_file_that_vanishes_or_shrinks_after_opening_is_an_explained_error(sharded: Path) -> None:
    checkpoint = open_checkpoint(sharded)
    (sharded / FIRST).unlink()
    (sharded / SECOND).write_bytes((sharded / SECOND).read_bytes()[:-4])
    for name in ("a", "b"):
        with pytest.raises(EdgepruneError):
            checkpoint.tensor(name)


DENSE = [
    "{}",
    '{"model_type": "llama", "num_experts": 0, "num_local_experts": null}',
    '{"text_config": {"hidden_size": 8}}',
]


@pytest.mark.parametrize("config", DENSE)
def test_dense_model_is_told_that_it_is_one(config: str, single: Path) -> None:
    (single / "config.json").write_text(config)
    with pytest.raises(Unsupported, match=r"is a dense (llama|language) model: it has no experts") as refusal:
        open_checkpoint(single).require_experts()
    assert "llama-quantize" in refusal.value.hint


EXPERT_COUNTS = ["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_tok"]


@pytest.mark.parametrize("key", EXPERT_COUNTS)
@pytest.mark.parametrize("nested", [False, True], ids=["outside", "nested"])
def test_model_whose_configuration_counts_experts_is_not_dense(key: str, nested: bool, single: Path) -> None:
    (single / "config.json").write_text(json.dumps({"text_config": {key: 8}} if nested else {key: 8}))
    open_checkpoint(single).require_experts()


@pytest.mark.parametrize(
    ("name", "dense"),
    [
        ("model.layers.0.mlp.experts.0.up_proj.weight", False),
        ("model.layers.0.mlp.experts.gate_up_proj", False),
        ("model.layers.0.mlp.shared_experts.up_proj.weight", True),
    ],
)
def test_model_with_tensors_of_experts_is_not_dense(name: str, dense: bool, single: Path) -> None:
    save_file({name: A}, single / SINGLE)
    if dense:
        with pytest.raises(Unsupported, match="is a dense x model"):
            open_checkpoint(single).require_experts()
    else:
        open_checkpoint(single).require_experts()


def test_fingerprint_is_of_the_content_and_not_of_the_place(single: Path, tmp_path_factory: Any) -> None:
    first = open_checkpoint(single).fingerprint()
    other = tmp_path_factory.mktemp("other")
    for path in single.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    assert open_checkpoint(other).fingerprint() == first
    prints = {first}
    toys.change_json(other / "config.json", x=1)
    prints.add(open_checkpoint(other).fingerprint())
    save_file({"a": A, "b": B + 1}, other / SINGLE, {"format": "pt"})
    prints.add(open_checkpoint(other).fingerprint())
    (other / "chat_template.jinja").write_text("{{ x }}")
    prints.add(open_checkpoint(other).fingerprint())
    assert len(prints) == 4


def test_fingerprint_sees_a_change_in_the_last_rows_of_a_matrix(single: Path) -> None:
    weights = torch.ones(400, 64)
    save_file({"down_proj": weights}, single / SINGLE)
    before = open_checkpoint(single).origin()
    weights[100:] = 0
    save_file({"down_proj": weights}, single / SINGLE)
    assert open_checkpoint(single).origin() != before


# The index against what the shards hold.

LISTED: dict[str, tuple[dict[str, str], str]] = {
    "a tensor that is nowhere": (
        {"a": FIRST, "b": SECOND, "c": SECOND},
        f"says that {SECOND} holds c, which no file holds",
    ),
    "a tensor that is elsewhere": ({"a": FIRST, "b": FIRST, "c": SECOND}, f"holds b, which is in {SECOND}"),
    "a tensor that is not listed": ({"a": FIRST, "d": SECOND}, f"{SECOND} holds b, which {INDEX} does not list"),
    "a tensor by another name": (
        {"a": FIRST, "x": SECOND},
        f"{SECOND} holds x, which no file holds; 2 tensors differ",
    ),
}


@pytest.mark.parametrize("case", LISTED)
def test_shards_hold_what_the_index_lists(case: str, sharded: Path) -> None:
    listed, cause = LISTED[case]
    if case == "a tensor that is not listed":
        save_file({"b": B, "d": B.clone()}, sharded / SECOND)
    (sharded / INDEX).write_text(json.dumps({"weight_map": listed}))
    with pytest.raises(BadFile, match=cause.replace(".", r"\.")) as refusal:
        open_checkpoint(sharded)
    assert "\n" not in refusal.value.cause and "get all of them again" in refusal.value.hint


def test_missing_index_is_named(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    with pytest.raises(BadFile, match=f"lacks {INDEX}, which says what its 2 safetensors hold") as refusal:
        open_checkpoint(sharded)
    assert "incomplete" in refusal.value.hint


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_empty_file_is_called_empty(name: str, sharded: Path) -> None:
    (sharded / name).write_bytes(b"")
    with pytest.raises(BadFile, match=f"{name}: it is empty") as refusal:
        open_checkpoint(sharded)
    assert "download" in refusal.value.hint
