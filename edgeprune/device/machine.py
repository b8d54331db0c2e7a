"""A reachable machine, read from ``devices/<name>.toml``: how to get there, what runs models there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgeprune.device import lookup
from edgeprune.errors import BadFile
from edgeprune.files import check_keys, checked_int, read_toml

_KIND = "devices"
LOCAL, SSH, ADB = "local", "ssh", "adb"
TRANSPORTS = (LOCAL, SSH, ADB)
AUTO = "auto"  # the profile of this machine, probed
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# Host and user become words of a command line: nothing there may look like an option or like several words.
_HOST = re.compile(r"[A-Za-z0-9\[][A-Za-z0-9._:%\[\]-]*")
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._@-]*")
_SERIAL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]*")
_PATH = re.compile(r"[^-\x00-\x1f\x7f][^\x00-\x1f\x7f]*")
_SSH_PORT = 22


@dataclass(frozen=True)
class Runner:
    """What runs a model on the machine.

    Attributes:
        python: interpreter, with llama-cpp-python unless there is a ``server``; "" for the one that runs edgeprune,
            or for none.
        server: a ``llama-server`` binary to be used instead of llama-cpp-python, or "".
        bench: a ``llama-bench`` binary that measures the speed, or "".
        engine: who does everything else: ``library``, ``server``, or ``bench`` where neither an interpreter nor a
            server is named beside it; what it cannot do is then left out.
    """

    python: str
    server: str
    bench: str = ""
    engine: str = "library"

    @property
    def words(self) -> str:
        """For people."""
        if self.engine == "bench":
            return f"{self.bench} alone: load, memory, speed and context"
        engine = self.server or f"llama-cpp-python of {self.python or 'this Python'}"
        return f"{engine}, speed by {self.bench}" if self.bench else engine


@dataclass(frozen=True)
class Machine:
    """A reachable machine.

    Attributes:
        transport: one of ``TRANSPORTS``.
        profile: name of the profile it claims; ``auto`` for this machine.
        folder: where models are put there, from the home folder on; "" where they are used as they lie.
        host, user, port, identity, known_hosts: of OpenSSH; "" and 22 for its own defaults.
        serial: of an Android device, or "" for the only one.
    """

    name: str
    summary: str
    transport: str
    profile: str
    folder: str
    runner: Runner
    host: str = ""
    user: str = ""
    port: int = _SSH_PORT
    identity: str = ""
    known_hosts: str = ""
    serial: str = ""

    @property
    def address(self) -> str:
        """Where it is, for people."""
        if self.transport == SSH:
            user, port = (f"{self.user}@" if self.user else ""), (f":{self.port}" if self.port != _SSH_PORT else "")
            return f"ssh {user}{self.host}{port}"
        return f"adb {self.serial or '(the only device)'}" if self.transport == ADB else "this machine"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "address": self.address}


def _text(where: str, table: Mapping[str, Any], key: str, form: re.Pattern[str], default: str = "") -> str:
    if key not in table:
        return default
    value = table[key]
    if not isinstance(value, str) or not form.fullmatch(value):
        raise BadFile(f"{where}: {key} = {str(value)[:60]!r} is not what it should be", hint=_WANTED[key])
    return value


_WANTED = {
    "name": "letters, digits, dots, dashes and underscores",
    "profile": "the name of a profile, as `edgeprune profiles` lists them",
    "folder": "a folder of its own below the home folder, or below / ; without .. and ~",
    "host": "a host name or an address",
    "user": "a user's name",
    "identity": "the path of a private key",
    "known_hosts": "the path of a file of host keys",
    "serial": "as `adb devices` prints it",
    "python": "the path of an interpreter on the device, from the home folder on",
    "server": "the path of llama-server on the device, from the home folder on",
    "bench": "the path of llama-bench on the device, from the home folder on",
}


def _folder(where: str, table: Mapping[str, Any], transport: str) -> str:
    if transport == LOCAL:
        if "folder" in table:
            raise BadFile(f"{where}: a local device has no folder: models are used where they lie")
        return ""
    folder = _text(where, table, "folder", _PATH)
    parts = [part for part in folder.split("/") if part not in ("", ".")]
    if not parts or ".." in parts or folder.startswith("~"):
        raise BadFile(f"{where}: folder = {folder[:60]!r} is not what it should be", hint=_WANTED["folder"])
    if transport == ADB and not folder.startswith("/"):
        raise BadFile(
            f"{where}: folder = {folder[:60]!r} has to begin with / on Android", hint="/data/local/tmp/edgeprune"
        )
    return folder.rstrip("/")


def _runner(where: str, table: Mapping[str, Any], transport: str) -> Runner:
    where = f"{where} [runner]"
    named = {"server", "bench"} & table.keys()
    check_keys(where, table, {"server"} if transport == ADB and not named else set(), {"python", "server", "bench"})
    if transport == ADB and "python" in table:
        raise BadFile(f"{where}: a shell on Android has no Python; `server` and `bench` are used there")
    python = _text(where, table, "python", _PATH, "python3" if transport == SSH else "")
    alone = "bench" in named and "python" not in table
    engine = "server" if "server" in named else "bench" if alone else "library"
    return Runner(python, _text(where, table, "server", _PATH), _text(where, table, "bench", _PATH), engine)


def _ssh(where: str, table: Mapping[str, Any]) -> dict[str, Any]:
    where = f"{where} [ssh]"
    check_keys(where, table, {"host"}, {"user", "port", "identity", "known_hosts"})
    files = {
        key: str(Path(_text(where, table, key, _PATH)).expanduser())
        for key in ("identity", "known_hosts")
        if key in table
    }
    return {
        "host": _text(where, table, "host", _HOST),
        "user": _text(where, table, "user", _USER),
        "port": checked_int(f"{where}: port", table.get("port", _SSH_PORT), 1, 65535),
        **files,
    }


def load_machine(path: Path) -> Machine:
    """The machine in ``path``.

    Raises:
        BadFile: a missing or unknown key, an impossible value, a name other than the file's.
    """
    table = read_toml(path)
    where = str(path)
    required = {"name", "transport", "profile"}
    if table.get("transport") not in TRANSPORTS:
        check_keys(where, table, required, set(table))
        raise BadFile(f"{where}: transport = {str(table['transport'])[:40]!r} is none of {', '.join(TRANSPORTS)}")
    transport = str(table["transport"])
    sections = {SSH: ({"folder", "ssh"}, set()), ADB: ({"folder", "runner"}, {"adb"}), LOCAL: (set(), {"folder"})}
    needed, allowed = sections[transport]
    check_keys(where, table, required | needed, {"summary", "runner", *allowed})
    name = _text(where, table, "name", _NAME)
    if name != path.stem:
        raise BadFile(f"{where}: the name is {name!r}, the file's is {path.stem!r}", hint="make them the same")
    profile = _text(where, table, "profile", _PATH)
    if profile == AUTO and transport != LOCAL:
        raise BadFile(f"{where}: only a local device can have the profile 'auto'", hint=_WANTED["profile"])
    reached: dict[str, Any] = {}
    if transport == SSH:
        reached = _ssh(where, table["ssh"])
    elif transport == ADB:
        check_keys(f"{where} [adb]", table.get("adb", {}), set(), {"serial"})
        reached = {"serial": _text(f"{where} [adb]", table.get("adb", {}), "serial", _SERIAL)}
    return Machine(
        name=name,
        summary=str(table.get("summary", "")),
        transport=transport,
        profile=profile,
        folder=_folder(where, table, transport),
        runner=_runner(where, table.get("runner", {}), transport),
        **reached,
    )


def user_folder() -> Path:
    """Where the user's own devices live, and what was measured on each."""
    return lookup.user_folder(_KIND)


def known_machines() -> dict[str, Path]:
    """Files of all devices by name, the user's own over the shipped ones."""
    return lookup.known_files(_KIND)


def find_machine(name: str) -> Machine:
    """The device called ``name``, or in the file ``name``.

    Raises:
        UsageError: there is none; suggests near names.
    """
    way_out = f"`edgeprune devices` lists them; describe yours in {user_folder() / f'{name[:40]}.toml'}"
    return load_machine(lookup.found_file(_KIND, "device", name, way_out))
