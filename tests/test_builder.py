"""The built file is what the plan says, byte for byte."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toys

from edgeprune.build import builder
from edgeprune.build.builder import Build, describe
from edgeprune.decide.plan import Plan, Prediction
from edgeprune.errors import BadFile, EdgepruneError
from edgeprune.files import file_digest
from edgeprune.measure import child
from edgeprune.measure.launch import Launch
from edgeprune.measure.llama import session
from edgeprune.measure.statistics import InputMoments, Statistics
from edgeprune.model import ggml, unbiased
from edgeprune.model.architecture import Architecture, read_architecture
from edgeprune.model.gguf import Entry, GgufFile, TensorShape, make_entry
from edgeprune.model.layout import layout

pytest_plugins = ("demo_fixtures",)

EXPERTS, USED = 6, 2
KEPT = {0: (0, 3, 5), 1: (1, 2, 4)}
# llama.cpp computes a table before the first weight of these types, which takes it many seconds.
SLOW = {"IQ1_S", "IQ1_M", "IQ2_XS", "IQ2_S"}
TYPES = [name for name in (*ggml.CHOICES, "F16", "BF16") if name not in SLOW]
# What the builder changes in the metadata of a file that keeps all experts.
CHANGED = {"general.file_type", "general.quantization_version"}
RECORDS = {"edgeprune.plan_digest", "edgeprune.source_experts"}
PRUNED_RECORDS = {"edgeprune.kept_experts", "edgeprune.kept_layers"}

Source = Callable[[str], Path]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """A small random model whose matrices have the given type."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            path = tmp_path_factory.mktemp("source") / f"{kind}.gguf"
            extra = [("general.size_label", "str", "6x1M"), ("general.tags", "[str]", ["a", "", "naïve"])]
            made[kind] = toys.synthetic_gguf(
                path, "qwen3moe", experts=EXPERTS, used=USED, kind=kind, extra=extra, expert_width=256, seed=5
            )
        return made[kind]

    return make


