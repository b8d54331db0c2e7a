"""Calibration sums: they survive the disk, damage is noticed, and llama.cpp's tools read the importance matrix."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from safetensors.numpy import save_file

from edgeprune.errors import BadFile
from edgeprune.measure.merging import merge
from edgeprune.measure.reservoir import Reservoir
from edgeprune.measure.statistics import ACCUMULATORS, InputMoments, LayerStatistics, Statistics, write_imatrix
from edgeprune.measure.tensorfile import ArrayFile, Shape, write_arrays

DOMAINS, EXPERTS = ["code", "prose"], 4


def moments(square_sum: list[list[float]], count: list[float]) -> InputMoments:
    return InputMoments(np.array(square_sum), np.array(count), np.zeros(len(count)))


@pytest.fixture
def measured() -> Statistics:
    random = np.random.default_rng(0)
    layers = {layer: LayerStatistics.zeros(len(DOMAINS), EXPERTS, width=3, hidden=5) for layer in (1, 12)}
    for sums in layers.values():
        for array in sums.arrays.values():
            array += random.random(array.shape).astype(np.float32)
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
        assert set(loaded.layers[layer].arrays) == set(ACCUMULATORS)
        for name in ACCUMULATORS:
            assert np.array_equal(loaded.layers[layer][name], sums[name])
            assert loaded.layers[layer][name].dtype == np.float64
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


def test_arrays_of_a_type_that_is_not_ours_are_a_bad_file(tmp_path: Path) -> None:
    save_file({"x": np.zeros(3, np.uint8)}, tmp_path / "other.safetensors", metadata={"edgeprune": "{}"})
    with pytest.raises(BadFile, match="arrays of the type U8"):
        Statistics.load(tmp_path / "other.safetensors")


def test_statistics_that_are_replaced_while_they_are_in_use_are_not_mixed_up(
    measured: Statistics, tmp_path: Path
) -> None:
    path = tmp_path / "statistics.safetensors"
    measured.save(path)
    loaded = Statistics.load(path)
    assert loaded.layers[1].total("routed").shape == (EXPERTS,)
    measured.save(path)
    with pytest.raises(BadFile, match="was replaced while it was in use"):
        loaded.layers[1].total("routed")


def test_rows_of_an_array_can_be_read_alone(tmp_path: Path) -> None:
    values = np.arange(24, dtype=np.float32).reshape(4, 3, 2)
    write_arrays(tmp_path / "a.safetensors", [Shape("a", "float32", (4, 3, 2))], [values], {"k": "v"})
    file = ArrayFile(tmp_path / "a.safetensors")
    assert (file.metadata, list(file), file.shape("a")) == ({"k": "v"}, ["a"], (4, 3, 2))
    assert np.array_equal(file.part("a", 1, 3), values[1:3]) and np.array_equal(file["a"], values)
    assert file.part("a", 0, 0).shape == (0, 3, 2)


def test_total_sums_over_domains(measured: Statistics) -> None:
    sums = measured.layers[12]
    assert sums.total("gate_sum").tolist() == pytest.approx(sums["gate_sum"].sum(axis=0).tolist())
    assert sums.total("peak").tolist() == sums["peak"].max(axis=0).tolist()
    assert LayerStatistics.zeros(3, EXPERTS).total("routed").tolist() == [0.0] * EXPERTS


def test_what_was_not_observed_is_named() -> None:
    with pytest.raises(BadFile, match="no turn_sum"):
        LayerStatistics({"routed": np.ones((1, 4))})["turn_sum"]


def reservoir(tokens: int, seed: int) -> Reservoir:
    random = np.random.default_rng(seed)
    wide, experts = random.standard_normal((2, tokens, 6)).astype(np.float32), random.random((2, tokens, EXPERTS))
    return Reservoir(
        domain=np.zeros(tokens, np.int16),
        x=wide[0],
        y=1e6 * wide[1],
        ids=random.integers(0, EXPERTS, (tokens, 2)).astype(np.int16),
        gates=random.random((tokens, 2)).astype(np.float32),
        selection=experts[0].astype(np.float32),
        probs=experts[1].astype(np.float32),
        residual=random.random(tokens).astype(np.float32),
        turn=random.random(tokens).astype(np.float32),
        stream=None,
    )


def part(domain: str, tokens: int, seed: int, folder: Path, model: str = "abc") -> tuple[Statistics, Path]:
    random = np.random.default_rng(seed)
    sums = LayerStatistics.zeros(1, EXPERTS, width=3, hidden=5)
    for array in sums.arrays.values():
        array += random.random(array.shape)
    seen = {"output.weight": InputMoments(random.random((1, 7)), np.array([float(tokens)]), random.random(1))}
    made = Statistics([domain], tokens, 64, {0: sums}, seen, {"model": model}, {0: reservoir(tokens, seed)})
    made.save(folder / f"{domain}{seed}.safetensors")
    return made, folder / f"{domain}{seed}.safetensors"


def test_merging_adds_domains_of_one_name_and_puts_others_side_by_side(tmp_path: Path) -> None:
    parts = [part("code", 5, 0, tmp_path), part("prose", 3, 1, tmp_path), part("code", 4, 2, tmp_path)]
    merge([path for _, path in parts], tmp_path / "all.safetensors", {"model": "abc", "text": "x"})
    (first, _), (second, _), (third, _) = parts
    merged = Statistics.load(tmp_path / "all.safetensors")
    assert (merged.domains, merged.tokens, merged.window) == (["code", "prose"], 12, 64)
    assert merged.made_from == {"model": "abc", "text": "x"}
    for name, kind in ACCUMULATORS.items():
        code = kind.combine(first.layers[0][name][0], third.layers[0][name][0])
        np.testing.assert_allclose(merged.layers[0][name], [code, second.layers[0][name][0]], rtol=1e-6)
    moment = merged.moments["output.weight"]
    assert moment.count.tolist() == [12.0]
    np.testing.assert_allclose(moment.square_sum, sum(made.moments["output.weight"].square_sum for made, _ in parts))
    tokens = merged.reservoirs[0]
    assert tokens.domain.tolist() == [0] * 5 + [1] * 3 + [0] * 4
    for name in ("ids", "gates", "selection", "probs", "residual", "turn"):
        joined = np.concatenate([getattr(made.reservoirs[0], name) for made, _ in parts])
        np.testing.assert_array_equal(getattr(tokens, name), joined)
    y = np.concatenate([made.reservoirs[0].y for made, _ in parts])
    np.testing.assert_allclose(tokens.y, y, atol=1e-3 * np.abs(y).max())


def test_a_merged_reservoir_is_an_even_sample_of_all_texts(tmp_path: Path) -> None:
    """Texts of 400 and 100 tokens: the kept tokens are four to one, whatever each file kept."""
    paths = []
    for name, tokens, kept in (("long", 400, 40), ("short", 100, 40)):
        sums = {0: LayerStatistics.zeros(1, EXPERTS)}
        made = Statistics([name], tokens, 64, sums, {}, {"model": "abc"}, {0: reservoir(kept, tokens)})
        made.save(tmp_path / name)
        paths.append(tmp_path / name)
    for most, expected in ((30, [24, 6]), (1_000, [40, 10])):
        assert merge(paths, tmp_path / "both", {"model": "abc"}, most) == []
        tokens = Statistics.load(tmp_path / "both").reservoirs[0]
        assert np.bincount(tokens.domain).tolist() == expected
        whole = Statistics.load(paths[0]).reservoirs[0]
        own = [np.flatnonzero((whole.ids == row).all(axis=1) & np.isclose(whole.residual, r)) for row, r in
               zip(tokens.ids[: expected[0]], tokens.residual[: expected[0]], strict=True)]  # fmt: skip
        positions = [int(found[0]) for found in own]
        assert positions == sorted(set(positions))  # whole rows, in their order
        first = (tmp_path / "both").read_bytes()
        merge(paths, tmp_path / "both", {"model": "abc"}, most)
        assert (tmp_path / "both").read_bytes() == first


def test_what_not_every_file_has_is_left_out_and_named(tmp_path: Path) -> None:
    whole, _ = part("code", 5, 0, tmp_path)
    bare = {name: array for name, array in whole.layers[0].arrays.items() if name != "mask_gradient_sum"}
    made = Statistics(["prose"], 5, 64, {0: LayerStatistics(bare)}, {}, {"model": "abc"})
    made.save(tmp_path / "bare.safetensors")
    left_out = merge(
        [tmp_path / "code0.safetensors", tmp_path / "bare.safetensors"], tmp_path / "both", made.made_from
    )
    assert left_out == ["mask_gradient_sum", "output.weight", "the reservoir"]
    both = Statistics.load(tmp_path / "both")
    assert "mask_gradient_sum" not in both.layers[0] and "routed" in both.layers[0] and not both.reservoirs


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        (b"GGUF\x03\0\0\0", "this is a GGUF"),
        (b"PK\x03\x04", "was not made by `edgeprune calibrate`"),
        (None, "`edgeprune calibrate` makes statistics.safetensors"),
    ],
    ids=["imatrix", "something else", "missing"],
)
def test_another_file_is_not_to_be_deleted(content: bytes | None, hint: str, tmp_path: Path) -> None:
    path = tmp_path / "mine"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadFile) as error:
        Statistics.load(path)
    assert hint in error.value.hint and "delete" not in str(error.value)


def test_merging_does_not_depend_on_the_order_of_sums(tmp_path: Path) -> None:
    paths = [part("code", 5, 0, tmp_path)[1], part("code", 3, 1, tmp_path)[1]]
    for name, order in (("a", paths), ("b", paths[::-1])):
        merge(order, tmp_path / name, {"model": "abc"})
    one, other = Statistics.load(tmp_path / "a"), Statistics.load(tmp_path / "b")
    for name in ACCUMULATORS:
        np.testing.assert_array_equal(one.layers[0][name], other.layers[0][name])


def test_statistics_of_another_model_are_not_merged(tmp_path: Path) -> None:
    paths = [part("code", 5, 0, tmp_path)[1], part("prose", 3, 1, tmp_path, model="other")[1]]
    with pytest.raises(BadFile, match="another model") as error:
        merge(paths, tmp_path / "all.safetensors", {"model": "abc"})
    assert dict(error.value.rows) == {"its model": "other", "this model": "abc"}
    assert not (tmp_path / "all.safetensors").exists()


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
