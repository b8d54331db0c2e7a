"""What is sent to a device and run there: it loads a GGUF, makes it work, and says how that went.

It needs Python 3.9 and llama-cpp-python, or a ``llama-server``, and nothing else: no edgeprune. It reads one line of
JSON, the job, and writes lines of JSON: ``{"step": ..., "done": ..., "total": ...}`` while it works,
``{"result": {"step": ..., "value": ...}}`` for every step that ended well, ``{"failed": {"step": ..., "cause": ...,
"log": [...]}}`` for the one that did not, ``{"error": ...}`` when the device cannot be used at all, and last
``{"end": true}``.

llama.cpp runs in a child, so that an abort, a kill or a hang of it is a line of the report. When standard input
closes, because the connection or the parent is gone, everything here ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import platform
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import IO, Any

Tick = Callable[[int, int], None]
_SIGNALS = {
    "SIGABRT": "llama.cpp aborted on a failed check",
    "SIGSEGV": "llama.cpp crashed with a memory fault",
    "SIGBUS": "a mapped file changed or shrank while it was read",
    "SIGILL": "llama.cpp was built for another processor",
    "SIGKILL": "it was killed, most likely for using too much memory",
}
_LOG_LINES = 6
_TICK_SECONDS = 0.5
_POLL_SECONDS = 1.0
_DEBUG = 1  # enum ggml_log_level
# No softmax gives its best token less, whatever the vocabulary; what is computed from NaN is below or no number.
_LEAST_LOGARITHM = -1000.0


class Failure(Exception):
    """A step went wrong: one line, and the end of the log."""

    def __init__(self, cause: str, log: list[str]) -> None:
        super().__init__(cause)
        self.cause, self.log = cause, log


class Unusable(Exception):
    """Nothing can be run here at all: one line, and the way out."""

    def __init__(self, cause: str, hint: str) -> None:
        super().__init__(cause)
        self.cause, self.hint = cause, hint


class Answer:
    """What a model said after a prompt: tokens, text, whether all logits were finite, and seconds that it took."""

    def __init__(self, tokens: list[int], text: str, finite: bool, prefill_s: float, decode_s: float) -> None:
        self.tokens, self.text, self.finite = tokens, text, finite
        self.prefill_s, self.decode_s = prefill_s, decode_s


def _once(tokens: list[int], special: bool) -> list[int]:
    """``tokens`` without a second BOS where a chat template has written one, too."""
    return tokens[1:] if special and len(tokens) > 1 and tokens[0] == tokens[1] else tokens


def _threads(job: dict[str, Any]) -> int:
    """Threads that are asked for, but no more than there are cores here: they wait for each other by spinning."""
    if job.get("status"):  # it runs on another machine than this
        return int(job["launch"]["threads"])
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(int(job["launch"]["threads"]), usable)


def _high_water(text: str) -> int | None:
    """Peak resident memory in bytes in the text of a ``/proc/PID/status``."""
    for line in text.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None


def _status(pid: str) -> str:
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as stream:
            return stream.read()
    except OSError:
        return ""


def _greatest(who: str) -> int | None:
    """Peak resident memory by ``getrusage``, where that is about one address space (not on Linux)."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    if sys.platform.startswith("linux"):
        return None
    return int(resource.getrusage(getattr(resource, who)).ru_maxrss)  # bytes on macOS


class Library:
    """llama.cpp through llama-cpp-python's ctypes layer, in this process."""

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
        self._binding, self._launch, self._threads = binding, job["launch"], _threads(job)
        self._lines: list[str] = []
        self._callback = binding.llama_log_callback(self._hear)
        binding.llama_log_set(self._callback, ctypes.c_void_p(0))
        binding.llama_backend_init()
        self._free_before = _free_on_gpus(binding._lib)
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
            self._overrides = _expert_override(self._binding, launch["cpu_experts"])
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
        return _once(list(buffer[:count]), special)

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
        return taken(self._free_before, _free_on_gpus(self._binding._lib))

    def close(self) -> int | None:
        """Peak memory in bytes, if the system tells."""
        return _high_water(_status("self")) or _greatest("RUSAGE_SELF")


