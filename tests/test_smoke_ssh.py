"""Smoke tests over ssh: a real sshd on the loopback, with keys and configuration of its own."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest
import toys
from runs import gone, run_edgeprune

from edgeprune.device.machine import Machine, load_machine
from edgeprune.errors import EdgepruneError
from edgeprune.files import file_digest
from edgeprune.prove.smoke.conversation import converse
from edgeprune.prove.smoke.packing import packed_runner
from edgeprune.prove.smoke.ssh import Ssh

pytest_plugins = ("demo_fixtures",)

SSHD = shutil.which("sshd", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"]))
pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="sshd as an ordinary program"),
    pytest.mark.skipif(SSHD is None, reason="no sshd is installed"),
    pytest.mark.skipif(shutil.which("ssh") is None, reason="no ssh client is installed"),
]
# Where sshd started by root wants an empty folder; the system's own scripts make it, which may not have run.
PRIVILEGE_SEPARATION = Path("/run/sshd")


@dataclass(frozen=True)
class Daemon:
    """A running sshd: its process, port and the folder of keys."""

    process: psutil.Process
    port: int
    keys: Path


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def key(path: Path) -> Path:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
    return path


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, one_core: None) -> Iterator[Daemon]:
    keys, port = tmp_path_factory.mktemp("ssh"), free_port()
    key(keys / "host")
    key(keys / "other")
    shutil.copyfile(key(keys / "user").with_suffix(".pub"), keys / "authorized")
    host = (keys / "host.pub").read_text().split()[:2]
    (keys / "known").write_text(f"[127.0.0.1]:{port} {' '.join(host)}\n")
    (keys / "config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {keys / 'host'}\nAuthorizedKeysFile {keys / 'authorized'}\n"
        "PidFile none\nUsePAM no\nStrictModes no\nPasswordAuthentication no\nPermitRootLogin yes\n"
    )
    made = os.geteuid() == 0 and not PRIVILEGE_SEPARATION.exists()
    if made:
        PRIVILEGE_SEPARATION.mkdir()
    assert SSHD is not None
    log = (keys / "log").open("wb")
    process = subprocess.Popen([SSHD, "-D", "-e", "-f", str(keys / "config")], stdin=subprocess.DEVNULL, stderr=log)
    try:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.02)
        if process.poll() is not None:
            pytest.skip(f"sshd does not start: {(keys / 'log').read_text()[-200:]}")
        yield Daemon(psutil.Process(process.pid), port, keys)
    finally:
        process.terminate()
        process.wait(20)
        log.close()
        if made:
            PRIVILEGE_SEPARATION.rmdir()


@pytest.fixture
def device(daemon: Daemon, tmp_path: Path) -> Path:
    """A device file for the sshd; models are put into the folder ``far`` of the test."""
    path = tmp_path / "board.toml"
    path.write_text(
        f'name = "board"\ntransport = "ssh"\nprofile = "cpu-8gb"\nfolder = "{tmp_path / "far"}"\n'
        f'[ssh]\nhost = "127.0.0.1"\nuser = "{getpass.getuser()}"\nport = {daemon.port}\n'
        f'identity = "{daemon.keys / "user"}"\nknown_hosts = "{daemon.keys / "known"}"\n'
        f'[runner]\npython = "{sys.executable}"\n'
    )
    return path


SHORT = ("--context", "128")


def test_a_file_is_sent_run_and_left_for_the_next_time(synthetic: toys.Maker, device: Path, tmp_path: Path) -> None:
    model = synthetic("qwen3moe")
    done = run_edgeprune("smoke", model, "--device", device, *SHORT, "-o", tmp_path / "own")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{model.name} on board (cpu-8gb), llama-cpp-python ")
    with packed_runner() as runner:
        far = tmp_path / "far" / f"{file_digest(runner)[:32]}.pyz"
        assert far.read_bytes() == runner.read_bytes()
    far.write_bytes(b"damaged")  # a memory card forgets; the runner is looked at as the model is
    (there,) = (tmp_path / "far").glob("*.gguf")
    assert there.name == f"{file_digest(model)[:32]}.gguf" and there.read_bytes() == model.read_bytes()
    again = run_edgeprune("smoke", model, "--device", device, *SHORT, "-o", tmp_path / "other", "--remove")
    assert again.returncode == 0 and not there.exists()
    assert far.stat().st_size > 1000


def test_what_was_broken_off_is_gone_on_with(synthetic: toys.Maker, device: Path, tmp_path: Path) -> None:
    model, steps = synthetic("qwen3moe"), list[tuple[int, int]]()
    size, sha256 = model.stat().st_size, file_digest(model)
    (tmp_path / "far").mkdir()
    partial = tmp_path / "far" / f"{sha256[:32]}.gguf.partial"
    partial.write_bytes(model.read_bytes()[: size - 5000])
    inode = partial.stat().st_ino
    way = Ssh(load_machine(device))
    path = Path(way.deliver(model, sha256, lambda done, total: steps.append((done, total))))
    assert steps == [(size, size)] and path.stat().st_ino == inode
    assert path.read_bytes() == model.read_bytes()
    assert way.deliver(model, sha256, lambda done, total: steps.append((done, total))) == str(path)
    assert len(steps) == 1


def other(device: Path, **fields: object) -> Machine:
    return replace(load_machine(device), **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("old", "new", "said", "hint"),
    [
        ("known_hosts", "known", "Host key verification failed", "known_hosts"),
        ("identity", "user", "Permission denied", "identity"),
        ("port", "", "Connection refused", "port"),
    ],
)
def test_a_device_that_cannot_be_reached_is_explained(
    old: str, new: str, said: str, hint: str, daemon: Daemon, synthetic: toys.Maker, device: Path, tmp_path: Path
) -> None:
    text = device.read_text()
    if old == "port":
        text = text.replace(f"port = {daemon.port}", f"port = {free_port()}")
    else:
        text = text.replace(str(daemon.keys / new), str(daemon.keys / ("other" if new == "user" else "nowhere")))
    device.write_text(text)
    done = run_edgeprune("smoke", synthetic("qwen3moe"), "--device", device, *SHORT, "-o", tmp_path / "own")
    assert (done.returncode, done.stdout) == (1, "")
    first, last = done.stderr.splitlines()
    assert first.startswith("error: cannot reach board (ssh ") and said in first
    assert last.startswith("hint: ") and hint in last


def test_a_python_that_is_not_there_is_explained(synthetic: toys.Maker, device: Path, tmp_path: Path) -> None:
    device.write_text(device.read_text().replace(sys.executable, "nowhere/python"))
    done = run_edgeprune("smoke", synthetic("qwen3moe"), "--device", device, *SHORT, "-o", tmp_path / "own")
    assert done.returncode == 1
    assert "the runner on the device ended early (exit code 127)" in done.stderr and "nowhere/python" in done.stderr


def test_a_folder_that_cannot_be_written_is_explained(synthetic: toys.Maker, device: Path, tmp_path: Path) -> None:
    (tmp_path / "far").write_text("a file, no folder")
    with pytest.raises(EdgepruneError, match=r"board: .*far"):
        Ssh(load_machine(device)).deliver(synthetic("qwen3moe"), "0" * 64, lambda done, total: None)


def test_a_lost_connection_ends_everything_on_the_device(daemon: Daemon, synthetic: toys.Maker, device: Path) -> None:
    endless = {"prompt_tokens": 16, "generated_tokens": 64, "repeats": 10**6}
    launch = {"context": 128, "batch": 32, "threads": 1, "kv_type": "F16", "kv_type_id": 1, "gpu_layers": 0}
    launch |= {"cpu_experts": 0, "mmap": True, "repack": False}
    job = {"engine": "library", "model": str(synthetic("qwen3moe")), "launch": launch, "speed": endless}
    job |= {"server": [], "prompts": [], "silent_seconds": 60}
    way, workers = Ssh(load_machine(device)), list[psutil.Process]()

    def cut(done: int, total: int) -> None:
        """As soon as the model is at work, the connection is gone."""
        below = daemon.process.children(recursive=True)
        workers.extend(process for process in below if ".pyz" in " ".join(process.cmdline()))
        for session in daemon.process.children():
            with contextlib.suppress(psutil.Error):
                session.kill()
                for part in session.children():
                    if "sshd" in part.name():
                        part.kill()

    with tempfile.TemporaryFile() as log, way.run(job, log) as (process, told):
        seen = iter(range(10**9))
        with pytest.raises(EdgepruneError, match="the runner on the device ended early"):
            converse(process, told, log, lambda done, total: cut(done, total) if next(seen) == 2 else None)
    assert workers and all(gone(worker) for worker in workers)
