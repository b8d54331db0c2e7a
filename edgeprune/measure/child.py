"""Work in a child process: an abort, an out-of-memory kill or a hang of native code is an error here.

A task is a function ``module:function`` inside this package that takes JSON-like keyword arguments,
and optionally ``progress``, and returns a JSON-like value. Large results travel as files.

Parent and child speak one JSON object per line; the child has a descriptor of its own for it, and whatever
native code prints goes to its standard error, of which the end is kept for the message when it dies. It
ends itself when its parent is gone, because its standard input then closes.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import inspect
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from edgeprune.errors import KINDS, EdgepruneError, NativeCrash, system_cause
from edgeprune.units import format_seconds

Progress = Callable[[int, int], None]
# A child is taken to hang when for this long it used no processor time and said nothing, or when it said
# nothing for the longer time whatever it did: the threads of llama.cpp wait for each other by spinning.
IDLE_SECONDS, SILENT_SECONDS = 300.0, 6 * 3600.0
_POLL_SECONDS = 1.0
_LOG_LINES = 6
# Packages that are installed under another name than they are imported by.
_DISTRIBUTIONS = {"llama_cpp": "llama-cpp-python", "huggingface_hub": "huggingface-hub"}
_FRAMES = 3
_SIGNALS: dict[int, str] = {
    signal.SIGABRT: "llama.cpp aborted on a failed check",
    signal.SIGSEGV: "llama.cpp crashed with a memory fault",
    signal.SIGILL: "llama.cpp was built for another processor",
}
if hasattr(signal, "SIGKILL"):
    _SIGNALS[signal.SIGKILL] = "it was killed, most likely for using too much memory"
if hasattr(signal, "SIGBUS"):
    _SIGNALS[signal.SIGBUS] = "a mapped file changed or shrank while it was read"


# Threads that wait for each other by spinning take the cores away from those they wait for as soon as anything else
# runs on the machine: four times the wall time was seen on two busy cores. The matrix products made in Python are
# too small to be worth threads of their own.
_POLITE = {"GOMP_SPINCOUNT": "1000", "OPENBLAS_NUM_THREADS": "1"}


class Worker:
    """A child process that does one task after another, for tasks that begin with the same preparations: the tables
    of the coarsest types take llama.cpp up to four seconds to make.

    It is started by the first call, and anew by the next if it has died. A context manager: the process is gone at
    the end, with all that it held. Not for several threads.
    """

    def __init__(self, *, as_user: bool = False) -> None:
        """
        Args:
            as_user: leave the threads' way of waiting as the user's own programs have it, to measure their speed.
        """
        self._as_user = as_user
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def call(
        self,
        task: str,
        arguments: dict[str, Any],
        progress: Progress | None = None,
        *,
        silent_seconds: float | None = None,
    ) -> Any:
        """The value that ``task`` returns for ``arguments``, computed in the child process.

        Args:
            task: ``"edgeprune.room.module:function"``.
            progress: called with steps done and steps in all, as the task reports them.
            silent_seconds: end the child when it reports nothing for so long, instead of after hours.

        Raises:
            NativeCrash: the child died; the message has the reason and the end of its log.
            EdgepruneError: whatever the task raised.
        """
        outcome = self._outcome({"task": task, "arguments": arguments}, progress, silent_seconds)
        if "error" in outcome:
            kind = KINDS.get(outcome["error"], EdgepruneError)
            raise kind(outcome["cause"], rows=[(a, b) for a, b in outcome["rows"]], hint=outcome["hint"])
        return outcome["value"]

    def _outcome(
        self, order: dict[str, Any], progress: Progress | None, silent_seconds: float | None
    ) -> dict[str, Any]:
        process, log = self._running(order["task"])
        assert process.stdin is not None and process.stdout is not None
        watch, outcome = _Watch(process, SILENT_SECONDS if silent_seconds is None else silent_seconds), None
        # Not by seeking: the child writes at the offset that it shares with this process.
        begins = os.fstat(log.fileno()).st_size
        try:
            watch.start()
            with contextlib.suppress(OSError):  # it is gone
                process.stdin.write(json.dumps(order).encode() + b"\n")
                process.stdin.flush()
            outcome = _listen(process.stdout, progress, watch.heard)
            if outcome is None:
                code = process.wait()
                watch.stop()  # it may be about to say why
                raise _crash(order["task"], code, log, begins, watch.verdict)
        finally:
            try:
                watch.stop()
            finally:
                if outcome is None:  # a process that may still be at it is not asked again
                    self._end()
        return outcome

    def _running(self, task: str) -> tuple[subprocess.Popen[bytes], IO[bytes]]:
        """The process and its log; ``task`` names it in lists of processes, if it is started."""
        if self._process is None or self._process.poll() is not None:
            self._end()  # it was killed while it waited, most likely for its memory, or could not be started
        if self._process is None or self._log is None:
            self._log = tempfile.TemporaryFile()  # noqa: SIM115 - is closed in _end
            environment = {
                **({} if self._as_user else _POLITE),
                **os.environ,
                "PYTHONPATH": _python_path(),
                "TOKENIZERS_PARALLELISM": "false",
                "GGML_NO_BACKTRACE": "1",  # a debugger's frames would push the failed check out of the log's end
            }
            self._process = subprocess.Popen(
                [sys.executable, "-m", "edgeprune.measure.child", task],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env=environment,
            )
        return self._process, self._log

    def _end(self) -> None:
        """Let the process go, whatever it does: llama.cpp frees its backends at an orderly exit in an order that can
        crash."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                with contextlib.suppress(OSError):
                    if stream is not None:
                        stream.close()
        if self._log is not None:
            self._log.close()
        self._process = self._log = None


