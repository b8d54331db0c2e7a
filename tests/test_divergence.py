"""KL divergence through the file of reference log-probabilities, against direct computation in double precision."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from edgeprune.measure.divergence import RANGE_NATS, Reference, TokenScores, log_softmax, summarise

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]


def logits(seed: int, rows: int, vocabulary: int, scale: float = 3.0) -> Floats:
    return (scale * np.random.default_rng(seed).standard_normal((rows, vocabulary))).astype(np.float32)


def exact_log_softmax(values: Floats) -> Doubles:
    shifted = values.astype(np.float64) - values.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def exact_divergence(reference: Floats, candidate: Floats) -> Doubles:
    expected, got = exact_log_softmax(reference), exact_log_softmax(candidate)
    return np.asarray((np.exp(expected) * (expected - got)).sum(axis=1))


def rounding(divergence: Doubles) -> Doubles:
    """Most that 16-bit reference log-probabilities can move a divergence, all of them rounded the same way.

    Half a step in each log-probability, times the spread of the difference, which is about sqrt(2 KL).
    """
    return np.asarray(RANGE_NATS / 65535 / 2 * np.sqrt(2 * divergence) + 1e-6)


def text(rows: int, vocabulary: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(9).integers(0, vocabulary, rows).tolist())


def compared(path: Path, reference: Floats, candidate: Floats) -> TokenScores:
    kept = Reference(path, reference.shape[1])
    kept.append(reference)
    return kept.compare(candidate, text(*reference.shape))


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0, 1000.0])
def test_log_softmax_is_normalised_and_exact(scale: float) -> None:
    values = logits(0, 7, 500, scale)
    found = log_softmax(values)
    assert found.dtype == np.float32
    assert np.exp(found.astype(np.float64)).sum(axis=1) == pytest.approx(np.ones(7), abs=1e-5)
    assert found == pytest.approx(exact_log_softmax(values), rel=1e-6, abs=2e-6)


@pytest.mark.parametrize("noise", [0.01, 0.1, 1.0])
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 2), (40, 320), (12, 32_000)])
def test_divergence_is_that_of_direct_computation(tmp_path: Path, rows: int, vocabulary: int, noise: float) -> None:
    reference = logits(1, rows, vocabulary)
    candidate = reference + noise * logits(2, rows, vocabulary, 1.0)
    found = compared(tmp_path / "reference", reference, candidate).divergence
    expected = exact_divergence(reference, candidate)
    assert (np.abs(found - expected) < rounding(expected)).all()
    if noise == 0.01:
        assert np.abs(found - expected).max() < 1e-6


def test_mean_divergence_is_finer_than_that_of_a_token(tmp_path: Path) -> None:
    """Rounding errors of many tokens cancel: what plans are compared by is good to a few millionths."""
    reference = logits(1, 3000, 300)
    candidate = reference + logits(2, 3000, 300, 0.3)
    found = compared(tmp_path / "reference", reference, candidate).divergence
    expected = exact_divergence(reference, candidate)
    assert expected.mean() > 0.03
    assert abs(found.mean(dtype=np.float64) - expected.mean()) < 1e-6


@pytest.mark.parametrize("scale", [0.5, 3.0, 6.0])
def test_divergence_of_the_same_logits_is_zero(tmp_path: Path, scale: float) -> None:
    reference = logits(3, 60, 2000, scale)
    scores = compared(tmp_path / "reference", reference, reference)
    assert np.abs(scores.divergence).max() < 1e-6
    assert abs(float(scores.divergence.mean())) < 1e-7
    assert scores.same_top.all()
    probable = scores.nll < 20
    assert probable.any()
    assert scores.nll[probable] == pytest.approx(scores.reference_nll[probable], abs=5e-4)


def test_shifted_logits_are_the_same_distribution(tmp_path: Path) -> None:
    reference = logits(4, 20, 500)
    assert np.abs(compared(tmp_path / "reference", reference, reference + np.float32(8)).divergence).max() < 2e-6


def test_improbable_tokens_do_not_spoil_the_rest(tmp_path: Path) -> None:
    """Probabilities below e^-24 count as e^-24; a hundred of them are lost in the rounding of the others."""
    reference = logits(5, 10, 400)
    reference[:, :100] -= np.float32(80)
    candidate = reference + logits(6, 10, 400, 0.1)
    found = compared(tmp_path / "reference", reference, candidate).divergence
    expected = exact_divergence(reference, candidate)
    assert (np.abs(found - expected) < rounding(expected)).all()


def test_rows_beyond_one_block_are_compared_with_their_own(tmp_path: Path) -> None:
    rows, vocabulary = 70, 130_000  # 9.1 million values, more than a block holds
    reference = logits(7, rows, vocabulary)
    candidate = reference.copy()
    candidate[:, 0] += np.linspace(0, 15, rows, dtype=np.float32)
    found = compared(tmp_path / "reference", reference, candidate).divergence
    assert found == pytest.approx(exact_divergence(reference, candidate), rel=1e-3, abs=1e-6)


def test_windows_are_compared_in_order_and_again_after_rewinding(tmp_path: Path) -> None:
    first, second = logits(10, 5, 300), logits(11, 8, 300)
    kept = Reference(tmp_path / "reference", 300)
    kept.append(first)
    kept.append(second)
    for _ in range(2):
        kept.rewind()
        assert np.abs(kept.compare(first, text(5, 300)).divergence).max() < 1e-6
        assert np.abs(kept.compare(second, text(8, 300)).divergence).max() < 1e-6
    # A reader of its own begins at the beginning.
    again = Reference(tmp_path / "reference", 300)
    assert again.compare(second[:5], text(5, 300)).divergence.mean() > 0.1


def test_likelihoods_are_those_of_the_next_token(tmp_path: Path) -> None:
    reference, candidate = logits(12, 6, 50), logits(13, 6, 50)
    tokens = text(6, 50)
    scores = compared(tmp_path / "reference", reference, candidate)
    for found, source in ((scores.nll, candidate), (scores.reference_nll, reference)):
        expected = [-exact_log_softmax(source)[row, tokens[row + 1]] for row in range(5)]
        assert found == pytest.approx(expected, abs=5e-4)


def test_agreement_is_that_of_the_most_likely_token(tmp_path: Path) -> None:
    reference = np.zeros((4, 10), np.float32)
    candidate = np.zeros((4, 10), np.float32)
    for row, (expected, got) in enumerate([(1, 1), (2, 3), (4, 4), (5, 6)]):
        reference[row, expected] = candidate[row, got] = 5
    assert compared(tmp_path / "reference", reference, candidate).same_top.tolist() == [True, False, True, False]


def test_summary_is_over_all_tokens_of_all_windows() -> None:
    def scores(divergence: list[float], same: list[bool], nll: list[float], reference: list[float]) -> TokenScores:
        doubles = [np.array(values, np.float32) for values in (divergence, nll, reference)]
        return TokenScores(doubles[0], np.array(same), doubles[1], doubles[2])

    many = np.linspace(0, 1, 101)
    found = summarise(
        [
            scores(many.tolist(), [True] * 101, [1.0] * 100, [0.5] * 100),
            scores([9.5], [False], [2.0] * 100, [0.5] * 100),
        ]
    )
    assert found.tokens == 102
    assert found.kl_mean == pytest.approx((50.5 + 9.5) / 102)
    assert found.kl_max == 9.5
    # The 99 % quantile of 102 values lies a hundredth of the way from the 100th to the 101st.
    assert found.kl_99 == pytest.approx(0.99 + 0.01 * 0.99, abs=1e-2)
    assert found.kl_99 == pytest.approx(float(np.quantile([*many, 9.5], 0.99)))
    assert found.kl_999 == pytest.approx(float(np.quantile([*many, 9.5], 0.999)))
    assert found.kl_99 < found.kl_999 < found.kl_max
    assert found.same_top == pytest.approx(101 / 102)
    assert found.perplexity == pytest.approx(np.exp(1.5))
    assert found.reference_perplexity == pytest.approx(np.exp(0.5))
    assert found.to_json()["tokens"] == 102
