"""How fast this machine multiplies with weights of each GGML type: llama.cpp's own products, measured on their own.

A token's time is the sum over the matrices it meets, each at the rate of its type or of the memory, whichever is
slower, and of what llama.cpp takes besides for every token and layer, which is measured on models of almost no
weights. All of it with one thread, whose processor time is its own whatever else the machine does: threads that wait
for each other would be measured by what others leave them.
"""

from __future__ import annotations

import contextlib
import ctypes
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.measure.launch import Launch
from edgeprune.measure.llama import session
from edgeprune.measure.meanwhile import Meanwhile
from edgeprune.measure.rates import BATCH, FORMAT
from edgeprune.measure.tiny import USED, layer_shapes, write_tiny
from edgeprune.model import ggml

Progress = Callable[[int, int], None]
# The matrices: 2^20 weights of a dense one, 8 experts of 2^18, 2 of them used, of a width that all blocks divide.
_WIDTH, _ROWS, _EXPERT_ROWS, _EXPERTS, _USED = 1024, 1024, 256, 8, 2
# How long each product is repeated; the fastest counts, because nobody disturbed it.
_SECONDS, _STREAM_SECONDS = 0.005, 0.05
_LEAST_REPEATS = 4
_PATTERN_ROWS = 8  # made once and repeated
# Bytes of matrices that are read from the caches nearby, from those further off, and from the memory.
_STREAMS = (1 << 20, 16 << 20, 64 << 20)
_TINY_LAYERS, _TINY_WIDTHS, _TINY_DEPTH = (2, 8), (64, 256), 8
_TINY_RUNS = 20
_DEEPER = 512  # tokens in the cache, that their cost is seen with
_F32, _I32 = 0, 26
_STREAM_TYPE = "F32"  # quickest to multiply with, byte by byte, so that what is slow is the reading


class _InitParams(ctypes.Structure):
    """``struct ggml_init_params`` (ggml.h)."""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


_POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_init": (_POINTER, (_InitParams,)),
    "ggml_free": (None, (_POINTER,)),
    "ggml_new_tensor_3d": (_POINTER, (_POINTER, _INT, _LONG, _LONG, _LONG)),
    "ggml_mul_mat": (_POINTER, (_POINTER, _POINTER, _POINTER)),
    "ggml_mul_mat_id": (_POINTER, (_POINTER, _POINTER, _POINTER, _POINTER)),
    "ggml_new_graph": (_POINTER, (_POINTER,)),
    "ggml_build_forward_expand": (None, (_POINTER, _POINTER)),
    "ggml_backend_cpu_init": (_POINTER, ()),
    "ggml_backend_cpu_set_n_threads": (None, (_POINTER, _INT)),
    "ggml_backend_free": (None, (_POINTER,)),
    "ggml_backend_alloc_ctx_tensors": (_POINTER, (_POINTER, _POINTER)),
    "ggml_backend_buffer_free": (None, (_POINTER,)),
    "ggml_backend_tensor_set": (None, (_POINTER, _POINTER, ctypes.c_size_t, ctypes.c_size_t)),
    "ggml_backend_graph_compute": (_INT, (_POINTER, _POINTER)),
}


