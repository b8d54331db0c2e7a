"""Checkpoints in FP8 and MXFP4, and Q8_0 as the base type: the same numbers as before, or nothing is written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import hub_files
import numpy as np
import observed
import pytest
import torch
import toys
from runs import conversion_peaks
from safetensors.torch import load_file, save_file
from test_inspection import verdicts

from edgeprune.errors import BadFile, EdgepruneError, Unsupported
from edgeprune.inspection import inspect_model
from edgeprune.measure.replay import LayerExperts, activation_of
from edgeprune.measure.reservoir import Reservoir
from edgeprune.model import ggml
from edgeprune.model.architecture import read_architecture
from edgeprune.model.checkpoint import SINGLE, open_checkpoint
from edgeprune.model.convert import convert
from edgeprune.model.gguf import GgufFile
from edgeprune.model.quantised import FP8, Scaled, decoded

pytest_plugins = ("hub_fixtures",)

Weights = dict[str, torch.Tensor]
# Neither rows nor columns are a multiple of the blocks of 128.
ODD = {
    "hidden_size": 160, "moe_intermediate_size": 96, "intermediate_size": 160, "head_dim": 48, "num_hidden_layers": 1,
}  # fmt: skip
EXPERT = "model.layers.0.mlp.experts.3.up_proj.weight"


def is_quantised(name: str) -> bool:
    return "_proj.weight" in name


def stored_values(file: GgufFile, name: str) -> np.ndarray[Any, Any]:
    """Weights of a tensor, float32 [..., rows, width]."""
    info = file.tensors[name]
    values = ggml.decode(ggml.BY_NAME[info.type], file.raw(name), info.shape[0])
    return values.reshape(tuple(reversed(info.shape)))


# FP8.


def by_block(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights in FP8 and their scales by blocks of 128 x 128, one block after the other."""
    rows, columns = weight.shape
    scales = torch.empty(-(-rows // 128), -(-columns // 128))
    packed = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
            scales[i, j] = weight[part].abs().max() / 448
            packed[part] = (weight[part] / scales[i, j]).to(torch.float8_e4m3fn)
    return packed, scales


def unpacked_blocks(packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    values = packed.float()
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            values[128 * i : 128 * i + 128, 128 * j : 128 * j + 128] *= scales[i, j]
    return values


def by_tensor(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = weight.abs().max() / 448
    return (weight / scale).to(torch.float8_e4m3fn), scale.reshape(1)


def by_row(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 448
    return (weight / scale).to(torch.float8_e4m3fn), scale


Quantiser = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
Undo = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
FORMS: dict[str, tuple[Quantiser, Undo, str, str]] = {
    "blocks, as DeepSeek-V3": (by_block, unpacked_blocks, "_scale_inv", "fp8"),
    "tensors": (by_tensor, lambda packed, scale: packed.float() * scale, "_scale", "compressed-tensors"),
    "rows": (by_row, lambda packed, scale: packed.float() * scale, "_scale", "fbgemm_fp8"),
}


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.qwen3_moe(tmp_path_factory.mktemp("odd") / "model", dtype="bfloat16", **ODD)


def with_weights(source: Path, folder: Path, weights: Weights, method: str = "") -> Path:
    """A copy of the checkpoint with other weights."""
    shutil.copytree(source, folder)
    save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / SINGLE)
    if method:
        toys.change_json(folder / "config.json", quantization_config={"quant_method": method})
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_fp8_weights_are_converted_as_what_they_stand_for(form: str, odd: Path, tmp_path: Path) -> None:
    pack, unpack, ending, method = FORMS[form]
    packed: Weights = {}
    plain: Weights = {}
    for name, weight in load_file(odd / SINGLE).items():
        if is_quantised(name):
            packed[name], packed[name + ending] = pack(weight.float())
            packed[name.replace(".weight", ".input_scale")] = torch.ones(1)
            plain[name] = unpack(packed[name], packed[name + ending])
        else:
            packed[name] = plain[name] = weight
    with_weights(odd, tmp_path / "packed", packed, method)
    with_weights(odd, tmp_path / "plain", plain)
    for base in ("f32", "bf16", "q8_0"):
        for name in ("packed", "plain"):
            convert(tmp_path / name, tmp_path / f"{name}.gguf", base)
        one, two = GgufFile(tmp_path / "packed.gguf"), GgufFile(tmp_path / "plain.gguf")
        assert list(one.tensors) == list(two.tensors)
        for tensor in one.tensors:
            assert np.array_equal(one.raw(tensor), two.raw(tensor)), (base, tensor)
    convert(tmp_path / "packed", tmp_path / "packed.gguf")  # holds every FP8 value exactly, but for the scale
    assert GgufFile(tmp_path / "packed.gguf").tensors["blk.0.ffn_up_exps.weight"].type == "BF16"


def test_fp8_experts_in_one_tensor_have_their_own_scales(tmp_path: Path) -> None:
    folder = toys.qwen3_moe(tmp_path / "model", save={"save_original_format": False}, **ODD)
    weights = load_file(folder / SINGLE)
    name = "model.layers.0.mlp.experts.down_proj"
    blocks = [by_block(expert) for expert in weights[name]]
    weights[name] = torch.stack([packed for packed, _ in blocks])
    expected = np.stack([unpacked_blocks(*block).numpy() for block in blocks])
    for scales in (torch.stack([scale for _, scale in blocks]), torch.arange(1.0, 9.0)):
        weights[name + "_scale_inv"] = scales
        save_file(weights, folder / SINGLE)
        convert(folder, tmp_path / "model.gguf", "f32")
        if scales.dim() == 1:
            expected = weights[name].float().numpy() * scales.numpy()[:, None, None]
        np.testing.assert_array_equal(
            stored_values(GgufFile(tmp_path / "model.gguf"), "blk.0.ffn_down_exps.weight"), expected
        )


# MXFP4.


def test_fp8_experts_of_a_llama_4_have_a_scale_for_each_output(tmp_path: Path) -> None:
    """As transformers stores them (``FbgemmFp8Llama4TextExperts``): outputs are columns, whichever way scales lie."""
    folder = families.make_checkpoint("llama4", tmp_path / "model", {"intermediate_size": 192})
    weights = load_file(folder / SINGLE)
    plain = dict(weights)
    for name in [name for name in weights if ".experts." in name]:
        scale = weights[name].abs().amax(1, keepdim=True) / 448
        weights[name] = (weights[name] / scale).to(torch.float8_e4m3fn)
        weights[name + "_scale"] = scale.transpose(1, 2).contiguous() if "down_proj" in name else scale
        plain[name] = weights[name].float() * scale
    with_weights(folder, tmp_path / "packed", weights, "fbgemm_fp8")
    with_weights(folder, tmp_path / "plain", plain)
    for name in ("packed", "plain"):
        convert(tmp_path / name, tmp_path / f"{name}.gguf", "f32")
    one, two = GgufFile(tmp_path / "packed.gguf"), GgufFile(tmp_path / "plain.gguf")
    assert list(one.tensors) == list(two.tensors)
    for tensor in one.tensors:
        assert np.array_equal(one.raw(tensor), two.raw(tensor)), tensor


def test_scales_that_are_exponents_in_integers_are_not_taken_for_numbers() -> None:
    weight = torch.ones(4, 4).to(torch.float8_e4m3fn)
    with pytest.raises(Unsupported, match="x_scale has scales of the type uint8"):
        decoded(Scaled(FP8, "x_scale"), weight, torch.full((1,), 127, dtype=torch.uint8), (128, 128))


@pytest.fixture(scope="module")
def mxfp4(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Weights]:
    """A gpt-oss checkpoint as OpenAI publishes it, random bits and scales, and the weights it stands for."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    folder = tmp_path_factory.mktemp("mxfp4")
    source = families.make_checkpoint("gpt_oss", folder / "source", dtype="bfloat16")
    generator = torch.Generator().manual_seed(5)
    packed: Weights = {}
    plain: Weights = {}
    for name, weight in load_file(source / SINGLE).items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            packed[name] = plain[name] = weight
            continue
        experts, width, rows = weight.shape
        blocks = torch.randint(0, 256, (experts, rows, width // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(120, 126, blocks.shape[:-1], generator=generator, dtype=torch.uint8)
        packed[f"{name}_blocks"], packed[f"{name}_scales"] = blocks, scales
        plain[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
        assert plain[name].shape == weight.shape
    with_weights(source, folder / "packed", packed, "mxfp4")
    return folder / "packed", plain


def experts_of(plain: Weights, part: str) -> np.ndarray[Any, Any]:
    """Layer 1's experts [E, rows, width] by transformers' own reading of the blocks."""
    if part == "down":
        return plain["model.layers.1.mlp.experts.down_proj"].transpose(1, 2).numpy()
    gate_up = plain["model.layers.1.mlp.experts.gate_up_proj"].transpose(1, 2)
    return gate_up[:, ("gate", "up").index(part) :: 2].numpy()


@pytest.mark.parametrize(("base", "kind"), [("auto", "MXFP4"), ("bf16", "BF16"), ("f16", "F16"), ("f32", "F32")])
def test_mxfp4_experts_are_the_same_numbers_in_every_type(
    base: str, kind: str, mxfp4: tuple[Path, Weights], tmp_path: Path
) -> None:
    folder, plain = mxfp4
    convert(folder, tmp_path / "model.gguf", base)
    file = GgufFile(tmp_path / "model.gguf")
    for part in ("gate", "up", "down"):
        name = f"blk.1.ffn_{part}_exps.weight"
        assert file.tensors[name].type == kind
        np.testing.assert_array_equal(stored_values(file, name), experts_of(plain, part))
    assert file.tensors["blk.1.attn_q.weight"].type == ("BF16" if base == "auto" else kind)
    assert file.tensors["blk.1.ffn_gate_exps.bias"].type == "F32"


def test_a_gguf_of_mxfp4_experts_is_as_small_as_the_checkpoint(mxfp4: tuple[Path, Weights], tmp_path: Path) -> None:
    folder, _ = mxfp4
    convert(folder, tmp_path / "model.gguf")
    experts = sum(t.nbytes for t in read_architecture(GgufFile(tmp_path / "model.gguf")).tensors if t.is_expert)
    stored = [w for n, w in load_file(folder / SINGLE).items() if n.endswith(("_blocks", "_scales"))]
    assert experts == sum(weight.numel() for weight in stored)


@pytest.mark.parametrize("base", ["auto", "bf16"])
def test_experts_in_one_tensor_are_never_in_memory_together(
    base: str, mxfp4: tuple[Path, Weights], tmp_path: Path
) -> None:
    experts, width = 32, 2048
    sizes = {"gate_up_proj": (2 * width, 8), "down_proj": (256, width // 32)}
    weights: Weights = {}
    for name, weight in load_file(mxfp4[0] / SINGLE).items():
        own = next((size for part, size in sizes.items() if part in name and "_bias" not in name), None)
        if "layers.1." in name:
            continue
        if "gate_up_proj_bias" in name:
            weights[name] = torch.zeros(experts, 2 * width)
        elif "mlp" in name and own is None:
            weights[name] = torch.zeros(experts, *weight.shape[1:])
        elif own is not None:
            last = (16,) if name.endswith("_blocks") else ()
            weights[name] = torch.full((experts, *own, *last), 120, dtype=torch.uint8)
        else:
            weights[name] = weight
    folder = with_weights(mxfp4[0], tmp_path / "large", weights)
    changes = {"num_local_experts": experts, "intermediate_size": width, "num_hidden_layers": 1}
    toys.change_json(folder / "config.json", layer_types=["sliding_attention"], **changes)
    small = Path(shutil.copytree(mxfp4[0], tmp_path / "small"))
    first, second = conversion_peaks(base, small, folder)
    assert (folder / SINGLE).stat().st_size > 26e6
    assert second - first < 90e6  # the mapped file counts; the experts as floats take 300 MB


@pytest.mark.parametrize("name", ["MXFP4", "Q8_0"])
def test_experts_of_a_quantised_source_are_recognised_by_their_outputs(
    name: str, mxfp4: tuple[Path, Weights], odd: Path, tmp_path: Path
) -> None:
    """llama.cpp rounds the inputs of quantised products, so that its outputs are not those of exact arithmetic."""
    source, base = {"MXFP4": (mxfp4[0], "auto"), "Q8_0": (odd, "q8_0")}[name]
    convert(source, tmp_path / "model.gguf", base)
    file = GgufFile(tmp_path / "model.gguf")
    architecture = read_architecture(file)
    windows = observed.token_windows(architecture.vocabulary, 1)
    tokens = observed.collected(file.path, windows, tmp_path).reservoirs()[0]
    experts = LayerExperts(file, architecture, 0)
    assert file.tensors["blk.0.ffn_up_exps.weight"].type == name
    assert activation_of(experts, tokens) == experts.activations()["swiglu_oai" if name == "MXFP4" else "silu"]
    wrong = Reservoir(**{**tokens.unpacked(), "y": tokens.y * np.float32(1.05)})
    assert activation_of(experts, wrong) is None


# Q8_0.


def test_matrices_in_q8_0_are_close_and_the_rest_is_as_it_was(odd: Path, tmp_path: Path) -> None:
    convert(odd, tmp_path / "q8.gguf", "q8_0")
    convert(odd, tmp_path / "f32.gguf", "f32")
    small, exact = GgufFile(tmp_path / "q8.gguf"), GgufFile(tmp_path / "f32.gguf")
    for tensor in read_architecture(small).tensors:
        assert tensor.type == ("Q8_0" if tensor.quantisable else "F32"), tensor.name
        expected, found = stored_values(exact, tensor.name), stored_values(small, tensor.name)
        error = np.square(found - expected).mean() / np.square(expected).mean()
        assert (0 < error < 1e-4) if tensor.quantisable else (error == 0), tensor.name


def test_rows_that_q8_0_does_not_divide_stay_floats(tmp_path: Path) -> None:
    folder = toys.qwen3_moe(tmp_path / "model", **{**ODD, "moe_intermediate_size": 80})
    convert(folder, tmp_path / "model.gguf", "q8_0")
    types = {name: info.type for name, info in GgufFile(tmp_path / "model.gguf").tensors.items()}
    assert types["blk.0.ffn_down_exps.weight"] == "BF16" and types["blk.0.ffn_up_exps.weight"] == "Q8_0"


# What cannot be read is refused.


def changed(name: str, make: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Weights], None]:
    def change(weights: Weights) -> None:
        made = make(weights.pop(name))
        if made is not None:
            weights[name] = made.contiguous()

    return change


SCALES = "model.layers.0.mlp.experts.down_proj_scales"
DAMAGES: dict[str, tuple[Callable[[Weights], None], type[EdgepruneError], str, str]] = {
    "scales missing": (changed(SCALES, lambda s: None), Unsupported, "down_proj_blocks as U8; F32", "auto"),
    "scales of another shape": (changed(SCALES, lambda s: s[:, :-1]), Unsupported, "down_proj_blocks as U8", "auto"),
    "a scale that is NaN": (changed(SCALES, lambda s: s.fill_(255)), BadFile, "scales that are NaN", "auto"),
    "a scale that is NaN, in floats": (changed(SCALES, lambda s: s.fill_(255)), BadFile, "NaN or infinite", "bf16"),
    "scales too large for F16": (changed(SCALES, lambda s: s.fill_(160)), Unsupported, "does not fit F16", "f16"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_mxfp4_is_refused(case: str, mxfp4: tuple[Path, Weights], tmp_path: Path) -> None:
    change, kind, cause, base = DAMAGES[case]
    weights = load_file(mxfp4[0] / SINGLE)
    change(weights)
    folder = with_weights(mxfp4[0], tmp_path / "model", weights)
    with pytest.raises(kind, match=cause) as refusal:
        convert(folder, tmp_path / "model.gguf", base)
    assert "\n" not in refusal.value.cause and not (tmp_path / "model.gguf").exists()


def test_fp8_scales_that_do_not_fit_are_refused(odd: Path, tmp_path: Path) -> None:
    weights = load_file(odd / SINGLE)
    weights[EXPERT], scales = by_block(weights[EXPERT].float())
    weights[EXPERT + "_scale_inv"] = scales.repeat(3, 1)
    folder = with_weights(odd, tmp_path / "model", weights)
    with pytest.raises(BadFile, match=r"scales of the shape \[3, 2\] do not fit weights of the shape \[96, 160\]"):
        convert(folder, tmp_path / "model.gguf")


def test_scales_are_parts_of_their_tensors(mxfp4: tuple[Path, Weights]) -> None:
    stored = open_checkpoint(mxfp4[0]).stored
    assert not any(name.endswith("_scales") for name in stored)
    blocks = stored["model.layers.0.mlp.experts.gate_up_proj_blocks"]
    assert (blocks.type, blocks.shape) == ("MXFP4", (8, 512, 256))


def test_mxfp4_on_the_hub_gets_the_answers_of_a_local_one(mxfp4: tuple[Path, Weights], hub: hub_files.Hub) -> None:
    hub.add_folder("org/oss", mxfp4[0])
    here, there = inspect_model(str(mxfp4[0])), inspect_model("org/oss")
    assert (there.roles, verdicts(there)) == (here.roles, verdicts(here))
