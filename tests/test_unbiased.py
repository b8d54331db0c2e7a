"""Encoding without bias: what ggml's encoders are off by, that it is gone, and what is left alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from observed import LAUNCH, Toy

from edgeprune.build.builder import build
from edgeprune.decide.plan import PRESET, Plan, Prediction
from edgeprune.model import ggml, unbiased
from edgeprune.model.architecture import read_architecture
from edgeprune.model.gguf import GgufFile

Floats = npt.NDArray[np.float32]
COARSE = [name for name in ggml.CHOICES if ggml.BY_NAME[name].bits_per_weight <= 5]


def matrix(rows: int = 96, width: int = 512, seed: int = 0) -> Floats:
    """Weights with the heavy tails of trained ones."""
    return (0.02 * np.random.default_rng(seed).standard_t(6, (rows, width))).astype(np.float32)


def importance(width: int = 512) -> Floats:
    return np.random.default_rng(1).gamma(1.0, 1.0, width).astype(np.float32)


def gain(kind: ggml.GgmlType, raw: npt.NDArray[np.uint8], exact: Floats, columns: Floats) -> float:
    decoded = ggml.decode(kind, raw.reshape(-1), exact.shape[1]).astype(np.float64)
    return float((decoded * exact @ columns).sum() / (np.square(exact, dtype=np.float64) @ columns).sum())


@pytest.mark.parametrize("name", COARSE)
def test_what_is_decoded_is_as_large_as_what_was_encoded(name: str) -> None:
    kind, exact, columns = ggml.BY_NAME[name], matrix(), importance()
    assert abs(gain(kind, unbiased.encode(kind, exact, columns), exact, columns) - 1) < 0.006


@pytest.mark.parametrize(("name", "least"), [("IQ3_S", 0.015), ("Q2_K", 0.02)])
def test_errors_that_point_the_same_way_cost_most_behind_the_next_product(name: str, least: float) -> None:
    """Matrices with a few strong directions that inputs share, as trained ones have, and two products in a row."""
    random, kind, columns = np.random.default_rng(2), ggml.BY_NAME[name], np.ones(512, np.float32)
    left, right = (np.linalg.qr(random.standard_normal((size, 8)))[0].T.astype(np.float32) for size in (96, 512))
    exact = matrix() + 2 * left.T @ right
    plain = ggml.encode(kind, exact, columns)
    assert abs(gain(kind, plain, exact, columns) - 1) > least
    inputs = random.standard_normal((64, 8)).astype(np.float32) @ right
    inputs += 0.02 * random.standard_normal((64, 512)).astype(np.float32)

    def error(raw: npt.NDArray[np.uint8]) -> float:
        decoded = ggml.decode(kind, raw.reshape(-1), 512)
        return float(np.square(inputs @ (decoded - exact).T @ exact).sum())

    assert error(unbiased.encode(kind, exact, columns)) < 0.8 * error(plain)


def test_fine_types_and_matrices_without_energy_are_left_alone() -> None:
    exact, columns = matrix(), importance()
    fine = ggml.BY_NAME["Q6_K"]
    np.testing.assert_array_equal(unbiased.encode(fine, exact, columns), ggml.encode(fine, exact, columns))
    assert unbiased.gain(ggml.BY_NAME["Q2_K"], np.zeros((8, 256), np.float32), columns[:256]) == 1.0
    assert unbiased.gain(ggml.BY_NAME["Q2_K"], exact, np.zeros(512, np.float32)) == 1.0


def test_a_matrix_at_the_end_of_the_range_stays_within_it() -> None:
    kind, columns = ggml.BY_NAME["Q2_K"], np.ones(512, np.float32)
    exact = matrix()
    exact[0, 0] = 0.999 * kind.largest
    np.testing.assert_array_equal(
        unbiased.divided(kind, exact, columns, 0.97), unbiased.divided(kind, exact, columns, 1.0)
    )


def test_files_are_without_bias_and_stock_presets_as_llama_quantize_makes_them(toy_gguf: Toy, tmp_path: Path) -> None:
    file = GgufFile(toy_gguf("qwen3_moe"))
    architecture = read_architecture(file)
    (tensor,) = [t for t in architecture.tensors if t.name == "blk.0.ffn_up_exps.weight"]
    kind, width = ggml.BY_NAME["IQ3_S"], tensor.shape[0]
    exact = ggml.decode(ggml.BY_NAME[tensor.type], file.raw(tensor.name), width)
    found = {}
    for origin in ("solver", f"{PRESET}IQ3_S"):
        counts = (architecture.experts, architecture.experts)
        types = {tensor.name: kind.name}
        plan = Plan(architecture.arch, *counts, {}, types, LAUNCH, "test", origin, Prediction(), {"source": "toy"})
        output = tmp_path / "made.gguf"
        build(str(file.path), plan.to_json(), str(output))
        raw = GgufFile(output).raw(tensor.name)
        found[origin] = gain(kind, raw, exact, np.ones(width, np.float32))
    assert abs(found["solver"] - 1) < 0.006 < 0.015 < abs(found[f"{PRESET}IQ3_S"] - 1)