@pytest.fixture(scope="module")
def statistics(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Input moments for every weight, uneven enough that they decide how a weight is rounded."""
    random = np.random.default_rng(11)
    moments = {}
    for tensor in read_architecture(GgufFile(source("F32"))).tensors:
        if tensor.quantisable:
            squares = random.lognormal(0, 2, (tensor.matrices, tensor.shape[0]))
            moments[tensor.name] = InputMoments(squares, np.ones(tensor.matrices), np.zeros(tensor.matrices))
    path = tmp_path_factory.mktemp("statistics") / "statistics.safetensors"
    Statistics(["all"], 64, 64, {}, moments, {}).save(path)
    return path


def make_plan(
    architecture: Architecture, keep: dict[int, Sequence[int]] | None = None, types: dict[str, str] | None = None
) -> Plan:
    kept = {layer: tuple(ids) for layer, ids in (keep or {}).items()}
    return Plan(
        arch=architecture.arch,
        experts=architecture.experts,
        kept=len(next(iter(kept.values()))) if kept else architecture.experts,
        keep=kept,
        types=types or {},
        launch=Launch(),
        method="test",
        origin="user",
        predicted=Prediction(),
        made_from={"source": "toy"},
    )


def built(model: Path, output: Path, statistics: Path | str = "", **wishes: Any) -> tuple[GgufFile, Plan, Build]:
    plan = make_plan(read_architecture(GgufFile(model)), **wishes)
    value = builder.build(str(model), plan.to_json(), str(output), str(statistics))
    return GgufFile(output), plan, Build(**value)


def by_expert(file: GgufFile, name: str) -> Any:
    """Bytes of a tensor, uint8 [matrices, bytes]."""
    return file.raw(name).reshape(file.tensors[name].shape[-1], -1)


def aligned_like(source: GgufFile, path: Path, alignment: int) -> Path:
    """A copy of ``source`` with another alignment of its tensors."""
    entries = [*source.entries.values(), make_entry("general.alignment", "u32", alignment)]
    tensors = [(TensorShape(t.name, t.shape, t.type), source.raw(t.name)) for t in source.tensors.values()]
    return toys.write_gguf(path, entries, tensors, alignment)


@pytest.mark.parametrize("alignment", [32, 8, 256])
@pytest.mark.parametrize("kind", ["F32", "Q4_K"])
def test_a_plan_that_changes_nothing_copies_every_tensor(
    kind: str, alignment: int, source: Source, tmp_path: Path
) -> None:
    model = source(kind)
    if alignment != 32:
        model = aligned_like(GgufFile(model), tmp_path / "aligned.gguf", alignment)
    before = GgufFile(model)
    after, plan, build = built(model, tmp_path / "same.gguf")
    assert list(after.tensors) == list(before.tensors)
    assert after.alignment == before.alignment == alignment
    for name, info in before.tensors.items():
        assert (after.tensors[name].shape, after.tensors[name].type) == (info.shape, info.type)
        np.testing.assert_array_equal(after.raw(name), before.raw(name))
    assert after.get("edgeprune.plan_digest") == plan.digest == build.plan_digest
    assert build.sha256 == file_digest(tmp_path / "same.gguf")


def test_metadata_that_need_not_change_are_copied_raw_and_in_order(source: Source, tmp_path: Path) -> None:
    before = GgufFile(source("F32"))
    same, _, _ = built(source("F32"), tmp_path / "same.gguf")
    fewer, _, _ = built(source("F32"), tmp_path / "fewer.gguf", keep=KEPT)
    for after, gone, changed in (
        (same, set(), CHANGED),
        (fewer, {"general.size_label"}, CHANGED | {"qwen3moe.expert_count"}),
    ):
        kept = [key for key in before.entries if key not in gone]
        assert [key for key in after.entries if key in before.entries] == kept
        for key in set(kept) - changed:
            assert after.entries[key].raw == before.entries[key].raw, key
    assert set(same.entries) - set(before.entries) == CHANGED | RECORDS
    assert set(fewer.entries) - set(before.entries) == CHANGED | RECORDS | PRUNED_RECORDS
    assert fewer.get("qwen3moe.expert_count") == 3 and fewer.get("qwen3moe.expert_used_count") == USED
    assert fewer.get("edgeprune.source_experts") == EXPERTS
    assert fewer.get("edgeprune.kept_layers").tolist() == [0, 1]
    assert fewer.get("edgeprune.kept_experts").reshape(2, 3).tolist() == [list(KEPT[0]), list(KEPT[1])]


@pytest.mark.parametrize("kind", ["F32", "BF16", "Q8_0", "Q4_K", "IQ2_XXS"])
def test_kept_experts_of_unchanged_type_are_slices_of_the_source(kind: str, source: Source, tmp_path: Path) -> None:
    before = GgufFile(source(kind))
    after, _, _ = built(source(kind), tmp_path / "fewer.gguf", keep=KEPT)
    for name, info in before.tensors.items():
        if "_exps" in name or "ffn_gate_inp" in name:
            kept = list(KEPT[int(name.split(".")[1])])
            assert after.tensors[name].shape == (*info.shape[:-1], 3)
            np.testing.assert_array_equal(by_expert(after, name), by_expert(before, name)[kept])
        else:
            np.testing.assert_array_equal(after.raw(name), before.raw(name))


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_changed_tensors_are_encoded_expert_by_expert_with_their_own_importance(
    kind: str, source: Source, statistics: Path, tmp_path: Path
) -> None:
    types = {
        "blk.0.ffn_down_exps.weight": "Q4_K",
        "blk.0.ffn_up_exps.weight": "IQ2_XXS",
        "blk.1.ffn_gate_exps.weight": "IQ4_NL",
        "blk.1.attn_q.weight": "Q3_K",
        "token_embd.weight": "Q6_K",
    }
    before = GgufFile(source(kind))
    after, _, _ = built(source(kind), tmp_path / "mixed.gguf", statistics, keep=KEPT, types=types)
    moments = Statistics.load(statistics).moments
    for name, wanted in types.items():
        assert after.tensors[name].type == wanted
        width = before.tensors[name].shape[0]
        experts = "_exps" in name
        means = moments[name].mean()
        matrices = by_expert(before, name)[list(KEPT[int(name.split(".")[1])])] if experts else before.raw(name)[None]
        ids = KEPT[int(name.split(".")[1])] if experts else (0,)
        expected = [
            unbiased.encode(
                ggml.BY_NAME[wanted],
                ggml.decode(ggml.BY_NAME[before.tensors[name].type], raw, width),
                means[row],
            ).reshape(-1)
            for row, raw in zip(ids, matrices, strict=True)
        ]
        np.testing.assert_array_equal(after.raw(name), np.concatenate(expected), err_msg=name)
    untouched = set(before.tensors) - set(types)
    assert all(after.tensors[name].type == before.tensors[name].type for name in untouched)


def test_importance_decides_how_weights_are_rounded(source: Source, statistics: Path, tmp_path: Path) -> None:
    types = {"blk.0.ffn_down_exps.weight": "Q4_K"}
    with_importance, _, _ = built(source("F32"), tmp_path / "with.gguf", statistics, types=types)
    without, _, _ = built(source("F32"), tmp_path / "without.gguf", types=types)
    name = "blk.0.ffn_down_exps.weight"
    assert not np.array_equal(with_importance.raw(name), without.raw(name))


def random_plan(architecture: Architecture, seed: int) -> dict[str, Any]:
    """Random experts, and random types for a random half of the tensors."""
    random = np.random.default_rng(seed)
    kept = int(random.integers(architecture.used, architecture.experts + 1))
    keep = {
        layer: tuple(sorted(random.choice(architecture.experts, kept, replace=False).tolist()))
        for layer in architecture.moe_layers
    }
    types = {}
    for tensor in architecture.tensors:
        fitting = [name for name in TYPES if tensor.shape[0] % ggml.BY_NAME[name].block == 0]
        if tensor.quantisable and random.random() < 0.5:
            types[tensor.name] = str(random.choice(fitting))
    return {"keep": keep if kept < architecture.experts else {}, "types": types}


@pytest.mark.parametrize("seed", range(12))
def test_predicted_size_is_the_written_size_and_the_file_loads(
    seed: int, statistics: Path, source: Source, tmp_path: Path
) -> None:
    model = source(("F32", "BF16", "Q8_0")[seed % 3])
    file = GgufFile(model)
    architecture = read_architecture(file)
    wishes = random_plan(architecture, seed)
    after, plan, build = built(model, tmp_path / "random.gguf", statistics, **wishes)
    predicted = layout(file, architecture, plan.kept, plan.types, plan.records()).nbytes
    assert predicted == build.nbytes == (tmp_path / "random.gguf").stat().st_size
    own = {info.name: info.type for info in file.tensors.values()}
    assert {info.name: info.type for info in after.tensors.values()} == {**own, **plan.types}
    with session(tmp_path / "random.gguf", Launch(context=32, batch=16, threads=1)) as opened:
        assert np.isfinite(opened.run(list(range(16)))).all()


@pytest.mark.parametrize("arch", ["qwen2moe", "deepseek2", "gpt-oss"])
def test_pruned_files_of_other_architectures_load(arch: str, synthetic: Source, tmp_path: Path) -> None:
    layers = read_architecture(GgufFile(synthetic(arch))).moe_layers
    after, _, _ = built(synthetic(arch), tmp_path / "fewer.gguf", keep={layer: (0, 2, 5) for layer in layers})
    assert after.get(f"{arch}.expert_count") == 3
    with session(tmp_path / "fewer.gguf", Launch(context=32, batch=16, threads=1)) as opened:
        assert np.isfinite(opened.run(list(range(16)))).all()


def test_progress_ends_at_the_size_of_the_file(source: Source, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    plan = make_plan(read_architecture(GgufFile(source("Q4_K"))))
    arguments = {"model": str(source("Q4_K")), "plan": plan.to_json(), "output": str(tmp_path / "x.gguf")}
    value = child.call("edgeprune.build.builder:build", arguments, lambda done, total: steps.append((done, total)))
    assert steps == sorted(steps) and steps[-1] == (value["nbytes"],) * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arch": "olmoe"}, "the plan is for olmoe with 6 experts, the model is qwen3moe with 6"),
        (
            {"experts": 8, "keep": {}, "kept": 8},
            "the plan is for qwen3moe with 8 experts, the model is qwen3moe with 6",
        ),
        ({"keep": {"0": [0, 1, 2]}, "kept": 3}, "must list the kept experts of every MoE layer"),
        ({"keep": {"0": [3], "1": [4]}, "kept": 1}, "1 of 6 experts cannot be kept"),
        (
            {"types": {"blk.7.attn_q.weight": "Q4_K"}},
            "changes blk.7.attn_q.weight, which is not a quantisable tensor",
        ),
        ({"types": {"blk.0.ffn_gate_inp.weight": "Q4_K"}}, "ffn_gate_inp.weight, which is not a quantisable tensor"),
        ({"types": {"blk.0.attn_q.weight": "Q9_K"}}, "unknown type Q9_K"),
        ({"keep": {"0": [0, 1, 9], "1": [0, 1, 2]}, "kept": 3}, "not 3 ascending ids below 6"),
    ],
    ids=[
        "another architecture",
        "another number of experts",
        "a layer missing",
        "fewer than the router uses",
        "an unknown tensor",
        "a router",
        "an unknown type",
        "an unknown expert",
    ],
)
def test_a_plan_that_is_not_for_this_model_is_refused(
    change: dict[str, Any], message: str, source: Source, tmp_path: Path
) -> None:
    value = make_plan(read_architecture(GgufFile(source("F32")))).to_json()
    with pytest.raises(BadFile) as error:
        builder.build(str(source("F32")), {**value, **change}, str(tmp_path / "x.gguf"))
    assert message in error.value.cause
    assert list(tmp_path.iterdir()) == []


def test_plans_for_grouped_routing_keep_equal_numbers_per_group(tmp_path: Path) -> None:
    grouped = {"experts": 16, "used": 3, "groups": 4, "groups_used": 2, "layers": 2}
    model = toys.synthetic_gguf(tmp_path / "grouped.gguf", "deepseek2", **grouped)
    even, uneven = (0, 2, 5, 6, 8, 11, 14, 15), (0, 1, 2, 6, 8, 11, 14, 15)
    built(model, tmp_path / "even.gguf", keep={1: even})
    with pytest.raises(BadFile, match="unequal numbers per routing group in layer 1"):
        built(model, tmp_path / "uneven.gguf", keep={1: uneven})


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e6], ids=["NaN", "infinity", "too large"])
def test_weights_that_cannot_be_encoded_leave_no_file(bad: float, source: Source, tmp_path: Path) -> None:
    file = GgufFile(source("F32"))
    name = "blk.1.ffn_up_exps.weight"
    tensors = []
    for info in file.tensors.values():
        values = np.array(file.raw(info.name)).view(np.float32)
        if info.name == name:
            values[1000] = bad
        tensors.append((TensorShape(info.name, info.shape, info.type), values))
    model = toys.write_gguf(tmp_path / "bad.gguf", file.entries.values(), tensors)
    with pytest.raises(BadFile, match=name):
        built(model, tmp_path / "out.gguf", types={name: "Q4_K"})
    assert [path.name for path in tmp_path.iterdir()] == ["bad.gguf"]


def test_a_full_disk_is_an_error_and_leaves_nothing(source: Source, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    model = source("F32")
    plan = make_plan(read_architecture(GgufFile(model))).to_json()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(EdgepruneError) as error:
            arguments = {"model": str(model), "plan": plan, "output": str(tmp_path / "x.gguf")}
            child.call("edgeprune.build.builder:build", arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"writing {tmp_path / 'x.gguf'} failed" in error.value.cause
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "keep", "stem"),
    [
        ("Tiny MoE/4x", {}, "Tiny-MoE-4x"),
        ("Tiny", KEPT, "Tiny-K3of6"),
        ("日本", {}, "日本"),
        ("/../", {}, ".."),
        ("", {}, "F32"),
    ],
    ids=["spaces and slashes", "pruned", "letters of any script", "no way out of the folder", "nameless"],
)
def test_file_names_say_what_is_inside(
    name: str, keep: dict[int, tuple[int, ...]], stem: str, source: Source, tmp_path: Path
) -> None:
    file = GgufFile(source("F32"))
    entries: dict[str, Entry] = {**file.entries, "general.name": make_entry("general.name", "str", name)}
    tensors = [(TensorShape(t.name, t.shape, t.type), file.raw(t.name)) for t in file.tensors.values()]
    model = toys.write_gguf(tmp_path / "F32.gguf", entries.values(), tensors)
    architecture = read_architecture(GgufFile(model))
    plan = make_plan(architecture, keep)
    nbytes = layout(GgufFile(model), architecture, plan.kept, {}, plan.records()).nbytes
    weights = sum(int(np.prod(tensor.kept_shape(plan.kept))) for tensor in architecture.tensors)
    assert (
        describe(architecture, replace(plan, predicted=replace(plan.predicted, file_bytes=nbytes)))
        == f"{stem}-{8 * nbytes / weights:.2f}bpw.gguf"
    )
