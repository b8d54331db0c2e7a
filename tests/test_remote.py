"""Models on the Hub looked at through their headers alone: the same answers, and few bytes."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path

import hub_files
import numpy as np
import pytest
import toys
from huggingface_hub import constants
from runs import run_edgeprune
from test_inspection import sparse, verdicts

from edgeprune.errors import BadFile, EdgepruneError, Unsupported
from edgeprune.inspection import Inspection, inspect_model
from edgeprune.model import remote
from edgeprune.model.download import fetch
from edgeprune.model.gguf import Entry, GgufFile, TensorShape, header, make_entry
from edgeprune.model.location import HubName

pytest_plugins = ("hub_fixtures",)

REPO = "maker/toy"
KIB, GIB = 1 << 10, 1 << 30


def without_fetched(found: Inspection) -> list[tuple[str, str]]:
    return [fact for fact in found.facts if fact[0] not in ("fetched", "checkpoint")]


def test_gguf_on_the_hub_gets_the_answers_of_a_local_one(hub: hub_files.Hub, synthetic: toys.Maker) -> None:
    for arch in ("qwen3moe", "deepseek2", "gpt-oss"):
        hub.add(REPO, {f"{arch}.gguf": synthetic(arch)})
        here, there = inspect_model(str(synthetic(arch))), inspect_model(REPO)
        assert without_fetched(there) == here.facts
        assert (there.roles, verdicts(there), there.nbytes) == (here.roles, verdicts(here), here.nbytes)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_checkpoint_on_the_hub_gets_the_answers_of_a_local_one(
    family: str, hub: hub_files.Hub, toy_checkpoint: toys.Maker
) -> None:
    hub.add_folder(REPO, toy_checkpoint(family))
    here, there = inspect_model(str(toy_checkpoint(family))), inspect_model(REPO)
    told = [fact for fact in without_fetched(there) if not fact[1].startswith("not looked at")]
    assert told == [fact for fact in here.facts if fact[0] != "checkpoint"]
    assert (there.roles, verdicts(there), there.nbytes) == (here.roles, verdicts(here), here.nbytes)
    assert not any(request.path.endswith("tokenizer.json") for request in hub.requests)


def vocabulary(kind: str) -> list[Entry]:
    """A tokenizer as large as real ones: Qwen3's byte-level BPE, or Gemma's SentencePiece with scores."""
    chance = random.Random(3)
    count = 151_936 if kind == "bpe" else 262_144

    def word() -> str:
        return "".join(chance.choices("abcdefghijklmnopqrstuvwxyzéĠ日", k=chance.randint(1, 11)))

    entries = [
        make_entry("tokenizer.ggml.model", "str", "gpt2" if kind == "bpe" else "llama"),
        make_entry("tokenizer.ggml.tokens", "[str]", [word() for _ in range(count)]),
    ]
    if kind == "spm":
        entries.append(make_entry("tokenizer.ggml.scores", "[f32]", [-float(rank) for rank in range(count)]))
    entries.append(make_entry("tokenizer.ggml.token_type", "[i32]", chance.choices([1, 3, 4, 6], k=count)))
    if kind == "bpe":
        merges = [f"{word()} {word()}" for _ in range(count - 600)]
        entries.append(make_entry("tokenizer.ggml.merges", "[str]", merges))
    entries.append(make_entry("tokenizer.chat_template", "str", "{% if messages %}\n" * 1500))
    return [*entries, make_entry("general.quantization_version", "u32", 2)]


def sparse_gguf(
    path: Path, *, layers: int = 48, experts: int = 128, more: Sequence[Entry] = (), junk: bytes = b""
) -> Path:
    """The header of a model of Qwen3-30B-A3B's shape in BF16, and a hole instead of 57 GiB of weights."""
    shapes = {"token_embd.weight": (2048, 151_936)}
    for layer in range(layers):
        own = {"attn_q": (2048, 4096), "attn_k": (2048, 512), "attn_v": (2048, 512), "attn_output": (4096, 2048)}
        own |= {f"ffn_{part}_exps": (2048, 768, experts) for part in ("gate", "up")}
        own |= {"ffn_down_exps": (768, 2048, experts), "ffn_gate_inp": (2048, experts)}
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in own.items()}
    numbers = {"block_count": layers, "expert_count": experts, "expert_used_count": 8, "embedding_length": 2048}
    entries = [make_entry("general.architecture", "str", "qwen3moe")]
    given = {entry.key for entry in more}
    entries += [
        make_entry(f"qwen3moe.{key}", "u32", value)
        for key, value in numbers.items()
        if f"qwen3moe.{key}" not in given
    ]
    tensors = [TensorShape(name, shape, "BF16") for name, shape in shapes.items()]
    with path.open("wb") as stream:
        stream.write(header([*entries, *more], tensors, 32))
        end = stream.tell() + sum(tensor.nbytes for tensor in tensors)
        # Weights are not zero; those near the header are looked at.
        stream.write(np.random.default_rng(1).standard_normal(1 << 21, np.float32).tobytes())
        stream.truncate(end)
        stream.seek(end)
        stream.write(junk)
    return path


