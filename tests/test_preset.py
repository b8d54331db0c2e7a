"""Stock presets made by llama.cpp itself with edgeprune's importance matrix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toys
from gguf import GGUFReader

from edgeprune.build.builder import build
from edgeprune.build.preset import PRESETS
from edgeprune.decide.plan import Plan, Prediction
from edgeprune.errors import BadFile, EdgepruneError
from edgeprune.measure import child
from edgeprune.measure.launch import Launch
from edgeprune.measure.statistics import InputMoments, Statistics, write_imatrix
from edgeprune.model.architecture import read_architecture
from edgeprune.model.gguf import GgufFile
from edgeprune.prove.baseline import contenders

pytest_plugins = ("demo_fixtures",)


@pytest.fixture(scope="module")
def statistics(demo_gguf: Path, small_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's statistics over the small text."""
    path = tmp_path_factory.mktemp("statistics") / "statistics.safetensors"
    architecture = read_architecture(GgufFile(demo_gguf))
    child.call(
        "edgeprune.measure.calibration:collect",
        {
            "model": str(demo_gguf),
            "output": str(path),
            "scratch": str(path.parent / "scratch"),
            "texts": [{"domain": "small", "path": str(small_text), "split": "shared"}],
            "window": 64,
            "most_tokens": 512,
            "weights": [tensor.name for tensor in architecture.tensors if tensor.quantisable],
            "experts": architecture.experts,
            "arch": architecture.arch,
            "made_from": {},
        },
    )
    return path


def quantized(model: Path, output: Path, preset: str, statistics: Path) -> dict[str, Any]:
    arguments = {"model": str(model), "output": str(output), "preset": preset, "statistics": str(statistics)}
    value: dict[str, Any] = child.call("edgeprune.build.preset:quantize", {**arguments, "expected_bytes": 1 << 20})
    return value


