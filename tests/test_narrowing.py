"""Narrower experts: masking channels equals cutting them out of the file, to the byte as planned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import toys

from edgeprune.build import builder
from edgeprune.decide.narrowing import MOST_RANKING_SECONDS, asked_width, ranking_seconds, widths_to_try
from edgeprune.decide.plan import Plan, Prediction
from edgeprune.errors import BadFile, EdgepruneError, UsageError
from edgeprune.measure.channels import Channels
from edgeprune.measure.divergence import Reference, summarise
from edgeprune.measure.launch import Launch
from edgeprune.measure.llama import EvalCallback, session
from edgeprune.measure.observers import ChannelMask, Masks, RouterMask
from edgeprune.model import ggml, unbiased
from edgeprune.model.architecture import Architecture, read_architecture
from edgeprune.model.convert import convert
from edgeprune.model.gguf import GgufFile, make_entry
from edgeprune.model.headers import Header
from edgeprune.model.layout import layout
from edgeprune.model.widths import WidthRule, width_rule

Toy = Callable[[str], Path]
TOKENS = 48
LAUNCH = Launch(context=64, batch=64, threads=1, kv_type="F32")
SYNTHETIC = ["qwen3moe", "qwen2moe", "deepseek2", "gpt-oss"]
CONVERTED = ["qwen3_moe", "mixtral", "olmoe"]
# Shared experts as wide as two, gate and up in one tensor with GELU, general width with a shared expert of its own
# width, no gate and another width inside, clamps.
FAMILIES = ["glm4_moe", "gemma4", "hunyuan_v1_moe", "nemotron_h", "granitemoehybrid", "qwen3_next"]


def random_channels(architecture: Architecture, path: Path, seed: int = 0) -> Channels:
    """Every expert's channels in an order of its own."""
    random = np.random.default_rng(seed)
    shape = (architecture.experts, architecture.expert_width)
    orders = {
        layer: random.permuted(np.tile(np.arange(shape[1], dtype=np.int16), (shape[0], 1)), axis=1)
        for layer in architecture.moe_layers
    }
    Channels(orders, {}).save(path)
    return Channels.load(path)


def narrow_plan(architecture: Architecture, width: int, digest: str = "", **changes: Any) -> Plan:
    values: dict[str, Any] = {
        "arch": architecture.arch,
        "experts": architecture.experts,
        "kept": architecture.experts,
        "keep": {},
        "types": {},
        "launch": Launch(),
        "method": "test",
        "origin": "user",
        "predicted": Prediction(),
        "made_from": {"source": "toy"},
        "width": width,
        "narrowing": "camera",
        "channels": digest,
    }
    return Plan(**{**values, **changes})


def logits(model: Path, tokens: list[int], observer: EvalCallback | None = None) -> Any:
    with session(model, LAUNCH, observer) as opened:
        return opened.run(tokens).copy()


def apart(first: Any, second: Any, tokens: list[int], folder: Path) -> float:
    """KL divergence of ``second`` from ``first``, nats per token."""
    (folder / "reference").unlink(missing_ok=True)  # or else it would be continued
    kept = Reference(folder / "reference", first.shape[1])
    kept.append(first)
    kept.rewind()
    return summarise([kept.compare(second, tuple(tokens))]).kl_mean


def model_of(name: str, synthetic: Toy, toy_gguf: Toy, folder: Path) -> Path:
    if name in SYNTHETIC:
        return synthetic(name)
    if name in CONVERTED:
        return toy_gguf(name)
    checkpoint = families.make_checkpoint(name, folder / name, {})
    convert(checkpoint, folder / "model.gguf", "f32")
    return folder / "model.gguf"


