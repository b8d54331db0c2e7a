"""Checkpoints of which not every header is read: what is said of them is right, or everything is read."""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import hub_files
import pytest
import toys
from runs import run_edgeprune
from test_inspection import verdicts

from edgeprune.inspection import inspect_model
from edgeprune.model.checkpoint import Checkpoint, Stored
from edgeprune.model.deduced import deduced

pytest_plugins = ("hub_fixtures",)

REPO = "maker/toy"
KIB = 1 << 10
BYTES = {"BF16": 2, "F32": 4, "F8_E4M3": 1}
# Qwen3-30B-A3B as published.
QWEN3: dict[str, Any] = {
    "model_type": "qwen3_moe", "num_hidden_layers": 48, "num_experts": 128, "num_experts_per_tok": 8,
    "hidden_size": 2048, "moe_intermediate_size": 768, "intermediate_size": 6144, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151_936, "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
    "attention_bias": False, "hidden_act": "silu", "use_sliding_window": False, "tie_word_embeddings": False,
}  # fmt: skip
# DeepSeek-V3 as published, as far as it matters here.
DEEPSEEK = {
    "model_type": "deepseek_v3",
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "n_routed_experts": 256,
    "num_nextn_predict_layers": 1,
}


def nbytes(tensors: Mapping[str, Stored]) -> int:
    return sum(math.prod(stored.shape) * BYTES[stored.type] for stored in tensors.values())


def qwen3() -> dict[str, Stored]:
    """The 18,867 tensors of Qwen3-30B-A3B, in the order of its files."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (151_936, 2048)}
    for layer in range(48):
        front = f"model.layers.{layer}."
        own = {"q_proj": (4096, 2048), "k_proj": (512, 2048), "v_proj": (512, 2048), "o_proj": (2048, 4096)}
        shapes |= {f"{front}self_attn.{name}.weight": shape for name, shape in own.items()}
        shapes |= {f"{front}self_attn.{name}_norm.weight": (128,) for name in "qk"}
        shapes[f"{front}mlp.gate.weight"] = (128, 2048)
        for expert in range(128):
            parts = {"gate": (768, 2048), "up": (768, 2048), "down": (2048, 768)}
            shapes |= {f"{front}mlp.experts.{expert}.{part}_proj.weight": shape for part, shape in parts.items()}
        shapes |= {f"{front}{name}_layernorm.weight": (2048,) for name in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (2048,), "lm_head.weight": (151_936, 2048)}
    return {name: Stored(shape, "BF16") for name, shape in shapes.items()}


def deepseek() -> dict[str, Stored]:
    """DeepSeek-V3 in FP8 with a block that predicts further tokens, narrower than it is."""
    tensors = {"model.embed_tokens.weight": Stored((1024, 256), "BF16")}

    def scaled(name: str, rows: int, columns: int) -> None:
        tensors[f"{name}.weight"] = Stored((rows, columns), "F8_E4M3")
        tensors[f"{name}.weight_scale_inv"] = Stored((-(-rows // 128), -(-columns // 128)), "F32")

    for layer in range(62):
        front = f"model.layers.{layer}."
        scaled(f"{front}self_attn.kv_b_proj", 512, 128)
        if layer < 3:
            scaled(f"{front}mlp.up_proj", 768, 256)
        else:
            tensors[f"{front}mlp.gate.e_score_correction_bias"] = Stored((256,), "F32")
            for expert in range(256):
                for part in ("gate", "up", "down"):
                    scaled(f"{front}mlp.experts.{expert}.{part}_proj", 128, 128)
        if layer == 61:
            scaled(f"{front}eh_proj", 256, 512)
            tensors[f"{front}shared_head.head.weight"] = Stored((1024, 256), "BF16")
        tensors[f"{front}input_layernorm.weight"] = Stored((256,), "BF16")
    return tensors | {"model.norm.weight": Stored((256,), "BF16"), "lm_head.weight": Stored((1024, 256), "BF16")}


def in_files(tensors: Mapping[str, Stored], count: int) -> list[dict[str, Stored]]:
    """``tensors`` in ``count`` files of about as many bytes, in their order."""
    files: list[dict[str, Stored]] = [{} for _ in range(count)]
    done, whole = 0, nbytes(tensors)
    for name, stored in tensors.items():
        files[done * count // whole][name] = stored
        done += nbytes({name: stored})
    return files


def published(
    folder: Path,
    config: Mapping[str, Any],
    files: list[dict[str, Stored]],
    spelt: str = "model-{number:05d}-of-{count:05d}.safetensors",
) -> Path:
    """A checkpoint with holes in place of its weights. ``spelt``: names of its files."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    weight_map = {}
    for number, tensors in enumerate(files):
        name, end, described = spelt.format(number=number + 1, count=len(files)), 0, {}
        for key in sorted(tensors):
            begin, end = end, end + nbytes({key: tensors[key]})
            dtype, shape = tensors[key].type, list(tensors[key].shape)
            described[key] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        encoded = json.dumps(described, separators=(",", ":")).encode()
        with (folder / name).open("wb") as stream:
            stream.write(struct.pack("<Q", len(encoded)) + encoded)
            stream.truncate(8 + len(encoded) + end)
        weight_map |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def serve(hub: hub_files.Hub, folder: Path) -> None:
    own = sorted(folder.iterdir())
    digests = {path: "d" * 64 if path.suffix == ".safetensors" else "" for path in own}
    hub.add(REPO, {path.name: hub_files.stored(path, digests[path]) for path in own})