class _Bench:
    """ggml's CPU backend with one thread, and room for one small graph at a time."""

    def __init__(self) -> None:
        self._library = ggml.library()
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(self._library, name)
            function.restype, function.argtypes = result, list(arguments)
        self._backend = self._library.ggml_backend_cpu_init()
        self._library.ggml_backend_cpu_set_n_threads(self._backend, 1)

    def close(self) -> None:
        self._library.ggml_backend_free(self._backend)

    @contextlib.contextmanager
    def _context(self) -> Iterator[Any]:
        context = self._library.ggml_init(_InitParams(1 << 20, None, True))
        try:
            yield context
        finally:
            self._library.ggml_free(context)

    def tensor(self, context: Any, kind: int, *shape: int) -> Any:
        return self._library.ggml_new_tensor_3d(context, kind, *shape, *[1] * (3 - len(shape)))

    def fastest(
        self, build: Callable[[Any], tuple[Any, dict[Any, np.ndarray[Any, Any]]]], seconds: float = _SECONDS
    ) -> float:
        """Seconds of the graph that ``build`` makes in a context: its result, and what is in its inputs."""
        with self._context() as context:
            result, inputs = build(context)
            graph = self._library.ggml_new_graph(context)
            self._library.ggml_build_forward_expand(graph, result)
            buffer = self._library.ggml_backend_alloc_ctx_tensors(context, self._backend)
            try:
                for tensor, values in inputs.items():
                    self._library.ggml_backend_tensor_set(tensor, values.ctypes.data, 0, values.nbytes)
                return self._repeated(graph, seconds)
            finally:
                self._library.ggml_backend_buffer_free(buffer)

    def _repeated(self, graph: Any, seconds: float) -> float:
        best, count, begun = float("inf"), 0, time.thread_time()
        while count < _LEAST_REPEATS or time.thread_time() - begun < seconds:
            started = time.thread_time()
            self._library.ggml_backend_graph_compute(self._backend, graph)
            best, count = min(best, time.thread_time() - started), count + 1
        return best

    def dense(self, kind: ggml.GgmlType, weights: np.ndarray[Any, Any], tokens: int, rows: int = _ROWS) -> float:
        """Seconds of a dense product."""

        def build(context: Any) -> tuple[Any, dict[Any, np.ndarray[Any, Any]]]:
            matrix, vectors = self.tensor(context, kind.id, _WIDTH, rows), self.tensor(context, _F32, _WIDTH, tokens)
            inputs = {matrix: np.resize(weights, (rows, weights.shape[1])), vectors: _vectors(tokens)}
            return self._library.ggml_mul_mat(context, matrix, vectors), inputs

        return self.fastest(build, _SECONDS if rows == _ROWS else _STREAM_SECONDS)

    def experts(self, kind: ggml.GgmlType, weights: np.ndarray[Any, Any], tokens: int, width: int = _WIDTH) -> float:
        """Seconds of a product with the used experts, of as many weights whatever their ``width``."""
        rows = _EXPERT_ROWS * _WIDTH // width

        def build(context: Any) -> tuple[Any, dict[Any, np.ndarray[Any, Any]]]:
            matrix = self.tensor(context, kind.id, width, rows, _EXPERTS)
            vectors, chosen = self.tensor(context, _F32, width, 1, tokens), self.tensor(context, _I32, _USED, tokens)
            turns = np.arange(_USED * tokens, dtype=np.int32) % _EXPERTS
            inputs = {
                matrix: np.resize(weights, (_EXPERTS * _EXPERT_ROWS, weights.shape[1])),
                vectors: _vectors(tokens)[:, :width].copy(),
                chosen: turns,
            }
            return self._library.ggml_mul_mat_id(context, matrix, vectors, chosen), inputs

        return self.fastest(build)


