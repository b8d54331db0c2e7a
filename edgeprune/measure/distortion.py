"""How much each GGML type distorts each tensor, from a sample of its weights."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeprune.device.probe import cores
from edgeprune.measure.statistics import InputMoments, Statistics
from edgeprune.model import ggml, unbiased
from edgeprune.model.architecture import Tensor, read_architecture
from edgeprune.model.gguf import GgufFile

_SAMPLED_WEIGHTS = 65_536
# Experts differ more than rows of one do: of a layer whose answers had energies from 306 to 1,700, four experts made
# errors of 0.6 to 1.1 times those of all, eight and sixteen 0.95 to 1.05.
_MOST_MATRICES, _LEAST_MATRICES, _LEAST_ROWS = 16, 8, 4
_CHUNK_BYTES = 16 << 20
Floats = npt.NDArray[np.float32]


def candidate_types(tensor: Tensor, row: int = 0) -> list[str]:
    """Types worth trying: smaller than what the tensor has now, and dividing its rows.

    Where 256-blocks divide the rows, their types dominate the 32-block types of the same bits.

    Args:
        row: weights of a row that is to be shorter, or 0; any size is worth trying where the tensor's own type has no
            such rows.
    """
    row, own = row or tensor.shape[0], ggml.BY_NAME[tensor.type]
    most = own.bits_per_weight if row % own.block == 0 else float("inf")
    fitting = [ggml.BY_NAME[name] for name in ggml.CHOICES if row % ggml.BY_NAME[name].block == 0]
    if any(kind.block == 256 for kind in fitting):
        fitting = [kind for kind in fitting if kind.block == 256 or kind.name == "Q8_0"]
    return [kind.name for kind in fitting if kind.bits_per_weight < most]


def _sample(file: GgufFile, tensor: Tensor, random: np.random.Generator) -> list[tuple[int, Floats]]:
    """Random rows of a few matrices: pairs of matrix index and float32 [rows, width]."""
    kind, width = ggml.BY_NAME[tensor.type], tensor.shape[0]
    row_bytes = kind.row_bytes(width)
    rows_per_matrix = tensor.nbytes // row_bytes // tensor.matrices
    most = min(max(_SAMPLED_WEIGHTS // (_LEAST_ROWS * width), _LEAST_MATRICES), _MOST_MATRICES, tensor.matrices)
    chosen = random.choice(tensor.matrices, most, replace=False)
    count = min(rows_per_matrix, max(_LEAST_ROWS, _SAMPLED_WEIGHTS // width // len(chosen)))
    raw = file.raw(tensor.name).reshape(tensor.matrices, rows_per_matrix, row_bytes)
    samples = []
    for matrix in sorted(chosen.tolist()):
        rows = np.sort(random.choice(rows_per_matrix, count, replace=False))
        samples.append((matrix, ggml.decode(kind, raw[matrix, rows].reshape(-1), width)))
    file.release(tensor.name)
    return samples


def _largest(file: GgufFile, tensor: Tensor, samples: list[tuple[int, Floats]]) -> float:
    """The largest magnitude in ``tensor``; in a quantised one, whose scales are bounded already, that of ``samples``.

    One outlier decides whether a type can hold the tensor, and a sample would miss it. The bits of two floats of one
    format are in the order of their magnitudes, so none is decoded.
    """
    if tensor.type not in ("F32", "F16", "BF16"):
        return max((float(np.abs(rows).max(initial=0.0)) for _, rows in samples), default=0.0)
    word, magnitude = (np.uint32, 0x7FFFFFFF) if tensor.type == "F32" else (np.uint16, 0x7FFF)
    raw, most = file.raw(tensor.name), 0
    for start in range(0, raw.size, _CHUNK_BYTES):
        bits: npt.NDArray[Any] = raw[start : start + _CHUNK_BYTES].view(word)
        most = max(most, int((bits & magnitude).max(initial=0)))
    file.release(tensor.name)
    if tensor.type == "F16":
        return float(np.array(most, np.uint16).view(np.float16))
    return float(np.array(most << (16 if tensor.type == "BF16" else 0), np.uint32).view(np.float32))


def relative_error(exact: Floats, approximate: Floats, importance: Floats) -> tuple[float, float]:
    """Weighted squared error and weighted energy of rows [rows, width] under ``importance`` [width].

    With the second moment of the input as importance, their quotient is the expected squared error of
    the product relative to its energy, if the inputs' channels are uncorrelated.
    """
    error = np.square(approximate - exact, dtype=np.float64) @ importance.astype(np.float64)
    energy = np.square(exact, dtype=np.float64) @ importance.astype(np.float64)
    return float(error.sum()), float(energy.sum())


def _output_energy(moment: InputMoments | None, matrix: int, rows: int) -> float:
    """Observed squared output per token and row of ``matrix``, or 0 where it was not observed.

    It exceeds the sum of weighted squares where inputs are correlated, which rounding errors are not.
    """
    if moment is None or not moment.output_square.any():
        return 0.0
    index = matrix if len(moment.count) > 1 else 0
    return float(moment.output_square[index] / max(moment.count[index], 1.0) / rows)


def _rounding_error(rows: Floats, by_block: dict[str, list[float]]) -> dict[str, float]:
    """Squared output error of ``rows`` [rows, width] that rounded inputs make, by the size of their blocks.

    Args:
        by_block: mean squared error of an input channel in each block, see ``rounding.observe``.
    """
    energy = np.square(rows, dtype=np.float64).sum(axis=0)
    return {
        block: float(energy.reshape(len(errors), -1).sum(axis=1) @ np.asarray(errors))
        for block, errors in by_block.items()
    }


def _distortions(
    file: GgufFile, tensor: Tensor, moment: InputMoments | None, types: list[str], seed: int, rates: dict[str, float]
) -> dict[str, list[float]]:
    """By type: relative squared error as a product's weight, and as a lookup table (unweighted).

    A type whose range the tensor exceeds has no entry, so that nothing can choose it.

    Args:
        rates: by type, the most weights per second that one thread has encoded so far; raised here.
    """
    means = None if moment is None else moment.mean()
    samples = _sample(file, tensor, np.random.default_rng(seed))
    largest, results = _largest(file, tensor, samples), {}
    for name in types:
        kind = ggml.BY_NAME[name]
        if largest > kind.largest:
            continue
        weighted, plain = np.zeros(2), np.zeros(2)
        for matrix, rows in samples:
            whole = rows.shape[1] // kind.block * kind.block  # a type for shorter rows may not divide these
            rows = rows[:, :whole]
            flat = np.ones(rows.shape[1], np.float32)
            importance = flat if means is None else means[matrix if len(means) > 1 else 0][:whole]
            gain = unbiased.gain(kind, rows, importance, tensor.name)
            started = time.perf_counter()
            encoded = unbiased.divided(kind, rows, importance, gain, tensor.name)
            rates[name] = max(rates.get(name, 0.0), rows.size / (time.perf_counter() - started))
            decoded = ggml.decode(kind, encoded.reshape(-1), rows.shape[1])
            error, energy = relative_error(rows, decoded, importance)
            energy = _output_energy(moment, matrix, tensor.shape[1]) * len(rows) or energy
            weighted += (error, energy)
            plain += relative_error(rows, decoded, flat)
        results[name] = [float(pair[0] / pair[1]) if pair[1] else 0.0 for pair in (weighted, plain)]
    return results


def _rounding(
    file: GgufFile, tensor: Tensor, moment: InputMoments | None, seed: int, by_block: dict[str, list[float]]
) -> dict[str, float]:
    """By the size of the blocks in which inputs are rounded: squared error of the product, relative to its energy."""
    error, energy = dict.fromkeys(by_block, 0.0), 0.0
    for matrix, rows in _sample(file, tensor, np.random.default_rng(seed)):
        if moment is not None:
            means = moment.mean()
            own = np.square(rows, dtype=np.float64) @ means[matrix if len(means) > 1 else 0].astype(np.float64)
            energy += _output_energy(moment, matrix, tensor.shape[1]) * len(rows) or float(own.sum())
        for block, found in _rounding_error(rows, by_block).items():
            error[block] += found
    return {block: found / energy if energy else 0.0 for block, found in error.items()}


def measure(
    model: str,
    statistics: str,
    rounding: dict[str, dict[str, list[float]]],
    wanted: dict[str, list[str]] | None = None,
    mtp: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Distortion of every quantisable tensor for every candidate type. A task for a child process.

    Args:
        rounding: of the inputs of each tensor's product, as ``rounding.observe`` returns it.
        wanted: types by tensor, instead of all candidates of all quantisable tensors.
        mtp: with the blocks that predict further tokens.

    Returns:
        ``errors``: by tensor, by type: [as a product's weight, as a lookup table], relative squared errors; without
        the types that cannot hold the tensor's largest weight. ``rounding``: by tensor and block size, what rounding
        the inputs adds to the product's error. ``rates``: by type, weights per second that a thread
        encodes; the first time, which fills the encoder's tables, is not among them. ``products_per_s``: products of
        two numbers that a thread sums up in float32 matrices.
    """
    file = GgufFile(Path(model))
    everything = read_architecture(file, mtp=mtp).tensors
    tensors = [tensor for tensor in everything if tensor.quantisable]
    if wanted is not None:
        tensors = [tensor for tensor in everything if tensor.name in wanted]
    moments = Statistics.load(Path(statistics)).moments
    results: dict[str, dict[str, list[float]]] = {}
    rounded: dict[str, dict[str, float]] = {}
    rates: dict[str, float] = {}

    def one(item: tuple[int, Tensor]) -> Any:
        index, tensor = item
        moment = moments.get(tensor.name)
        types = candidate_types(tensor) if wanted is None else wanted[tensor.name]
        own = _rounding(file, tensor, moment, index, rounding.get(tensor.name, {}))
        return tensor.name, _distortions(file, tensor, moment, types, index, rates), own

    with ThreadPoolExecutor(cores()) as pool:
        for name, by_type, by_block in pool.map(one, enumerate(tensors)):
            results[name], rounded[name] = by_type, by_block
            if progress is not None:
                progress(len(results), len(tensors))
    return {"errors": results, "rounding": rounded, "rates": rates, "products_per_s": _products_per_s()}


def _products_per_s() -> float:
    """Of float32 matrices of the size that healing multiplies, the best of a few times."""
    matrix, best = np.ones((512, 512), np.float32), math.inf
    for _ in range(5):
        started = time.perf_counter()
        matrix @ matrix
        best = min(best, time.perf_counter() - started)
    return len(matrix) ** 3 / best
