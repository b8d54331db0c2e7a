"""Conversion: llama.cpp computes what transformers computes with the checkpoint, or nothing is written."""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
import toys
from agreement import log_probabilities, token_windows
from runs import Ear, conversion_peaks, run_edgeprune
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from edgeprune.errors import BadFile, EdgepruneError, Unsupported
from edgeprune.files import data_folder
from edgeprune.model.architecture import read_architecture
from edgeprune.model.checkpoint import INDEX, SINGLE, open_checkpoint
from edgeprune.model.convert import SOURCE_KEY, _piece_bytes, convert, whole_header
from edgeprune.model.converter import load_converter
from edgeprune.model.gguf import GgufFile
from edgeprune.model.planning import plan_conversion
from edgeprune.stages.converting import convert_checked, require_convertible


def assert_computes_the_same(checkpoint: Path, gguf: Path, folder: Path) -> None:
    """KL divergence and top token over four sequences, transformers against llama.cpp."""
    tokens = token_windows(checkpoint, folder)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        output = model(tokens, output_router_logits=True)
    for logits in output.router_logits:
        used = logits.topk(toys.USED).indices
        assert set(used.flatten().tolist()) == set(range(toys.EXPERTS))
    expected = torch.log_softmax(output.logits.flatten(0, 1).double(), -1)
    assert -(expected.exp() * expected).sum(-1).mean() < 0.8 * np.log(toys.VOCABULARY)  # not flat
    found = log_probabilities(gguf, tokens.tolist())
    divergence = (expected.exp() * (expected - found)).sum(-1)
    assert divergence.mean() < 1e-5  # a wrong base, epsilon or order costs 1e-3 and more
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("family", toys.CHECKPOINTS)
def test_llama_cpp_computes_what_transformers_computes(
    family: str, toy_checkpoint: toys.Maker, toy_gguf: toys.Maker, tmp_path: Path
) -> None:
    assert_computes_the_same(toy_checkpoint(family), toy_gguf(family), tmp_path)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 32.0}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe, tied embeddings": ("qwen3_moe", {"tie_word_embeddings": True}),
    "qwen3_moe, YaRN": (
        "qwen3_moe",
        {"rope_parameters": {**YARN, "rope_theta": 10000.0}},
    ),
    "mixtral, linear scaling": (
        "mixtral",
        {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "linear", "factor": 2.0}},
    ),
    "mixtral, wide heads and another epsilon": ("mixtral", {"head_dim": 128, "rms_norm_eps": 1e-2}),
    "olmoe, tied embeddings": ("olmoe", {"tie_word_embeddings": True}),
}


@pytest.mark.parametrize("case", VARIANTS)
def test_variants_of_the_configuration_are_computed_too(case: str, tmp_path: Path) -> None:
    family, changes = VARIANTS[case]
    checkpoint = toys.CHECKPOINTS[family](tmp_path / "model", **changes)
    convert(checkpoint, tmp_path / "model.gguf", "f32")
    assert_computes_the_same(checkpoint, tmp_path / "model.gguf", tmp_path)


# The same weights in every layout in which checkpoints come.


def tensor_bytes(path: Path) -> dict[str, bytes]:
    file = GgufFile(path)
    return {name: file.raw(name).tobytes() for name in file.tensors}


def metadata(path: Path) -> dict[str, bytes]:
    return {key: entry.raw for key, entry in GgufFile(path).entries.items() if key != SOURCE_KEY}


@pytest.mark.parametrize("family", toys.CHECKPOINTS)
def test_sharded_checkpoint_gives_the_same_bytes(family: str, toy_gguf: toys.Maker, tmp_path: Path) -> None:
    folder = toys.CHECKPOINTS[family](tmp_path / family, save={"max_shard_size": "3MB"})
    assert len(list(folder.glob("*.safetensors"))) > 4 and not (folder / SINGLE).exists()
    convert(folder, tmp_path / "sharded.gguf", "f32")
    whole, sharded = GgufFile(toy_gguf(family)), GgufFile(tmp_path / "sharded.gguf")
    assert metadata(whole.path) == metadata(sharded.path)
    assert whole.path.read_bytes()[whole.data_offset :] == sharded.path.read_bytes()[sharded.data_offset :]