@pytest.fixture(scope="module")
def sizes(demo_gguf: Path, statistics: Path) -> dict[str, int]:
    arguments = {"model": str(demo_gguf), "statistics": str(statistics)}
    found: dict[str, int] = child.call("edgeprune.build.preset:sizes", arguments)
    return found


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small random model, and statistics by which its inputs differ a lot."""
    folder = tmp_path_factory.mktemp("small")
    model = toys.synthetic_gguf(folder / "model.gguf", "qwen3moe", layers=1, experts=4)
    random = np.random.default_rng(7)
    moments = {
        tensor.name: InputMoments(
            random.lognormal(0, 2, (tensor.matrices, tensor.shape[0])), *np.ones((2, tensor.matrices))
        )
        for tensor in read_architecture(GgufFile(model)).tensors
        if tensor.quantisable
    }
    Statistics(["all"], 64, 64, {}, moments, {}).save(folder / "statistics.safetensors")
    return model, folder / "statistics.safetensors"


@pytest.mark.parametrize("preset", ["Q8_0", "Q4_K_M", "IQ4_XS", "Q2_K"])
def test_a_preset_is_what_the_builder_makes_of_its_types(
    preset: str, small: tuple[Path, Path], tmp_path: Path
) -> None:
    model, statistics = small
    made = quantized(model, tmp_path / "preset.gguf", preset, statistics)
    source, file = GgufFile(model), GgufFile(tmp_path / "preset.gguf")
    assert made["nbytes"] == (tmp_path / "preset.gguf").stat().st_size
    assert made["types"] == {info.name: info.type for info in file.tensors.values()}

    architecture = read_architecture(source)
    own = {info.name: info.type for info in source.tensors.values()}
    types = {name: kind for name, kind in made["types"].items() if kind != own[name]}
    origin = f"stock preset {preset}"
    plan = Plan(
        architecture.arch,
        architecture.experts,
        architecture.experts,
        {},
        types,
        Launch(),
        "",
        origin,
        Prediction(),
        {},
    )
    build(str(model), plan.to_json(), str(tmp_path / "ours.gguf"), str(statistics))
    ours = GgufFile(tmp_path / "ours.gguf")
    for name in file.tensors:
        np.testing.assert_array_equal(ours.raw(name), file.raw(name), err_msg=name)


@pytest.mark.parametrize("preset", ["Q8_0", "Q4_K_M"])
def test_the_size_of_a_preset_is_known_before_it_is_made(
    preset: str, demo_gguf: Path, statistics: Path, sizes: dict[str, int], tmp_path: Path
) -> None:
    quantized(demo_gguf, tmp_path / "preset.gguf", preset, statistics)
    tensor_bytes = sum(info.nbytes for info in GgufFile(tmp_path / "preset.gguf").tensors.values())
    assert sizes[preset] == pytest.approx(tensor_bytes, rel=1e-3, abs=2**20 / 100)


def test_sizes_are_known_for_every_preset_and_fall_with_the_bits(sizes: dict[str, int]) -> None:
    assert set(sizes) == set(PRESETS)
    ladder = ["Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K", "IQ2_XXS", "IQ1_S"]
    assert sorted(ladder, key=lambda name: -sizes[name]) == ladder


@pytest.mark.parametrize("preset", ["Q8_0", "Q4_K_M", "IQ1_S"])
def test_contenders_are_the_presets_that_can_fit_largest_first(preset: str, sizes: dict[str, int]) -> None:
    header = 100_000
    chosen = contenders(sizes, sizes[preset] + header, header)
    fitting = [name for name in sizes if sizes[name] <= sizes[preset]]
    assert preset in fitting
    assert chosen == sorted(fitting, key=lambda name: -sizes[name])
    assert contenders(sizes, min(sizes.values()) // 2, header) == []


def test_presets_that_need_an_importance_matrix_take_ours(small: tuple[Path, Path], tmp_path: Path) -> None:
    model, statistics = small
    empty = tmp_path / "empty.safetensors"
    Statistics(["none"], 0, 64, {}, {}, {}).save(empty)
    with pytest.raises(EdgepruneError, match="could not make preset IQ2_XXS"):
        quantized(model, tmp_path / "x.gguf", "IQ2_XXS", empty)
    assert [path.name for path in tmp_path.iterdir()] == ["empty.safetensors"]
    made = quantized(model, tmp_path / "x.gguf", "IQ2_XXS", statistics)
    assert made["types"]["blk.0.ffn_up_exps.weight"] == "IQ2_XXS"


def test_statistics_of_a_model_of_other_widths_are_refused(statistics: Path, tmp_path: Path) -> None:
    other = toys.synthetic_gguf(tmp_path / "other.gguf", "qwen3moe", width=128, expert_width=128)
    with pytest.raises(EdgepruneError, match="could not make preset Q4_K_M") as error:
        quantized(other, tmp_path / "x.gguf", "Q4_K_M", statistics)
    assert any("imatrix" in line for _, line in error.value.rows)
    assert [path.name for path in tmp_path.iterdir()] == ["other.gguf"]


def test_the_imatrix_file_follows_llama_cpps_conventions(statistics: Path, tmp_path: Path) -> None:
    measured = Statistics.load(statistics)
    write_imatrix(measured, tmp_path / "imatrix.gguf")
    reader = GGUFReader(tmp_path / "imatrix.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.type"] == "imatrix"
    assert fields["imatrix.datasets"] == ["small"]
    assert fields["imatrix.chunk_size"] == 64
    assert fields["imatrix.chunk_count"] == measured.tokens // 64
    assert reader.fields["imatrix.chunk_count"].types[0].name == "UINT32"
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert set(tensors) == {f"{name}{end}" for name in measured.moments for end in (".in_sum2", ".counts")}
    for name, moment in measured.moments.items():
        matrices, width = moment.square_sum.shape
        sums, counts = tensors[f"{name}.in_sum2"], tensors[f"{name}.counts"]
        assert sums.shape.tolist() == [width, matrices] and counts.shape.tolist() == [1, matrices]
        assert sums.tensor_type.name == counts.tensor_type.name == "F32"
        np.testing.assert_allclose(np.asarray(sums.data), moment.square_sum, rtol=1e-6)
        np.testing.assert_allclose(np.asarray(counts.data).reshape(-1), moment.count)


@pytest.mark.parametrize("content", [b"", b"\0" * 4096], ids=["empty", "zeros"])
def test_a_file_that_is_no_statistics_is_refused(content: bytes, demo_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "s.safetensors").write_bytes(content)
    with pytest.raises(BadFile, match="cannot read the statistics"):
        quantized(demo_gguf, tmp_path / "x.gguf", "Q8_0", tmp_path / "s.safetensors")
