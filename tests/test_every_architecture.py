"""Every architecture with experts: a file without half of them computes what a mask on the router does."""

from __future__ import annotations

from pathlib import Path

import architectures
import numpy as np
import pytest
import toys
from observed import collected
from runs import run_edgeprune
from test_observers import logits, sliced, token_windows

from edgeprune.decide.plan import Plan
from edgeprune.errors import Unsupported
from edgeprune.measure.observers import RouterMask
from edgeprune.measure.weights import load_weights, weigh
from edgeprune.model.architecture import read_architecture
from edgeprune.model.gguf import Entry, GgufFile, TensorShape, make_entry

OBSTACLES = {"grovemoe": "chunk experts", "deepseek4": "token table"}
# (tokens, vocabulary): rounding of a sum in another order; most are equal to the last bit.
TOLERANCE = 1e-4


def halves(path: Path, groups: int = 1) -> dict[int, list[int]]:
    """Half of the experts of every layer, chosen at random, equally many of each group."""
    architecture = read_architecture(GgufFile(path))
    random = np.random.default_rng(1)
    size = architecture.experts // groups
    return {
        layer: sorted(
            int(group * size + expert) for group in range(groups) for expert in random.permutation(size)[: size // 2]
        )
        for layer in architecture.moe_layers
    }


def require_same(path: Path, keep: dict[int, list[int]], folder: Path) -> None:
    """Without the experts that are not in ``keep``, the file computes what it computes when they are masked."""
    architecture = read_architecture(GgufFile(path))
    assert architecture.obstacle == "" and architecture.count_allowed(architecture.experts // 2)
    windows = token_windows(architectures.VOCABULARY, 1)
    whole = logits(path, windows)[0]
    masked = logits(path, windows, RouterMask(keep, architecture.experts))[0]
    dropped = logits(sliced(path, keep, folder / "half.gguf"), windows)[0]
    assert np.isfinite(whole).all() and np.abs(whole - dropped).max() > 0.01  # dropping these experts is felt
    np.testing.assert_allclose(masked, dropped, atol=TOLERANCE)


@pytest.mark.parametrize("arch", [arch for arch in architectures.KNOWN if arch not in OBSTACLES])
def test_half_of_the_experts_equals_a_mask(arch: str, tmp_path: Path) -> None:
    path = architectures.toy(tmp_path / "toy.gguf", arch)
    require_same(path, halves(path), tmp_path)


@pytest.mark.parametrize("arch", [arch for arch in architectures.KNOWN if arch != "deepseek4"])
def test_routing_and_every_experts_input_is_observed(arch: str, tmp_path: Path) -> None:
    path = architectures.toy(tmp_path / "toy.gguf", arch)
    architecture = read_architecture(GgufFile(path))
    tokens = token_windows(architectures.VOCABULARY, 1)
    collector = collected(path, tokens, tmp_path)
    layers = collector.layers()
    assert tuple(sorted(layers)) == architecture.moe_layers
    for sums in layers.values():
        assert sums["routed"].sum() == len(tokens[0]) * architecture.used
    assert {tensor.name for tensor in architecture.tensors if tensor.is_expert} <= collector.moments.keys()


@pytest.mark.parametrize("arch", architectures.FUSED)
def test_half_of_the_experts_with_gate_and_up_in_one_tensor_equals_a_mask(arch: str, tmp_path: Path) -> None:
    shapes = architectures.fused(architectures.tensors(arch))
    assert any("gate_up_exps" in name for name in shapes)
    path = architectures.toy(tmp_path / "toy.gguf", arch, shapes)
    require_same(path, halves(path), tmp_path)


@pytest.mark.parametrize("arch", architectures.SCALED)
def test_half_of_the_experts_with_scales_equals_a_mask(arch: str, tmp_path: Path) -> None:
    path = architectures.toy(tmp_path / "toy.gguf", arch, architectures.scaled(architectures.tensors(arch)))
    file = GgufFile(path)
    assert any(tensor.role == "expert_vector" for tensor in read_architecture(file).tensors)
    require_same(path, halves(path), tmp_path)


@pytest.mark.parametrize("arch", ["bailingmoe2", "deepseek2", "dots1", "exaone-moe", "glm4moe", "kimi-linear"])
def test_half_of_every_group_equals_a_mask(arch: str, tmp_path: Path) -> None:
    metadata = {"expert_group_count": ("u32", 2), "expert_group_used_count": ("u32", 1)}
    path = architectures.toy(tmp_path / "toy.gguf", arch, **metadata)
    require_same(path, halves(path, groups=2), tmp_path)


@pytest.mark.parametrize("arch", ["cohere2moe", "deepseek2", "glm4moe", "hy_v3", "mimo2"])
def test_blocks_of_multi_token_prediction_that_are_not_in_the_file_are_no_obstacle(arch: str, tmp_path: Path) -> None:
    metadata = {"nextn_predict_layers": ("u32", 1), "block_count": ("u32", architectures.LAYERS + 1)}
    path = architectures.toy(tmp_path / "toy.gguf", arch, architectures.tensors(arch), **metadata)
    require_same(path, halves(path), tmp_path)


def with_further_block(path: Path, arch: str) -> Path:
    """A toy with one block behind the others that predicts further tokens, and numbers of heads by block."""
    shapes = architectures.tensors(arch)
    last, own = f"blk.{architectures.LAYERS - 1}.", f"blk.{architectures.LAYERS}."
    shapes |= {name.replace(last, own): shape for name, shape in list(shapes.items()) if name.startswith(last)}
    width = architectures.WIDTH
    shapes |= {f"{own}nextn.eh_proj.weight": (2 * width, width)}
    shapes |= {f"{own}nextn.{part}.weight": (width,) for part in ("enorm", "hnorm", "shared_head_norm")}
    blocks = architectures.LAYERS + 1
    known = {**architectures.COMMON, **architectures.KNOWN[arch]["metadata"]}
    heads = known["attention.head_count_kv"][1]
    return architectures.toy(
        path,
        arch,
        shapes,
        nextn_predict_layers=("u32", 1),
        block_count=("u32", blocks),
        attention__head_count_kv=("[u32]", [heads] * blocks),
    )


FURTHER = ["deepseek2", "glm4moe", "hy_v3", "cohere2moe"]


@pytest.mark.parametrize("arch", FURTHER)
def test_half_of_the_experts_without_further_blocks_equals_a_mask(arch: str, tmp_path: Path) -> None:
    path = with_further_block(tmp_path / "toy.gguf", arch)
    keep = halves(path)
    assert max(keep) == architectures.LAYERS - 1
    require_same(path, keep, tmp_path)
    file = GgufFile(tmp_path / "half.gguf")
    assert not any(name.startswith(f"blk.{architectures.LAYERS}.") for name in file.tensors)
    assert (file.get(f"{arch}.block_count"), file.get(f"{arch}.nextn_predict_layers")) == (architectures.LAYERS, 0)
    assert len(file.get(f"{arch}.attention.head_count_kv")) == architectures.LAYERS


@pytest.mark.parametrize("arch", FURTHER)
def test_further_blocks_can_be_kept_with_as_many_experts(arch: str, tmp_path: Path) -> None:
    path = with_further_block(tmp_path / "toy.gguf", arch)
    keep = {**halves(path), architectures.LAYERS: [0, 2, 5, 7]}
    half = sliced(path, keep, tmp_path / "half.gguf", mtp=True)
    windows = token_windows(architectures.VOCABULARY, 1)
    alone = sliced(path, halves(path), tmp_path / "alone.gguf")
    np.testing.assert_array_equal(logits(half, windows)[0], logits(alone, windows)[0])
    name = f"blk.{architectures.LAYERS}.ffn_down_exps.weight"
    before, after = GgufFile(path), GgufFile(half)
    assert after.tensors[name].shape[-1] == 4
    rows = before.raw(name).reshape(architectures.EXPERTS, -1)[keep[architectures.LAYERS]]
    np.testing.assert_array_equal(after.raw(name).reshape(4, -1), rows)
    assert after.get(f"{arch}.nextn_predict_layers") == 1


@pytest.mark.parametrize("arch", OBSTACLES)
def test_what_cannot_be_pruned_safely_says_why(arch: str, tmp_path: Path) -> None:
    found = read_architecture(GgufFile(architectures.toy(tmp_path / "toy.gguf", arch)))
    assert OBSTACLES[arch] in found.obstacle
    assert found.allowed_counts() == (8,) and not found.count_allowed(4)


@pytest.mark.parametrize(
    ("arch", "reason"), [("nomic-bert-moe", "an encoder"), ("dflash", "drafts for another model")]
)
def test_what_is_no_language_model_is_refused(arch: str, reason: str, tmp_path: Path) -> None:
    renamed = rename(architectures.toy(tmp_path / "toy.gguf", "qwen3moe"), arch)
    with pytest.raises(Unsupported, match=reason):
        read_architecture(GgufFile(renamed))


def rename(path: Path, arch: str) -> Path:
    """The model ``path`` under the name of another architecture."""
    file = GgufFile(path)
    entries = [make_entry("general.architecture", "str", arch)]
    entries += [
        Entry(key.replace("qwen3moe.", f"{arch}."), entry.kind, entry.element, entry.count, entry.raw)
        for key, entry in file.entries.items()
        if key != "general.architecture"
    ]
    pairs = [(TensorShape(t.name, t.shape, t.type), file.raw(t.name)) for t in file.tensors.values()]
    return toys.write_gguf(path.with_name("renamed.gguf"), entries, pairs)


def test_weights_count_with_the_scales_of_their_experts(tmp_path: Path) -> None:
    shapes = architectures.scaled(architectures.tensors("qwen3moe"))
    path = architectures.toy(tmp_path / "toy.gguf", "qwen3moe", shapes)
    file = GgufFile(path)
    weigh(str(path), str(tmp_path / "weights"), "x")
    found = load_weights(tmp_path / "weights", "x")[0]
    total = np.zeros(architectures.EXPERTS)
    for part in ("gate", "up", "down"):
        name = f"blk.0.ffn_{part}_exps"
        matrices = file.raw(f"{name}.weight").view(np.float32).reshape(architectures.EXPERTS, -1).astype(np.float64)
        scales = file.raw(f"{name}.scale").view(np.float32)
        assert len(set(scales.tolist())) > 1
        total += np.square(matrices).sum(axis=1) * np.square(scales, dtype=np.float64)
    np.testing.assert_allclose(found.square, total, rtol=1e-5)


@pytest.mark.parametrize("mtp", ["drop", "keep"])
def test_commands_plan_with_and_without_further_blocks(mtp: str, tmp_path: Path) -> None:
    path = with_further_block(tmp_path / "toy.gguf", "glm4moe")
    words = [f"{word:x}" for word in np.random.default_rng(0).integers(0, 1 << 24, 1500)]
    (tmp_path / "text.txt").write_text(" ".join(words))
    options = (
        "--memory",
        "1GiB",
        "--context",
        "64",
        "--keep",
        "4",
        "--no-heal",
        "--method",
        "reap",
        "--tokens",
        "512",
    )
    done = run_edgeprune("plan", path, *options, "--text", "text.txt", "-o", "run", "--mtp", mtp, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    plan = Plan.load(tmp_path / "run" / "plan.json")
    layers = range(architectures.LAYERS + (mtp == "keep"))
    assert (plan.mtp, set(plan.keep)) == (mtp == "keep", set(layers))
    assert ("left out: blocks that predict further tokens" in done.stderr) == (mtp == "drop")
    if mtp == "keep":  # by AIMER, from the weights
        weigh(str(path), str(tmp_path / "weights"), "x", mtp=True)
        own = load_weights(tmp_path / "weights", "x")[architectures.LAYERS]
        flatness = (own.absolute / own.count) / np.sqrt(own.square / own.count)
        assert plan.keep[architectures.LAYERS] == tuple(sorted(np.argsort(flatness, kind="stable")[:4].tolist()))
