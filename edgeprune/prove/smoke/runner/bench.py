"""A ``llama-bench``, which tells speeds and knows no answers."""

from __future__ import annotations

import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from typing import Any

from .answer import LOG_LINES, Failure, Tick, Unusable
from .system import high_water, reason, status, threads

_LOOK_SECONDS, _LOOK_FAR_SECONDS = 0.2, 2.0
_RUN = re.compile(r"^llama-bench: benchmark .* run(?: (\d+)/(\d+))?(?: \(cached\))?$")  # what --progress prints
_UNKNOWN = re.compile(r"invalid parameter for argument: (\S+)")


class Bench:
    """Runs of a ``llama-bench``, each a process of its own.

    ``job["bench"]`` has a command line by the name of each run, with ``{threads}`` for what is known here only; they
    print lines of JSON, and their progress. Where they are reached through a shell on another machine, the first line
    of output is the process id, and ``job["status"]`` and ``job["kill"]`` are as for a server.

    Attributes:
        version: as the last result says.
        loaded_s: seconds until the first run had the model loaded; None before.
        peak: memory in bytes of the largest run, 0 where nobody tells.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        self._job, self._remote = job, job.get("status")
        self._process: subprocess.Popen[bytes] | None = None
        self._pid = ""
        self.version, self.peak = "llama-bench", 0
        self.loaded_s: float | None = None

    def run(self, name: str, tick: Tick) -> dict[str, Any]:
        """The result of the run called ``name``, as llama-bench prints it."""
        words = [str(threads(self._job)) if word == "{threads}" else word for word in self._job["bench"][name]]
        self._heard, self._hung, self._pid = time.monotonic(), False, ""
        try:
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        except OSError as error:
            raise Unusable(
                f"{words[0]} cannot be started: {error.strerror or error}",
                "name the path of llama-bench under [runner] in the device's file",
            ) from error
        self._process, self._pid = process, "" if self._remote else str(process.pid)
        done = threading.Event()
        threading.Thread(target=self._watch, args=(done,), daemon=True).start()
        rows, log = self._listen(process, tick)
        done.set()
        code = self._ended(process)
        if code:
            raise self._dead(code, log)
        if not rows:
            raise Failure("llama-bench printed no result", log[-LOG_LINES:])
        self.version = f"llama-bench {rows[-1].get('build_number', '')} ({rows[-1].get('build_commit', '')})"
        return rows[-1]

    def _listen(self, process: subprocess.Popen[bytes], tick: Tick) -> tuple[list[dict[str, Any]], list[str]]:
        """Results and the end of what else was printed."""
        rows: list[dict[str, Any]] = []
        log: list[str] = []
        started = time.monotonic()
        assert process.stdout is not None
        with process.stdout as stream:
            for line in stream:
                self._heard, text = time.monotonic(), line.decode("utf-8", errors="replace").strip()
                progress = _RUN.match(text)
                if self._remote and not self._pid and text.isdigit():
                    self._pid = text
                elif progress:
                    if self.loaded_s is None:
                        self.loaded_s = time.monotonic() - started
                    tick(int(progress[1] or 1) - 1, int(progress[2] or 1))
                elif text.startswith("{"):
                    with contextlib.suppress(ValueError):
                        rows.append(json.loads(text))
                elif text and not text.startswith("llama-bench: benchmark"):
                    log.append(text[:160])
                    del log[:-200]
        return rows, log

    def _watch(self, done: threading.Event) -> None:
        """Look at the memory now and then, and end a run that says nothing any more."""
        while not done.wait(_LOOK_FAR_SECONDS if self._remote else _LOOK_SECONDS):
            if self._pid:
                text = self._over_there(self._remote) if self._remote else status(self._pid)
                self.peak = max(self.peak, high_water(text) or 0)
            if time.monotonic() - self._heard > self._job["silent_seconds"]:
                self._hung = True
                self.end()
                return

    def _over_there(self, command: list[str]) -> str:
        words = [word.replace("{pid}", self._pid) for word in command]
        found = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        return found.stdout.decode("utf-8", errors="replace")

    def _ended(self, process: subprocess.Popen[bytes]) -> int:
        """The exit code; what the system knows of the peak of a process that has ended is exact."""
        if self._remote or not hasattr(os, "wait4"):
            return process.wait()
        try:
            _, how, usage = os.wait4(process.pid, 0)
        except ChildProcessError:  # somebody ended it meanwhile
            return process.wait()
        process.returncode = os.waitstatus_to_exitcode(how)
        self.peak = max(self.peak, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))
        return process.returncode

    def _dead(self, code: int, log: list[str]) -> Exception:
        if unknown := next((found[1] for line in log if (found := _UNKNOWN.search(line))), ""):
            return Unusable(f"llama-bench is too old: it lacks {unknown}", "build one of late 2025 or newer there")
        hang = f"it said nothing for {self._job['silent_seconds']:.0f} s and was ended"
        return Failure(f"llama-bench ended: {hang if self._hung else reason(code)}", log[-LOG_LINES:])

    def end(self) -> None:
        if self._process is not None and self._process.returncode is None:
            if self._remote and self._pid:  # what was started through a shell may outlive the shell
                self._over_there(self._job["kill"])
            with contextlib.suppress(OSError):
                self._process.kill()

    def speed(self, prefill: dict[str, Any], tick: Tick) -> dict[str, Any]:
        """What a result of ``prefill`` and a run of ``decode`` say; nobody looks at logits there."""
        decode = self.run("decode", tick)
        per_s = statistics.median(prefill["samples_ts"])
        return {
            "prefill_per_s": per_s,
            "decode_per_s": statistics.median(decode["samples_ts"]),
            "best_decode_per_s": max(decode["samples_ts"]),
            "prompt_tokens": prefill["n_prompt"],
            "generated_tokens": decode["n_gen"],
            "first_token_s": prefill["n_prompt"] / per_s,
            "by": self.version,
        }


def bench(job: dict[str, Any], channel: Any, ends: list[Any]) -> None:
    """The speed as llama-bench measures it; where it is all that there is, loading, memory and context, too."""
    alone = job["engine"] == "bench"
    step, found = ("load" if alone else "speed"), Bench(job)
    ends.append(found.end)

    def result(value: dict[str, Any]) -> None:
        channel.say({"result": {"step": step, "value": value}})

    try:
        channel.say({"step": step, "done": 0, "total": 1})
        try:
            prefill = found.run("prefill", channel.tick("speed"))
        finally:
            if alone and found.loaded_s is not None:
                result({"version": found.version, "seconds": found.loaded_s})
                step = "speed"
        result(found.speed(prefill, channel.tick("speed")))
        if alone:
            step = "context"
            channel.say({"step": step, "done": 0, "total": 1})
            filled = found.run("context", channel.tick(step))
            result({"filled_tokens": filled["n_prompt"], "context": job["launch"]["context"]})
            step = "memory"
            result({"device_bytes": None, "peak_bytes": found.peak or None})
    except Unusable as error:
        channel.say({"error": error.cause, "hint": error.hint})
    except Failure as error:
        channel.say({"failed": {"step": step, "cause": error.cause, "log": error.log}})
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        cause = f"llama-bench answers in an unknown way: {type(error).__name__} {error}"
        channel.say({"failed": {"step": step, "cause": cause, "log": []}})
    finally:
        found.end()
