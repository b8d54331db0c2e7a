"""Device files: what is sound is read whole, and every mistake in a file is refused with its name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from runs import environment, run_edgeprune

from edgeprune.device.machine import find_machine, known_machines, load_machine
from edgeprune.errors import BadFile, UsageError
from edgeprune.files import data_folder

PI = """
name = "pi"
summary = "the board on the shelf"
transport = "ssh"
profile = "rpi5-8gb"
folder = "work/edgeprune/"

[ssh]
host = "pi.local"
user = "me"
port = 2222
identity = "~/key"

[runner]
python = "llama/bin/python"
"""
PHONE = """
name = "phone"
transport = "adb"
profile = "phone-12gb"
folder = "/data/local/tmp/edgeprune"

[runner]
server = "/data/local/tmp/llama-server"
"""


@pytest.fixture
def own_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder of devices, with one called pi."""
    for name in ("XDG_CONFIG_HOME", "HOME", "APPDATA", "LOCALAPPDATA"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    folder = tmp_path / "home" / "edgeprune" / "devices"
    folder.mkdir(parents=True)
    (folder / "pi.toml").write_text(PI, encoding="utf-8")
    return folder


def written(folder: Path, text: str, name: str = "pi") -> Path:
    path = folder / f"{name}.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("path", sorted(data_folder("devices").glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_device_is_sound(path: Path) -> None:
    assert load_machine(path).name == path.stem


def test_what_a_file_says_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    machine = load_machine(written(tmp_path, PI))
    assert (machine.transport, machine.profile, machine.folder) == ("ssh", "rpi5-8gb", "work/edgeprune")
    assert (machine.host, machine.user, machine.port) == ("pi.local", "me", 2222)
    assert Path(machine.identity) == tmp_path / "key" and machine.known_hosts == ""
    assert (machine.runner.python, machine.runner.server) == ("llama/bin/python", "")
    assert machine.address == "ssh me@pi.local:2222"
    phone = load_machine(written(tmp_path, PHONE, "phone"))
    assert (phone.transport, phone.serial, phone.runner.server) == ("adb", "", "/data/local/tmp/llama-server")


MISTAKES = [
    (PI, 'profile = "rpi5-8gb"\n', "", "lacks profile"),
    (PI, "port = 2222", "prot = 2222", "unknown keys: prot"),
    (PI, "port = 2222", "port = 70000", "from 1 to 65,535"),
    (PI, "port = 2222", 'port = "22"', "not a whole number"),
    (PI, '"ssh"', '"telnet"', "none of local, ssh, adb"),
    (PI, '"ssh"', '["ssh"]', "none of local, ssh, adb"),
    (PI, '"ssh"', '"local"', "unknown keys: ssh"),
    (PI, 'name = "pi"', 'name = "other"', "the file's is 'pi'"),
    (PI, 'name = "pi"', 'name = "../pi"', "name = '../pi'"),
    (PI, '"pi.local"', '"-oProxyCommand=reboot"', "host = '-oProxyCommand=reboot'"),
    (PI, '"pi.local"', '"pi.local; reboot"', "host = 'pi.local; reboot'"),
    (PI, '"pi.local"', '""', "host = ''"),
    (PI, '"me"', '"-l root"', "user = '-l root'"),
    (PI, '"work/edgeprune/"', '"../other"', "folder = '../other'"),
    (PI, '"work/edgeprune/"', '"/"', "folder = '/'"),
    (PI, '"work/edgeprune/"', '"~/x"', "folder = '~/x'"),
    (PI, '"work/edgeprune/"', "3", "folder = '3'"),
    (PI, '"llama/bin/python"', '"-c"', "python = '-c'"),
    (PI, "[runner]\n", "[runner]\nshell = 1\n", "unknown keys: shell"),
    (PI, '"rpi5-8gb"', '"auto"', "only a local device"),
    (PHONE, '\n[runner]\nserver = "/data/local/tmp/llama-server"\n', "", "lacks runner"),
    (PHONE, "[runner]\n", '[runner]\npython = "python3"\n', "has no Python"),
    (PHONE, '"/data/local/tmp/edgeprune"', '"sdcard"', "begin with /"),
    (PHONE, "\n[runner]", '\n[adb]\nserial = "x -d"\n[runner]', "serial = 'x -d'"),
]


@pytest.mark.parametrize(
    ("text", "old", "new", "said"), MISTAKES, ids=[row[3] + " " + row[2][:20] for row in MISTAKES]
)
def test_every_mistake_is_named(tmp_path: Path, text: str, old: str, new: str, said: str) -> None:
    assert old in text
    name = "pi" if text is PI else "phone"
    path = written(tmp_path, text.replace(old, new), name)
    with pytest.raises(BadFile) as caught:
        load_machine(path)
    assert said in caught.value.cause and str(path) in caught.value.cause


def test_a_local_device_has_no_folder(tmp_path: Path) -> None:
    path = written(tmp_path, 'name = "pi"\ntransport = "local"\nprofile = "auto"\nfolder = "here"\n')
    with pytest.raises(BadFile, match="no folder"):
        load_machine(path)


def test_the_users_own_file_wins_and_a_path_wins_over_both(own_devices: Path, tmp_path: Path) -> None:
    assert find_machine("local").summary == "this machine"
    own = 'name = "local"\nsummary = "mine"\ntransport = "local"\nprofile = "cpu-16gb"\n'
    written(own_devices, own, "local")
    assert find_machine("local").summary == "mine"
    assert set(known_machines()) == {"local", "pi"}
    elsewhere = written(tmp_path, own.replace("mine", "elsewhere"), "local")
    assert find_machine(str(elsewhere)).summary == "elsewhere"


def test_an_unknown_device_is_explained(own_devices: Path) -> None:
    with pytest.raises(UsageError) as caught:
        find_machine("pie")
    assert "no device 'pie'" in caught.value.cause and "did you mean pi?" in caught.value.hint
    with pytest.raises(UsageError, match=r"no device file nowhere\.toml"):
        find_machine("nowhere.toml")


def test_devices_are_listed_and_shown(own_devices: Path) -> None:
    listed = run_edgeprune("devices", env=environment())
    assert (listed.returncode, listed.stderr) == (0, "")
    assert [line.split()[0] for line in listed.stdout.splitlines()] == ["local", "pi"]
    assert "ssh me@pi.local:2222" in listed.stdout and "rpi5-8gb" in listed.stdout
    shown = run_edgeprune("devices", "pi")
    assert shown.stdout.startswith("pi\nthe board on the shelf\n") and "llama/bin/python" in shown.stdout
    found = json.loads(run_edgeprune("devices", "--json").stdout)
    assert [row["name"] for row in found] == ["local", "pi"] and found[1]["address"] == "ssh me@pi.local:2222"
    wrong = run_edgeprune("devices", "nowhere")
    assert wrong.returncode == 2 and "no device 'nowhere'" in wrong.stderr
