"""Smoke tests with llama-server instead of llama-cpp-python, here and through adb on an Android device.

The outside programs are stand-ins that are run as the real ones are; a real ``llama-server`` is used too, where one
is installed.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import toys
from runs import Ear, environment, run_edgeprune
from stand_ins import ADB, LLAMA_SERVER, program

from edgeprune.device.machine import load_machine
from edgeprune.errors import EdgepruneError
from edgeprune.files import file_digest
from edgeprune.prove.smoke.adb import Adb
from edgeprune.prove.smoke.report import SmokeReport
from edgeprune.stages.smoke import Wish, smoke

pytest_plugins = ("demo_fixtures",)

REAL = shutil.which("llama-server")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="scripts as programs")
server_kinds = pytest.mark.parametrize(
    "real", [False, pytest.param(True, marks=pytest.mark.skipif(REAL is None, reason="no llama-server is installed"))]
)


def device(folder: Path, transport: str, server: str | Path, more: str = "") -> Path:
    path = folder / "thing.toml"
    own = f'folder = "{folder / "far"}"\n' if transport == "adb" else ""
    path.write_text(
        f'name = "thing"\ntransport = "{transport}"\nprofile = "cpu-8gb"\n{own}{more}[runner]\nserver = "{server}"\n'
    )
    return path


@pytest.fixture
def server(tmp_path: Path) -> Path:
    return program(tmp_path / "bin" / "llama-server", LLAMA_SERVER)


@pytest.fixture
def adb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for adb on the path; the file in which it notes how it was called."""
    program(tmp_path / "tools" / "adb", ADB)
    monkeypatch.setenv("PATH", f"{tmp_path / 'tools'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("STAND_IN_LOG", str(tmp_path / "adb.log"))
    return tmp_path / "adb.log"


def verdicts(report: SmokeReport) -> dict[str, str]:
    return {check.key: check.verdict for check in report.checks}


def tried(synthetic: toys.Maker, described: Path, **wishes: Any) -> SmokeReport:
    wish = Wish(synthetic("qwen3moe"), str(described), context=128, output=described.parent / "own", **wishes)
    report, _ = smoke(wish, Ear())
    return report


KEPT = ("loads", "memory", "deterministic", "finite", "context")


@server_kinds
@pytest.mark.parametrize("transport", ["local", "adb"])
def test_a_server_is_led_through_all_checks(
    transport: str, real: bool, synthetic: toys.Maker, server: Path, adb: Path, tmp_path: Path
) -> None:
    report = tried(synthetic, device(tmp_path, transport, REAL if real else server))
    assert {key: verdicts(report)[key] for key in KEPT} == dict.fromkeys(KEPT, "kept")
    assert report.engine.startswith("llama-server ") and report.step("context")["filled_tokens"] == 128
    assert report.step("speed")["prefill_per_s"] > 0 and report.step("memory")["peak_bytes"] > 1e6
    assert bool(report.machine) is (transport == "local")  # the runner of a phone is not on it
    if not real:
        assert report.engine == "llama-server b1-stand-in" and report.step("load")["vocabulary"] == 320
        assert report.step("speed")["decode_per_s"] == pytest.approx(100.0)
        assert report.right == ["capital"]


@pytest.mark.parametrize(
    ("mood", "broken", "said"),
    [
        ("dies", "loads", "no: llama-server ended: llama.cpp aborted on a failed check"),
        ("dies at the end", "context", "llama-server ended: llama.cpp aborted on a failed check"),
        ("fickle", "deterministic", "no: capital, sum, product"),
        ("nan", "finite", "no: speed, context, answers to capital"),
    ],
)
@pytest.mark.parametrize("transport", ["local", "adb"])
def test_what_goes_wrong_in_a_server_is_found(
    transport: str,
    mood: str,
    broken: str,
    said: str,
    synthetic: toys.Maker,
    server: Path,
    adb: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("STAND_IN_MOOD", mood)
    report = tried(synthetic, device(tmp_path, transport, server))
    assert [check.key for check in report.broken] == [broken]
    assert report.broken[0].measured.startswith(said)
    if mood == "dies":
        assert any("out of luck" in line for line in report.measured["log"])


def test_what_the_model_asks_of_samplers_does_not_make_it_fickle(
    synthetic: toys.Maker, server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_MOOD", "penalising")
    assert verdicts(tried(synthetic, device(tmp_path, "local", server)))["deterministic"] == "kept"


def test_a_server_that_tells_no_probabilities_proves_nothing_about_them(
    synthetic: toys.Maker, server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_MOOD", "taciturn")
    report = tried(synthetic, device(tmp_path, "local", server))
    (finite,) = (check for check in report.checks if check.key == "finite")
    assert (finite.verdict, finite.measured) == ("not run", "the engine does not tell")
    assert verdicts(report)["deterministic"] == "kept"  # by the texts


def test_a_server_that_is_not_there_is_explained(synthetic: toys.Maker, adb: Path, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere" / "llama-server"
    with pytest.raises(EdgepruneError, match="llama-server cannot be started: No such file"):
        tried(synthetic, device(tmp_path, "local", nowhere))
    report = tried(synthetic, device(tmp_path, "adb", nowhere))
    assert report.broken[0].measured == "no: llama-server ended: exit code 127"
    assert any("not found" in line for line in report.measured["log"])


def test_a_file_is_pushed_in_pieces_once_and_nothing_is_left_running(
    synthetic: toys.Maker, server: Path, adb: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import edgeprune.prove.smoke.adb as module

    model = synthetic("qwen3moe")
    size = model.stat().st_size
    monkeypatch.setattr(module, "_PIECE", size // 3)
    monkeypatch.setattr(module, "_BLOCK", 1 << 16)
    described = device(tmp_path, "adb", server, '[adb]\nserial = "R5CT"\n')
    tried(synthetic, described)
    calls = adb.read_text().splitlines()
    assert all(call.startswith("-s R5CT ") for call in calls)
    kinds = [call.split()[2] for call in calls]
    assert kinds.count("push") >= 3
    assert [kinds[0], kinds[-1]] == ["shell", "forward"] and calls[-1].split()[3] == "--remove"
    pid = next(call for call in calls if "/proc/" in call).split("/")[2]
    assert f"-s R5CT shell kill {pid}" in calls and not Path(f"/proc/{pid}").exists()
    (there,) = (tmp_path / "far").iterdir()
    assert there.name == f"{file_digest(model)[:32]}.gguf" and there.read_bytes() == model.read_bytes()
    adb.write_text("")
    tried(synthetic, described, remove=True)
    assert not [call for call in adb.read_text().splitlines() if " push " in call]
    assert not there.exists()


@pytest.mark.parametrize(
    ("devices", "more", "said", "hint"),
    [
        ("", "", "no devices/emulators found", "USB debugging"),
        ("one two", "", "more than one device/emulator", "serial"),
        ("one", '[adb]\nserial = "R5CT"\n', "device 'R5CT' not found", "adb devices"),
    ],
)
def test_a_device_that_cannot_be_reached_is_explained(
    devices: str, more: str, said: str, hint: str, server: Path, adb: Path, synthetic: toys.Maker, tmp_path: Path
) -> None:
    described = device(tmp_path, "adb", server, more)
    done = run_edgeprune(
        "smoke", synthetic("qwen3moe"), "--device", described, env=environment(STAND_IN_DEVICES=devices)
    )
    assert (done.returncode, done.stdout) == (1, "")
    first, last = done.stderr.splitlines()
    assert first.startswith("error: thing (adb ") and said in first and hint in last


def test_without_adb_such_a_device_is_refused(
    server: Path, synthetic: toys.Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(EdgepruneError) as caught:
        Adb(load_machine(device(tmp_path, "adb", server)))
    assert "adb, which is not installed here" in caught.value.cause and "platform tools" in caught.value.hint
    ear = Ear()
    with pytest.raises(EdgepruneError, match="not installed here"):
        smoke(Wish(synthetic("qwen3moe"), str(device(tmp_path, "adb", server))), ear)
    assert not ear.stages  # no file of 20 GB was read for that
