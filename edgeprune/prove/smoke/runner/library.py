"""llama.cpp through llama-cpp-python, in this process."""

from __future__ import annotations

import ctypes
import math
import sys
import time
from collections.abc import Callable
from typing import Any

from .answer import Answer, Failure, Tick, Unusable, once
from .cards import expert_override, free_on_gpus, taken
from .system import greatest, high_water, status, threads

_DEBUG = 1  # enum ggml_log_level


class Library:
    """llama.cpp through llama-cpp-python's ctypes layer, in this process.

    Attributes:
        pid: of the process that computes, as /proc has it.
    """

    pid = "self"

    def __init__(self, job: dict[str, Any]) -> None:
        try:
            import llama_cpp
            from llama_cpp import llama_cpp as binding
        except Exception as error:  # a library that cannot be loaded is no ImportError
            raise Unusable(
                f"llama-cpp-python cannot be loaded by {sys.executable}: {' '.join(str(error).split())[:200]}",
                "install it there, or name another interpreter or a llama-server under [runner] in the device's file",
            ) from error
        wanted = ("llama_model_load_from_file", "llama_init_from_model", "llama_memory_clear", "llama_get_memory")
        if missing := [name for name in wanted if not hasattr(binding, name)]:
            raise Unusable(
                f"llama-cpp-python {llama_cpp.__version__} of {sys.executable} is too old: it lacks {missing[0]}",
                "install version 0.3.36 or newer there",
            )
        self.version = f"llama-cpp-python {llama_cpp.__version__}"
        self._binding, self._launch, self._threads = binding, job["launch"], threads(job)
        self._lines: list[str] = []
        self._callback = binding.llama_log_callback(self._hear)
        binding.llama_log_set(self._callback, ctypes.c_void_p(0))
        binding.llama_backend_init()
        self._free_before = free_on_gpus(binding._lib)
        self._model = self._load(job["model"])
        self._context = self._start()
        self._vocabulary = binding.llama_model_get_vocab(self._model)
        self.vocabulary_size = int(binding.llama_vocab_n_tokens(self._vocabulary))
        self._greedy = binding.llama_sampler_init_greedy()

    def _hear(self, level: int, text: bytes, _: Any) -> None:
        if level != _DEBUG:
            self._lines.append(text.decode("utf-8", errors="replace").rstrip("\n"))
            del self._lines[:-2000]

    def _failure(self, cause: str) -> Failure:
        telling = [line for line in self._lines if "error" in line or "failed" in line or "invalid" in line]
        return Failure(cause, telling[-3:] or self._lines[-3:])

    def _load(self, path: str) -> Any:
        launch, params = self._launch, self._binding.llama_model_default_params()
        known = {name for name, *_ in params._fields_}
        values = {
            "n_gpu_layers": launch["gpu_layers"],
            "split_mode": 0,  # one device
            "use_extra_bufts": launch["repack"],
            "load_mode" if "load_mode" in known else "use_mmap": int(launch["mmap"]),
        }
        for name, value in values.items():
            if name in known:
                setattr(params, name, value)
        if launch["cpu_experts"]:
            self._overrides = expert_override(self._binding, launch["cpu_experts"])
            params.tensor_buft_overrides = ctypes.addressof(self._overrides)
        model = self._binding.llama_model_load_from_file(path.encode(), params)
        if not model:
            raise self._failure("llama.cpp cannot load the file")
        return model

    def _start(self) -> Any:
        launch, params = self._launch, self._binding.llama_context_default_params()
        known, quantised = {name for name, *_ in params._fields_}, launch["kv_type"] != "F16"
        values = {
            "n_ctx": launch["context"],
            "n_batch": min(launch["batch"], launch["context"]),
            "n_ubatch": min(launch["batch"], launch["context"]),
            "n_seq_max": 1,
            "n_outputs_max": 1,
            "type_k": launch["kv_type_id"],
            "type_v": launch["kv_type_id"],
            "n_threads": self._threads,
            "n_threads_batch": self._threads,
            "no_perf": True,
            "flash_attn_type": 1 if quantised else -1,  # on; llama.cpp decides
            "flash_attn": quantised,
        }
        for name, value in values.items():
            if name in known:
                setattr(params, name, value)
        context = self._binding.llama_init_from_model(self._model, params)
        if not context:
            raise self._failure(f"llama.cpp cannot create a context of {launch['context']:,} tokens")
        return context

    def tokenize(self, text: str, special: bool) -> list[int]:
        data = text.encode()
        room = len(data) + 16
        buffer = (self._binding.llama_token * room)()
        count = self._binding.llama_tokenize(self._vocabulary, data, len(data), buffer, room, True, special)
        if count < 0:
            raise self._failure(f"llama.cpp could not tokenize {len(data)} bytes of text")
        return once(list(buffer[:count]), special)

    def _decode(self, tokens: list[int], start: int) -> None:
        count = len(tokens)
        batch = self._binding.llama_batch_init(count, 0, 1)
        try:
            batch.n_tokens = count
            for index, token in enumerate(tokens):
                batch.token[index], batch.pos[index] = token, start + index
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
                batch.logits[index] = index == count - 1
            status = self._binding.llama_decode(self._context, batch)
        finally:
            self._binding.llama_batch_free(batch)
        if status != 0:
            raise self._failure(f"llama.cpp could not decode {count} tokens at position {start:,} (status {status})")

    def _prefill(self, tokens: list[int], tick: Tick) -> None:
        self._binding.llama_memory_clear(self._binding.llama_get_memory(self._context), True)
        step = min(self._launch["batch"], self._launch["context"])
        for start in range(0, len(tokens), step):
            self._decode(tokens[start : start + step], start)
            tick(min(start + step, len(tokens)), len(tokens))

    def _finite(self) -> bool:
        # A sum in double precision of finite floats is finite.
        logits = self._binding.llama_get_logits_ith(self._context, -1)
        return math.isfinite(sum(logits[: self.vocabulary_size]))

    def _pick(self) -> int:
        return int(self._binding.llama_sampler_sample(self._greedy, self._context, -1))

    def complete(self, tokens: list[int], most: int, *, ends: bool, tick: Tick) -> Answer:
        """The ``most`` likeliest next tokens one by one; fewer if the model ends its answer and ``ends`` is set."""
        started = time.perf_counter()
        self._prefill(tokens, lambda done, total: tick(0, most))
        token = self._pick()
        prefill, decode, finite = time.perf_counter() - started, 0.0, self._finite()
        said: list[int] = []
        while not (ends and self._binding.llama_vocab_is_eog(self._vocabulary, token)):
            said.append(token)
            tick(len(said), most)
            if len(said) == most:
                break
            started = time.perf_counter()
            self._decode([token], len(tokens) + len(said) - 1)
            token = self._pick()
            decode += time.perf_counter() - started
            finite = self._finite() and finite
        return Answer(said, self._text(said), finite, prefill, decode)

    def _text(self, tokens: list[int]) -> str:
        ids = (self._binding.llama_token * len(tokens))(*tokens)
        room = 16 * len(tokens) + 16
        while True:
            buffer = ctypes.create_string_buffer(room)
            size = self._binding.llama_detokenize(self._vocabulary, ids, len(tokens), buffer, room, False, False)
            if size >= 0:
                return buffer.raw[:size].decode("utf-8", errors="replace")
            room = -size

    def fill(self, context: int, tokens: Callable[[int], list[int]], tick: Tick) -> tuple[int, bool]:
        """Fill the whole context; how many tokens it then holds, and whether the last logits are finite."""
        self._prefill(tokens(context), tick)
        return context, self._finite()

    def device_bytes(self) -> int | None:
        """What the model holds of the memory of graphics cards, which is most at the end; None without one."""
        return taken(self._free_before, free_on_gpus(self._binding._lib))

    def close(self) -> int | None:
        """Peak memory in bytes, if the system tells."""
        return high_water(status("self")) or greatest("RUSAGE_SELF")