_GPU = 1  # enum ggml_backend_dev_type; integrated ones use the memory of the system


def _free_on_gpus(library: Any) -> dict[str, int]:
    """Free memory in bytes of every graphics card that llama.cpp sees, by name; empty where it cannot tell."""
    found: dict[str, int] = {}
    try:
        count, get, kind = (getattr(library, f"ggml_backend_dev_{name}") for name in ("count", "get", "type"))
        name, memory = library.ggml_backend_dev_name, library.ggml_backend_dev_memory
    except AttributeError:
        return found
    count.restype, get.restype, get.argtypes = ctypes.c_size_t, ctypes.c_void_p, [ctypes.c_size_t]
    kind.argtypes, name.restype, name.argtypes = [ctypes.c_void_p], ctypes.c_char_p, [ctypes.c_void_p]
    memory.argtypes = [ctypes.c_void_p, ctypes.POINTER(ctypes.c_size_t), ctypes.POINTER(ctypes.c_size_t)]
    for index in range(count()):
        device = get(index)
        if kind(device) == _GPU:
            free, total = ctypes.c_size_t(), ctypes.c_size_t()
            memory(device, ctypes.byref(free), ctypes.byref(total))
            found[name(device).decode()] = free.value
    return found


def taken(before: dict[str, int], now: dict[str, int]) -> int | None:
    """Bytes by which the free memory of the devices fell together; None without devices."""
    return sum(max(0, free - now.get(name, free)) for name, free in before.items()) if before else None


