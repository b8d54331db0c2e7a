"""Work in a child process: values and explained errors come back, and a dead child is an explained error too."""

from __future__ import annotations

import io
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import toys
from runs import environment

from edgeprune.device.profile import find_profile
from edgeprune.errors import BadFile, EdgepruneError, NativeCrash, UsageError
from edgeprune.files import digest, to_json
from edgeprune.measure import child
from edgeprune.model.gguf import GgufFile
from edgeprune.stages.source import DEMO
from edgeprune.units import parse_bytes

pytest_plugins = ("demo_fixtures",)

posix = pytest.mark.skipif(sys.platform == "win32", reason="signals and FIFOs")
SMALL = {"experts": 4, "width": 64, "expert_width": 64}


def test_a_value_comes_back_whole_however_large() -> None:
    value = {"text": "naïve – 日本\n" * 20_000, "numbers": [0.1, -1e300, 2**53], "nothing": None}
    assert child.call("edgeprune.files:to_json", {"value": value}) == to_json(value)
    assert child.call("edgeprune.files:digest", {"value": value}) == digest(value)


def test_a_worker_does_one_task_after_another_in_one_process() -> None:
    with child.Worker() as worker:
        assert worker.call("edgeprune.files:digest", {"value": 1}) == digest(1)
        (process,) = children(psutil.Process())
        with pytest.raises(UsageError, match="12 parsecs"):
            worker.call("edgeprune.units:parse_bytes", {"text": "12 parsecs"})
        assert worker.call("edgeprune.units:parse_bytes", {"text": "12MiB"}) == 12 << 20
        assert children(psutil.Process()) == [process]
    assert gone(process)


def test_a_worker_begins_anew_after_a_crash() -> None:
    with child.Worker() as worker:
        worker.call("edgeprune.files:digest", {"value": 1})
        (process,) = children(psutil.Process())
        with pytest.raises(NativeCrash, match="exit code 1"):
            worker.call("os:getcwd", {})
        assert gone(process)
        assert worker.call("edgeprune.files:digest", {"value": 2}) == digest(2)


def test_a_worker_that_was_killed_while_it_waited_is_replaced() -> None:
    with child.Worker() as worker:
        worker.call("edgeprune.files:digest", {"value": 1})
        (process,) = children(psutil.Process())
        process.kill()
        assert gone(process)
        assert worker.call("edgeprune.files:digest", {"value": 2}) == digest(2)


