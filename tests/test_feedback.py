"""Error feedback: the formula against least squares, and what it does to the error of products on other inputs."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from edgeprune.measure import feedback
from edgeprune.measure.feedback import Inputs
from edgeprune.model import ggml, unbiased

Floats = npt.NDArray[np.float32]


def weights(rows: int, width: int, seed: int = 0) -> Floats:
    """Weights with the heavy tails of trained ones."""
    return (0.02 * np.random.default_rng(seed).standard_t(6, (rows, width))).astype(np.float32)


def correlated(count: int, width: int, seed: int = 1) -> Floats:
    """Inputs whose energy lies in few directions, as activations' does: the n-th has 1/n of the first one's."""
    mixing = np.random.default_rng(99).standard_normal((width, width)).astype(np.float32)
    strengths = np.sqrt(1 / np.arange(1, width + 1, dtype=np.float32))
    return np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32) * strengths @ mixing


def plain(kind: ggml.GgmlType, matrix: Floats, importance: Floats) -> npt.NDArray[np.uint8]:
    return unbiased.encode(kind, matrix, importance).reshape(-1)


def output_error(inputs: Floats, matrix: Floats, decoded: Floats) -> float:
    return float(np.square(inputs @ (matrix - decoded).T, dtype=np.float64).sum())


def test_every_group_is_corrected_as_least_squares_would() -> None:
    """The columns that are not encoded yet, solved for all at once; the next group is as the formula has it."""
    width, step = 128, 32
    matrix, inputs = weights(6, width), correlated(500, width)
    root = feedback.factor(inputs, None)
    damped = (root @ root.T).astype(np.float64)
    errors = np.zeros_like(matrix)
    random = np.random.default_rng(3)
    for start in range(0, width, step):
        group, rest = slice(start, start + step), slice(start, None)
        found = feedback.corrected(matrix, errors, root, group)
        # With Z for the rest, the error is tr(D H D') for D = [W - Q, W_rest - Z]: zero gradient in Z.
        answer = np.linalg.solve(damped[rest, rest], damped[rest, :start] @ errors[:, :start].T).T
        np.testing.assert_allclose(found, (matrix[:, rest] + answer)[:, :step], rtol=1e-3, atol=1e-5)
        errors[:, group] = 0.01 * random.standard_normal((6, step))


def test_the_factor_is_of_the_second_moments() -> None:
    inputs = correlated(4_000, 64)
    root = feedback.factor(inputs, None)
    np.testing.assert_array_equal(root, np.triu(root))
    exact = inputs.T @ inputs / len(inputs)
    assert np.abs(root @ root.T - exact).max() < 0.03 * np.abs(exact).max()


@pytest.mark.parametrize("name", ["Q4_0", "IQ4_NL", "Q8_0", "Q2_K", "Q4_K", "Q6_K", "IQ4_XS", "IQ3_S", "IQ2_XXS"])
def test_errors_of_correlated_inputs_are_put_right(name: str) -> None:
    """Against ggml's own encoding, on inputs that were not fitted, in exactly as many bytes."""
    kind = ggml.BY_NAME[name]
    width = 8 * kind.block
    matrix, fitted, judged = weights(16, width), correlated(2 * width, width), correlated(300, width, seed=2)
    importance = np.square(fitted).mean(axis=0)
    found = feedback.encode(kind, matrix, importance, Inputs(fitted, judged[:150]), name)
    flat = plain(kind, matrix, importance)
    assert found.raw.shape == flat.shape == (16 * kind.row_bytes(width),)
    np.testing.assert_array_equal(found.decoded, ggml.decode(kind, found.raw, width))
    assert ggml.library().ggml_validate_row_data(kind.id, found.raw.ctypes.data, found.raw.nbytes)
    before, after = (
        output_error(judged[150:], matrix, decoded) for decoded in (ggml.decode(kind, flat, width), found.decoded)
    )
    assert after < 0.85 * before
    assert found.after < 0.85 * found.before < found.energy


