"""Stock llama.cpp presets, built by ``llama_model_quantize`` itself: the baseline that a plan must beat."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.errors import EdgepruneError
from edgeprune.files import PARTIAL_SUFFIX, require_space
from edgeprune.measure.statistics import Statistics
from edgeprune.model.gguf import GgufFile

# Presets of llama-quantize and their numbers (llama.h, enum llama_ftype), largest first.
PRESETS = {
    "Q8_0": 7, "Q6_K": 18, "Q5_K_M": 17, "Q5_K_S": 16, "Q4_K_M": 15, "Q4_K_S": 14, "IQ4_NL": 25, "IQ4_XS": 30,
    "Q3_K_L": 13, "Q3_K_M": 12, "IQ3_M": 27, "IQ3_S": 26, "Q3_K_S": 11, "IQ3_XS": 22, "IQ3_XXS": 23,
    "Q2_K": 10, "Q2_K_S": 21, "IQ2_M": 29, "IQ2_S": 28, "IQ2_XS": 20, "IQ2_XXS": 19, "IQ1_M": 31, "IQ1_S": 24,
}  # fmt: skip

# Memory for one tensor at a time; llama.cpp would take up to 8 GiB.
_MOST_BUFFER = 1 << 29
_PROGRESS = re.compile(r"\[\s*(\d+)/\s*(\d+)\]")  # how llama.cpp begins the line of a tensor


class _ImatrixEntry(ctypes.Structure):
    """``struct llama_model_imatrix_data``: one weight's importance, ended by a null name."""

    _fields_ = (("name", ctypes.c_char_p), ("data", ctypes.c_void_p), ("size", ctypes.c_size_t))


@contextmanager
def _imatrix(statistics: str) -> Iterator[Any]:
    """The importance matrix of ``statistics`` as the array that llama.cpp wants."""
    means = {name: moment.mean() for name, moment in Statistics.load(Path(statistics)).moments.items()}
    array = (_ImatrixEntry * (len(means) + 1))()
    for index, (name, values) in enumerate(means.items()):
        flat = np.ascontiguousarray(values)
        array[index] = _ImatrixEntry(name.encode(), flat.ctypes.data, flat.size)
        means[name] = flat
    yield array


def _parameters(preset: str, array: Any, dry_run: bool) -> Any:
    import llama_cpp.llama_cpp as binding

    parameters = binding.llama_model_quantize_default_params()
    parameters.ftype = PRESETS[preset]
    parameters.allow_requantize = True
    parameters.dry_run = dry_run
    parameters.max_buf_size = _MOST_BUFFER
    parameters.imatrix = ctypes.cast(array, type(parameters.imatrix))
    return parameters


def quantize(
    model: str,
    output: str,
    preset: str,
    statistics: str,
    expected_bytes: int,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write ``preset`` of ``model`` as ``output``. A task for a child process.

    Args:
        expected_bytes: size of the tensors, as ``sizes`` tells it.
        progress: called with tensors begun and tensors in all, as llama.cpp's log tells them.

    Returns:
        ``nbytes``: of the file; ``types``: GGML type by tensor.

    Raises:
        EdgepruneError: llama.cpp refused, or the disk has no room.
    """
    import llama_cpp.llama_cpp as binding

    from edgeprune.measure.llama import Log

    require_space(Path(output).parent, expected_bytes)

    def told(line: str) -> None:
        if progress is not None and (match := _PROGRESS.match(line)):
            progress(int(match[1]), int(match[2]))

    log = Log(told)
    partial = Path(output + PARTIAL_SUFFIX)
    with _imatrix(statistics) as array:
        parameters = _parameters(preset, array, dry_run=False)
        status = binding.llama_model_quantize(model.encode(), str(partial).encode(), ctypes.byref(parameters))
    if status != 0:
        try:  # llama.cpp does not say that the disk was full
            require_space(partial.parent, expected_bytes - (partial.stat().st_size if partial.is_file() else 0))
        finally:
            partial.unlink(missing_ok=True)
        raise EdgepruneError(
            f"llama.cpp could not make preset {preset}", rows=[("llama.cpp", line) for line in log.errors()]
        )
    partial.replace(output)
    file = GgufFile(Path(output))
    return {"nbytes": file.size, "types": {info.name: info.type for info in file.tensors.values()}}


def sizes(model: str, statistics: str) -> dict[str, int]:
    """Approximate bytes of every preset, from llama.cpp's dry run. A task for a child process.

    The figure is the sum of tensor bytes rounded to 0.01 MiB; presets that llama.cpp refuses are left out.
    """
    import llama_cpp.llama_cpp as binding

    from edgeprune.measure.llama import Log

    found = {}
    with _imatrix(statistics) as array:
        for preset in PRESETS:
            log = Log()
            parameters = _parameters(preset, array, dry_run=True)
            status = binding.llama_model_quantize(model.encode(), b"", ctypes.byref(parameters))
            for line in log.lines:
                if status == 0 and (match := re.search(r"quant size\s*=\s*([0-9.]+) MiB", line)):
                    found[preset] = int(float(match[1]) * 2**20)
    return found