def test_an_answer_to_an_interrupted_call_is_none_to_the_next(tiny_checkpoint: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    arguments = {"folder": str(tiny_checkpoint), "output": str(tmp_path / "x.gguf")}
    with child.Worker() as worker:
        with pytest.raises(KeyboardInterrupt):
            worker.call("edgeprune.model.convert:convert_task", arguments, interrupt)
        assert worker.call("edgeprune.files:digest", {"value": 2}) == digest(2)


def test_the_log_of_a_crash_is_that_of_its_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llama_cpp.py").write_text("import sys\nprint('of an earlier task', file=sys.stderr)\n1 / 0\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with child.Worker() as worker:
        with pytest.raises(EdgepruneError):
            worker.call("edgeprune.measure.llama:backend_devices", {})
        with pytest.raises(NativeCrash) as error:
            worker.call("os:getcwd", {})
    assert error.value.rows == (("log", "not a task of edgeprune: os:getcwd"),)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc")
def test_a_worker_gives_back_what_a_task_has_let_go_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces with others between them that stay: glibc keeps those for the process."""
    (tmp_path / "llama_cpp.py").write_text(
        "import builtins\n"
        "pieces = [b'x' * size for _ in range(2_000) for size in (100_000, 600)]\n"
        "builtins.stay = pieces[1::2]\n"
        "del pieces\n"
        "1 / 0\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with child.Worker() as worker:
        with pytest.raises(EdgepruneError):
            worker.call("edgeprune.measure.llama:backend_devices", {})
        (process,) = children(psutil.Process())
        assert worker.call("edgeprune.measure.child:peak_memory_bytes", {}) > 200_000_000
        assert process.memory_info().rss < 100_000_000


def test_progress_is_forwarded_in_order(tiny_checkpoint: Path, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    output = tmp_path / "model.gguf"
    child.call(
        "edgeprune.model.convert:convert_task",
        {"folder": str(tiny_checkpoint), "output": str(output)},
        lambda done, total: steps.append((done, total)),
    )
    size = output.stat().st_size
    assert len(steps) == len(GgufFile(output).tensors)
    assert steps == sorted(steps) and steps[-1] == (size, size)


@pytest.mark.parametrize(
    ("task", "arguments", "kind", "local"),
    [
        ("units:parse_bytes", {"text": "12 parsecs"}, UsageError, lambda: parse_bytes("12 parsecs")),
        ("device.profile:find_profile", {"name": "rpi6"}, UsageError, lambda: find_profile("rpi6")),
        ("model.gguf:GgufFile", {"path": os.devnull}, BadFile, lambda: GgufFile(Path(os.devnull))),
    ],
    ids=["usage", "usage with suggestions", "bad file"],
)
def test_an_explained_error_arrives_as_it_was_raised(
    task: str, arguments: dict[str, Any], kind: type[EdgepruneError], local: Callable[[], object]
) -> None:
    with pytest.raises(kind) as here:
        local()
    with pytest.raises(kind) as there:
        child.call(f"edgeprune.{task}", arguments)
    assert type(there.value) is type(here.value)
    assert str(there.value) == str(here.value)


def test_rows_of_an_error_arrive_too(tmp_path: Path) -> None:
    with pytest.raises(EdgepruneError) as error:
        child.call("edgeprune.files:require_space", {"folder": str(tmp_path), "needed_bytes": 2**60})
    assert [label for label, _ in error.value.rows] == ["needed", "free"]
    assert error.value.rows[0][1] == "1073741824 GiB"


def test_a_failed_system_call_is_one_line_with_the_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    output = tmp_path / "file" / "below" / "x.gguf"
    with pytest.raises(EdgepruneError) as error:
        child.call("edgeprune.model.convert:convert_task", {"folder": str(DEMO), "output": str(output)})
    assert type(error.value) is EdgepruneError
    assert str(error.value) == f"{output.parent}: Not a directory"


def test_an_allocation_beyond_all_memory_is_explained(synthetic: Callable[[str], Path]) -> None:
    arguments = {"model": str(synthetic("qwen3moe")), "launch": {"context": 64}, "generated_tokens": 1}
    with pytest.raises(NativeCrash, match="out of memory in benchmark"):
        child.call("edgeprune.measure.benchmark:benchmark", {**arguments, "prompt_tokens": 10**15})


def test_a_fault_of_the_program_says_where(tmp_path: Path) -> None:
    with pytest.raises(EdgepruneError, match=r"internal error in windows: TypeError: .*missing") as error:
        child.call("edgeprune.measure.text:windows", {"texts": []})
    assert error.value.rows[-1][1].startswith("child.py:")
    assert "report" in error.value.hint


def test_only_tasks_of_this_package_run() -> None:
    with pytest.raises(NativeCrash, match="exit code 1") as error:
        child.call("os:getcwd", {})
    assert error.value.rows == (("log", "not a task of edgeprune: os:getcwd"),)


BROKEN = {
    "a library that cannot be loaded": "raise RuntimeError(\"Failed to load shared library 'libllama.so':\\n bad\")",
    "a library that is missing": "raise FileNotFoundError(\"Shared library with base name 'llama' not found\")",
    "a module that is missing": "import llama_cpp.nowhere",
    "a name that is missing": "from llama_cpp import nothing",
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize(
    ("task", "arguments"),
    [("measure.llama:backend_devices", {}), ("build.preset:sizes", {"model": "", "statistics": ""})],
    ids=["imported with the task", "imported by the task"],
)
def test_a_broken_installation_of_llama_cpp_is_named(
    task: str, arguments: dict[str, Any], case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "llama_cpp").mkdir()
    (tmp_path / "llama_cpp" / "__init__.py").touch()
    (tmp_path / "llama_cpp" / "llama_cpp.py").write_text(BROKEN[case])
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(EdgepruneError) as error:
        child.call(f"edgeprune.{task}", arguments)
    assert type(error.value) is EdgepruneError
    function = task.partition(":")[2]
    assert error.value.cause.startswith(f"{function} needs llama_cpp, which cannot be loaded: ")
    assert "\n" not in error.value.cause
    assert error.value.hint.endswith("pip install --force-reinstall -c constraints.txt llama-cpp-python")


@posix
@pytest.mark.parametrize(
    ("used", "reason"),
    [
        (("u32", 5), "llama.cpp aborted on a failed check"),
        (("[u32]", [2, 3]), "llama.cpp aborted on a failed check"),
        (("[u32]", [2, 0]), "llama.cpp crashed with a memory fault"),
    ],
    ids=["abort while loading", "abort while decoding", "memory fault"],
)
def test_a_crash_of_llama_cpp_is_an_error_with_its_reason(used: tuple[str, Any], reason: str, tmp_path: Path) -> None:
    model = toys.synthetic_gguf(tmp_path / "bad.gguf", extra=[("expert_used_count", *used)], **SMALL)
    arguments = {"model": str(model), "launch": {"context": 64}, "prompt_tokens": 8, "generated_tokens": 1}
    with pytest.raises(NativeCrash) as error:
        child.call("edgeprune.measure.benchmark:benchmark", arguments)
    assert error.value.cause == f"the child process for benchmark died: {reason}"
    if "check" in reason:  # the failed check itself is in the log's end, not a debugger's frames
        assert any("GGML_ASSERT" in line or "GGML_ABORT" in line for _, line in error.value.rows), error.value.rows
    assert "damaged" in error.value.hint


@pytest.fixture
def hanging(tmp_path: Path) -> Path:
    """A FIFO: whoever opens it waits for ever."""
    path = tmp_path / "pipe.gguf"
    os.mkfifo(path)
    return path


def children(process: psutil.Process, within_seconds: float = 20.0) -> list[psutil.Process]:
    """Children of ``process`` as soon as there are any."""
    deadline = time.monotonic() + within_seconds
    while time.monotonic() < deadline:
        if found := process.children():
            return found
        time.sleep(0.01)
    raise AssertionError("no child was started")


def gone(process: psutil.Process, within_seconds: float = 20.0) -> bool:
    """Whether ``process`` ends in time; one that nobody waited for has ended."""
    deadline = time.monotonic() + within_seconds
    while time.monotonic() < deadline:
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


@posix
def test_a_killed_child_is_taken_for_an_out_of_memory_kill(hanging: Path) -> None:
    killer = threading.Thread(target=lambda: children(psutil.Process())[0].kill())
    killer.start()
    with pytest.raises(NativeCrash, match="killed, most likely for using too much memory") as error:
        child.call("edgeprune.model.gguf:GgufFile", {"path": str(hanging)})
    killer.join()
    assert "--context" in error.value.hint


@posix
def test_an_unnamed_signal_is_an_error_as_well(hanging: Path) -> None:
    number = signal.SIGRTMIN + 1
    killer = threading.Thread(target=lambda: children(psutil.Process())[0].send_signal(number))
    killer.start()
    with pytest.raises(NativeCrash, match=f"died: signal {int(number)}"):
        child.call("edgeprune.model.gguf:GgufFile", {"path": str(hanging)})
    killer.join()


@posix
def test_a_child_that_stands_still_is_ended(hanging: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "IDLE_SECONDS", 3.0)
    with pytest.raises(NativeCrash, match=r"for GgufFile hung: it used no processor time for \d\.0 s") as error:
        child.call("edgeprune.model.gguf:GgufFile", {"path": str(hanging)})
    assert "goes on where it was" in error.value.hint


def test_a_child_that_is_busy_for_ever_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "SILENT_SECONDS", 3.0)
    with pytest.raises(NativeCrash, match=r"hung: it made no progress for \d\.0 s and was ended"):
        child.call("edgeprune.device.probe:memory_bandwidth_bytes_per_s", {"repeats": 10**9})


def test_a_child_that_reports_progress_is_left_alone(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "_POLL_SECONDS", 0.01)
    arguments = {"folder": str(tiny_checkpoint), "output": str(tmp_path / "x.gguf")}
    child.call("edgeprune.model.convert:convert_task", arguments, lambda done, total: None)


@posix
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "terminated"])
def test_the_child_ends_when_its_parent_is_gone(how: signal.Signals, hanging: Path) -> None:
    program = (
        "from edgeprune.measure import child\n"
        f"child.call('edgeprune.model.gguf:GgufFile', {{'path': {str(hanging)!r}}})\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], env=environment())
    (worker,) = children(psutil.Process(parent.pid))
    while worker.num_threads() < 2:  # the second one reads orders, and ends with the parent
        time.sleep(0.02)
    parent.send_signal(how)
    parent.wait()
    assert gone(worker)


def test_a_line_cut_off_by_death_is_no_result() -> None:
    seen: list[tuple[int, int]] = []
    stream = io.BytesIO(b'{"done": 1, "total": 2}\n{"value": "ab')
    assert child._listen(stream, lambda done, total: seen.append((done, total))) is None
    assert seen == [(1, 2)]


def test_what_native_code_prints_does_not_disturb_the_result(synthetic: Callable[[str], Path]) -> None:
    # Pricing loads the model with llama.cpp's own loader, which writes to the log while it works.
    launch = {"context": 256, "batch": 32}
    priced = child.call("edgeprune.measure.benchmark:price", {"shadow": str(synthetic("qwen3moe")), "launch": launch})
    assert priced["kv_bytes"] == 2 * 2 * 256 * 128 * 2  # K and V, two layers, 256 cells of 128 values in F16


def test_peak_memory_counts_this_process_alone_and_does_not_forget() -> None:
    program = (
        "from edgeprune.measure import child\n"
        "before = child.peak_memory_bytes()\n"
        "block = bytes(range(256)) * (96 << 12)\n"
        "del block\n"
        "after = child.peak_memory_bytes()\n"
        "print(before, after, child.call('edgeprune.measure.child:peak_memory_bytes', {}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment()
    )
    before, after, fresh = map(int, done.stdout.split())
    assert 90 << 20 <= after - before <= 110 << 20  # 96 MiB were there for a moment
    assert 5 << 20 < fresh < before + (48 << 20)  # and are not its child's
