"""Every family that has a converter: llama.cpp computes what transformers computes, whole and without experts."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import families
import pytest
import torch
import transformers
from agreement import divergence, log_probabilities, token_windows, transformers_log_probabilities
from families import FAMILIES

from edgeprune.build import builder
from edgeprune.decide.plan import Plan, Prediction
from edgeprune.files import data_folder
from edgeprune.measure.launch import Launch
from edgeprune.model.architecture import read_architecture
from edgeprune.model.checkpoint import open_checkpoint
from edgeprune.model.convert import SOURCE_KEY, convert
from edgeprune.model.converter import load_converter
from edgeprune.model.gguf import GgufFile
from edgeprune.model.rope import FREQUENCIES

CASES = [(name, "") for name in FAMILIES] + [(name, case) for name in FAMILIES for case in FAMILIES[name].variants]
CASE_NAMES = [f"{name}, {case}" if case else name for name, case in CASES]
# The first three have such a test of their own; Gemma's experts are in one tensor everywhere.
NEW = [name for name in FAMILIES if name not in ("qwen3_moe", "mixtral", "olmoe", "gemma4")]
CheckpointMaker = Any


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, own_home: Path) -> Any:
    """Checkpoint and F32 GGUF of a family's case, made when first asked for. Do not change them."""
    known: dict[tuple[str, str], tuple[Path, Path]] = {}

    def make(name: str, case: str = "") -> tuple[Path, Path]:
        if (name, case) not in known:
            folder = tmp_path_factory.mktemp("families")
            checkpoint = families.make_checkpoint(name, folder / name, changes_of(name, case))
            convert(checkpoint, folder / "model.gguf", "f32")
            known[name, case] = checkpoint, folder / "model.gguf"
        return known[name, case]

    return make


def changes_of(name: str, case: str) -> Mapping[str, Any]:
    return FAMILIES[name].variants[case] if case else {}


def loaded(name: str, checkpoint: Path) -> Any:
    auto = getattr(transformers, FAMILIES[name].auto)
    return auto.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager").eval()


def assert_same(expected: torch.Tensor, found: torch.Tensor) -> None:
    spread = -(expected.exp() * expected).sum(-1).mean()
    assert spread < 0.85 * torch.log(torch.tensor(float(expected.shape[-1])))  # not flat
    nats, same = divergence(expected, found)
    assert nats < 1e-5 and same == 1.0, (nats, same)


@pytest.mark.parametrize(("name", "case"), CASES, ids=CASE_NAMES)
def test_llama_cpp_computes_what_transformers_computes(name: str, case: str, made: Any, tmp_path: Path) -> None:
    checkpoint, gguf = made(name, case)
    tokens = token_windows(checkpoint, tmp_path)
    expected = transformers_log_probabilities(loaded(name, checkpoint), tokens)
    assert_same(expected, log_probabilities(gguf, tokens.tolist()))


@pytest.mark.parametrize("name", FAMILIES)
def test_half_of_the_experts_compute_what_transformers_computes_with_them(
    name: str, made: Any, tmp_path: Path
) -> None:
    checkpoint, gguf = made(name)
    architecture = read_architecture(GgufFile(gguf))
    chosen = families.kept_experts(architecture.layers, architecture.groups)
    keep = {layer: chosen[layer] for layer in architecture.moe_layers}
    plan = Plan(
        arch=architecture.arch,
        experts=architecture.experts,
        kept=families.KEPT,
        keep=keep,
        types={},
        launch=Launch(),
        method="test",
        origin="user",
        predicted=Prediction(),
        made_from={"source": "toy"},
    )
    builder.build(str(gguf), plan.to_json(), str(tmp_path / "half.gguf"), "")
    model = families.without_experts(name, loaded(name, checkpoint), keep, {})
    model.set_attn_implementation("eager")
    tokens = token_windows(checkpoint, tmp_path)
    found = log_probabilities(tmp_path / "half.gguf", tokens.tolist())
    assert_same(transformers_log_probabilities(model, tokens), found)
    assert divergence(transformers_log_probabilities(loaded(name, checkpoint), tokens), found)[0] > 0.01


@pytest.mark.parametrize("name", NEW)
def test_both_layouts_of_experts_give_the_same_file(name: str, made: Any, tmp_path: Path) -> None:
    """transformers keeps the experts of a layer in one tensor, published checkpoints mostly one by one."""
    checkpoint, gguf = made(name)
    other = families.make_checkpoint(name, tmp_path / name, save_original_format=False)
    names = set(open_checkpoint(other).stored)
    assert names != set(open_checkpoint(checkpoint).stored)
    convert(other, tmp_path / "other.gguf", "f32", name)
    one, two = GgufFile(gguf), GgufFile(tmp_path / "other.gguf")
    assert list(one.tensors) == list(two.tensors)
    for tensor in one.tensors:
        assert (one.raw(tensor) == two.raw(tensor)).all(), tensor
    assert [e.raw for k, e in one.entries.items() if k != SOURCE_KEY] == [
        e.raw for k, e in two.entries.items() if k != SOURCE_KEY
    ]


# Converters are data; each must be complete.


def converter_files() -> list[Path]:
    return sorted(data_folder("converters").glob("*.toml"))


def test_every_converter_has_a_toy_model() -> None:
    assert {path.stem for path in converter_files()} == set(FAMILIES)


@pytest.mark.parametrize("name", FAMILIES)
def test_converter_accounts_for_every_tensor_of_its_model(name: str, made: Any) -> None:
    checkpoint, gguf = made(name)
    converter = load_converter(data_folder("converters") / f"{name}.toml")
    patterns = [pattern for group in converter.left_out.values() for pattern in group]
    stored = [
        tensor
        for key, tensor in open_checkpoint(checkpoint).stored.items()
        if not any(fnmatch(key, pattern) for pattern in patterns)
    ]
    file = GgufFile(gguf)
    computed = sum(torch.Size(file.tensors[key].shape).numel() for key in (FREQUENCIES,) if key in file.tensors)
    parameters = sum(torch.Size(tensor.shape).numel() for tensor in stored)
    assert read_architecture(file).parameters - computed == parameters
    assert converter.arch == FAMILIES[name].arch == file.get("general.architecture")
    required = {f"{converter.arch}.{key}" for key, field in converter.metadata.items() if not field.optional}
    assert required <= set(file.entries)