@pytest.fixture(scope="module")
def vocabularies() -> dict[str, list[Entry]]:
    return {kind: vocabulary(kind) for kind in ("bpe", "spm")}


@pytest.mark.parametrize("kind", ["bpe", "spm"])
def test_vocabulary_of_many_megabytes_is_leapt_over(
    kind: str, hub: hub_files.Hub, vocabularies: dict[str, list[Entry]], tmp_path: Path
) -> None:
    path = sparse_gguf(tmp_path / "large.gguf", more=vocabularies[kind])
    assert GgufFile(path).data_offset > 5 << 20
    hub.add(REPO, {"large.gguf": hub_files.stored(path, "d" * 64)})
    found = inspect_model(REPO)
    assert hub.sent < 500 * KIB
    here = inspect_model(str(path))
    assert (without_fetched(found), found.roles, verdicts(found)) == (here.facts, here.roles, verdicts(here))


def test_what_llama_gguf_split_appends_is_seen_behind_a_vocabulary(
    hub: hub_files.Hub, vocabularies: dict[str, list[Entry]], tmp_path: Path
) -> None:
    late = [make_entry("split.no", "u16", 0), make_entry("split.count", "u16", 2)]
    late.append(make_entry("split.tensors.count", "i32", 99))
    path = sparse_gguf(tmp_path / "large-00001-of-00002.gguf", more=[*vocabularies["bpe"], *late])
    hub.add(REPO, {path.name: hub_files.stored(path, "d" * 64), "large-00002-of-00002.gguf": bytes(99)})
    with pytest.raises(BadFile, match=r"00002-of-00002.gguf is not a GGUF file"):  # it was asked for
        inspect_model(REPO)
    hub.repositories[REPO].files.pop("large-00002-of-00002.gguf")
    hub.add(REPO, {"large.gguf": hub_files.stored(path, "d" * 64)})
    with pytest.raises(BadFile, match=r"is part 1 of 2 parts by its metadata"):
        inspect_model(REPO)
    assert hub.sent < 1000 * KIB


@pytest.mark.parametrize("case", ["bytes behind the last tensor", "its numbers behind the vocabulary"])
def test_header_that_cannot_be_leapt_over_is_walked_through(
    case: str, hub: hub_files.Hub, vocabularies: dict[str, list[Entry]], tmp_path: Path
) -> None:
    more, junk = vocabularies["bpe"], b""
    if case.startswith("bytes"):
        junk = b"junk" * 99
    else:
        more = [*more, make_entry("qwen3moe.block_count", "u32", 48)]
    path = sparse_gguf(tmp_path / "large.gguf", more=more, junk=junk)
    hub.add(REPO, {"large.gguf": hub_files.stored(path, "d" * 64)})
    assert without_fetched(inspect_model(REPO)) == inspect_model(str(path)).facts
    assert 5 << 20 < hub.sent < 14 << 20