def call(
    task: str,
    arguments: dict[str, Any],
    progress: Progress | None = None,
    *,
    as_user: bool = False,
    silent_seconds: float | None = None,
) -> Any:
    """``Worker.call`` in a child process of its own.

    Args:
        as_user: as of ``Worker``.

    Raises:
        NativeCrash, EdgepruneError: as there.
    """
    with Worker(as_user=as_user) as worker:
        return worker.call(task, arguments, progress, silent_seconds=silent_seconds)


def _python_path() -> str:
    """Module path of the child, so that a checkout that is not installed works from any folder."""
    root = str(Path(__file__).resolve().parents[2])
    inherited = os.environ.get("PYTHONPATH")
    return root if not inherited else f"{root}{os.pathsep}{inherited}"


class _Watch(threading.Thread):
    """Kills a child that hangs, and says why in ``verdict``.

    Time is counted in looks at the child, so that a machine that sleeps or a stopped process group is no hang.
    """

    def __init__(self, process: subprocess.Popen[bytes], silent_seconds: float) -> None:
        super().__init__(daemon=True)
        self.verdict = ""
        self._process, self._silent_seconds, self._ended = process, silent_seconds, threading.Event()
        self._messages = 0

    def heard(self) -> None:
        """The child has said something."""
        self._messages += 1

    def stop(self) -> None:
        self._ended.set()
        self.join()

    def run(self) -> None:
        before: tuple[int, float] = (-1, -1.0)
        idle = silent = 0.0
        while not self._ended.wait(_POLL_SECONDS):
            now = (self._messages, _processor_seconds(self._process.pid))
            silent = silent + _POLL_SECONDS if now[0] == before[0] else 0.0
            idle = idle + _POLL_SECONDS if now == before else 0.0
            before = now
            if idle >= IDLE_SECONDS or silent >= self._silent_seconds:
                doing = "used no processor time" if idle >= IDLE_SECONDS else "made no progress"
                self.verdict = f"it {doing} for {format_seconds(max(idle, silent))} and was ended"
                self._process.kill()
                return


def _processor_seconds(pid: int) -> float:
    """Processor time of the process so far; -1 when it is gone."""
    import psutil

    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return -1.0
    return float(times.user + times.system)


def _listen(
    stream: IO[bytes], progress: Progress | None, heard: Callable[[], None] = lambda: None
) -> dict[str, Any] | None:
    """What the child says at the end of a task; None if it died before."""
    for line in stream:
        heard()
        if not line.endswith(b"\n"):  # the child died while it wrote
            break
        message: dict[str, Any] = json.loads(line)
        if "done" not in message:
            return message
        if progress is not None:
            progress(message["done"], message["total"])
    return None