@pytest.mark.parametrize("family", toys.CHECKPOINTS)
def test_stacked_experts_give_the_same_bytes_as_single_ones(
    family: str, toy_checkpoint: toys.Maker, toy_gguf: toys.Maker, tmp_path: Path
) -> None:
    stacked = toys.CHECKPOINTS[family](tmp_path / family, save={"save_original_format": False})
    names = {path: set(open_checkpoint(path).stored) for path in (stacked, toy_checkpoint(family))}
    assert "model.layers.0.mlp.experts.gate_up_proj" in names[stacked]
    assert any("experts.7." in name for name in names[toy_checkpoint(family)])
    convert(stacked, tmp_path / "stacked.gguf", "f32")
    assert tensor_bytes(tmp_path / "stacked.gguf") == tensor_bytes(toy_gguf(family))
    assert metadata(tmp_path / "stacked.gguf") == metadata(toy_gguf(family))


def test_configuration_of_an_older_transformers_says_the_same(tmp_path: Path) -> None:
    new = toys.qwen3_moe(tmp_path / "model", rope_parameters={**YARN, "rope_theta": 5e5}, **SMALL)
    convert(new, tmp_path / "new.gguf")
    scaling = {"type": "yarn", **{key: value for key, value in YARN.items() if key != "rope_type"}}
    old = {"rope_theta": 5e5, "rope_scaling": scaling, "num_experts": toys.EXPERTS, "torch_dtype": "float32"}
    gone = dict.fromkeys(("rope_parameters", "num_local_experts", "dtype"), ...)
    toys.change_json(new / "config.json", **old, **gone)
    convert(new, tmp_path / "old.gguf")
    assert metadata(tmp_path / "old.gguf") == metadata(tmp_path / "new.gguf")
    assert GgufFile(tmp_path / "old.gguf").get("qwen3moe.rope.scaling.original_context_length") == 32


def test_expert_numbers_are_those_of_the_checkpoint(toy_checkpoint: toys.Maker, toy_gguf: toys.Maker) -> None:
    weights, file = load_file(toy_checkpoint("olmoe") / SINGLE), GgufFile(toy_gguf("olmoe"))
    for part in ("gate", "up", "down"):
        info = file.tensors[f"blk.1.ffn_{part}_exps.weight"]
        stacked = file.raw(info.name).view(np.float32).reshape(tuple(reversed(info.shape)))
        for expert in range(toys.EXPERTS):
            own = weights[f"model.layers.1.mlp.experts.{expert}.{part}_proj.weight"]
            assert np.array_equal(stacked[expert], own.numpy())


BASES = [("float32", "auto", "F32"), ("bfloat16", "auto", "BF16"), ("float16", "auto", "F16")]
BASES += [("bfloat16", "f16", "F16"), ("float32", "bf16", "BF16"), ("bfloat16", "f32", "F32")]


@pytest.mark.parametrize(("dtype", "base", "expected"), BASES, ids=[f"{d} as {b}" for d, b, _ in BASES])
def test_matrices_get_the_base_type_and_norms_and_routers_f32(
    dtype: str, base: str, expected: str, tmp_path: Path
) -> None:
    folder = toys.qwen3_moe(tmp_path / "model", dtype=dtype, **SMALL)
    convert(folder, tmp_path / "model.gguf", base)
    weights = load_file(folder / SINGLE)
    file = GgufFile(tmp_path / "model.gguf")
    for tensor in read_architecture(file).tensors:
        assert tensor.type == (expected if tensor.quantisable else "F32"), tensor.name
    exact = weights["model.norm.weight"].float().numpy()
    assert np.array_equal(file.raw("output_norm.weight").view(np.float32), exact)
    stored = torch.frombuffer(bytearray(file.raw("output.weight")), dtype=DTYPES[expected])
    assert torch.equal(stored, weights["lm_head.weight"].to(DTYPES[expected]).flatten())


DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SMALL = {
    "hidden_size": 64, "moe_intermediate_size": 32, "intermediate_size": 64, "head_dim": 16, "num_hidden_layers": 1,
}  # fmt: skip


def test_type_of_most_weights_is_the_base_type(tmp_path: Path) -> None:
    folder = toys.qwen3_moe(tmp_path / "model", dtype="bfloat16", **SMALL)
    weights = load_file(folder / SINGLE)
    save_file({n: w.float() if "gate.weight" in n else w for n, w in weights.items()}, folder / SINGLE)
    convert(folder, tmp_path / "model.gguf")
    assert GgufFile(tmp_path / "model.gguf").tensors["token_embd.weight"].type == "BF16"