class _BufferOverride(ctypes.Structure):
    """``struct llama_model_tensor_buft_override``: where tensors matching a pattern are kept."""

    _fields_ = (("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p))


def _expert_override(binding: Any, layers: int) -> ctypes.Array[_BufferOverride]:
    """Overrides that keep the experts of blocks 0 to ``layers`` - 1 in host memory."""
    host = binding._lib.ggml_backend_cpu_buffer_type
    host.restype = ctypes.c_void_p
    patterns = [rf"blk\.{layer}\.ffn_(up|down|gate|gate_up)_(ch|)exps".encode() for layer in range(layers)]
    return (_BufferOverride * (layers + 1))(*[_BufferOverride(pattern, host()) for pattern in patterns])


class Server:
    """A ``llama-server`` that is started here, spoken to over HTTP.

    ``job["server"]`` is its command line, with ``{port}`` and ``{threads}`` for what is known here only. Where it is
    reached through a shell on another machine, ``job["port"]`` is the port here that leads to it, its first line of
    output is its process id, ``job["status"]`` is a command that prints its ``/proc/PID/status``, and ``job["kill"]``
    one that ends it; both have ``{pid}`` in them.
    """

    def __init__(self, job: dict[str, Any], tick: Tick) -> None:
        self._timeout, self._remote, self._kill = job["silent_seconds"], job.get("status"), job.get("kill")
        self._port = job.get("port") or _free_port()
        values = {"{port}": str(self._port), "{threads}": str(_threads(job))}
        words = [values.get(word, word) for word in job["server"]]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the server
        try:
            self._process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if self._remote else self._log,
                stderr=self._log,
            )
        except OSError as error:
            raise Unusable(
                f"{words[0]} cannot be started: {error.strerror or error}",
                "name the path of llama-server under [runner] in the device's file",
            ) from error
        self._pid = "" if self._remote else str(self._process.pid)
        try:
            if self._remote:
                self._pid = self._announced()
            self._await(tick)
            properties = self._get("/props")
            self.version = f"llama-server {properties.get('build_info', '')}".strip()
            model = self._get("/v1/models")["data"][0]
            self.vocabulary_size = int(model["meta"]["n_vocab"])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            self.end()
            raise Failure(f"llama-server answers in an unknown way: {type(error).__name__} {error}", []) from error
        except BaseException:
            self.end()
            raise

    def _announced(self) -> str:
        """The process id that the shell prints before it becomes the server; what follows goes to the log."""
        stream = self._process.stdout
        assert stream is not None
        line = stream.readline().strip()
        threading.Thread(target=_drain, args=(stream, self._log), daemon=True).start()
        if not line.isdigit():
            self._log.write(line + b"\n")
            self._process.wait()
            raise self._dead()
        return line.decode()

    def _await(self, tick: Tick) -> None:
        deadline = time.monotonic() + self._timeout
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise self._dead()
            try:
                self._get("/health")
                return
            except (OSError, ValueError):  # not listening yet, or loading
                tick(0, 1)
                time.sleep(0.1)
        raise Failure(f"llama-server was not ready after {self._timeout:.0f} s", self._tail())

    def _tail(self) -> list[str]:
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().decode("utf-8", errors="replace").splitlines()]
        return [line[:160] for line in lines if line][-_LOG_LINES:]

    def _dead(self) -> Failure:
        return Failure(f"llama-server ended: {_reason(self._process.returncode)}", self._tail())

    def _get(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self._port}{path}", data, {"Content-Type": "application/json"}
        )
        # No proxy of the environment is to see this.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=self._timeout) as response:
            return json.loads(response.read())

    def _ask(self, path: str, body: dict[str, Any]) -> Any:
        try:
            return self._get(path, body)
        except urllib.error.HTTPError as error:
            said = error.read().decode("utf-8", errors="replace")[:160]
            raise Failure(f"llama-server refused {path}: {error.code}", [said]) from error
        except (OSError, ValueError) as error:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5)
            if self._process.poll() is not None:
                raise self._dead() from error
            raise Failure(f"llama-server does not answer: {error}", self._tail()) from error

    def tokenize(self, text: str, special: bool) -> list[int]:
        body = {"content": text, "add_special": True, "parse_special": special}
        return _once([int(token) for token in self._ask("/tokenize", body)["tokens"]], special)

    def _completion(self, tokens: list[int], most: int, ends: bool) -> Any:
        body = {
            "prompt": tokens,
            "n_predict": most,
            "temperature": 0,
            "top_k": 1,
            "seed": 0,
            "n_probs": 1,
            "cache_prompt": False,
            "return_tokens": True,
            "ignore_eos": not ends,
        }
        return self._ask("/completion", body)

    def complete(self, tokens: list[int], most: int, *, ends: bool, tick: Tick) -> Answer:
        """As ``Library.complete``; the seconds are those that the server counts."""
        tick(0, most)
        found = self._completion(tokens, most, ends)
        timings, said = found["timings"], [int(token) for token in found.get("tokens", [])]
        tick(most, most)
        seconds = (timings["prompt_ms"] / 1000, timings["predicted_ms"] / 1000)
        return Answer(said, str(found["content"]), _probable(found), *seconds)

    def fill(self, context: int, tokens: Callable[[int], list[int]], tick: Tick) -> tuple[int, bool]:
        """As ``Library.fill``; the last few tokens are generated: the server refuses a prompt without room."""
        generated = min(8, context - 1)
        tick(0, context)
        found = self._completion(tokens(context - generated), generated, False)
        tick(context, context)
        return int(found["tokens_evaluated"]) + int(found["tokens_predicted"]), _probable(found)

    def device_bytes(self) -> int | None:
        """As ``Library.device_bytes``; a server does not tell."""
        return None

    def close(self) -> int | None:
        """End the server; its peak memory in bytes, if the system tells."""
        peak = _high_water(self._over_there(self._remote) if self._remote else _status(self._pid))
        self.end()
        return peak or (None if self._remote else _greatest("RUSAGE_CHILDREN"))

    def _over_there(self, command: list[str]) -> str:
        words = [word.replace("{pid}", self._pid) for word in command]
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        return done.stdout.decode("utf-8", errors="replace")

    def end(self) -> None:
        if self._process.poll() is None:
            if self._kill and self._pid:  # what was started through a shell may outlive the shell
                self._over_there(self._kill)
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


def _probable(found: dict[str, Any]) -> bool:
    """Whether every token of a completion had a probability that is a number."""
    rows = found.get("completion_probabilities") or []
    values = [row.get("logprob") for row in rows]
    return all(isinstance(value, (int, float)) and value > _LEAST_LOGARITHM for value in values)