def test_few_inputs_are_drawn_towards_those_of_all() -> None:
    """Fewer than columns: what they have in common by chance is not put right."""
    kind, width = ggml.BY_NAME["Q4_0"], 512
    matrix, judged = weights(16, width), correlated(300, width, seed=2)
    everything = correlated(4_000, width, seed=4)
    prior = everything.T @ everything / np.float32(len(everything))
    few = correlated(width // 4, width)
    importance = np.square(few).mean(axis=0)
    errors = {}
    for drawn, own in (("not", None), ("towards all", prior)):
        _, decoded = feedback.spread(kind, matrix, importance, feedback.factor(few, own), "few")
        errors[drawn] = output_error(judged, matrix, decoded)
    before = output_error(judged, matrix, ggml.decode(kind, plain(kind, matrix, importance), width))
    assert errors["towards all"] < 0.8 * before
    assert errors["towards all"] < 0.9 * errors["not"]


@pytest.mark.parametrize(("name", "width"), [("Q4_K", 256), ("Q4_0", 32), ("F16", 256)])
def test_one_block_is_encoded_as_ever(name: str, width: int) -> None:
    kind = ggml.BY_NAME[name]
    matrix, inputs = weights(8, width), correlated(400, width)
    importance = np.square(inputs).mean(axis=0)
    found = feedback.encode(kind, matrix, importance, Inputs(inputs[:300], inputs[300:]), name)
    np.testing.assert_array_equal(found.raw, plain(kind, matrix, importance))
    assert found.energy == 0


def test_uncorrelated_inputs_leave_nothing_to_put_right() -> None:
    """One channel at a time: second moments are exactly diagonal. (Encoders of Q4_0 and Q5_0 look at the variance of
    the whole row, so that their blocks are not quite the same alone.)"""
    kind, width = ggml.BY_NAME["IQ4_NL"], 128
    matrix = weights(8, width)
    inputs = np.eye(width, dtype=np.float32) * np.linspace(1, 3, width, dtype=np.float32)
    importance = np.square(inputs).mean(axis=0)
    raw, _ = feedback.spread(kind, matrix, importance, feedback.factor(inputs, None), "uncorrelated")
    np.testing.assert_array_equal(raw, ggml.encode(kind, matrix, importance).reshape(-1))


def test_feedback_that_does_not_help_on_other_inputs_is_left_out() -> None:
    """Fitted to what is correlated one way, judged by what is correlated the other way."""
    kind, width = ggml.BY_NAME["Q4_0"], 64
    matrix = weights(32, width)
    common = np.random.default_rng(5).standard_normal((500, 32)).astype(np.float32)
    fitted, judged = np.concatenate([common, common], axis=1), np.concatenate([common, -common], axis=1)
    importance = np.square(fitted).mean(axis=0)
    found = feedback.encode(kind, matrix, importance, Inputs(fitted, judged), "opposed")
    np.testing.assert_array_equal(found.raw, plain(kind, matrix, importance))
    assert found.after == found.before > 0
    _, other = feedback.spread(kind, matrix, importance, feedback.factor(fitted, None), "opposed")
    assert output_error(judged, matrix, other) > 1.2 * found.before


@pytest.mark.parametrize("counts", [(0, 50), (50, 0)])
def test_without_inputs_to_fit_and_to_judge_there_is_none(counts: tuple[int, int]) -> None:
    kind, width = ggml.BY_NAME["Q4_0"], 64
    matrix, importance = weights(4, width), np.ones(width, np.float32)
    inputs = Inputs(*(correlated(count, width) for count in counts))
    np.testing.assert_array_equal(
        feedback.encode(kind, matrix, importance, inputs, "none").raw, plain(kind, matrix, importance)
    )
    assert kind.row_bytes(width) == 36


def test_weights_are_not_carried_out_of_the_types_range() -> None:
    """Scales of Q8_0 are F16: weights near the limit stay encodable whatever is added to them."""
    kind, width = ggml.BY_NAME["Q8_0"], 64
    matrix = np.full((4, width), kind.largest, np.float32) * np.float32(0.999)
    matrix[:, ::3] *= -0.37
    inputs = np.repeat(correlated(200, 1), width, axis=1)
    found = feedback.encode(kind, matrix, np.ones(width, np.float32), Inputs(inputs[:100], inputs[100:]), "large")
    assert np.isfinite(found.decoded).all()
    assert found.after <= found.before


def test_a_channel_that_is_always_zero_does_no_harm() -> None:
    kind, width = ggml.BY_NAME["Q4_0"], 64
    matrix, inputs = weights(4, width), correlated(300, width)
    inputs[:, 10:50] = 0
    importance = np.square(inputs).mean(axis=0)
    found = feedback.encode(kind, matrix, importance, Inputs(inputs[:200], inputs[200:]), "zeros")
    assert found.after < found.before