def test_output_matrix_that_repeats_tied_embeddings_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeprune.model.checkpoint._WEIGHTS_TOGETHER", 100 * 64)  # in several steps
    folder = toys.qwen3_moe(tmp_path / "model", tie_word_embeddings=True, **SMALL)
    weights = load_file(folder / SINGLE)
    assert "lm_head.weight" not in weights
    convert(folder, tmp_path / "tied.gguf")
    output = weights["model.embed_tokens.weight"].clone()
    save_file({**weights, "lm_head.weight": output}, folder / SINGLE)
    convert(folder, tmp_path / "both.gguf")
    assert tensor_bytes(tmp_path / "both.gguf") == tensor_bytes(tmp_path / "tied.gguf")
    output[-1, -1] += 1
    save_file({**weights, "lm_head.weight": output}, folder / SINGLE)
    convert(folder, tmp_path / "own.gguf")
    assert GgufFile(tmp_path / "own.gguf").raw("output.weight").tobytes() == output.numpy().tobytes()


def test_progress_ends_at_the_exact_size_and_the_origin_is_recorded(
    toy_checkpoint: toys.Maker, tmp_path: Path
) -> None:
    steps: list[tuple[int, int]] = []
    path = tmp_path / "new" / "model.gguf"
    convert(toy_checkpoint("mixtral"), path, name="A name", progress=lambda done, total: steps.append((done, total)))
    assert steps == sorted(steps) and len({total for _, total in steps}) == 1
    assert steps[-1] == (path.stat().st_size, path.stat().st_size)
    file = GgufFile(path)
    assert len(steps) == len(file.tensors)
    assert file.get("general.name") == "A name"
    assert file.get(SOURCE_KEY) == open_checkpoint(toy_checkpoint("mixtral")).origin()
    assert [entry.name for entry in path.parent.iterdir()] == ["model.gguf"]


