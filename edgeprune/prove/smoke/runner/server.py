"""A ``llama-server``, spoken to over HTTP."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import IO, Any

from .answer import LOG_LINES, Answer, Failure, Tick, Unusable, once
from .system import greatest, high_water, reason, status, threads

# No softmax gives its best token less, whatever the vocabulary; what is computed from NaN is below or no number.
_LEAST_LOGARITHM = -1000.0


class Server:
    """A ``llama-server`` that is started here, spoken to over HTTP.

    ``job["server"]`` is its command line, with ``{port}`` and ``{threads}`` for what is known here only. Where it is
    reached through a shell on another machine, ``job["port"]`` is the port here that leads to it, its first line of
    output is its process id, ``job["status"]`` is a command that prints its ``/proc/PID/status``, and ``job["kill"]``
    one that ends it; both have ``{pid}`` in them.

    Attributes:
        pid: of the server, "" where it is on another machine.
    """

    def __init__(self, job: dict[str, Any], tick: Tick) -> None:
        self._timeout, self._remote, self._kill = job["silent_seconds"], job.get("status"), job.get("kill")
        self._port = job.get("port") or free_port()
        values = {"{port}": str(self._port), "{threads}": str(threads(job))}
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
        self._pid = self.pid = "" if self._remote else str(self._process.pid)
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
        return [line[:160] for line in lines if line][-LOG_LINES:]

    def _dead(self) -> Failure:
        return Failure(f"llama-server ended: {reason(self._process.returncode)}", self._tail())

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
        return once([int(token) for token in self._ask("/tokenize", body)["tokens"]], special)

    def _completion(self, tokens: list[int], most: int, ends: bool) -> Any:
        body = {
            "prompt": tokens,
            "n_predict": most,
            # The likeliest token and nothing else: the model's own metadata may ask for penalties.
            "samplers": ["top_k", "temperature"],
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

    def fill(self, context: int, tokens: Callable[[int], list[int]], tick: Tick) -> tuple[int, bool | None]:
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
        peak = high_water(self._over_there(self._remote) if self._remote else status(self._pid))
        self.end()
        return peak or (None if self._remote else greatest("RUSAGE_CHILDREN"))

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


def _probable(found: dict[str, Any]) -> bool | None:
    """Whether every token of a completion had a probability that is a number; None where there is no probability."""
    rows = found.get("completion_probabilities") or []
    if not rows:  # of an answer that ended at once, or of a server that does not tell
        return None
    values = [row.get("logprob") for row in rows]
    return all(isinstance(value, (int, float)) and value > _LEAST_LOGARITHM for value in values)


def _drain(stream: IO[bytes], log: IO[bytes]) -> None:
    for line in stream:
        log.write(line)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