def test_model_of_57_gib_costs_a_few_hundred_kilobytes(hub: hub_files.Hub, tmp_path: Path) -> None:
    path = sparse_gguf(tmp_path / "large.gguf")
    assert path.stat().st_size > 56 * GIB
    hub.add(REPO, {"large.gguf": hub_files.stored(path, "d" * 64)})
    found = inspect_model(REPO)
    assert hub.sent < 200 * KIB
    assert dict(found.facts)["experts"] == "128 per layer, 8 per token"
    assert dict(found.facts)["fetched"].endswith("requests")
    assert (
        0
        < found.fetched_bytes
        == sum(
            int(request.range.split("-")[1]) - int(request.range.split("=")[1].split("-")[0]) + 1
            for request in hub.requests
            if request.store
        )
    )
    assert found.nbytes == sum(info.nbytes for info in GgufFile(path).tensors.values())


@pytest.mark.parametrize("stacked", [False, True], ids=["one by one", "stacked"])
def test_checkpoint_of_279_gib_costs_its_header(stacked: bool, hub: hub_files.Hub, tmp_path: Path) -> None:
    folder = sparse(tmp_path / "large", experts=64, used=8, width=16_384, hidden=49_152, stacked=stacked)
    weights = folder / "model.safetensors"
    with weights.open("rb") as stream:
        header_bytes = 8 + struct.unpack("<Q", stream.read(8))[0]
    files = {"config.json": folder / "config.json", weights.name: hub_files.stored(weights, "d" * 64)}
    hub.add(REPO, {**files, "tokenizer.json": b"{}" * 9000})
    found = inspect_model(REPO)
    assert found.nbytes > 279 * GIB
    assert found.fetched_bytes < 2 * header_bytes + 32 * KIB
    assert (found.roles, verdicts(found)) == (inspect_model(str(folder)).roles, verdicts(inspect_model(str(folder))))