def _drain(stream: IO[bytes], log: IO[bytes]) -> None:
    for line in stream:
        log.write(line)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _reason(code: int) -> str:
    """What an exit code of a process means; shells say 128 + N for signal N."""
    number = -code if code < 0 else code - 128
    if 0 < number < 65:
        try:
            name = signal.Signals(number).name
        except ValueError:
            name = f"signal {number}"
        return _SIGNALS.get(name, name)
    return f"exit code {code}"


def _tokens(size: int) -> Callable[[int], list[int]]:
    """Deterministic tokens spread over a vocabulary of ``size``, so that many experts take part."""

    def draw(count: int) -> list[int]:
        source = random.Random(0)
        return [source.randrange(size) for _ in range(count)]

    return draw


def _speed(engine: Any, job: dict[str, Any], tick: Tick) -> dict[str, Any]:
    wanted = job["speed"]
    prompt, most = _tokens(engine.vocabulary_size)(wanted["prompt_tokens"]), wanted["generated_tokens"]
    prefill, decode, finite = [], [], True
    for number in range(wanted["repeats"]):
        answer = engine.complete(
            prompt,
            most,
            ends=False,
            tick=lambda done, total, n=number: tick(n * total + done, total * wanted["repeats"]),
        )
        prefill.append(len(prompt) / max(answer.prefill_s, 1e-9))
        steps = len(answer.tokens) - 1  # the first token comes with the prompt
        decode.append(steps / max(answer.decode_s, 1e-9) if steps > 0 else 0.0)
        finite = finite and answer.finite
    return {
        "prefill_per_s": statistics.median(prefill),
        "decode_per_s": statistics.median(decode),
        "best_decode_per_s": max(decode),
        "prompt_tokens": len(prompt),
        "generated_tokens": most,
        "first_token_s": len(prompt) / statistics.median(prefill),
        "finite": finite,
    }


def _answers(engine: Any, job: dict[str, Any], tick: Tick, count: int | None = None) -> list[dict[str, Any]]:
    prompts, most = job["prompts"][:count], job["most_tokens"]
    found = []
    for number, prompt in enumerate(prompts):
        tokens = engine.tokenize(prompt["text"], prompt["special"])
        room = min(most, job["launch"]["context"] - len(tokens))
        if room < 1:
            raise Failure(f"a context of {job['launch']['context']} tokens has no room for a question", [])
        answer = engine.complete(
            tokens, room, ends=True, tick=lambda done, total, n=number: tick(n * most + done, len(prompts) * most)
        )
        found.append({"tokens": answer.tokens, "text": answer.text, "finite": answer.finite})
    return found


def _fill(engine: Any, job: dict[str, Any], tick: Tick) -> dict[str, Any]:
    context = job["launch"]["context"]
    filled, finite = engine.fill(context, _tokens(engine.vocabulary_size), tick)
    return {"filled_tokens": filled, "context": context, "finite": finite}


def _steps(engine: Any, job: dict[str, Any], tick: Callable[[str], Tick]) -> Iterator[tuple[str, Callable[[], Any]]]:
    yield "speed", lambda: _speed(engine, job, tick("speed"))
    yield "answers", lambda: _answers(engine, job, tick("answers"))
    # Others were asked in between: an answer that depends on what came before it is not deterministic either.
    yield "repeated", lambda: _answers(engine, job, tick("repeated"), count=job["repeated"])
    yield "context", lambda: _fill(engine, job, tick("context"))


class Channel:
    """Lines of JSON for whoever started this, from any thread."""

    def __init__(self) -> None:
        # Whatever native code prints goes to standard error, not between the lines.
        self._stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self._lock, self._last = threading.Lock(), 0.0

    def say(self, message: dict[str, Any]) -> None:
        with self._lock:
            self._stream.write(json.dumps(message) + "\n")
            self._stream.flush()

    def tick(self, step: str) -> Tick:
        def tick(done: int, total: int) -> None:
            now = time.monotonic()
            if now - self._last >= _TICK_SECONDS:
                self._last = now
                self.say({"step": step, "done": done, "total": total})

        return tick