# What cannot be converted is refused in one line, and nothing half-written stays.


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Qwen3-MoE checkpoint; tests work on copies."""
    return toys.qwen3_moe(tmp_path_factory.mktemp("small") / "model", **SMALL)


def assert_refused(folder: Path, kind: type[EdgepruneError], cause: str, base: str = "auto") -> EdgepruneError:
    output = folder.parent / "out" / "model.gguf"
    output.parent.mkdir()
    output.write_bytes(b"an older result")
    with pytest.raises(kind, match=cause) as refusal:
        convert(folder, output, base)
    assert "\n" not in refusal.value.cause
    assert [path.name for path in output.parent.iterdir()] == ["model.gguf"]
    assert output.read_bytes() == b"an older result"
    return refusal.value


CONFIGS: dict[str, tuple[dict[str, Any], type[EdgepruneError], str]] = {
    "an unknown type": ({"model_type": "mamba"}, Unsupported, "no converter for checkpoints of type 'mamba'"),
    "a type that is a path": ({"model_type": "../profiles/cpu-8gb"}, Unsupported, "no converter"),
    "no type": ({"model_type": ...}, BadFile, "it has no model_type"),
    "weights not renormalised": ({"norm_topk_prob": False}, Unsupported, "norm_topk_prob = False"),
    "biased attention": ({"attention_bias": True}, Unsupported, "attention_bias = True"),
    "dense layers between": ({"decoder_sparse_step": 2}, Unsupported, "decoder_sparse_step = 2"),
    "dense layers named": ({"mlp_only_layers": [0]}, Unsupported, r"mlp_only_layers = \[0\]"),
    "another activation": ({"hidden_act": "gelu"}, Unsupported, "hidden_act = 'gelu'"),
    "a sliding window": ({"use_sliding_window": True}, Unsupported, "use_sliding_window = True"),
    "quantised": ({"quantization_config": {"quant_method": "gptq"}}, Unsupported, "quantised already, as 'gptq'"),
    "quantised to integers": (
        {"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}},
        Unsupported,
        "quantised already, as 'pack-quantized'",
    ),
    "quantised, no table": ({"quantization_config": "int4"}, Unsupported, "quantised already, as 'int4'"),
    "an unknown rope": (
        {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}},
        Unsupported,
        "scaling 'llama3' is not supported",
    ),
    "an unknown rope setting": (
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "mscale": 0.7}},
        Unsupported,
        "'yarn' with mscale = 0.7 is not supported",
    ),
    "a rope setting that llama.cpp ignores": (
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 8.0}},
        Unsupported,
        "'yarn' with beta_fast = 8.0 is not supported",
    ),
    "a rope without its factor": ({"rope_parameters": {"rope_type": "yarn"}}, BadFile, "rotary embedding settings"),
    "a rope that is a text": ({"rope_parameters": "yarn"}, BadFile, "rotary embedding settings"),
    "a rope factor that is a text": (
        {"rope_parameters": {"rope_type": "linear", "factor": "two"}},
        BadFile,
        "rotary embedding settings",
    ),
    "a smaller vocabulary": ({"vocab_size": 600}, BadFile, "vocab_size = 600, the embeddings have 640 rows"),
    "no number of layers": ({"num_hidden_layers": ...}, BadFile, "has none of: num_hidden_layers"),
    "layers that are a text": ({"num_hidden_layers": "one"}, BadFile, "num_hidden_layers = 'one' is not a number"),
    "no layers": ({"num_hidden_layers": 0}, BadFile, "num_hidden_layers = 0 is not a number"),
    "a billion layers": ({"num_hidden_layers": 10**9}, BadFile, "num_hidden_layers = 1000000000"),
    "a billion experts": ({"num_experts": 10**9, "num_local_experts": 10**9}, BadFile, "num_experts = 1000000000"),
    "more layers than there are": ({"num_hidden_layers": 2}, BadFile, "lacks tensor model.layers.1"),
    "more experts than there are": (
        {"num_experts": 9, "num_local_experts": 9},
        BadFile,
        "config.json says 9 experts, the weights hold 8",
    ),
    "fewer experts than there are": (
        {"num_experts": 7, "num_local_experts": 7},
        BadFile,
        "config.json says 7 experts, the weights hold 8",
    ),
    "an epsilon that is a text": ({"rms_norm_eps": "small"}, BadFile, "rms_norm_eps = 'small' does not fit"),
    "a width below zero": ({"hidden_size": -1}, BadFile, "hidden_size = -1 does not fit"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configuration_that_cannot_be_converted_is_refused(case: str, small: Path, tmp_path: Path) -> None:
    changes, kind, cause = CONFIGS[case]
    folder = Path(shutil.copytree(small, tmp_path / "model"))
    toys.change_json(folder / "config.json", **changes)
    assert_refused(folder, kind, cause)


def test_unknown_type_names_the_known_ones(small: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(small, tmp_path / "model"))
    toys.change_json(folder / "config.json", model_type="mamba")
    refusal = assert_refused(folder, Unsupported, "mamba")
    assert all(family in refusal.hint for family in toys.CHECKPOINTS)


Weights = dict[str, torch.Tensor]
EXPERT = "model.layers.0.mlp.experts.3.up_proj.weight"


def filled(name: str, value: float) -> Callable[[Weights], None]:
    def change(weights: Weights) -> None:
        weights[name].view(-1)[77] = value

    return change


def replaced(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Weights], None]:
    def change(weights: Weights) -> None:
        weights[name] = make(weights[name]).contiguous()

    return change


def _stacked_as(weights: Weights, stacked: torch.Tensor) -> None:
    for name in [name for name in weights if name.startswith("model.layers.0.mlp.experts.") and "down" not in name]:
        del weights[name]
    weights["model.layers.0.mlp.experts.gate_up_proj"] = stacked


WEIGHTS: dict[str, tuple[Callable[[Weights], object], type[EdgepruneError], str, str]] = {
    "NaN in an expert": (filled(EXPERT, float("nan")), BadFile, f"{EXPERT} holds values that are NaN", "auto"),
    "infinity in the last matrix": (filled("lm_head.weight", float("inf")), BadFile, "lm_head.weight holds", "auto"),
    "NaN in the attention": (
        filled("model.layers.0.self_attn.q_proj.weight", float("nan")),
        BadFile,
        "q_proj.weight holds values that are NaN",
        "auto",
    ),
    "too large for F16": (filled(EXPERT, 7e4), Unsupported, f"{EXPERT} does not fit F16", "f16"),
    "an expert missing": (lambda weights: weights.pop(EXPERT), BadFile, f"lacks tensor {EXPERT}", "auto"),
    "a norm missing": (lambda w: w.pop("model.norm.weight"), BadFile, "lacks tensor model.norm.weight", "auto"),
    "no output matrix": (lambda w: w.pop("lm_head.weight"), BadFile, "lacks tensor lm_head.weight", "auto"),
    "a tensor too many": (
        lambda weights: weights.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}),
        Unsupported,
        r"1 tensors that qwen3_moe does not: model\.layers\.0\.self_attn\.q_proj\.bias",
        "auto",
    ),
    "an expert turned round": (replaced(EXPERT, lambda w: w.T), BadFile, r"experts\.3.* differ in shape", "auto"),
    "an expert cut short": (replaced(EXPERT, lambda w: w[:16]), BadFile, r"experts\.3.* differ in shape", "auto"),
    "an expert in FP8": (
        replaced(EXPERT, lambda w: w.to(torch.float8_e4m3fn)),
        Unsupported,
        r"experts\.3.* as F8_E4M3 without scales; F32, F16 and BF16 are supported",
        "auto",
    ),
    "a norm without extents": (
        replaced("model.norm.weight", lambda w: w.sum()),
        BadFile,
        r"model.norm.weight of the shape \[\] cannot become output_norm.weight",
        "auto",
    ),
    "experts in one row": (
        lambda weights: _stacked_as(weights, torch.zeros(64)),
        BadFile,
        r"gate_up_proj of the shape \[64\] cannot become blk.0.ffn_gate_exps.weight",
        "auto",
    ),
    "an embedding too few": (
        replaced("model.embed_tokens.weight", lambda w: w[:600]),
        BadFile,
        "vocab_size = 640, the embeddings have 600 rows",
        "auto",
    ),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_that_cannot_be_converted_are_refused(case: str, small: Path, tmp_path: Path) -> None:
    change, kind, cause, base = WEIGHTS[case]
    folder = Path(shutil.copytree(small, tmp_path / "model"))
    weights = load_file(folder / SINGLE)
    change(weights)
    save_file(weights, folder / SINGLE)
    assert_refused(folder, kind, cause, base)


def test_head_count_that_does_not_divide_the_rows_is_refused(tmp_path: Path) -> None:
    changes = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1}
    folder = toys.mixtral(tmp_path / "model", **changes)
    toys.change_json(folder / "config.json", num_attention_heads=3)
    assert_refused(folder, BadFile, "64 attention rows do not divide into 3 heads")


DAMAGES: dict[str, tuple[Callable[[Path], object], type[EdgepruneError], str]] = {
    "a file of weights missing": (lambda folder: last_shard(folder).unlink(), BadFile, "lacks model-0000"),
    "a file of weights cut off": (
        lambda folder: last_shard(folder).write_bytes(last_shard(folder).read_bytes()[:-1]),
        BadFile,
        "is truncated",
    ),
    "a corrupt header": (
        lambda folder: last_shard(folder).write_bytes(b"\x40" + bytes(7) + b"{" * 64),
        BadFile,
        "corrupt header",
    ),
    "an index that points outside": (
        lambda folder: toys.change_json(folder / INDEX, weight_map={"a": "../x.safetensors"}),
        BadFile,
        "points outside its folder",
    ),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), BadFile, "no tokenizer"),
    "only pickles": (lambda folder: only_pickles(folder), Unsupported, "Python pickles"),
}


def last_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[-1]


def only_pickles(folder: Path) -> None:
    (folder / INDEX).unlink()
    for path in folder.glob("*.safetensors"):
        path.rename(path.with_suffix(".bin"))


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_checkpoint_is_refused_with_a_way_out(case: str, tmp_path: Path) -> None:
    change, kind, cause = DAMAGES[case]
    folder = toys.qwen3_moe(tmp_path / "model", save={"max_shard_size": "100KB"}, **SMALL)
    change(folder)
    assert assert_refused(folder, kind, cause).hint


# Converters are data; each must be complete.


BROKEN_CONVERTERS = {
    "an unknown key": ("name = ", 'colour = "red"\nname = ', "unknown keys: colour"),
    "a missing key": ("layers = ", "# layers = ", "lacks layers"),
    "the name of another file": ('name = "olmoe"', 'name = "other"', "differs from the file's"),
    "an unknown transform": ('transform = "stack_experts"', 'transform = "melt"', "unknown transform melt"),
    "an unknown metadata type": ('type = "f32"', 'type = "f8"', "unknown type f8"),
    "a misspelt source": ("{ name = ", "{ nmae = ", "lacks name"),
    "no source": ('[{ name = "model.norm.weight" }]', "[]", "no source"),
    "broken TOML": ("[metadata]", "[metadata", "cannot read"),
}


@pytest.mark.parametrize("case", BROKEN_CONVERTERS)
def test_broken_converter_is_refused(case: str, tmp_path: Path) -> None:
    old, new, cause = BROKEN_CONVERTERS[case]
    text = (data_folder("converters") / "olmoe.toml").read_text(encoding="utf-8")
    assert old in text
    (tmp_path / "olmoe.toml").write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(BadFile, match=cause) as refusal:
        load_converter(tmp_path / "olmoe.toml")
    assert "\n" not in refusal.value.cause


def test_memory_of_a_conversion_does_not_grow_with_the_checkpoint(small: Path, tmp_path: Path) -> None:
    # 16 layers of one 6 MB file each, with the configuration of the toy around them.
    folder = Path(shutil.copytree(small, tmp_path / "model"))
    layers = 16
    toys.change_json(folder / "config.json", num_hidden_layers=layers)
    weights = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    weight_map = {}
    for layer in range(-1, layers):
        prefix = f"model.layers.{layer}." if layer >= 0 else ""
        own = {n: w for n, w in weights.items() if ("layers" not in n) == (layer < 0)}
        own = {n.replace("model.layers.0.", prefix) if prefix else n: w.clone() for n, w in own.items()}
        own = {n: torch.ones(1024, 64) if "up_proj" in n or "gate_proj" in n else w for n, w in own.items()}
        own = {n: torch.ones(64, 1024) if "down_proj" in n else w for n, w in own.items()}
        save_file(own, folder / f"layer{layer}.safetensors")
        weight_map |= dict.fromkeys(own, f"layer{layer}.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert size > 90e6
    first, second = conversion_peaks("auto", Path(shutil.copytree(small, tmp_path / "small")), folder)
    assert second - first < 30e6


@pytest.mark.parametrize("stacked", [False, True], ids=["one by one", "stacked"])
def test_memory_of_a_conversion_does_not_grow_with_a_shard(stacked: bool, small: Path, tmp_path: Path) -> None:
    """300 MB in one file, of which no tensor of the GGUF takes more than 3 MB."""
    folder, layers, width, hidden = Path(shutil.copytree(small, tmp_path / "model")), 48, 64, 1024
    toys.change_json(folder / "config.json", num_hidden_layers=layers, moe_intermediate_size=hidden)
    stored = {name: tuple(weight.shape) for name, weight in load_file(folder / SINGLE).items()}
    shapes = {name: shape for name, shape in stored.items() if "layers" not in name}
    for layer in range(layers):
        block = f"model.layers.{layer}."
        own = {name: shape for name, shape in stored.items() if ".layers.0." in name and ".experts." not in name}
        shapes |= {name.replace("model.layers.0.", block): shape for name, shape in own.items()}
        if stacked:
            shapes[f"{block}mlp.experts.gate_up_proj"] = (8, 2 * hidden, width)
            shapes[f"{block}mlp.experts.down_proj"] = (8, width, hidden)
        for expert in range(0 if stacked else 8):
            part = f"{block}mlp.experts.{expert}."
            shapes |= {f"{part}{name}_proj.weight": (hidden, width) for name in ("gate", "up")}
            shapes[f"{part}down_proj.weight"] = (width, hidden)
    described, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * math.prod(shape)
        described[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    encoded = json.dumps(described).encode()
    with (folder / SINGLE).open("wb") as stream:
        stream.write(struct.pack("<Q", len(encoded)) + encoded)
        stream.truncate(8 + len(encoded) + end)  # weights of zero
    assert end > 300e6
    first, second = conversion_peaks("auto", Path(shutil.copytree(small, tmp_path / "small")), folder)
    assert second - first < 200e6


# What only llama.cpp holds against each other: shapes, and the numbers of the configuration.

ABSURD: dict[str, tuple[dict[str, Any], type[EdgepruneError], str]] = {
    "an epsilon that is not a number": ({"rms_norm_eps": float("nan")}, BadFile, "rms_norm_eps = nan is no"),
    "an infinite epsilon": ({"rms_norm_eps": float("inf")}, BadFile, "rms_norm_eps = inf is no"),
    "a negative epsilon": ({"rms_norm_eps": -1e-6}, BadFile, "rms_norm_eps = -1e-06 is no"),
    "a gigantic width": ({"hidden_size": 10**12}, BadFile, "hidden_size = 1000000000000 does not fit"),
    "half a layer's width": ({"moe_intermediate_size": 32.5}, BadFile, "moe_intermediate_size = 32.5 does not fit"),
    "a width that is an empty list": ({"hidden_size": []}, BadFile, r"hidden_size = \[\] is an empty list"),
    "a base that is not a number": (
        {"rope_parameters": {"rope_theta": float("nan"), "rope_type": "default"}},
        BadFile,
        "rope_theta = nan is no base",
    ),
    "a base that is a text": (
        {"rope_parameters": {"rope_theta": "1e4", "rope_type": "default"}},
        BadFile,
        "rope_theta = '1e4' is no base",
    ),
    "experts used of none": ({"num_experts_per_tok": 0}, BadFile, "8 experts, 0 used per token"),
    "more experts used than there are": ({"num_experts_per_tok": 9}, BadFile, "8 experts, 9 used per token"),
}


@pytest.mark.parametrize("case", ABSURD)
def test_absurd_number_is_named_with_its_key_and_file(case: str, small: Path, tmp_path: Path) -> None:
    changes, kind, cause = ABSURD[case]
    folder = Path(shutil.copytree(small, tmp_path / "model"))
    toys.change_json(folder / "config.json", **changes)
    with pytest.raises(kind, match=cause) as refusal:
        require_convertible(open_checkpoint(folder))
    assert str(folder / "config.json") in refusal.value.cause and "\n" not in refusal.value.cause


CONTRADICTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "another width": ({"hidden_size": 128}, r"embed_tokens\.weight has the shape \[\d+, \d+\].* llama\.cpp wants"),
    "another head": (
        {"head_dim": 96},
        r"q_proj\.weight has the shape .* does not fit config\.json: as blk",
    ),
    "more heads": ({"num_key_value_heads": 4}, r"k_proj\.weight has the shape"),
    "wider experts": ({"moe_intermediate_size": 512}, r"experts\.0\.gate_proj\.weight has the shape"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_weights_of_another_shape_than_the_configuration_says_are_named(
    case: str, small: Path, tmp_path: Path
) -> None:
    changes, cause = CONTRADICTIONS[case]
    folder = Path(shutil.copytree(small, tmp_path / "model"))
    assert require_convertible(open_checkpoint(folder)).shapes
    toys.change_json(folder / "config.json", **changes)
    with pytest.raises(BadFile, match=cause) as refusal:
        require_convertible(open_checkpoint(folder))
    assert "\n" not in refusal.value.cause


def test_one_tensor_of_another_shape_is_named_before_anything_is_written(small: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(small, tmp_path / "model"))
    name = "model.layers.0.self_attn.o_proj.weight"
    weights = load_file(folder / SINGLE)
    weights[name] = weights[name][:, :32].contiguous()
    save_file(weights, folder / SINGLE)
    done = run_edgeprune("convert", folder, "out.gguf", cwd=tmp_path)
    assert done.returncode == 1 and f"{name} has the shape [64, 32]" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out.gguf").exists()


def test_large_tensor_is_encoded_in_pieces() -> None:
    weights = torch.arange(5000 * 4096, dtype=torch.float32).reshape(5000, 4096).to(torch.bfloat16)
    pieces = list(_piece_bytes(weights, "BF16", "x"))
    assert len(pieces) > 2 and b"".join(pieces) == weights.view(torch.uint8).numpy().tobytes()
    assert max(map(len, pieces)) <= 1 << 24


def test_what_cannot_fit_is_told_before_a_checkpoint_is_converted(small: Path, tmp_path: Path) -> None:
    done = run_edgeprune("plan", small, "--file-size", "20kB", "-o", "run", cwd=tmp_path)
    assert done.returncode == 3 and "smallest plan" in done.stderr, done.stderr
    assert not list(tmp_path.rglob("*.gguf"))


@pytest.mark.parametrize("counted", [4, 16])
@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_moe, stacked", "granitemoe"])
def test_another_number_of_experts_than_the_weights_hold_is_told_with_both(
    family: str, counted: int, small: Path, tmp_path: Path
) -> None:
    if family == "granitemoe":
        folder = families.make_checkpoint(family, tmp_path / "model")
        toys.change_json(folder / "config.json", num_local_experts=counted)
    else:
        folder = Path(shutil.copytree(small, tmp_path / "model"))
        toys.change_json(folder / "config.json", num_experts=counted, num_local_experts=counted)
    if family == "qwen3_moe, stacked":
        weights = load_file(folder / SINGLE)
        for layer in range(len({name.split(".")[2] for name in weights if ".layers." in name})):
            block = f"model.layers.{layer}.mlp.experts"
            gates, ups, downs = (
                torch.stack([weights.pop(f"{block}.{expert}.{part}_proj.weight") for expert in range(8)])
                for part in ("gate", "up", "down")
            )
            weights |= {f"{block}.gate_up_proj": torch.cat([gates, ups], 1), f"{block}.down_proj": downs}
        save_file(weights, folder / SINGLE)
    error = assert_refused(folder, BadFile, f"config.json says {counted} experts, the weights hold 8")
    assert "blk." not in error.cause and "another model" in error.hint


@pytest.mark.parametrize("value", ["", None])
def test_configuration_without_a_type_is_told_what_it_lacks(value: Any, small: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(small, tmp_path / "model"))
    toys.change_json(folder / "config.json", model_type=value)
    error = assert_refused(folder, BadFile, "has no model_type")
    assert "config.json" in error.hint


@pytest.mark.parametrize("damage", ["a tensor", "tokenizer.json"])
def test_damaged_download_has_a_way_out(damage: str, small: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(small, tmp_path / "model"))
    if damage == "a tensor":
        weights = load_file(folder / SINGLE)
        weights["model.layers.0.mlp.gatte.weight"] = weights.pop("model.layers.0.mlp.gate.weight")
        save_file(weights, folder / SINGLE)
    else:
        (folder / damage).write_bytes(b"")
    done = run_edgeprune("convert", folder, tmp_path / "model.gguf")
    cause = "lacks tensor model.layers.0.mlp.gate.weight" if damage == "a tensor" else f"{damage}: it is empty"
    assert done.returncode == 1 and cause in done.stderr and "hint: the download is damaged" in done.stderr


def test_reading_a_checkpoint_for_its_fingerprint_is_a_stage_of_its_own(small: Path, tmp_path: Path) -> None:
    ear = Ear()
    convert_checked(small, tmp_path / "model.gguf", ear)
    assert ear.stages == ["fingerprint of the checkpoint", "convert"]
    assert GgufFile(tmp_path / "model.gguf").get(SOURCE_KEY) == open_checkpoint(small).origin()


def test_fewer_layers_than_the_weights_hold_are_told_with_both(toy_checkpoint: toys.Maker, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(toy_checkpoint("qwen3_moe"), tmp_path / "model"))
    toys.change_json(folder / "config.json", num_hidden_layers=1)
    assert_refused(folder, BadFile, "config.json says 1 layers, the weights hold 2")


# Values of generation_config.json, and what becomes of them.
SAMPLERS: dict[str, tuple[dict[str, Any], dict[str, float]]] = {
    "as Qwen3's": (
        {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.05},
        {"temp": 0.6, "top_k": 20, "top_p": 0.95, "penalty_repeat": 1.05},
    ),
    "without a word on whether anything is drawn": ({"temperature": 1, "min_p": 0.0}, {"temp": 1.0, "min_p": 0.0}),
    "greedy": ({"do_sample": False, "temperature": 0.6}, {}),
    "no numbers": ({"temperature": None, "top_k": True, "top_p": "0.9", "min_p": float("nan")}, {}),
    "numbers of nothing": ({"temperature": -1, "top_k": 2.5, "top_p": 1e300, "min_p": 10**400}, {}),
}


@pytest.mark.parametrize("case", SAMPLERS)
def test_sampler_of_the_authors_is_kept(case: str, toy_checkpoint: toys.Maker, tmp_path: Path) -> None:
    """Under the names that llama-server looks for."""
    told, expected = SAMPLERS[case]
    folder = Path(shutil.copytree(toy_checkpoint("qwen3_moe"), tmp_path / "model"))
    (folder / "generation_config.json").write_text(json.dumps(told))
    convert(folder, tmp_path / "out.gguf")
    file = GgufFile(tmp_path / "out.gguf")
    front = "general.sampling."
    found = {key.removeprefix(front): file.get(key) for key in file.entries if key.startswith(front)}
    assert found == pytest.approx(expected)
    planned = plan_conversion(open_checkpoint(folder))
    assert len(whole_header(planned, folder.name, folder)[0].top) == file.data_offset