def _vectors(tokens: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(1).standard_normal((tokens, _WIDTH)).astype(np.float32)


def _pattern(kind: ggml.GgmlType) -> np.ndarray[Any, Any]:
    """A few rows of weights in type ``kind``, uint8 [rows, row bytes].

    Of quantised types any bytes will do: their products take as long whatever the numbers, and encoding is slow.
    Among the bytes of floats there would be denormal numbers, with which processors are slow.
    """
    random = np.random.default_rng(0)
    if kind.is_float:
        return ggml.encode(kind, random.standard_normal((_PATTERN_ROWS, _WIDTH)).astype(np.float32), None)
    return random.integers(0, 256, (_PATTERN_ROWS, kind.row_bytes(_WIDTH)), np.uint8)


def _row_seconds(bench: _Bench, pattern: np.ndarray[Any, Any], tokens: int) -> float:
    """What every row takes whatever its length, by token: the same weights in rows of a quarter as many."""
    kind = ggml.BY_NAME[_STREAM_TYPE]
    short, long = (bench.experts(kind, pattern, tokens, width) for width in (_WIDTH // 4, _WIDTH))
    return max(0.0, short - long) / (3 * _EXPERT_ROWS * _USED * tokens)


def _tiny_seconds(path: Path, tokens: int, depth: int = _TINY_DEPTH) -> float:
    """Fastest time of ``tokens`` at once behind ``depth`` others in the model at ``path``."""
    best = float("inf")
    launch = Launch(context=2 * _DEEPER, batch=_DEEPER, threads=1)
    with session(path, launch, single_output=True) as opened:
        for _ in range(_TINY_RUNS):
            opened.clear()
            opened.extend([1] * depth, 0, all_logits=False)
            begun = time.thread_time()
            int(opened.extend([1] * tokens, depth, all_logits=False)[-1].argmax())
            best = min(best, time.thread_time() - begun)
    return best


def _tiny_products(width: int, dense: float, experts: float) -> float:
    """Seconds of a tiny layer's products, of one token."""
    total = 0.0
    for shape in layer_shapes(width).values():
        if len(shape) == 3:
            total += experts * shape[0] * shape[1] * USED
        elif len(shape) == 2:
            total += dense * shape[0] * shape[1]
    return total


def _beyond(folder: Path, tokens: int, width: int, dense: float, experts: float) -> tuple[float, float]:
    """Seconds beside the products, by token with ``tokens`` at once: of a token, and of a layer of ``width``."""
    times = []
    for layers in _TINY_LAYERS:
        path = folder / f"{layers}-{width}.gguf"
        if not path.is_file():
            write_tiny(path, layers, width)
        times.append(_tiny_seconds(path, tokens) / tokens)
    slope = (times[1] - times[0]) / (_TINY_LAYERS[1] - _TINY_LAYERS[0])
    return max(0.0, times[0] - _TINY_LAYERS[0] * slope), max(0.0, slope - _tiny_products(width, dense, experts))


def _cached(path: Path, layers: int, width: int) -> float:
    """``cache`` of ``KernelRates``, from the model at ``path``, whose queries are as wide as it is."""
    added = _tiny_seconds(path, 1, _DEEPER) - _tiny_seconds(path, 1)
    return max(0.0, added) / (2 * (_DEEPER - _TINY_DEPTH) * width * layers)


def _besides(tables: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """``besides``, ``besides_batch`` and ``cache`` of ``KernelRates``. What the width adds is seen in batches alone:
    a single token of a wide model waits for its weights."""
    narrow, wide = _TINY_WIDTHS
    one = tables["dense"]["F32"], tables["experts"]["F32"]
    many = tables["dense_batch"]["F32"], tables["experts_batch"]["F32"]
    with tempfile.TemporaryDirectory(prefix="edgeprune-") as folder:
        fixed, layer = _beyond(Path(folder), 1, narrow, *one)
        fixed_batch, layer_batch = _beyond(Path(folder), BATCH, narrow, *many)
        _, wide_batch = _beyond(Path(folder), BATCH, wide, *many)
        layers = _TINY_LAYERS[-1]
        cache = _cached(Path(folder) / f"{layers}-{wide}.gguf", layers, wide)
    element = max(0.0, wide_batch - layer_batch) / (wide - narrow)
    return {
        "besides": [fixed, max(0.0, layer - element * narrow), element],
        "besides_batch": [fixed_batch, max(0.0, layer_batch - element * narrow), element],
        "cache": cache,
    }


def measure_kernels(types: list[str], progress: Progress | None = None) -> dict[str, Any]:
    """``KernelRates`` of this machine as JSON, and the share of the cores that others used meanwhile.

    A task for ``edgeprune.measure.child``.

    Args:
        types: GGML types to be measured, beside F32 and F16.
    """
    tables: dict[str, dict[str, float]] = {"dense": {}, "dense_batch": {}, "experts": {}, "experts_batch": {}}
    names, meanwhile = sorted({*types, "F32", "F16"}), Meanwhile()
    with contextlib.closing(_Bench()) as bench:
        for number, name in enumerate(names):
            kind = ggml.type_named(name)
            weights = _pattern(kind)
            for suffix, tokens in (("", 1), ("_batch", BATCH)):
                dense, experts = bench.dense(kind, weights, tokens), bench.experts(kind, weights, tokens)
                tables[f"dense{suffix}"][name] = dense / (_WIDTH * _ROWS * tokens)
                tables[f"experts{suffix}"][name] = experts / (_WIDTH * _EXPERT_ROWS * _USED * tokens)
            if progress is not None:
                progress(number + 1, len(names) + 1)
        row = ggml.BY_NAME[_STREAM_TYPE].row_bytes(_WIDTH)
        pattern = _pattern(ggml.BY_NAME[_STREAM_TYPE])
        streams = [
            (size, bench.dense(ggml.BY_NAME[_STREAM_TYPE], pattern, 1, size // row) / size) for size in _STREAMS
        ]
        rows = [_row_seconds(bench, pattern, tokens) for tokens in (1, BATCH)]
    found = {"format": FORMAT, **tables, "streams": streams, "rows": rows, **_besides(tables)}
    return {**found, "others": meanwhile.others()}
