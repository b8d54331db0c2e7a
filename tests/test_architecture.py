"""The model as numbers: roles, slicing, and headers that contradict themselves."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toys

from edgeprune.errors import BadFile, Unsupported
from edgeprune.measure import child
from edgeprune.measure.launch import Launch
from edgeprune.model.architecture import MOST_EXPERTS, MOST_LAYERS, Architecture, _described, read_architecture
from edgeprune.model.gguf import GgufFile, TensorInfo, TensorShape, make_entry

TINY = {"width": 64, "expert_width": 32, "vocabulary": 260}


def described(path: Path) -> Architecture:
    return read_architecture(GgufFile(path))


MOE = {
    "expert_gate": 2, "expert_up": 2, "expert_down": 2, "router": 2, "attention": 8, "embedding": 1, "output": 1,
}  # fmt: skip
ROLES = {
    "qwen3moe": {**MOE, "norm": 9},
    "qwen2moe": {**MOE, "norm": 5, "shared": 8},
    "gpt-oss": {**MOE, "norm": 5, "router": 4, "expert_vector": 6, "attention": 12},
    "deepseek2": {
        "expert_gate": 1, "expert_up": 1, "expert_down": 1, "router": 2, "shared": 3, "dense": 3, "attention": 12,
        "norm": 9, "embedding": 1, "output": 1,
    },
}  # fmt: skip


@pytest.mark.parametrize("arch", ROLES)
def test_every_tensor_has_its_role(arch: str, synthetic: toys.Maker) -> None:
    found = described(synthetic(arch))
    assert Counter(tensor.role for tensor in found.tensors) == ROLES[arch]


@pytest.mark.parametrize("arch", ROLES)
def test_exactly_the_tensors_that_count_experts_are_sliced(arch: str, synthetic: toys.Maker) -> None:
    found = described(synthetic(arch))
    roles = {"expert_gate", "expert_up", "expert_gate_up", "expert_down", "expert_vector", "router"}
    for tensor in found.tensors:
        assert tensor.sliced == (tensor.role in roles)
        if tensor.sliced:
            assert tensor.shape[-1] == found.experts
            assert tensor.kept_shape(3) == (*tensor.shape[:-1], 3)
        else:
            assert tensor.kept_shape(3) == tensor.shape


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *((f"blk.3.{part}.weight", True) for part in ("attn_q", "attn_kv", "attn_output_a", "shortconv.in_proj")),
        *((f"blk.0.{part}.weight", True) for part in ("ffn_latent_up", "ffn_routed_down", "ffn_gate_up_exps")),
        *((f"blk.0.{part}.weight", False) for part in ("shortconv.conv", "ssm_conv1d", "ffn_gate_inp", "attn_norm")),
        ("token_embd.weight", True),
        ("blk.0.ffn_gate_tid2eid.weight", False),
    ],
)
def test_matrices_that_llama_quantize_would_change_may_be_changed(name: str, expected: bool) -> None:
    assert _described(TensorInfo(name, (256, 8), "F32", 0, 8192)).quantisable == expected


@pytest.mark.parametrize("arch", ROLES)
def test_norms_routers_and_vectors_keep_their_type(arch: str, synthetic: toys.Maker) -> None:
    for tensor in described(synthetic(arch)).tensors:
        matrix = tensor.role not in ("norm", "router", "expert_vector") and len(tensor.shape) > 1
        assert tensor.quantisable == matrix, tensor.name


RUNNING: dict[str, dict[str, Any]] = {
    "shared expert": {"arch": "qwen2moe"},
    "latent attention, grouped sigmoid routing, biased": {"arch": "deepseek2", "groups": 2, "groups_used": 1},
    "biased experts and attention sinks": {"arch": "gpt-oss"},
}


@pytest.mark.parametrize("case", RUNNING)
def test_llama_cpp_runs_the_models_that_these_tests_are_made_of(case: str, tmp_path: Path) -> None:
    path = toys.synthetic_gguf(tmp_path / "a.gguf", **RUNNING[case])
    arguments = {"model": str(path), "launch": Launch(threads=1).to_json(), "repeats": 1}
    arguments |= {"prompt_tokens": 8, "generated_tokens": 1}
    assert child.call("edgeprune.measure.benchmark:benchmark", arguments)["finite"]
    assert described(path).obstacle == ""


def test_numbers_of_a_converted_checkpoint(toy_gguf: toys.Maker) -> None:
    for family, arch in (("qwen3_moe", "qwen3moe"), ("mixtral", "llama"), ("olmoe", "olmoe")):
        found = described(toy_gguf(family))
        assert (found.arch, found.name) == (arch, family)
        assert (found.layers, found.experts, found.used) == (toys.LAYERS, toys.EXPERTS, toys.USED)
        assert (found.width, found.expert_width, found.moe_layers) == (toys.WIDTH, toys.EXPERT_WIDTH, (0, 1))
        assert (found.vocabulary, found.context_length, found.obstacle) == (toys.VOCABULARY, 2048, "")
        assert found.nbytes == 4 * found.parameters
        assert found.tensor("blk.1.ffn_down_exps.weight").matrices == toys.EXPERTS


def test_dense_layers_have_no_experts(synthetic: toys.Maker) -> None:
    found = described(synthetic("deepseek2"))
    assert found.moe_layers == (1,)
    assert found.layers == 2


def test_dense_model_is_refused_with_a_way_out(synthetic: toys.Maker) -> None:
    with pytest.raises(Unsupported, match="dense llama model") as refusal:
        described(synthetic("llama"))
    assert "llama-quantize" in refusal.value.hint


def test_file_that_is_no_language_model_is_refused(tmp_path: Path) -> None:
    for index, value in enumerate((None, ("u32", 5), ("str", ""), ("str", "a\nb"), ("str", "x" * 80))):
        entries = [] if value is None else [make_entry("general.architecture", *value)]
        with pytest.raises(BadFile, match="names no architecture") as refusal:
            described(toys.write_gguf(tmp_path / f"{index}.gguf", entries, []))
        assert "\n" not in refusal.value.cause


def test_name_of_the_model_cannot_control_the_terminal(tmp_path: Path) -> None:
    path = toys.synthetic_gguf(tmp_path / "a.gguf", extra=[("general.name", "str", "  evil\x1b[31m\nname ")], **TINY)
    assert described(path).name == "evil[31mname"


def test_nameless_model_is_called_like_its_file(tmp_path: Path) -> None:
    path = toys.synthetic_gguf(tmp_path / "some-model.gguf", extra=[("general.name", "str", "\n")], **TINY)
    assert described(path).name == "some-model"


# llama.cpp ends its process on most of these (src/llama-model.cpp), so they must not reach it.
IMPOSSIBLE: dict[str, tuple[str, tuple[str, str, Any]]] = {
    "no layers": ("impossible metadata: 0 layers", ("block_count", "u32", 0)),
    "too many layers": (f"impossible metadata: {MOST_LAYERS + 1} layers", ("block_count", "u32", MOST_LAYERS + 1)),
    "too many experts": (f"{MOST_EXPERTS + 1} experts", ("expert_count", "u32", MOST_EXPERTS + 1)),
    "no expert used": ("0 used per token", ("expert_used_count", "u32", 0)),
    "more used than there are": ("9 used per token", ("expert_used_count", "u32", 9)),
    "a negative count": ("impossible metadata", ("expert_used_count", "i32", -1)),
    "a count that is a text": ("expert_count is not a number", ("expert_count", "str", "eight")),
    "a count that is infinite": ("expert_used_count is not a number", ("expert_used_count", "f32", float("inf"))),
    "a count that is not a number": ("block_count is not a number", ("block_count", "f32", float("nan"))),
    "an empty list of counts": ("expert_used_count is not a number", ("expert_used_count", "[u32]", [])),
    "other than the tensors": ("has 8 experts, the metadata 16", ("expert_count", "u32", 16)),
    "3 groups of 8 experts": ("impossible routing groups", ("expert_group_count", "u32", 3)),
    "as many groups as experts": ("impossible routing groups", ("expert_group_count", "u32", 8)),
    "groups of which none is used": ("impossible routing groups: 0 of 2", ("expert_group_count", "u32", 2)),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_impossible_metadata_are_refused(case: str, tmp_path: Path) -> None:
    cause, change = IMPOSSIBLE[case]
    with pytest.raises(BadFile, match=cause):
        described(toys.synthetic_gguf(tmp_path / "a.gguf", extra=[change], **TINY))


WRONG_SHAPES = {
    "token_embd.weight": (64,),
    "blk.0.ffn_up_exps.weight": (64, 8),
    "blk.0.ffn_down_exps.weight": (32, 8, 1, 8),
}


@pytest.mark.parametrize("name", WRONG_SHAPES)
def test_tensor_of_an_impossible_shape_is_refused(name: str, tmp_path: Path) -> None:
    whole = GgufFile(toys.synthetic_gguf(tmp_path / "whole.gguf", **TINY))
    shapes = [
        TensorShape(n, WRONG_SHAPES.get(n, i.shape) if n == name else i.shape, "F32")
        for n, i in whole.tensors.items()
    ]
    pairs = [(shape, np.zeros(tuple(reversed(shape.shape)), np.float32)) for shape in shapes]
    broken = toys.write_gguf(tmp_path / "broken.gguf", whole.entries.values(), pairs)
    with pytest.raises(BadFile, match="impossible shape"):
        described(broken)


COUNTS = [
    ("8 experts go down by 2", {}, (8, 6, 4, 2)),
    ("never below those used", {"used": 4}, (8, 6, 4)),
    ("32 experts go down by 8", {"experts": 32}, (32, 24, 16, 8, 4, 2)),
    ("48 experts go down by 16", {"experts": 48, "used": 8}, (48, 32, 16, 8)),
    ("128 experts go down by 32", {"experts": 128, "used": 8}, (128, 96, 64, 32, 16, 8)),
    ("2 groups keep 2 each", {"groups": 2, "groups_used": 1}, (8, 6, 4)),
    ("4 groups of 2 cannot shrink", {"groups": 4, "groups_used": 2}, (8,)),
    ("4 groups shrink together", {"experts": 32, "groups": 4, "groups_used": 2}, (32, 24, 16, 8)),
    ("groups used hold those used", {"experts": 32, "used": 8, "groups": 4, "groups_used": 1}, (32,)),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "expected"), [case[1:] for case in COUNTS], ids=[case[0] for case in COUNTS])
def test_allowed_counts_keep_the_rules_of_the_router(
    changes: dict[str, int], expected: tuple[int, ...], tmp_path: Path
) -> None:
    found = described(toys.synthetic_gguf(tmp_path / "a.gguf", **{**TINY, "expert_width": 8, **changes}))
    assert found.allowed_counts() == expected
    assert all(found.count_allowed(count) for count in expected)
    assert not any(found.count_allowed(count) for count in (0, found.used - 1, found.experts + 1))


OBSTACLES = {
    "experts used vary by layer": (("expert_used_count", "[u32]", [2, 2]), "vary by layer"),
}


@pytest.mark.parametrize("case", OBSTACLES)
def test_obstacle_leaves_all_experts_as_the_only_choice(case: str, tmp_path: Path) -> None:
    change, reason = OBSTACLES[case]
    found = described(toys.synthetic_gguf(tmp_path / "a.gguf", extra=[change], **TINY))
    assert reason in found.obstacle
    assert found.allowed_counts() == (8,)
    assert found.count_allowed(8) and not found.count_allowed(4)


def test_blocks_that_predict_further_tokens_are_left_out_unless_they_are_wanted(tmp_path: Path) -> None:
    path = toys.synthetic_gguf(tmp_path / "a.gguf", extra=[("nextn_predict_layers", "u32", 1)], **TINY)
    found, whole = described(path), read_architecture(GgufFile(path), mtp=True)
    assert (found.layers, found.moe_layers, found.sliced_layers, found.obstacle) == (1, (0,), (0,), "")
    assert {tensor.layer for tensor in found.left_out} == {1} and len(found.allowed_counts()) > 1
    assert (whole.layers, whole.moe_layers, whole.further_moe_layers) == (1, (0,), (1,)) and not whole.left_out
    assert {*found.tensors, *found.left_out} == set(whole.tensors)


@pytest.mark.parametrize("further", [0, 1])
def test_more_blocks_than_are_counted_are_refused_and_not_taken_for_further_ones(
    further: int, tmp_path: Path
) -> None:
    counts = [("block_count", "u32", 2), ("nextn_predict_layers", "u32", further)]
    path = toys.synthetic_gguf(tmp_path / "a.gguf", layers=3, extra=counts, **TINY)
    for mtp in (False, True):
        with pytest.raises(BadFile, match="the metadata count 2 blocks, the tensors are of 3") as refusal:
            read_architecture(GgufFile(path), mtp=mtp)
        assert "another model" in refusal.value.hint