@pytest.mark.parametrize("name", [*SYNTHETIC, *CONVERTED, *FAMILIES])
def test_masking_channels_equals_the_narrowed_file(name: str, synthetic: Toy, toy_gguf: Toy, tmp_path: Path) -> None:
    model = model_of(name, synthetic, toy_gguf, tmp_path)
    file = GgufFile(model)
    architecture = read_architecture(file)
    width = next(w for w in architecture.width_rule.widths() if w <= architecture.expert_width // 2)
    channels = random_channels(architecture, tmp_path / "channels")
    plan = narrow_plan(architecture, width, channels.digest)
    output = tmp_path / "narrow.gguf"
    made = builder.build(str(model), plan.to_json(), str(output), channels=str(tmp_path / "channels"))
    predicted = layout(file, architecture, plan.kept, {}, plan.records(), width=width).nbytes
    assert predicted == made["nbytes"] == output.stat().st_size < model.stat().st_size
    assert read_architecture(GgufFile(output)).expert_width == width
    tokens = np.random.default_rng(1).integers(3, architecture.vocabulary - 16, TOKENS).tolist()
    mask = ChannelMask(channels, width)
    masked, narrow = logits(model, tokens, mask), logits(output, tokens)
    mask.check()
    assert apart(masked, narrow, tokens, tmp_path) < 1e-6
    assert apart(logits(model, tokens), narrow, tokens, tmp_path) > 1e-3


def test_router_and_channels_masked_together_equal_a_file_without_both(synthetic: Toy, tmp_path: Path) -> None:
    model = synthetic("qwen3moe")
    architecture = read_architecture(GgufFile(model))
    channels = random_channels(architecture, tmp_path / "channels")
    ids = tuple(range(0, architecture.experts, 2))
    plan = narrow_plan(
        architecture, 96, channels.digest, kept=len(ids), keep=dict.fromkeys(architecture.moe_layers, ids)
    )
    output = tmp_path / "both.gguf"
    builder.build(str(model), plan.to_json(), str(output), channels=str(tmp_path / "channels"))
    router = RouterMask({layer: list(ids) for layer in architecture.moe_layers}, architecture.experts)
    masks = Masks([router, ChannelMask(channels, 96)])
    tokens = np.random.default_rng(2).integers(3, architecture.vocabulary - 16, TOKENS).tolist()
    masked = logits(model, tokens, masks)
    masks.check()
    assert apart(masked, logits(output, tokens), tokens, tmp_path) < 1e-6


def test_a_mask_that_finds_no_activation_is_an_error(synthetic: Toy, tmp_path: Path) -> None:
    architecture = read_architecture(GgufFile(synthetic("qwen3moe")))
    mask = ChannelMask(random_channels(architecture, tmp_path / "channels"), 96)
    with pytest.raises(EdgepruneError, match="no activation of the experts in layer 0"):
        mask.check()


@pytest.mark.parametrize("target", ["same", "Q4_0"])
@pytest.mark.parametrize("kind", ["F32", "BF16", "Q8_0", "Q4_K"])
def test_gate_and_up_are_copied_row_by_row_and_down_is_encoded_anew(kind: str, target: str, tmp_path: Path) -> None:
    model = toys.synthetic_gguf(tmp_path / "toy.gguf", layers=1, vocabulary=300, kind=kind)
    before = GgufFile(model)
    architecture = read_architecture(before)
    channels = random_channels(architecture, tmp_path / "channels")
    block = ggml.BY_NAME[kind].block
    down = "blk.0.ffn_down_exps.weight"
    new = kind if target == "same" else target
    types = {down: new} if new != kind else {}
    if 96 % ggml.BY_NAME[new].block:
        with pytest.raises(BadFile, match=f"leaves {down} in {kind}, whose blocks do not divide 96"):
            narrow_plan(architecture, 96, channels.digest, types=types).check(architecture)
        return
    plan = narrow_plan(architecture, 96, channels.digest, types=types)
    output = tmp_path / "narrow.gguf"
    builder.build(str(model), plan.to_json(), str(output), channels=str(tmp_path / "channels"))
    after, width = GgufFile(output), architecture.expert_width
    kept = channels.best(0, 96)
    for name in ("blk.0.ffn_gate_exps.weight", "blk.0.ffn_up_exps.weight"):
        rows = before.raw(name).reshape(architecture.experts, width, -1)
        expected = np.concatenate([rows[e][kept[e]].reshape(-1) for e in range(architecture.experts)])
        np.testing.assert_array_equal(after.raw(name), expected)
    matrices = before.raw(down).reshape(architecture.experts, -1)
    for expert, found in enumerate(after.raw(down).reshape(architecture.experts, -1)):
        values = ggml.decode(ggml.BY_NAME[kind], matrices[expert], width)[:, kept[expert]]
        if new == kind and block == 1:
            np.testing.assert_array_equal(ggml.decode(ggml.BY_NAME[kind], found, 96), values)
        else:
            encoded = unbiased.encode(ggml.BY_NAME[new], np.ascontiguousarray(values), np.ones(96, np.float32), down)
            np.testing.assert_array_equal(found, encoded.reshape(-1))


# The rule of each architecture.


def rule(arch: str, entries: dict[str, int], shared: int = 0, dense: bool = False, width: int = 256) -> WidthRule:
    path = Path("model.gguf")
    made = {f"{arch}.{key}": make_entry(f"{arch}.{key}", "u32", value) for key, value in entries.items()}
    header = Header(path, made, {}, 32, 0, 0)
    return width_rule(header, arch, frozenset({width}), frozenset({shared} if shared else ()), dense=dense)


COUNT = "expert_shared_count"
OWN, GENERAL, SHARED = "expert_feed_forward_length", "feed_forward_length", "expert_shared_feed_forward_length"


@pytest.mark.parametrize(
    ("found", "width", "metadata"),
    [
        (rule("qwen3moe", {OWN: 256}), 192, {OWN: 192}),
        (rule("qwen3moe", {GENERAL: 1024}), 192, {OWN: 192}),  # F / k, which another k would change
        (rule("qwen2moe", {OWN: 256}, shared=1024), 160, {OWN: 160}),
        (
            rule("deepseek2", {OWN: 256, "expert_shared_count": 2}, shared=512),
            128,
            {OWN: 128, "expert_shared_count": 4},
        ),
        (rule("laguna", {OWN: 256}, shared=512), 192, {OWN: 192, SHARED: 512}),
        (rule("laguna", {OWN: 256, SHARED: 512}, shared=512), 192, {OWN: 192}),
        (rule("olmoe", {GENERAL: 256}), 192, {GENERAL: 192}),
        (rule("hunyuan-moe", {GENERAL: 256, OWN: 256}, shared=256), 192, {GENERAL: 192, OWN: 192, SHARED: 256}),
        (rule("arctic", {GENERAL: 256}, dense=True), 192, {GENERAL: 192}),
    ],
)
def test_metadata_say_the_new_width_and_keep_shared_experts(
    found: WidthRule, width: int, metadata: dict[str, int]
) -> None:
    assert found.problem(width) == ""
    assert width in found.widths() and found.widths() == tuple(sorted(found.widths(), reverse=True))
    assert found.metadata(width) == metadata
    assert found.metadata(256) == {} and found.problem(256) == ""


@pytest.mark.parametrize(
    ("found", "width", "reason"),
    [
        (rule("deepseek2", {OWN: 256}, shared=512), 192, "its shared experts are 512 wide"),
        (rule("qwen3moe", {OWN: 256}), 100, "100 is no multiple of 32 below 256"),
        (rule("qwen3moe", {OWN: 256}), 288, "288 is no multiple of 32 below 256"),
        (rule("qwen3moe", {OWN: 512}), 128, "its metadata say that they are 512 wide, and they are 256"),
        (rule("llama4", {OWN: 256}, shared=256), 128, "shared experts have to be as wide as the others"),
        (rule("jamba", {GENERAL: 256}, dense=True), 128, "its dense layers have to be as wide as its experts"),
        (rule("something", {OWN: 256}), 128, "it is not known what else of something depends on their width"),
        (rule("grok", {GENERAL: 256}), 128, "its metadata do not say how wide they are"),
    ],
)
def test_widths_that_would_not_load_are_refused_with_the_reason(found: WidthRule, width: int, reason: str) -> None:
    assert reason in found.problem(width)
    assert width not in found.widths()


def test_a_llama_4_is_refused_by_its_plan(synthetic: Toy) -> None:
    architecture = read_architecture(GgufFile(synthetic("llama4")))
    with pytest.raises(BadFile, match="shared experts have to be as wide"):
        narrow_plan(architecture, 128).check(architecture)
    with pytest.raises(UsageError, match="cannot be narrowed: its shared experts"):
        asked_width(0.5, architecture)


def test_a_share_is_rounded_and_a_number_is_not(synthetic: Toy) -> None:
    architecture = read_architecture(GgufFile(synthetic("qwen3moe")))
    assert [asked_width(asked, architecture) for asked in (0.75, 0.7, 0.5, 128)] == [192, 192, 128, 128]
    with pytest.raises(UsageError, match="100 is no multiple of 32"):
        asked_width(100, architecture)
    with pytest.raises(UsageError, match="they have 256 channels"):
        asked_width(256, architecture)


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (256, (224, 192, 160, 128)),
        (768, (672, 576, 512, 480, 384, 256)),
        (1408, (1280, 1024, 768, 512)),
        (2048, (1792, 1536, 1280, 1024, 768, 512)),
        (14336, (12544, 10752, 8960, 7168, 5376, 3584)),
    ],
)
def test_a_few_widths_are_worth_trying(width: int, expected: tuple[int, ...]) -> None:
    assert rule("qwen3moe", {OWN: width}, width=width).worth_trying() == expected


