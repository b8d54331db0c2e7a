"""GGML types: the table against llama.cpp's own, and what must never reach its encoders."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edgeprune.errors import BadFile, Unsupported
from edgeprune.model import ggml

TYPES = list(ggml.BY_NAME.values())
NAMES = [kind.name for kind in TYPES]
WIDTH = 1024

# Root of the weighted squared error over the weighted energy, for normal weights. The lookup tables of IQ2_XS, IQ2_S,
# IQ1_S and IQ1_M take the library 15 seconds to build, so these are left to the builds that use them.
EXPECTED_ERRORS = {
    "F32": 0.0, "BF16": 0.0017, "F16": 0.0002, "Q8_0": 0.0053, "Q6_K": 0.016, "Q5_K": 0.033, "Q5_1": 0.031,
    "Q5_0": 0.038, "Q4_K": 0.065, "Q4_1": 0.064, "Q4_0": 0.077, "IQ4_NL": 0.070, "IQ4_XS": 0.071, "MXFP4": 0.115,
    "NVFP4": 0.101, "Q3_K": 0.135, "IQ3_S": 0.119, "IQ3_XXS": 0.150, "Q2_K": 0.239, "IQ2_XXS": 0.304,
    "Q1_0": 0.596, "Q2_0": 0.704, "TQ1_0": 0.790, "TQ2_0": 0.790,
}  # fmt: skip


def weights(rows: int = 4, width: int = WIDTH, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.float32(0.02) * np.random.default_rng(seed).standard_normal((rows, width), np.float32)


def importance(width: int = WIDTH) -> npt.NDArray[np.float32]:
    return np.random.default_rng(1).gamma(1.0, 1.0, width).astype(np.float32)


@pytest.mark.parametrize("kind", TYPES, ids=NAMES)
def test_table_has_the_block_sizes_of_the_library(kind: ggml.GgmlType) -> None:
    assert ggml.native_block(kind) == (kind.block, kind.block_bytes)


def test_names_and_numbers_are_those_of_the_library() -> None:
    traits = ggml.library().ggml_get_type_traits
    for kind in TYPES:
        assert traits(kind.id).contents.type_name.decode().upper() == kind.name


def test_every_choice_is_a_type_that_can_be_encoded_and_decoded() -> None:
    for name in (*ggml.CHOICES, "F32", "F16", "BF16"):
        kind = ggml.BY_NAME[name]
        assert kind.encodable
        assert name == "F32" or ggml.library().ggml_get_type_traits(kind.id).contents.to_float


SIZES = [("Q4_K", (256,), 144), ("Q4_K", (512, 3), 864), ("IQ1_S", (2048, 768, 128), 39_321_600), ("F32", (1,), 4)]


@pytest.mark.parametrize(("name", "shape", "size"), SIZES, ids=[f"{name} {shape}" for name, shape, _ in SIZES])
def test_size_of_a_tensor_is_exact(name: str, shape: tuple[int, ...], size: int) -> None:
    assert ggml.tensor_bytes(name, shape) == size


def test_bits_per_weight_count_the_scales() -> None:
    assert ggml.BY_NAME["Q4_K"].bits_per_weight == 4.5
    assert ggml.BY_NAME["Q8_0"].bits_per_weight == 8.5
    assert [kind.name for kind in TYPES if kind.is_float and kind.bits_per_weight == 16 and kind.encodable] == [
        "F16",
        "BF16",
    ]


def test_type_is_found_in_either_case_and_an_unknown_one_lists_the_known() -> None:
    assert ggml.type_named("q4_k") is ggml.BY_NAME["Q4_K"]
    with pytest.raises(Unsupported, match="unknown GGML type Q4_K_M") as refusal:
        ggml.type_named("Q4_K_M")
    assert "Q4_K" in refusal.value.hint


@pytest.mark.parametrize("name", EXPECTED_ERRORS)
def test_encoding_loses_as_much_as_the_type_should(name: str) -> None:
    kind, exact, columns = ggml.BY_NAME[name], weights(), importance()
    encoded = ggml.encode(kind, exact, columns)
    assert encoded.shape == (len(exact), kind.row_bytes(WIDTH))
    decoded = ggml.decode(kind, encoded.reshape(-1), WIDTH)
    error = float(np.sqrt((columns * (decoded - exact) ** 2).sum() / (columns * exact**2).sum()))
    assert error == pytest.approx(EXPECTED_ERRORS[name], rel=0.15, abs=1e-4)


@pytest.mark.parametrize("name", ["Q4_K", "IQ3_S", "Q8_0"])
def test_importance_steers_the_error_to_where_it_does_not_matter(name: str) -> None:
    if name == "Q8_0":  # has no use for it, but must accept it
        assert np.array_equal(
            ggml.encode(ggml.BY_NAME[name], weights(), importance()),
            ggml.encode(ggml.BY_NAME[name], weights(), None),
        )
        return
    kind, exact = ggml.BY_NAME[name], weights()
    columns = np.where(np.arange(WIDTH) % 4 == 0, 100.0, 0.01).astype(np.float32)

    def important_error(imatrix: npt.NDArray[np.float32] | None) -> float:
        decoded = ggml.decode(kind, ggml.encode(kind, exact, imatrix).reshape(-1), WIDTH)
        return float(((decoded - exact)[:, ::4] ** 2).sum())

    assert important_error(columns) < 0.9 * important_error(None)


@pytest.mark.parametrize("name", EXPECTED_ERRORS)
def test_rows_of_zeros_stay_zeros(name: str) -> None:
    kind = ggml.BY_NAME[name]
    for columns in (importance(), np.zeros(WIDTH, np.float32)):
        encoded = ggml.encode(kind, np.zeros((2, WIDTH), np.float32), columns)
        assert not ggml.decode(kind, encoded.reshape(-1), WIDTH).any()


@pytest.mark.parametrize("name", EXPECTED_ERRORS)
def test_largest_accepted_weights_are_encoded_as_well_as_small_ones(name: str) -> None:
    kind, small = ggml.BY_NAME[name], weights()
    factor = np.float32(min(kind.largest, 1e30) * 0.99 / np.abs(small).max())

    def error(exact: npt.NDArray[np.float32]) -> float:
        decoded = ggml.decode(kind, ggml.encode(kind, exact, importance()).reshape(-1), WIDTH).astype(np.float64)
        return float(np.sqrt(((decoded - exact) ** 2).sum() / (exact.astype(np.float64) ** 2).sum()))

    assert error(small * factor) == pytest.approx(error(small), rel=0.1, abs=1e-4)


def test_encoding_does_not_depend_on_memory_order() -> None:
    kind, exact = ggml.BY_NAME["Q4_K"], weights(8)
    strided = np.asfortranarray(exact)
    assert np.array_equal(ggml.encode(kind, exact, None), ggml.encode(kind, strided, None))
    assert np.array_equal(ggml.encode(kind, exact, None)[::2], ggml.encode(kind, exact[::2], None))


REFUSED_WEIGHTS: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("NaN", {"value": np.nan}, BadFile, "1 values that are NaN or infinite"),
    ("infinity", {"value": np.inf}, BadFile, "1 values that are NaN or infinite"),
    ("minus infinity", {"value": -np.inf}, BadFile, "1 values that are NaN or infinite"),
    ("too large", {"value": 6.6e4}, BadFile, "weights up to 6.6e"),
    ("too far below zero", {"value": -6.6e4}, BadFile, "weights up to 6.6e"),
    ("half a block", {"width": WIDTH - 16}, Unsupported, "do not divide into"),
    ("importance of another width", {"columns": WIDTH - 1}, BadFile, "importance matrix has the shape"),
    ("importance NaN", {"importance": np.nan}, BadFile, "importance matrix holds"),
    ("importance below zero", {"importance": -1.0}, BadFile, "importance matrix holds"),
]


@pytest.mark.parametrize("kind", [k for k in TYPES if k.encodable and not k.is_float], ids=lambda kind: kind.name)
@pytest.mark.parametrize(
    ("case", "kind_of_refusal", "cause"), [c[1:] for c in REFUSED_WEIGHTS], ids=[c[0] for c in REFUSED_WEIGHTS]
)
def test_what_would_abort_the_encoder_is_refused_before(
    kind: ggml.GgmlType, case: dict[str, Any], kind_of_refusal: type[Exception], cause: str
) -> None:
    values = weights(width=case.get("width", WIDTH))
    values[1, 17] = case.get("value", values[1, 17])
    columns = importance(case.get("columns", values.shape[1]))
    columns[5] = case.get("importance", columns[5])
    with pytest.raises(kind_of_refusal, match=cause) as refusal:
        ggml.encode(kind, values, columns, "blk.0.ffn_up_exps.weight")
    assert "blk.0.ffn_up_exps.weight" in str(refusal.value)


@pytest.mark.parametrize("kind", [k for k in TYPES if k.needs_imatrix], ids=lambda kind: kind.name)
def test_type_that_needs_an_importance_matrix_is_refused_without(kind: ggml.GgmlType) -> None:
    with pytest.raises(Unsupported, match="needs an importance matrix"):
        ggml.encode(kind, weights(), None, "t")


def test_library_agrees_about_which_types_abort_without_importance() -> None:
    requires = ggml.library().ggml_quantize_requires_imatrix
    requires.restype = ctypes.c_bool
    aborting = {kind.name for kind in TYPES if requires(kind.id)}
    assert aborting and aborting <= {kind.name for kind in TYPES if kind.needs_imatrix}


@pytest.mark.parametrize("kind", [k for k in TYPES if not k.encodable], ids=lambda kind: kind.name)
def test_type_that_only_activations_have_is_refused_both_ways(kind: ggml.GgmlType) -> None:
    with pytest.raises(Unsupported, match=f"does not store weights as {kind.name}"):
        ggml.encode(kind, weights(), importance(), "t")
    with pytest.raises(Unsupported, match=f"no decoder for {kind.name}"):
        ggml.decode(kind, np.zeros(kind.row_bytes(WIDTH), np.uint8), WIDTH)