def _crash(task: str, code: int, log: IO[bytes], begins: int, verdict: str) -> NativeCrash:
    """Why the process died that was at ``task``, of which ``log`` tells from ``begins`` on."""
    log.seek(begins)
    lines = [line.strip() for line in log.read().decode("utf-8", errors="replace").splitlines()]
    tail = deque((line for line in lines if line), maxlen=_LOG_LINES)
    if verdict:
        return NativeCrash(
            f"the child process for {task.rpartition(':')[2]} hung: {verdict}",
            rows=[("log", line[:160]) for line in tail],
            hint="run the same command again; it goes on where it was",
        )
    reason = _SIGNALS.get(-code, f"signal {-code}") if code < 0 else f"exit code {code}"
    out_of_memory = code == -getattr(signal, "SIGKILL", 0)
    return NativeCrash(
        f"the child process for {task.rpartition(':')[2]} died: {reason}",
        rows=[("log", line[:160]) for line in tail],
        hint="close other programs, or choose a shorter --context"
        if out_of_memory
        else "the model file may be damaged, or of a kind that this llama.cpp cannot run",
    )


def peak_memory_bytes() -> int:
    """Largest resident memory of this process so far.

    Linux keeps the figure per address space in VmHWM; ``ru_maxrss`` there also remembers the parent's.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # bytes on macOS


def _orders() -> queue.SimpleQueue[dict[str, Any]]:
    """What the parent wants done, one JSON object a line of standard input. The process ends with that stream, which
    closes when the parent is gone."""
    orders: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    def read() -> None:
        try:
            with os.fdopen(os.dup(0), "rb") as stream:
                for line in stream:
                    orders.put(json.loads(line))
        except Exception:  # the parent died while it wrote; or it is no order
            traceback.print_exc()
        finally:  # nothing more can be asked for
            os._exit(1)

    threading.Thread(target=read, daemon=True).start()
    return orders


def _main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides, and kills
    channel = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    orders = _orders()

    def progress(done: int, total: int) -> None:
        channel.write(json.dumps({"done": done, "total": total}) + "\n")

    while True:
        message = _done(progress=progress, **orders.get())
        channel.write(json.dumps(message) + "\n")
        _give_back()  # after what it has done is told


def _give_back() -> None:
    """What the last task has let go of is for others until there is another: glibc keeps it for this process. After
    layers were healed that was 320 of 440 MiB."""
    import ctypes

    gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):  # no glibc
        ctypes.CDLL(None).malloc_trim(0)


def _done(task: str, arguments: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """What the parent is told of ``task`` when it has ended."""
    module_name, _, function_name = task.partition(":")
    if not module_name.startswith("edgeprune."):
        os.write(2, f"not a task of edgeprune: {task}\n".encode())
        os._exit(1)
    try:
        function = getattr(importlib.import_module(module_name), function_name)
        if "progress" in inspect.signature(function).parameters:
            arguments["progress"] = progress
        return {"value": function(**arguments)}
    except Exception as error:
        explained = error if isinstance(error, EdgepruneError) else _explained(function_name, error)
        return {
            "error": type(explained).__name__,
            "cause": explained.cause,
            "rows": explained.rows,
            "hint": explained.hint,
        }


def _explained(task: str, error: Exception) -> EdgepruneError:
    """What a task that failed without an explanation most likely failed of."""
    if package := _failed_import(error):
        named = _DISTRIBUTIONS.get(package, package)
        return EdgepruneError(
            f"{task} needs {package}, which cannot be loaded: {' '.join(str(error).split())[:200]}",
            hint=f"install it again: pip install --force-reinstall -c constraints.txt {named}",
        )
    if isinstance(error, MemoryError):
        return NativeCrash(f"out of memory in {task}", hint="close other programs, or choose a shorter --context")
    if isinstance(error, OSError):
        return EdgepruneError(system_cause(error))
    frames = traceback.extract_tb(error.__traceback__)[-_FRAMES:]
    return EdgepruneError(
        f"internal error in {task}: {type(error).__name__}: {error}",
        rows=[("in", f"{Path(frame.filename).name}:{frame.lineno} {frame.name}") for frame in frames],
        hint="this is a fault of edgeprune; please report it with these lines and the command",
    )


def _failed_import(error: Exception) -> str:
    """The package of others in whose import ``error`` arose, or "".

    It is that of the innermost module body that was running: a library that cannot be loaded is no ImportError.
    """
    name = (error.name or "") if isinstance(error, ImportError) else ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_name == "<module>" and not isinstance(error, ImportError):
            name = str(frame.f_globals.get("__name__", ""))
    package = name.partition(".")[0]
    return "" if package == __package__.partition(".")[0] else package


if __name__ == "__main__":
    _main()
