"""A class of hardware, read from ``profiles/<name>.toml``: usable without owning it."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgeprune.device import lookup
from edgeprune.errors import BadFile, UsageError
from edgeprune.files import check_keys, read_toml
from edgeprune.units import parse_bytes

_KIND = "profiles"
BACKENDS = ("cpu", "cuda", "rocm", "vulkan", "metal")
KV_TYPES = ("f16", "q8_0", "q4_0")


@dataclass(frozen=True)
class Pool:
    """One memory of the device.

    Attributes:
        name: ``ram`` (host or unified memory) or ``vram``.
        total_bytes: installed.
        reserve_bytes: kept by the operating system, the desktop and ordinary applications.
        bandwidth_bytes_per_s: peak, of the whole pool.
    """

    name: str
    total_bytes: int
    reserve_bytes: int
    bandwidth_bytes_per_s: float

    @property
    def usable_bytes(self) -> int:
        return max(0, self.total_bytes - self.reserve_bytes)


@dataclass(frozen=True)
class Profile:
    """A class of hardware.

    Attributes:
        backend: how llama.cpp computes there, one of ``BACKENDS``.
        threads: cores worth using.
        ram: host or unified memory.
        vram: memory of a discrete GPU, or None.
        working_set_bytes: how much of unified memory the GPU may use, or 0 for no such limit.
        context: default context in tokens.
        kv_type: default KV cache type, lower case.
        avoid: GGML types that the backend lacks or runs badly.
        why: for a probed machine, the reasons behind its figures, one line each.
    """

    name: str
    summary: str
    backend: str
    threads: int
    ram: Pool
    vram: Pool | None
    working_set_bytes: int
    context: int
    kv_type: str
    avoid: tuple[str, ...]
    why: tuple[str, ...] = ()

    @property
    def usable_ram_bytes(self) -> int:
        """Host memory for the model: what is left by others, and of that what the GPU may use."""
        usable = self.ram.usable_bytes
        return min(usable, self.working_set_bytes) if self.working_set_bytes else usable

    @property
    def usable_bytes(self) -> int:
        """Memory for the model over all pools."""
        return self.usable_ram_bytes + (self.vram.usable_bytes if self.vram else 0)

    @property
    def on_gpu(self) -> bool:
        """Whether whole layers run on a GPU."""
        return self.backend != "cpu"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def _size(where: str, key: str, value: Any) -> int:
    try:
        return parse_bytes(value)
    except (UsageError, TypeError) as error:
        raise BadFile(f"{where}: {key} = {value!r} is not a size such as '16 GiB'") from error


def _count(where: str, key: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise BadFile(f"{where}: {key} = {value!r} is not a positive whole number")
    return value


def _bandwidth(where: str, text: Any) -> float:
    number, _, unit = str(text).partition(" ")
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    if unit != "GB/s" or not 0 < value < math.inf:
        raise BadFile(f"{where}: bandwidth '{text}' is not of the form '51.2 GB/s'")
    return value * 1e9


def _pool(where: str, name: str, table: dict[str, Any]) -> Pool:
    check_keys(f"{where} [pools.{name}]", table, {"total", "reserve", "bandwidth"}, set())
    pool = Pool(
        name,
        _size(where, f"pools.{name}.total", table["total"]),
        _size(where, f"pools.{name}.reserve", table["reserve"]),
        _bandwidth(where, table["bandwidth"]),
    )
    if pool.usable_bytes == 0:
        raise BadFile(f"{where} [pools.{name}]: the reserve leaves nothing")
    return pool


def load_profile(path: Path) -> Profile:
    """The profile in ``path``.

    Raises:
        BadFile: a missing or unknown key, an impossible value, a name other than the file's.
    """
    table = read_toml(path)
    where = str(path)
    keys = {"name", "summary", "backend", "threads", "pools", "defaults", "types"}
    check_keys(where, table, keys, {"gpu"})
    check_keys(f"{where} [pools]", table["pools"], {"ram"}, {"vram"})
    check_keys(f"{where} [defaults]", table["defaults"], {"context", "kv_type"}, set())
    check_keys(f"{where} [types]", table["types"], {"avoid"}, set())
    check_keys(f"{where} [gpu]", table.get("gpu", {}), set(), {"working_set"})
    if table["name"] != path.stem:
        raise BadFile(
            f"{where}: the name is {table['name']!r}, the file's is {path.stem!r}", hint="make them the same"
        )
    if table["backend"] not in BACKENDS or table["defaults"]["kv_type"] not in KV_TYPES:
        raise BadFile(f"{where}: backend must be one of {BACKENDS}, kv_type one of {KV_TYPES}")
    avoid = table["types"]["avoid"]
    if not isinstance(avoid, list) or not all(isinstance(name, str) for name in avoid):
        raise BadFile(f"{where}: types.avoid is not a list of GGML types")
    pools = table["pools"]
    ram = _pool(where, "ram", pools["ram"])
    working_set = 0
    if "working_set" in table.get("gpu", {}):
        working_set = _size(where, "gpu.working_set", table["gpu"]["working_set"])
        if not 0 < working_set <= ram.total_bytes:
            raise BadFile(f"{where}: gpu.working_set is not between nothing and all of the RAM")
    return Profile(
        name=table["name"],
        summary=str(table["summary"]),
        backend=table["backend"],
        threads=_count(where, "threads", table["threads"]),
        ram=ram,
        vram=_pool(where, "vram", pools["vram"]) if "vram" in pools else None,
        working_set_bytes=working_set,
        context=_count(where, "defaults.context", table["defaults"]["context"]),
        kv_type=table["defaults"]["kv_type"],
        avoid=tuple(avoid),
    )


def user_folder() -> Path:
    """Where the user's own profiles live; a profile there wins over a shipped one of the same name."""
    return lookup.user_folder(_KIND)


def known_profiles() -> dict[str, Path]:
    """Files of all profiles by name, the user's own over the shipped ones."""
    return lookup.known_files(_KIND)


def find_profile(name: str) -> Profile:
    """The profile called ``name``, or in the file ``name``.

    Raises:
        UsageError: there is none; suggests near names.
    """
    way_out = "`edgeprune profiles` lists them; 'auto' is this machine"
    with suppress(UsageError):
        parse_bytes(name)
        way_out = "a size of memory is given with --memory, one of files with --file-size, several with --file-sizes"
    return load_profile(lookup.found_file(_KIND, "device profile", name, way_out))