HOSTILE = {
    "2^60 tensors": (struct.pack("<IQQ", 3, 1 << 60, 0), "claims"),
    "10^9 tensors": (struct.pack("<IQQ", 3, 10**9, 0), "empty or overlong tensor name"),
    "a key of 1 GiB": (struct.pack("<IQQQ", 3, 0, 1, 1 << 30), "goes on beyond"),
    "2^30 texts in an array": (
        struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 8, 1 << 30),
        "goes on beyond",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_header_does_not_make_us_download_without_limit(
    case: str, hub: hub_files.Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "MOST_BYTES", 2 << 20)
    content, cause = HOSTILE[case]
    path = tmp_path / "hostile.gguf"
    with path.open("wb") as stream:
        stream.write(b"GGUF" + content)
        stream.truncate(60 * GIB)
    hub.add(REPO, {"hostile.gguf": hub_files.stored(path, "d" * 64)})
    with pytest.raises(BadFile, match=cause) as refusal:
        inspect_model(REPO)
    assert hub.sent < (2 << 20) + 64 * KIB
    assert "\n" not in refusal.value.cause


def test_hostile_safetensors_header_does_not_make_us_download_without_limit(
    hub: hub_files.Hub, toy_checkpoint: toys.Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "MOST_BYTES", 2 << 20)
    repository = hub.add_folder(REPO, toy_checkpoint("qwen3_moe"))
    path = tmp_path / "model.safetensors"
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", 90_000_000))
        stream.truncate(60 * GIB)
    repository.files["model.safetensors"] = hub_files.stored(path, "d" * 64)
    with pytest.raises(BadFile, match="goes on beyond"):
        inspect_model(REPO)
    assert hub.sent < (2 << 20) + 64 * KIB


def test_server_that_ignores_ranges_is_not_read_to_the_end(hub: hub_files.Hub, tmp_path: Path) -> None:
    hub.add(REPO, {"large.gguf": hub_files.stored(sparse_gguf(tmp_path / "large.gguf"), "d" * 64)})
    hub.ignores_ranges = True
    with pytest.raises(BadFile, match="sends files only as a whole"):
        inspect_model(REPO)
    assert hub.sent < 32 << 20  # what the sockets hold


def test_cut_connection_while_looking_is_told(hub: hub_files.Hub, synthetic: toys.Maker) -> None:
    hub.add(REPO, {"a.gguf": synthetic("qwen3moe")})
    hub.cut_after, hub.cuts = 1000, 1
    with pytest.raises(EdgepruneError, match="cannot reach the Hub"):
        inspect_model(REPO)


def test_dense_models_are_refused(hub: hub_files.Hub, synthetic: toys.Maker, tmp_path: Path) -> None:
    hub.add(REPO, {"dense.gguf": synthetic("llama")})
    with pytest.raises(Unsupported, match="dense llama model"):
        inspect_model(REPO)
    hub.add(REPO, {"config.json": json.dumps({"model_type": "llama"}).encode(), "model.safetensors": empty_shard()})
    with pytest.raises(Unsupported, match="dense llama model"):
        inspect_model(REPO)


def empty_shard() -> bytes:
    return struct.pack("<Q", 2) + b"{}"


def test_many_shards_are_found_without_their_index(
    hub: hub_files.Hub, toy_checkpoint: toys.Maker, tmp_path: Path
) -> None:
    folder = toys.qwen3_moe(tmp_path / "sharded", save={"max_shard_size": "2MB"})
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) > 2
    hub.add_folder(REPO, folder)
    assert inspect_model(REPO).roles == inspect_model(str(folder)).roles
    asked = {request.path.split("/")[-1] for request in hub.requests if "/resolve/" in request.path}
    assert asked == {"config.json", *shards}
    for number, name in enumerate(shards):  # other names: the index is needed
        shutil.move(folder / name, folder / f"part{number}.safetensors")
    index = (folder / "model.safetensors.index.json").read_text()
    for number, name in enumerate(shards):
        index = index.replace(name, f"part{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(index)
    hub.add_folder(REPO, folder)
    assert inspect_model(REPO).roles == inspect_model(str(folder)).roles


def test_offline_what_was_downloaded_is_looked_at(
    hub: hub_files.Hub, synthetic: toys.Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(REPO, {"toy-F32.gguf": synthetic("qwen3moe")})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(EdgepruneError, match="HF_HUB_OFFLINE forbids"):
        inspect_model(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    fetch(HubName(REPO), lambda done, total: None, lambda text: None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    before = len(hub.requests)
    assert inspect_model(REPO).facts == inspect_model(str(synthetic("qwen3moe"))).facts
    assert len(hub.requests) == before


def test_command_inspects_over_the_network(hub: hub_files.Hub, synthetic: toys.Maker) -> None:
    hub.add(REPO, {"toy-F32.gguf": synthetic("qwen3moe")})
    done = run_edgeprune("inspect", f"{REPO}:F32", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert sum(json.loads(done.stdout)["roles"].values()) == json.loads(done.stdout)["nbytes"]


def test_without_network_what_was_downloaded_is_looked_at(
    hub: hub_files.Hub, synthetic: toys.Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(REPO, {"toy-F32.gguf": synthetic("qwen3moe")})
    fetch(HubName(REPO), lambda done, total: None, lambda text: None)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert inspect_model(REPO).facts == inspect_model(str(synthetic("qwen3moe"))).facts
    with pytest.raises(EdgepruneError, match="cannot reach the Hub") as refusal:
        inspect_model("maker/other")
    assert "never downloaded" in dict(refusal.value.rows)["in the cache"]
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    done = run_edgeprune("inspect", REPO)
    assert done.returncode == 0 and "what was downloaded earlier is used" in done.stderr