def _work(job: dict[str, Any], channel: Channel, ends: list[Callable[[], None]]) -> None:
    """All steps in this process, until one fails."""
    step, engine = "load", None
    try:
        channel.say({"step": step, "done": 0, "total": 1})
        started = time.monotonic()
        engine = Server(job, channel.tick("load")) if job["engine"] == "server" else Library(job)
        if isinstance(engine, Server):
            ends.append(engine.end)
        facts = {
            "version": engine.version,
            "vocabulary": engine.vocabulary_size,
            "seconds": time.monotonic() - started,
        }
        channel.say({"result": {"step": step, "value": facts}})
        for step, function in _steps(engine, job, channel.tick):
            channel.say({"step": step, "done": 0, "total": 1})
            channel.say({"result": {"step": step, "value": function()}})
        step = "memory"
        memory = {"device_bytes": engine.device_bytes(), "peak_bytes": engine.close()}
        channel.say({"result": {"step": step, "value": memory}})
    except Unusable as error:
        channel.say({"error": error.cause, "hint": error.hint})
    except Failure as error:
        channel.say({"failed": {"step": step, "cause": error.cause, "log": error.log}})
    finally:
        for end in ends:
            end()


def _machine() -> dict[str, Any]:
    """What this is, for the report."""
    memory = None
    with contextlib.suppress(OSError, ValueError, AttributeError):
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}".strip(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "memory_bytes": memory,
    }


def _supervise(job: dict[str, Any], line: bytes, channel: Channel, ends: list[Callable[[], None]]) -> None:
    """All steps in a child, whose end, whatever it is, is reported."""
    environment = {"GGML_NO_BACKTRACE": "1", **os.environ}
    step, heard, last = "load", threading.Event(), time.monotonic()
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(
            [sys.executable, os.path.abspath(__file__), "child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
        )
        ends.append(child.kill)
        assert child.stdin is not None and child.stdout is not None
        hung = threading.Event()

        def watch() -> None:
            while not heard.wait(_POLL_SECONDS):
                if time.monotonic() - last > job["silent_seconds"]:
                    hung.set()
                    child.kill()
                    return

        threading.Thread(target=watch, daemon=True).start()
        with contextlib.suppress(OSError):
            child.stdin.write(line)
            child.stdin.flush()
        done = False
        for text in child.stdout:
            last = time.monotonic()
            if not text.endswith(b"\n"):  # it died while it wrote
                break
            message = json.loads(text)
            step = message.get("step", step)
            done = done or bool(message.keys() & {"failed", "error"})
            done = done or message.get("result", {}).get("step") == "memory"
            channel.say(message)
        heard.set()
        code = child.wait()
        if not done:
            log.seek(0)
            lines = [part.strip() for part in log.read().decode("utf-8", errors="replace").splitlines()]
            hang = f"it said nothing for {job['silent_seconds']:.0f} s and was ended"
            cause = hang if hung.is_set() else _reason(code)
            tail = [part[:160] for part in lines if part][-_LOG_LINES:]
            channel.say({"failed": {"step": step, "cause": cause, "log": tail}})


def _end_with_parent(ends: list[Callable[[], None]]) -> None:
    """Stop everything as soon as standard input closes."""

    def watch() -> None:
        with contextlib.suppress(OSError, ValueError):
            while sys.stdin.buffer.read(1):
                pass
        for end in list(ends):
            end()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    channel, ends = Channel(), list[Callable[[], None]]()
    line = sys.stdin.buffer.readline()
    job = json.loads(line)
    _end_with_parent(ends)
    if sys.argv[1:] == ["child"]:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
        _work(job, channel, ends)
    else:
        channel.say({"result": {"step": "machine", "value": _machine()}})
        if job["engine"] == "server":
            _work(job, channel, ends)
        else:
            _supervise(job, line, channel, ends)
        channel.say({"end": True})
    # llama.cpp frees its backends at exit in an order that can crash after the work is done.
    os._exit(0)


if __name__ == "__main__":
    main()
