"""A job comes in, lines go out, whatever happens.

It reads one line of JSON, the job, and writes lines of JSON: ``{"step": ..., "done": ..., "total": ...}`` while it
works, ``{"result": {"step": ..., "value": ...}}`` for every step that ended well, ``{"failed": {"step": ..., "cause":
..., "log": [...]}}`` for the one that did not, ``{"error": ...}`` when the device cannot be used at all, and last
``{"end": true}``.

llama.cpp runs in a child, so that an abort, a kill or a hang of it is a line of the report. When standard input
closes, because the connection or the parent is gone, everything here ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

from .answer import LOG_LINES, Failure, Tick, Unusable
from .bench import bench
from .library import Library
from .server import Server
from .steps import steps
from .system import machine, reason

_TICK_SECONDS = 0.5
_POLL_SECONDS = 1.0


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


def work(job: dict[str, Any], channel: Channel, ends: list[Callable[[], None]]) -> bool:
    """All steps in this process, until one fails; whether none did."""
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
        for step, function in steps(engine, job, channel.tick):
            channel.say({"step": step, "done": 0, "total": 1})
            channel.say({"result": {"step": step, "value": function()}})
        step = "memory"
        memory = {"device_bytes": engine.device_bytes(), "peak_bytes": engine.close()}
        channel.say({"result": {"step": step, "value": memory}})
        return True
    except Unusable as error:
        channel.say({"error": error.cause, "hint": error.hint})
    except Failure as error:
        channel.say({"failed": {"step": step, "cause": error.cause, "log": error.log}})
    finally:
        for end in ends:
            end()
    return False


def supervise(job: dict[str, Any], line: bytes, channel: Channel, ends: list[Callable[[], None]]) -> bool:
    """All steps in a child, whose end, whatever it is, is reported; whether they went well."""
    environment = {"GGML_NO_BACKTRACE": "1", **os.environ}
    step, heard, last = "load", threading.Event(), time.monotonic()
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(
            [sys.executable, os.path.abspath(sys.argv[0]), "child"],
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
        done = well = False
        for text in child.stdout:
            last = time.monotonic()
            if not text.endswith(b"\n"):  # it died while it wrote
                break
            message = json.loads(text)
            step = message.get("step", step)
            done = done or bool(message.keys() & {"failed", "error"})
            well = well or message.get("result", {}).get("step") == "memory"
            done = done or well
            channel.say(message)
        heard.set()
        code = child.wait()
        if not done:
            log.seek(0)
            lines = [part.strip() for part in log.read().decode("utf-8", errors="replace").splitlines()]
            hang = f"it said nothing for {job['silent_seconds']:.0f} s and was ended"
            cause = hang if hung.is_set() else reason(code)
            tail = [part[:160] for part in lines if part][-LOG_LINES:]
            channel.say({"failed": {"step": step, "cause": cause, "log": tail}})
    return well


def end_with_parent(ends: list[Callable[[], None]]) -> None:
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
    end_with_parent(ends)
    if sys.argv[1:] == ["child"]:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
        work(job, channel, ends)
    else:
        here = not job.get("status")  # or else this leads a server on another machine
        channel.say({"result": {"step": "machine", "value": machine() if here else {}}})
        if job["engine"] == "bench":
            well = True
        else:
            well = work(job, channel, ends) if job["engine"] == "server" else supervise(job, line, channel, ends)
        if job.get("bench") and well:
            bench(job, channel, ends)
        channel.say({"end": True})
    # llama.cpp frees its backends at exit in an order that can crash after the work is done.
    os._exit(0)
