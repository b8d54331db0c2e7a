"""The plan: a value that survives JSON, is checked however it was edited, and prints in a few lines."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import toys

from edgeprune.decide.plan import Plan, Prediction, folded
from edgeprune.errors import BadFile
from edgeprune.measure.launch import KV_TYPES, Launch
from edgeprune.model import ggml
from edgeprune.model.architecture import Architecture, read_architecture
from edgeprune.model.gguf import GgufFile, header

EXPERTS, LAYERS = 8, 3


@pytest.fixture(scope="module")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> Architecture:
    path = toys.synthetic_gguf(tmp_path_factory.mktemp("plan") / "toy.gguf", layers=LAYERS, vocabulary=300)
    return read_architecture(GgufFile(path))


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Architecture:
    path = tmp_path_factory.mktemp("plan") / "grouped.gguf"
    toys.synthetic_gguf(path, layers=LAYERS, width=32, expert_width=32, groups=2, groups_used=1)
    return read_architecture(GgufFile(path))


def plan(**changes: Any) -> Plan:
    values: dict[str, Any] = {
        "arch": "qwen3moe",
        "experts": EXPERTS,
        "kept": 4,
        "keep": {0: (0, 1, 2, 3), 1: (0, 2, 4, 6), 2: (1, 2, 5, 7)},
        "types": {"blk.0.ffn_up_exps.weight": "IQ2_XXS", "blk.1.attn_q.weight": "Q6_K"},
        "launch": Launch(context=4096, kv_type="Q8_0", gpu_layers=-1, cpu_experts=2, threads=4),
        "method": "reap",
        "origin": "solver",
        "predicted": Prediction(1000, {"ram": 2000, "vram": 300}, 0.125, 0.1, 0.025, 31.5, 1e-5),
        "made_from": {"source": "abc", "file_size": None, "types": ["Q6_K"]},
    }
    return Plan(**{**values, **changes})


def test_a_prediction_of_nothing_is_read_as_it_was_written() -> None:
    """A sum of nothing is a whole number, which JSON keeps apart from a fraction."""
    made = plan(predicted=Prediction(nats=sum([]), encode_seconds=0))
    written = made.to_json()
    assert Plan.from_json(json.loads(json.dumps(written)), "plan.json").to_json() == written


def test_plan_survives_json_and_the_disk(architecture: Architecture, tmp_path: Path) -> None:
    original = plan()
    original.check(architecture)
    assert Plan.from_json(json.loads(json.dumps(original.to_json())), "there") == original
    original.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == original
    assert json.loads((tmp_path / "plan.json").read_text())["digest"] == original.digest


def test_plan_that_keeps_everything_survives_json(architecture: Architecture) -> None:
    whole = plan(kept=EXPERTS, keep={}, types={}, predicted=Prediction())
    whole.check(architecture)
    assert Plan.from_json(whole.to_json(), "there") == whole


def test_prediction_and_digest_may_be_left_out_and_types_be_lower_case() -> None:
    value = plan().to_json()
    del value["predicted"], value["digest"]
    value["types"] = {name: kind.lower() for name, kind in value["types"].items()}
    loaded = Plan.from_json(value, "there")
    assert loaded.predicted == Prediction()
    assert loaded.types == plan().types


Edit = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        pytest.param(lambda v: v["keep"]["1"].append(7), "experts of layer 1 are not 4 ascending", id="one too many"),
        pytest.param(lambda v: v["keep"]["1"].pop(), "experts of layer 1 are not 4 ascending", id="one too few"),
        pytest.param(lambda v: v["keep"].update({"1": []}), "layer 1 are not 4", id="empty layer"),
        pytest.param(lambda v: v["keep"].update({"1": [0, 2, 2, 6]}), "layer 1 are not 4", id="duplicate"),
        pytest.param(lambda v: v["keep"].update({"1": [0, 2, 4, 8]}), "below 8", id="beyond the last"),
        pytest.param(lambda v: v["keep"].update({"1": [-1, 2, 4, 6]}), "below 8", id="negative"),
        pytest.param(lambda v: v["keep"].update({"1": [2, 0, 4, 6]}), "layer 1 are not 4 ascending", id="unsorted"),
        pytest.param(lambda v: v["keep"].update({"1": [0, 2, 4, 6.5]}), "is not a plan", id="fraction"),
        pytest.param(lambda v: v["keep"].update({"1": "0246"}), "is not a plan", id="text"),
        pytest.param(lambda v: v["keep"].update({"one": [0, 2, 4, 6]}), "is not a plan", id="layer in words"),
        pytest.param(lambda v: v.update(keep=[]), "is not a plan", id="keep is no table"),
        pytest.param(lambda v: v.update(keep={}), "keeps 4 of 8 experts but lists 0 layers", id="no layer"),
        pytest.param(lambda v: v.update(kept=EXPERTS), "but lists 3 layers", id="all and a list"),
        pytest.param(lambda v: v.update(kept=0), "keeps 0 of 8", id="none"),
        pytest.param(lambda v: v.update(kept=9), "keeps 9 of 8", id="more than there are"),
        pytest.param(lambda v: v.update(kept=4.0), "is not a plan", id="kept is no whole number"),
        pytest.param(lambda v: v.update(kept=3), "are not 3 ascending", id="another count than the lists"),
        pytest.param(lambda v: v["types"].update({"output.weight": "Q9_Z"}), "unknown type Q9_Z", id="unknown type"),
        pytest.param(lambda v: v["types"].update({"output.weight": "Q8_K"}), "no type for weights", id="Q8_K"),
        pytest.param(lambda v: v["types"].update({"output.weight": "I32"}), "no type for weights", id="integers"),
        pytest.param(lambda v: v.update(typos={}), "unknown keys: typos", id="unknown key"),
        pytest.param(lambda v: v.pop("launch"), "lacks launch", id="missing key"),
        pytest.param(lambda v: v["launch"].update(contxt=1), "unknown keys: contxt", id="unknown launch setting"),
        pytest.param(lambda v: v["predicted"].update(nat=1), "unknown keys: nat", id="unknown prediction"),
        pytest.param(lambda v: v.update(predicted=None), "predicted is not a table", id="prediction is null"),
        pytest.param(lambda v: v.update(launch=[1]), "launch is not a table", id="launch is a list"),
    ],
)
def test_plan_that_no_gguf_can_express_is_refused(edit: Edit, message: str) -> None:
    value = json.loads(json.dumps(plan().to_json()))
    edit(value)
    with pytest.raises(BadFile, match=message):
        Plan.from_json(value, "plan.json")


STRANGE: list[tuple[str, str, Any]] = [
    *(("launch", "context", value) for value in ("2048; echo PWNED", "2048", 2048.0, True, None, 0, -1, 10**30)),
    *(("launch", "gpu_layers", value) for value in ("all", -2, 10**6)),
    *(("launch", "cpu_experts", value) for value in ([1], -1, 10**6)),
    *(("launch", "threads", value) for value in ("$(nproc)", -1, 10**6)),
    *(("launch", "batch", value) for value in (None, 0, 2**40)),
    *(("launch", "kv_type", value) for value in ("F16 -fa on", "Q4_K", None, 1, ["F16"], "")),
    *(("launch", "mmap", value) for value in (1, None, "yes")),
    *(("launch", "repack", value) for value in (0, {})),
    *(("predicted", "pool_bytes", value) for value in (None, "ram", [1], {"ram": None}, {"ram": "1"}, {"ram": -1})),
    *(("predicted", "file_bytes", value) for value in (None, "1000", 1.5, -1)),
    *(("predicted", "nats", value) for value in (None, "0.1", float("nan"), float("inf"), 10**400, True)),
]


@pytest.mark.parametrize(("table", "key", "value"), STRANGE, ids=lambda value: repr(value)[:24])
def test_settings_and_predictions_of_another_kind_are_refused(table: str, key: str, value: Any) -> None:
    edited = plan().to_json()
    edited[table][key] = value
    with pytest.raises(BadFile, match=f"plan.json: {table}: {key}") as refusal:
        Plan.from_json(edited, "plan.json")
    assert "\n" not in refusal.value.cause


@pytest.mark.parametrize("kind", KV_TYPES)
def test_every_type_of_the_cache_may_be_written_in_either_case(kind: str) -> None:
    edited = plan().to_json()
    edited["launch"]["kv_type"] = kind.lower()
    assert Plan.from_json(edited, "plan.json").launch.kv_type == kind


@pytest.mark.parametrize("text", ["[1, 2]", "3", '"plan"', "{", ""], ids=["list", "number", "text", "cut", "empty"])
def test_file_that_holds_no_plan_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(BadFile, match=str(path)):
        Plan.load(path)


def keeping(count: int) -> dict[str, Any]:
    return {"kept": count, "keep": {layer: tuple(range(count)) for layer in range(LAYERS)}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"arch": "olmoe"}, "for olmoe with 8 experts", id="another architecture"),
        pytest.param(
            {"experts": 16, **keeping(4)}, "with 16 experts, the model is qwen3moe with 8", id="another model"
        ),
        pytest.param(keeping(1), "1 of 8 experts cannot be kept: 2 used", id="fewer than a token uses"),
        pytest.param({"keep": {0: (0, 1, 2, 3)}}, "of every MoE layer", id="a layer is missing"),
        pytest.param({"keep": dict.fromkeys(range(4), (0, 1, 2, 3))}, "of every MoE layer", id="a layer too many"),
        pytest.param({"types": {"blk.0.ffn_up.weight": "Q4_K"}}, "not a quantisable tensor", id="no such tensor"),
        pytest.param({"types": {"blk.0.ffn_gate_inp.weight": "Q4_K"}}, "not a quantisable tensor", id="router"),
        pytest.param({"types": {"blk.0.ffn_gate_inp.weight": "F16"}}, "not a quantisable tensor", id="router in F16"),
        pytest.param({"types": {"blk.0.attn_norm.weight": "F16"}}, "not a quantisable tensor", id="norm"),
        pytest.param({"types": {"output_norm.weight": "Q8_0"}}, "not a quantisable tensor", id="output norm"),
    ],
)
def test_plan_that_does_not_fit_the_model_is_refused(
    architecture: Architecture, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadFile, match=message):
        plan(**changes).check(architecture)


def test_type_whose_blocks_do_not_divide_the_rows_is_refused(grouped: Architecture) -> None:
    types = {"blk.0.ffn_up_exps.weight": "Q4_K"}
    whole = plan(kept=EXPERTS, keep={}, types=types)
    with pytest.raises(BadFile, match=r"ffn_up_exps.weight Q4_K, whose blocks do not divide 32"):
        whole.check(grouped)
    replace(whole, types={"blk.0.ffn_up_exps.weight": "IQ4_NL"}).check(grouped)


def test_unequal_numbers_per_routing_group_are_refused(grouped: Architecture) -> None:
    equal = plan(types={}, keep=dict.fromkeys(range(LAYERS), (0, 3, 4, 5)))
    equal.check(grouped)
    with pytest.raises(BadFile, match="unequal numbers per routing group in layer 2"):
        replace(equal, keep={**equal.keep, 2: (0, 4, 5, 6)}).check(grouped)
    with pytest.raises(BadFile, match="3 of 8 experts cannot be kept: 2 used, 2 groups"):
        plan(types={}, kept=3, keep=dict.fromkeys(range(LAYERS), (0, 1, 4))).check(grouped)


def test_type_that_a_tensor_already_has_is_no_change(architecture: Architecture) -> None:
    plan(types={"blk.0.ffn_gate_inp.weight": "F32"}).check(architecture)


def test_model_whose_experts_cannot_be_dropped_takes_only_types(architecture: Architecture) -> None:
    stuck = replace(architecture, obstacle="some layers route by a token table")
    with pytest.raises(BadFile, match="4 of 8 experts cannot be kept: some layers route by a token table"):
        plan().check(stuck)
    plan(kept=EXPERTS, keep={}).check(stuck)


@pytest.mark.parametrize(
    "changes",
    [
        keeping(4),
        {"kept": EXPERTS, "keep": {}},
        {"keep": {**plan().keep, 2: (1, 2, 5, 6)}},
        {"types": {**plan().types, "output.weight": "Q6_K"}},
        {"types": {**plan().types, "blk.1.attn_q.weight": "Q5_K"}},
        {"types": {}},
        {"made_from": {"source": "another model"}},
        {"arch": "olmoe"},
    ],
    ids=[
        "other experts",
        "all experts",
        "one expert",
        "one type more",
        "one other type",
        "no types",
        "model",
        "arch",
    ],
)
def test_digest_changes_with_what_determines_the_file(changes: dict[str, Any]) -> None:
    assert plan(**changes).digest != plan().digest


@pytest.mark.parametrize(
    "changes",
    [
        {"launch": Launch(context=99)},
        {"predicted": Prediction()},
        {"origin": "user", "method": "frequency"},
        {"types": dict(reversed(plan().types.items())), "keep": dict(reversed(plan().keep.items()))},
        {"made_from": {"source": "abc", "context": 1}},
    ],
    ids=["launch", "prediction", "origin", "order", "other digests"],
)
def test_digest_does_not_change_with_anything_else(changes: dict[str, Any]) -> None:
    assert plan(**changes).digest == plan().digest


def test_records_say_which_experts_were_kept(tmp_path: Path) -> None:
    path = tmp_path / "records.gguf"
    path.write_bytes(header(plan().records(), [], 32))
    file = GgufFile(path)
    assert file.get("edgeprune.plan_digest") == plan().digest
    assert file.get("edgeprune.source_experts") == EXPERTS
    assert file.get("edgeprune.kept_layers").tolist() == [0, 1, 2]
    assert file.get("edgeprune.kept_experts").reshape(3, 4).tolist() == [list(ids) for ids in plan().keep.values()]


@pytest.mark.parametrize("arch", ["qwen3moe", "qwen2moe", "gpt-oss"])
def test_deep_plan_prints_in_a_few_lines_with_every_kind_of_tensor(tmp_path: Path, arch: str) -> None:
    path = toys.synthetic_gguf(tmp_path / "deep.gguf", arch, layers=48, experts=4, width=32, expert_width=32)
    deep = read_architecture(GgufFile(path))
    tensors = [tensor for tensor in deep.tensors if tensor.quantisable]
    names = ["IQ2_XXS", "IQ3_XXS", "Q4_K", "Q6_K"]
    types = {tensor.name: names[tensor.layer * len(names) // 48] for tensor in tensors if tensor.layer >= 0}
    lines = folded(plan(kept=4, experts=4, keep={}, types=types), deep)
    kinds = {tensor.name.removesuffix(".weight").split(".")[-1] for tensor in tensors}
    assert {line.split()[0] for line in lines} == kinds
    assert len(lines) == len(kinds)
    assert len(lines) <= 12
    assert max(map(len, lines)) <= 110
    query = next(line for line in lines if line.startswith("attn_output"))
    assert query.split(maxsplit=1)[1] == "Q6_K[36-47]  Q4_K[24-35]  IQ3_XXS[12-23]  IQ2_XXS[0-11]"


def test_folded_types_are_those_of_the_plan_else_those_of_the_source(architecture: Architecture) -> None:
    types = {f"blk.{layer}.attn_q.weight": "Q4_K" for layer in (0, 2)} | {"output.weight": "Q6_K"}
    lines = {line.split()[0]: line.split(maxsplit=1)[1] for line in folded(plan(types=types), architecture)}
    assert lines["attn_q"] == "F32[1]  Q4_K[0,2]"
    assert lines["output"] == "Q6_K"
    assert lines["token_embd"] == "F32"
    assert "ffn_gate_inp" not in lines


def test_every_stored_type_can_be_planned() -> None:
    for name in (*ggml.CHOICES, "F32", "F16", "BF16"):
        plan(types={"output.weight": name})
