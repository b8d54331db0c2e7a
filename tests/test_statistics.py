"""Calibration sums: they survive the disk, damage is noticed, and llama.cpp's tools read the importance matrix."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from safetensors.numpy import save_file

from edgeprune.errors import BadFile
from edgeprune.measure.statistics import PER_EXPERT, InputMoments, LayerStatistics, Statistics, write_imatrix

DOMAINS, EXPERTS = ["code", "prose"], 4


def moments(square_sum: list[list[float]], count: list[float]) -> InputMoments:
    return InputMoments(np.array(square_sum), np.array(count), np.zeros(len(count)))


@pytest.fixture
def measured() -> Statistics:
    random = np.random.default_rng(0)
    layers = {
        layer: LayerStatistics(*(random.random((len(DOMAINS), EXPERTS)) for _ in PER_EXPERT)) for layer in (1, 12)
    }
    counts = {"blk.1.ffn_down_exps.weight": (32, [5.0, 0.0, 7.0, 1.0]), "output.weight": (48, [1000.0])}
    seen = {
        name: InputMoments(random.random((len(count), width)), np.array(count), random.random(len(count)))
        for name, (width, count) in counts.items()
    }
    return Statistics(DOMAINS, 1000, 256, layers, seen, {"model": "abc", "text": None})


def test_statistics_survive_the_disk(measured: Statistics, tmp_path: Path) -> None:
    measured.save(tmp_path / "statistics.safetensors")
    loaded = Statistics.load(tmp_path / "statistics.safetensors")
    assert (loaded.domains, loaded.tokens, loaded.window) == (DOMAINS, 1000, 256)
    assert loaded.made_from == {"model": "abc", "text": None}
    assert set(loaded.layers) == {1, 12}
    for layer, sums in measured.layers.items():
        for name in PER_EXPERT:
            assert np.array_equal(getattr(loaded.layers[layer], name), getattr(sums, name))
            assert getattr(loaded.layers[layer], name).dtype == np.float64
    assert set(loaded.moments) == set(measured.moments)
    for name, moment in measured.moments.items():
        assert np.array_equal(loaded.moments[name].square_sum, moment.square_sum)
        assert np.array_equal(loaded.moments[name].count, moment.count)
        assert np.array_equal(loaded.moments[name].output_square, moment.output_square)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.05, 0.5, 0.999], ids=lambda share: f"{share:.1%} left")
def test_truncated_statistics_are_a_bad_file(measured: Statistics, tmp_path: Path, share: float) -> None:
    path = tmp_path / "statistics.safetensors"
    measured.save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(BadFile, match=r"cannot read the statistics in .*statistics\.safetensors"):
        Statistics.load(path)


def test_missing_statistics_are_a_bad_file(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match="cannot read the statistics"):
        Statistics.load(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize("metadata", [None, {"edgeprune": "{"}], ids=["none", "cut"])
def test_safetensors_of_another_kind_are_a_bad_file(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    save_file({"x": np.zeros(3)}, tmp_path / "other.safetensors", metadata=metadata)
    with pytest.raises(BadFile, match="cannot read the statistics"):
        Statistics.load(tmp_path / "other.safetensors")


def test_total_sums_over_domains(measured: Statistics) -> None:
    sums = measured.layers[12]
    assert sums.total("gate_sum").tolist() == pytest.approx((sums.gate_sum[0] + sums.gate_sum[1]).tolist())
    assert LayerStatistics.zeros(3, EXPERTS).total("routed").tolist() == [0.0] * EXPERTS


def test_mean_is_the_mean_squared_input() -> None:
    mean = moments([[8.0, 2.0], [30.0, 3.0]], [2.0, 3.0]).mean()
    assert mean.dtype == np.float32
    assert mean.tolist() == [[4.0, 1.0], [10.0, 1.0]]


def test_matrix_that_saw_no_token_borrows_the_mean_over_the_others() -> None:
    mean = moments([[8.0, 2.0], [0.0, 0.0], [30.0, 3.0]], [2.0, 0.0, 3.0]).mean()
    assert mean[1].tolist() == pytest.approx([38 / 5, 5 / 5])


def test_without_any_token_all_inputs_are_equally_important() -> None:
    assert moments([[0.0] * 3] * 2, [0.0] * 2).mean().tolist() == [[1.0] * 3] * 2


def test_no_input_is_entirely_unimportant() -> None:
    mean = moments([[3.0, 0.0, 0.0]], [1.0]).mean()
    assert mean[0].tolist() == pytest.approx([3.0, 1e-6, 1e-6])
    # A matrix whose inputs were always zero.
    assert moments([[0.0] * 3], [9.0]).mean().tolist() == [[1.0] * 3]


def test_importance_matrix_is_what_llama_quantize_expects(measured: Statistics, tmp_path: Path) -> None:
    """Read back with llama.cpp's own Python reader: names, shapes, values and chunk counts."""
    path = tmp_path / "imatrix.gguf"
    write_imatrix(measured, path)
    reader = GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.type"] == "imatrix"
    assert fields["imatrix.datasets"] == DOMAINS
    assert fields["imatrix.chunk_size"] == 256
    assert fields["imatrix.chunk_count"] == 3
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == 2 * len(measured.moments)
    for name, moment in measured.moments.items():
        squares, counts = tensors[f"{name}.in_sum2"], tensors[f"{name}.counts"]
        matrices, width = moment.square_sum.shape
        assert squares.shape.tolist() == [width, matrices]
        assert counts.shape.tolist() == [1, matrices]
        assert {squares.tensor_type.name, counts.tensor_type.name} == {"F32"}
        assert np.array_equal(squares.data, moment.square_sum.astype(np.float32))
        assert counts.data.ravel().tolist() == moment.count.tolist()