def test_channels_that_take_hours_to_rank_are_not_ranked_unasked(synthetic: Toy) -> None:
    small = read_architecture(GgufFile(synthetic("qwen3moe")))
    assert widths_to_try(small, "ziplm") == small.width_rule.worth_trying() != ()
    mixtral = replace(small, experts=8, moe_layers=tuple(range(32)), expert_width=14_336)
    assert ranking_seconds(mixtral, "ziplm") > 100 * MOST_RANKING_SECONDS
    assert widths_to_try(mixtral, "ziplm") == ()
    assert widths_to_try(mixtral, "energy") == small.width_rule.worth_trying()
    thirty = replace(small, experts=128, moe_layers=tuple(range(48)), expert_width=768)
    assert 2_000 < ranking_seconds(thirty, "ziplm") < MOST_RANKING_SECONDS


# Plans.


def test_a_narrow_plan_survives_json_and_contradictions_do_not(synthetic: Toy) -> None:
    architecture = read_architecture(GgufFile(synthetic("qwen3moe")))
    plan = narrow_plan(architecture, 192, "0" * 64)
    assert Plan.from_json(plan.to_json(), "there") == plan
    assert plan.digest != narrow_plan(architecture, 160, "0" * 64).digest
    assert plan.digest != narrow_plan(architecture, 192, "1" * 64).digest
    for wrong in ({"narrowing": ""}, {"width": 0}, {"width": -32}):
        with pytest.raises(BadFile, match="the plan narrows experts to"):
            Plan.from_json({**plan.to_json(), **wrong}, "there")
    with pytest.raises(BadFile, match="merges experts by dern and narrows them"):
        Plan.from_json({**plan.to_json(), "reduce": "dern", "kept": 1, "keep": {"0": [1], "1": [1]}}, "there")


def test_channels_that_are_missing_or_others_than_planned_leave_no_file(synthetic: Toy, tmp_path: Path) -> None:
    model = synthetic("qwen3moe")
    architecture = read_architecture(GgufFile(model))
    plan = narrow_plan(architecture, 192, random_channels(architecture, tmp_path / "a").digest)
    random_channels(architecture, tmp_path / "b", seed=1)
    with pytest.raises(BadFile, match="order of their channels is missing"):
        builder.build(str(model), plan.to_json(), str(tmp_path / "x.gguf"))
    with pytest.raises(BadFile, match="has other channels than the plan was made with"):
        builder.build(str(model), plan.to_json(), str(tmp_path / "x.gguf"), channels=str(tmp_path / "b"))
    assert not (tmp_path / "x.gguf").exists()


def test_channels_that_are_no_order_are_refused(tmp_path: Path) -> None:
    Channels({0: np.zeros((2, 4), np.int16)}, {}).save(tmp_path / "channels")
    with pytest.raises(BadFile, match="channels of layer 0 are no order of all of them"):
        Channels.load(tmp_path / "channels")