def seen(config: Mapping[str, Any], *files: Mapping[str, Stored]) -> Checkpoint:
    stored = {name: own for file in files for name, own in file.items()}
    return Checkpoint(Path("model"), dict(config), {}, stored)


def test_an_expert_by_expert_checkpoint_of_57_gib_costs_a_few_hundred_kilobytes(
    hub: hub_files.Hub, tmp_path: Path
) -> None:
    folder = published(tmp_path / "model", QWEN3, in_files(qwen3(), 16))
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) > 56 << 30
    serve(hub, folder)
    there = inspect_model(REPO)
    assert hub.sent < 320 * KIB and len(hub.requests) < 64
    assert there.fetched_bytes < 320 * KIB
    shutil.copytree(toy_tokenizer(tmp_path), folder, dirs_exist_ok=True)
    here = inspect_model(str(folder))
    assert (there.roles, there.nbytes, verdicts(there)) == (here.roles, here.nbytes, verdicts(here))
    told = dict(there.facts)
    assert told["headers"].startswith("2 of 16 read")
    assert all(told[key] == value for key, value in here.facts if key not in ("checkpoint", "tokenizer"))


def toy_tokenizer(folder: Path) -> Path:
    toys.byte_level_tokenizer(folder / "tokenizer", ["<|endoftext|>"], toys.QWEN2_PATTERN)
    return folder / "tokenizer"


# DeepSeek's, Moonshot's and Qwen3.5's ways of numbering files.
@pytest.mark.parametrize(
    "spelt",
    [
        "model-{number:05d}-of-{count:06d}.safetensors",
        "model-{number}-of-{count}.safetensors",
        "model.safetensors-{number:05d}-of-{count:05d}.safetensors",
    ],
)
def test_the_index_is_not_fetched_whose_files_are_numbered(spelt: str, hub: hub_files.Hub, tmp_path: Path) -> None:
    serve(hub, published(tmp_path / "model", QWEN3, in_files(qwen3(), 16), spelt))
    told = dict(inspect_model(REPO).facts)
    assert told["headers"].startswith("2 of 16 read")
    assert not any(request.path.endswith("index.json") for request in hub.requests)


def test_a_layer_that_differs_in_the_middle_is_read(hub: hub_files.Hub, tmp_path: Path) -> None:
    tensors = qwen3()
    del tensors["model.layers.20.mlp.experts.77.up_proj.weight"]
    folder = published(tmp_path / "model", QWEN3, in_files(tensors, 16))
    serve(hub, folder)
    there = dict(inspect_model(REPO).facts)
    assert int(there["headers"].split()[0]) > 8  # from both ends to there
    assert "lacks tensor model.layers.20.mlp.experts.77.up_proj.weight" in there["conversion"]


@pytest.mark.parametrize("read", [24, 40])
def test_dense_first_layers_scales_and_further_blocks_are_found(read: int) -> None:
    tensors = deepseek()
    files = in_files(tensors, 163)
    half = read // 2
    found = deduced(seen(DEEPSEEK, *files[:half], *files[-half:]), nbytes(tensors))
    assert found == tensors
    assert deduced(seen(DEEPSEEK, *files[:2], *files[-2:]), nbytes(tensors)) is None  # no layer with experts yet


