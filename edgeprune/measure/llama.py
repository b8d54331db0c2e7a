"""llama.cpp through its C interface, as far as edgeprune needs it. Only ever used in a child process.

llama-cpp-python's high-level class exposes neither the eval callback nor memory-free loading, so this
goes through its ctypes layer.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as binding
import numpy as np
import numpy.typing as npt

from edgeprune.device.probe import cores
from edgeprune.errors import BadFile, EdgepruneError, NativeCrash
from edgeprune.measure.launch import Launch
from edgeprune.model import ggml

MAX_SOURCES = 10
LOAD_NONE, LOAD_MMAP = 0, 1
_DEBUG = 1  # enum ggml_log_level
FLASH_ATTENTION_AUTO, FLASH_ATTENTION_ON = -1, 1


class TensorStruct(ctypes.Structure):
    """``struct ggml_tensor`` (ggml.h). The size is checked against the library when it is loaded."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * MAX_SOURCES),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
        ("extra", ctypes.c_void_p),
        ("padding", ctypes.c_char * 8),
    )


class Node:
    """A tensor of the running graph, seen from the eval callback."""

    __slots__ = ("pointer", "struct")

    def __init__(self, pointer: int) -> None:
        self.pointer = pointer
        self.struct = TensorStruct.from_address(pointer)

    @property
    def name(self) -> str:
        return bytes(self.struct.name).decode("utf-8", errors="replace")

    @property
    def op(self) -> str:
        return _op_name(self.struct.op)

    @property
    def shape(self) -> tuple[int, ...]:
        """Extents in ggml's order."""
        return tuple(self.struct.ne)

    @property
    def is_contiguous(self) -> bool:
        """Whether it is F32 without gaps, so that it can be written."""
        return self.struct.type == 0 and bool(_library().ggml_is_contiguous(self.pointer))

    def source(self, index: int) -> Node | None:
        pointer = self.struct.src[index]
        return Node(pointer) if pointer else None

    def read_rows(self, most: int) -> npt.NDArray[np.float32]:
        """The first rows, ``most`` at most, of a contiguous F32 matrix, float32 [rows, ne0]."""
        rows = min(most, self.shape[1])
        values = np.empty((rows, self.shape[0]), np.float32)
        _library().ggml_backend_tensor_get(self.pointer, values.ctypes.data, 0, values.nbytes)
        return values

    def read(self) -> npt.NDArray[Any]:
        """The values, F32 or I32, as an array [ne3, ne2, ne1, ne0], honouring strides."""
        count = int(_library().ggml_nbytes(self.pointer))
        buffer = np.empty(count, np.uint8)
        _library().ggml_backend_tensor_get(self.pointer, buffer.ctypes.data, 0, count)
        return self._as_array(buffer)

    def view(self) -> npt.NDArray[Any]:
        """As ``read``, but without a copy where the tensor is in host memory: not to be changed, and valid only
        until the next node is computed."""
        if not _is_host(self.struct.buffer):
            return self.read()
        count = int(_library().ggml_nbytes(self.pointer))
        return self._as_array(np.ctypeslib.as_array((ctypes.c_uint8 * count).from_address(self.struct.data)))

    def _as_array(self, buffer: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
        dtype = {0: np.dtype(np.float32), 26: np.dtype(np.int32)}.get(self.struct.type)
        if dtype is None:
            raise EdgepruneError(f"tensor {self.name} has type {self.struct.type}, not F32 or I32")
        strides = tuple(reversed(tuple(self.struct.nb)))
        return np.lib.stride_tricks.as_strided(buffer.view(dtype), tuple(reversed(self.shape)), strides)

    def write(self, values: npt.NDArray[np.float32]) -> None:
        """Replace the values of a contiguous F32 tensor."""
        source = np.ascontiguousarray(values, np.float32)
        _library().ggml_backend_tensor_set(self.pointer, source.ctypes.data, 0, source.nbytes)


@cache
def _op_name(op: int) -> str:
    return str(_library().ggml_op_name(op).decode())


@cache
def _is_host(buffer: int) -> bool:
    return bool(buffer) and bool(_library().ggml_backend_buffer_is_host(buffer))


@cache
def _library() -> Any:
    """llama.cpp's library with the functions declared that its binding leaves out."""
    handle = ggml.library()
    for name in ("ggml_op_name", "ggml_backend_dev_name", "ggml_backend_dev_description"):
        getattr(handle, name).restype = ctypes.c_char_p
    handle.ggml_op_name.argtypes = [ctypes.c_int]
    handle.ggml_is_contiguous.restype = ctypes.c_bool
    handle.ggml_is_contiguous.argtypes = [ctypes.c_void_p]
    handle.ggml_nbytes.restype = ctypes.c_size_t
    handle.ggml_nbytes.argtypes = [ctypes.c_void_p]
    for name in ("ggml_backend_tensor_get", "ggml_backend_tensor_set"):
        getattr(handle, name).restype = None
        getattr(handle, name).argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
    handle.ggml_backend_dev_count.restype = ctypes.c_size_t
    handle.ggml_backend_dev_get.restype = ctypes.c_void_p
    handle.ggml_backend_dev_get.argtypes = [ctypes.c_size_t]
    handle.ggml_backend_dev_type.argtypes = [ctypes.c_void_p]
    for name in ("ggml_backend_dev_name", "ggml_backend_dev_description"):
        getattr(handle, name).argtypes = [ctypes.c_void_p]
    handle.ggml_backend_dev_memory.restype = None
    handle.ggml_backend_dev_memory.argtypes = [
        ctypes.c_void_p,
        ctypes.POINTER(ctypes.c_size_t),
        ctypes.POINTER(ctypes.c_size_t),
    ]
    handle.ggml_backend_buffer_is_host.restype = ctypes.c_bool
    handle.ggml_backend_buffer_is_host.argtypes = [ctypes.c_void_p]
    handle.ggml_backend_cpu_buffer_type.restype = ctypes.c_void_p
    handle.ggml_tensor_overhead.restype = ctypes.c_size_t
    if handle.ggml_tensor_overhead() != ctypes.sizeof(TensorStruct) + 32:
        raise NativeCrash(
            "this llama-cpp-python lays out its tensors in an unknown way",
            hint="install the version that edgeprune's constraints name",
        )
    return handle


class _BufferOverride(ctypes.Structure):
    """``struct llama_model_tensor_buft_override``: where tensors matching a pattern are kept."""

    _fields_ = (("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p))


@dataclass
class Log:
    """What llama.cpp said, kept for error messages and for the sizes it reports.

    Attributes:
        listener: called with every line.
        lines: the last 5,000.
    """

    listener: Callable[[str], None] | None = None
    lines: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._callback = binding.llama_log_callback(self._append)
        binding.llama_log_set(self._callback, ctypes.c_void_p(0))

    def _append(self, level: int, text: bytes, _: Any) -> None:
        if level == _DEBUG:
            return
        line = text.decode("utf-8", errors="replace").rstrip("\n")
        self.lines.append(line)
        del self.lines[:-5000]
        if self.listener is not None:
            self.listener(line)

    def errors(self) -> list[str]:
        interesting = [line for line in self.lines if "error" in line or "failed" in line or "invalid" in line]
        return interesting[-3:] or self.lines[-3:]


def _expert_override(layers: int) -> ctypes.Array[_BufferOverride]:
    """Overrides that keep the experts of blocks 0 to ``layers`` - 1 in host memory."""
    cpu = _library().ggml_backend_cpu_buffer_type()
    patterns = [rf"blk\.{layer}\.ffn_(up|down|gate|gate_up)_(ch|)exps".encode() for layer in range(layers)]
    array = (_BufferOverride * (layers + 1))(*[_BufferOverride(pattern, cpu) for pattern in patterns])
    return array


EvalCallback = Callable[[Node, bool], bool]


class Session:
    """A loaded model with one context.

    Args:
        path: a GGUF file.
        launch: how to start.
        observer: called before each graph node with ``ask=True`` to say whether it wants to see the
            node, and after it was computed with ``ask=False`` to say whether the rest of the graph is to be
            computed; an exception in it is kept and raised by the next call of ``run``.
        no_alloc: only price the memory, load nothing.
        single_output: only the last token of a batch has logits, as in a server with one slot; the buffers
            are smaller then.
        vocab_only: load the tokenizer alone, without weights or context.
        sequences: how many sequences the context can hold at a time, in ``launch.context`` tokens all together.
    """

    def __init__(
        self,
        path: Path,
        launch: Launch,
        observer: EvalCallback | None = None,
        *,
        no_alloc: bool = False,
        vocab_only: bool = False,
        single_output: bool = False,
        sequences: int = 1,
    ) -> None:
        self.log = Log()
        self._failure: BaseException | None = None
        self._observer = observer
        _library()
        binding.llama_backend_init()
        self.model = self._load(path, launch, no_alloc, vocab_only)
        self.vocabulary = binding.llama_model_get_vocab(self.model)
        self.vocabulary_size = int(binding.llama_vocab_n_tokens(self.vocabulary))
        self.launch = launch
        if not vocab_only:
            self.context = self._start(path, launch, single_output, sequences)

    def _load(self, path: Path, launch: Launch, no_alloc: bool, vocab_only: bool) -> Any:
        params = binding.llama_model_default_params()
        params.n_gpu_layers = launch.gpu_layers
        params.split_mode = binding.LLAMA_SPLIT_MODE_NONE
        params.use_extra_bufts = launch.repack
        params.no_alloc = no_alloc
        params.vocab_only = vocab_only
        params.load_mode = LOAD_MMAP if launch.mmap and not no_alloc else LOAD_NONE
        if launch.cpu_experts:
            self._overrides = _expert_override(launch.cpu_experts)
            params.tensor_buft_overrides = ctypes.addressof(self._overrides)
        model = binding.llama_model_load_from_file(str(path).encode(), params)
        if not model:
            raise BadFile(
                f"llama.cpp cannot load {path}",
                rows=[("llama.cpp", line) for line in self.log.errors()],
                hint="the file is damaged or was made for another version of llama.cpp; get it again, or another one",
            )
        return model

    def _start(self, path: Path, launch: Launch, single_output: bool, sequences: int) -> Any:
        params = binding.llama_context_default_params()
        params.n_ctx = launch.context
        params.n_batch = params.n_ubatch = min(launch.batch, launch.context)
        params.n_seq_max = sequences
        params.kv_unified = sequences > 1  # one pool of cells, so that what sequences share is kept once
        params.n_outputs_max = 1 if single_output else 0
        params.type_k = params.type_v = ggml.type_named(launch.kv_type).id
        params.flash_attn_type = FLASH_ATTENTION_AUTO if launch.kv_type == "F16" else FLASH_ATTENTION_ON
        params.no_perf = True
        if launch.threads:
            params.n_threads = params.n_threads_batch = launch.threads
        else:
            params.n_threads = params.n_threads_batch = cores()
        if self._observer is not None:
            self._callback = binding.ggml_backend_sched_eval_callback(self._on_node)
            params.cb_eval = self._callback
        context = binding.llama_init_from_model(self.model, params)
        if not context:
            raise EdgepruneError(
                f"llama.cpp cannot create a context of {launch.context} tokens for {path}",
                rows=[("llama.cpp", line) for line in self.log.errors()],
                hint="try --kv-type f16: a quantised cache needs head widths that are multiples of 32"
                if launch.kv_type != "F16"
                else "try a shorter --context",
            )
        return context

    def _on_node(self, pointer: int, ask: bool, _: Any) -> bool:
        # Returning False after a node aborts the rest of the graph silently, and an exception in a
        # ctypes callback counts as False; so failures are kept for run() and True is returned.
        try:
            assert self._observer is not None
            return self._observer(Node(pointer), ask) if self._failure is None else not ask
        except BaseException as error:
            self._failure = error
            return not ask

    def run(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Logits float32 [len(tokens), vocabulary] of ``tokens`` as a sequence of its own.

        The array is llama.cpp's own buffer, valid until the next call. Every token is an output, so that
        the last MoE layer sees all of them.
        """
        self.clear()
        return self.extend(tokens, 0)

    def clear(self) -> None:
        """Empty the KV cache."""
        binding.llama_memory_clear(binding.llama_get_memory(self.context), True)

    def extend(self, tokens: Sequence[int], start: int, *, all_logits: bool = True) -> npt.NDArray[np.float32]:
        """Decode ``tokens`` at positions from ``start`` on; logits of all of them, or of the last."""
        last = len(tokens) - 1
        return self._decode([(token, start + i, 0, all_logits or i == last) for i, token in enumerate(tokens)])

    def branch(self, continuations: Sequence[Sequence[int]], start: int) -> npt.NDArray[np.float32]:
        """Let one sequence for each of ``continuations`` go on from the ``start`` tokens that are decoded, which are
        shared and not decoded again, and forget them after.

        Returns:
            logits float32 [sum of their lengths, vocabulary], one continuation after the other, in llama.cpp's own
            buffer, valid until the next call.
        """
        memory = binding.llama_get_memory(self.context)
        numbered = list(enumerate(continuations, 1))
        for sequence, _ in numbered:
            binding.llama_memory_seq_cp(memory, 0, sequence, -1, -1)
        rows = [(token, start + i, sequence, True) for sequence, own in numbered for i, token in enumerate(own)]
        try:
            return self._decode(rows)
        finally:
            for sequence, _ in numbered:
                binding.llama_memory_seq_rm(memory, sequence, -1, -1)

    def forget(self, start: int) -> bool:
        """Forget what was decoded at ``start`` and behind it; False where the model's memory cannot go back."""
        return bool(binding.llama_memory_seq_rm(binding.llama_get_memory(self.context), 0, start, -1))

    def _decode(self, rows: Sequence[tuple[int, int, int, bool]]) -> npt.NDArray[np.float32]:
        """Decode one batch of ``rows``: token, position, sequence, and whether its logits are wanted, which come
        back in the same order."""
        count = len(rows)
        batch = binding.llama_batch_init(count, 0, 1)
        try:
            batch.n_tokens = count
            for index, (token, position, sequence, output) in enumerate(rows):
                batch.token[index] = token
                batch.pos[index] = position
                batch.n_seq_id[index] = 1
                batch.seq_id[index][0] = sequence
                batch.logits[index] = output
            status = binding.llama_decode(self.context, batch)
        finally:
            binding.llama_batch_free(batch)
        if self._failure is not None:
            raise self._failure
        if status != 0:
            raise EdgepruneError(
                f"llama.cpp could not decode {count} tokens (status {status})",
                rows=[("llama.cpp", line) for line in self.log.errors()],
            )
        pointer = binding.llama_get_logits(self.context)
        return np.ctypeslib.as_array(pointer, shape=(sum(row[3] for row in rows), self.vocabulary_size))

    def tokenize(self, text: str, *, framed: bool = True, special: bool = False) -> list[int]:
        """Token ids of ``text``.

        Args:
            framed: put BOS in front if the model wants it; where special tokens are parsed and the text begins with
                one of its own, that is enough.
            special: parse special tokens such as ``<|im_end|>``; otherwise they are text like any other.
        """
        encoded = text.encode("utf-8")
        room = len(encoded) + 16
        buffer = (binding.llama_token * room)()
        count = binding.llama_tokenize(self.vocabulary, encoded, len(encoded), buffer, room, framed, special)
        if count < 0:
            raise EdgepruneError(f"llama.cpp could not tokenize {len(encoded)} bytes of text")
        tokens: list[int] = list(buffer[:count])
        first = int(binding.llama_vocab_bos(self.vocabulary))
        return tokens[1:] if framed and special and tokens[:2] == [first, first] else tokens

    @property
    def begins_with(self) -> int | None:
        """The token that the model wants in front of every text, if it wants one."""
        wanted = binding.llama_vocab_get_add_bos(self.vocabulary)
        return int(binding.llama_vocab_bos(self.vocabulary)) if wanted else None

    def text(self, tokens: Sequence[int]) -> str:
        """What ``tokens`` say, without special ones; U+FFFD stands for a character that is cut off."""
        count, size = len(tokens), -16 * len(tokens)
        ids = (binding.llama_token * count)(*tokens)
        while size < 0:  # what it needs, if it has less
            buffer = ctypes.create_string_buffer(-size)
            size = binding.llama_detokenize(self.vocabulary, ids, count, buffer, len(buffer), False, False)
        return buffer.raw[:size].decode("utf-8", errors="replace") if count else ""

    def ends(self, token: int) -> bool:
        """Whether the model ends what it says with ``token``."""
        return bool(binding.llama_vocab_is_eog(self.vocabulary, token))

    @contextmanager
    def sampling(self, seed: int, *, temperature: float, top_k: int, top_p: float) -> Iterator[Callable[[], int]]:
        """A function that draws the next token from the logits of the last ``extend``, by llama.cpp's own chain of
        samplers."""
        links = (
            binding.llama_sampler_init_top_k(top_k),
            binding.llama_sampler_init_top_p(top_p, 1),
            binding.llama_sampler_init_temp(temperature),
            binding.llama_sampler_init_dist(seed),
        )
        with self._chain(links) as draw:
            yield draw

    @contextmanager
    def constrained(self, grammar: str) -> Iterator[Callable[[], int]]:
        """The same for the likeliest token of those that ``grammar``, in GBNF with a rule ``root``, allows."""
        rules = binding.llama_sampler_init_grammar(self.vocabulary, grammar.encode(), b"root")
        if not rules:
            raise EdgepruneError("llama.cpp cannot read the grammar", rows=[("llama.cpp", self.log.lines[-1])])
        with self._chain((rules, binding.llama_sampler_init_greedy())) as draw:
            yield draw

    @contextmanager
    def _chain(self, links: Sequence[Any]) -> Iterator[Callable[[], int]]:
        chain = binding.llama_sampler_chain_init(binding.llama_sampler_chain_default_params())
        try:
            for link in links:
                binding.llama_sampler_chain_add(chain, link)
            yield lambda: int(binding.llama_sampler_sample(chain, self.context, -1))
        finally:
            binding.llama_sampler_free(chain)

    def close(self) -> None:
        """Free the context and the model."""
        if hasattr(self, "context"):
            binding.llama_free(self.context)
        binding.llama_model_free(self.model)


@contextmanager
def session(
    path: Path,
    launch: Launch,
    observer: EvalCallback | None = None,
    *,
    no_alloc: bool = False,
    single_output: bool = False,
    sequences: int = 1,
) -> Iterator[Session]:
    """A ``Session`` that is closed at the end of the block."""
    opened = Session(path, launch, observer, no_alloc=no_alloc, single_output=single_output, sequences=sequences)
    try:
        yield opened
    finally:
        opened.close()


def backend_devices() -> list[dict[str, Any]]:
    """llama.cpp's compute devices: name, description, kind (cpu, gpu, igpu, accel), memory in bytes.

    A task for ``edgeprune.measure.child``.
    """
    binding.llama_backend_init()
    handle = _library()
    devices = []
    for index in range(handle.ggml_backend_dev_count()):
        device = handle.ggml_backend_dev_get(index)
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        handle.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
        kind = ("cpu", "gpu", "igpu", "accel", "meta")[handle.ggml_backend_dev_type(device)]
        devices.append(
            {
                "name": handle.ggml_backend_dev_name(device).decode(),
                "description": handle.ggml_backend_dev_description(device).decode(),
                "kind": kind,
                "free_bytes": free.value,
                "total_bytes": total.value,
            }
        )
    return devices


def build_of_llama() -> str:
    """Version and commit of the ggml that is loaded, which is llama.cpp's; "unknown" where it does not tell."""
    handle, said = ggml.library(), []
    for name in ("ggml_version", "ggml_commit"):
        if function := getattr(handle, name, None):
            function.restype = ctypes.c_char_p
            said.append(function().decode("utf-8", errors="replace"))
    return ", commit ".join(said) or "unknown"


_MIB_LINE = re.compile(r"([A-Za-z0-9_]+)\s+(KV|RS|compute|output)\s+buffer size\s*=\s*([0-9.]+) MiB")


def buffer_sizes(lines: Iterable[str]) -> dict[str, dict[str, int]]:
    """Bytes by backend and kind (``KV``, ``RS``, ``compute``, ``output``) from llama.cpp's log."""
    sizes: dict[str, dict[str, int]] = {}
    for line in lines:
        for backend, kind, amount in _MIB_LINE.findall(line):
            kinds = sizes.setdefault(backend, {})
            kinds[kind] = kinds.get(kind, 0) + int(float(amount) * 2**20)
    return sizes