def test_layers_that_take_turns_are_found() -> None:
    """As in Qwen3-Next, whose configuration does not say which layers have full attention."""
    config = {"model_type": "qwen3_next", "num_hidden_layers": 12}
    tensors = {}
    for layer in range(12):
        kind, width = ("self_attn.q_proj.weight", 512) if layer % 4 == 3 else ("linear_attn.A_log", 32)
        tensors[f"model.layers.{layer}.{kind}"] = Stored((width,), "BF16")
        tensors[f"model.layers.{layer}.mlp.up_proj.weight"] = Stored((64, 64), "BF16")
    files = in_files(tensors, 12)
    assert deduced(seen(config, *files[:3], *files[-2:]), nbytes(tensors)) is None
    assert deduced(seen(config, *files[:5], *files[-2:]), nbytes(tensors)) == tensors


def changed(name: str, **changes: Any) -> dict[str, Stored]:
    tensors = qwen3()
    tensors[name] = replace(tensors[name], **changes)
    return tensors


MIDDLE = "model.layers.24."
DOUBTFUL: dict[str, dict[str, Stored]] = {
    "one more tensor": {**qwen3(), f"{MIDDLE}self_attn.q_proj.bias": Stored((1,), "BF16")},
    "a tower": {"visual.weight": Stored((4, 4), "BF16")} | qwen3(),
    "another type": changed(f"{MIDDLE}input_layernorm.weight", type="F32"),
}


@pytest.mark.parametrize("case", DOUBTFUL)
def test_what_the_bytes_do_not_prove_is_not_said(case: str) -> None:
    tensors = DOUBTFUL[case]
    files = in_files(tensors, 16)
    whole = nbytes(tensors)
    own = [files[0], files[1], files[-2], files[-1]]
    if case == "a tower":
        own[0] = {name: stored for name, stored in own[0].items() if not name.startswith("visual")}
    assert deduced(seen(QWEN3, *own), whole) is None


@pytest.mark.parametrize("changes", [{"model_type": "unheard_of"}, {"num_hidden_layers": "many"}])
def test_a_configuration_that_does_not_tell_is_no_ground(changes: dict[str, Any]) -> None:
    files = in_files(qwen3(), 16)
    assert deduced(seen({**QWEN3, **changes}, *files[:2], *files[-2:]), nbytes(qwen3())) is None


def test_types_of_unknown_size_are_no_ground() -> None:
    tensors = qwen3()
    files = in_files(tensors, 16)
    files[0]["model.embed_tokens.weight"] = replace(files[0]["model.embed_tokens.weight"], type="F4")
    assert deduced(seen(QWEN3, *files[:2], *files[-2:]), nbytes(tensors)) is None


def test_the_tokenizer_is_looked_at_when_asked_for(
    hub: hub_files.Hub, toy_checkpoint: toys.Maker, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(toy_checkpoint("qwen3_moe"), tmp_path / "model"))
    definition = json.loads((folder / "tokenizer.json").read_text())
    definition["normalizer"] = {"type": "NFC"}
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    hub.add_folder(REPO, folder)
    assert "not looked at" in dict(inspect_model(REPO).facts)["tokenizer"]
    assert not any(request.path.endswith("tokenizer.json") for request in hub.requests)
    done = run_edgeprune("inspect", REPO, "--tokenizer", "--json")
    facts = dict(json.loads(done.stdout)["facts"])
    assert "does not compose characters (NFC)" in facts["tokenizer"]
    assert facts == {
        **dict(inspect_model(str(folder)).facts),
        "checkpoint": facts["checkpoint"],
        "fetched": facts["fetched"],
    }
    weights = [request for request in hub.requests if request.path.endswith(".safetensors")]
    assert all(request.range for request in weights)
    definition["pre_tokenizer"] = {"type": "Whitespace"}
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    hub.add_folder(REPO, folder).revisions["main"] = "b" * 40
    found = inspect_model(REPO, tokenizer=True)
    told = dict(found.facts)["tokenizer"]
    assert told.startswith("cannot be converted: ") and "Whitespace" in told
    assert found.refusal is not None and "Whitespace" in found.refusal.cause
