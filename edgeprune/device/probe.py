"""This machine as a profile, with the reason for every figure."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from edgeprune.device.profile import Pool, Profile
from edgeprune.errors import BadFile
from edgeprune.files import check_keys, checked_number
from edgeprune.remembered import remembered
from edgeprune.units import format_bytes

# What an idle desktop and its applications take, as share and bounds; ``--memory`` overrides it.
_RESERVE_SHARE = 0.15
_LEAST_RESERVE, _MOST_RESERVE = 1 << 30, 6 << 30
_BANDWIDTH_BUFFER = 128 << 20  # read and as much written: more than caches hold, little on a small machine
# The bandwidth of a graphics card is not measured; this is a modest discrete one's.
_VRAM_BANDWIDTH = 300e9
_BANDWIDTH_SECONDS = 86_400.0  # a machine can be given other memory, a virtual one other neighbours
_LEAST_VRAM_RESERVE = 512 << 20
_CGROUPS, _MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "neon", "asimd", "sve", "i8mm")


def _control_folders(controller: str, root: Path, membership: Path) -> list[Path]:
    """Folders of this process's control group and of those above it.

    ``membership`` has a line ``0::/path`` for version 2, whose groups are at ``root``, and ``4:memory:/path`` for
    a controller of version 1, with a tree of its own. In a container the path may be the host's; the
    container's own group then is the root.
    """
    folders = [root, root / controller]
    for line in membership.read_text().splitlines() if membership.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if controllers == "" or controller in controllers.split(","):
            base = root / controller if controllers else root
            own = base / path.lstrip("/")
            folders += [folder for folder in (own, *own.parents) if folder.is_relative_to(base)]
    return list(dict.fromkeys(folders))


def _control_files(controller: str, name: str, root: Path, membership: Path) -> list[str]:
    """Contents of the file ``name`` in this process's control group and in those above it."""
    files = (folder / name for folder in _control_folders(controller, root, membership))
    return [file.read_text().strip() for file in files if file.is_file()]


def _number(folder: Path, *names: str) -> int | None:
    """The number in the first of the files ``names`` that there is, or None for none and for no limit."""
    for name in names:
        if (folder / name).is_file():
            text = (folder / name).read_text().strip()
            # Version 2 writes "max" for no limit, version 1 a number near 2^63.
            return int(text) if text.isdigit() and int(text) < 1 << 60 else None
    return None


def cgroup_limit_bytes(root: Path = _CGROUPS, membership: Path = _MEMBERSHIP) -> int | None:
    """Tightest memory limit of this process's control groups (version 2 or 1), or None."""
    folders = _control_folders("memory", root, membership)
    limits = (_number(folder, "memory.max", "memory.limit_in_bytes") for folder in folders)
    return min((limit for limit in limits if limit is not None), default=None)


def cgroup_available_bytes(root: Path = _CGROUPS, membership: Path = _MEMBERSHIP) -> int | None:
    """What this process's control groups still grant, or None without a limit.

    File pages that nobody has touched lately do not count as used: the system takes them back.
    """
    left = []
    for folder in _control_folders("memory", root, membership):
        limit = _number(folder, "memory.max", "memory.limit_in_bytes")
        used = _number(folder, "memory.current", "memory.usage_in_bytes")
        if limit is not None and used is not None:
            left.append(max(0, limit - max(0, used - _reclaimable(folder))))
    return min(left, default=None)


def _reclaimable(folder: Path) -> int:
    file = folder / "memory.stat"
    for line in file.read_text().splitlines() if file.is_file() else []:
        name, _, count = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file") and count.isdigit():
            return int(count)
    return 0


def cgroup_cores(root: Path = _CGROUPS, membership: Path = _MEMBERSHIP) -> int | None:
    """Cores' worth of time that this process's control groups grant (version 2 or 1), rounded up, or None."""
    pairs = [text.split() for text in _control_files("cpu", "cpu.max", root, membership)]
    quotas = _control_files("cpu", "cpu.cfs_quota_us", root, membership)
    periods = _control_files("cpu", "cpu.cfs_period_us", root, membership)
    pairs += [list(pair) for pair in zip(quotas, periods, strict=False)]
    # No limit is "max" in version 2 and -1 in version 1.
    return min((math.ceil(int(pair[0]) / int(pair[1])) for pair in pairs if pair[0].isdigit()), default=None)


def instruction_sets() -> list[str]:
    """Instruction sets of this processor that matter for llama.cpp's kernels."""
    cpuinfo = Path("/proc/cpuinfo")
    words = set(cpuinfo.read_text().lower().split()) if cpuinfo.is_file() else set()
    return [flag for flag in _FLAGS if flag in words]


def processor() -> str:
    """Name of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.lower().startswith(("model name", "cpu part"))]
    return " ".join([platform.machine(), platform.processor(), *sorted(set(named))])


def memory_bandwidth_bytes_per_s(repeats: int = 5) -> float:
    """Best rate at which all cores together stream memory, read and write counted, in bytes per second.

    Numpy releases the interpreter lock while it copies, so threads run at once.
    """
    threads = cores()
    part = _BANDWIDTH_BUFFER // threads
    sources = [np.ones(part, np.uint8) for _ in range(threads)]
    targets = [np.zeros(part, np.uint8) for _ in range(threads)]
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats):
            started = time.perf_counter()
            list(pool.map(np.copyto, targets, sources))
            best = max(best, 2 * part * threads / (time.perf_counter() - started))
    return best


def _known_bandwidth() -> float:
    """``memory_bandwidth_bytes_per_s``, which takes a while, once a day."""
    made_from = {"processor": processor(), "cores": cores(), "bytes": psutil.virtual_memory().total}
    return remembered(
        "bandwidth",
        made_from,
        lambda: {"bytes_per_s": memory_bandwidth_bytes_per_s()},
        _bandwidth_in,
        most_seconds=_BANDWIDTH_SECONDS,
    )


def _bandwidth_in(value: Any, where: str) -> float:
    check_keys(where, value, {"bytes_per_s"}, set())
    found = checked_number(where, value["bytes_per_s"])
    if found <= 0:
        raise BadFile(f"{where} holds no bandwidth")
    return found


def cores() -> int:
    """Physical cores that this process may use."""
    usable = [psutil.cpu_count(logical=False) or psutil.cpu_count() or 1]
    if hasattr(psutil.Process, "cpu_affinity"):  # macOS has none
        usable.append(len(psutil.Process().cpu_affinity()))
    if (granted := cgroup_cores()) is not None:
        usable.append(granted)
    return max(1, min(usable))


def _gpu_of(devices: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The largest discrete GPU; an integrated one only when there is no other, as in llama.cpp."""
    for kind in ("gpu", "igpu"):
        found = [device for device in devices if device["kind"] == kind]
        if found:
            return max(found, key=lambda device: int(device["total_bytes"]))
    return None


def _backend(device: Mapping[str, Any]) -> str:
    name = str(device["name"]).lower()
    for backend, prefixes in {
        "cuda": ("cuda",),
        "metal": ("metal", "mtl"),
        "rocm": ("rocm", "hip"),
        "vulkan": ("vulkan",),
    }.items():
        if name.startswith(prefixes):
            return backend
    return "vulkan"


def this_machine(devices: Sequence[Mapping[str, Any]]) -> Profile:
    """A profile of this machine.

    Args:
        devices: llama.cpp's compute devices, as ``edgeprune.measure.llama.backend_devices`` lists them.
    """
    memory = psutil.virtual_memory()
    limit = cgroup_limit_bytes()
    total = min(memory.total, limit) if limit else memory.total
    why = [f"RAM {format_bytes(memory.total)}, {format_bytes(memory.available)} of it available now"]
    if limit and limit < memory.total:
        why.append(f"a control group limits this process to {format_bytes(limit)}")
    available = min(memory.available, total)
    if (granted := cgroup_available_bytes()) is not None:
        available = min(available, granted)
    taken = total - available
    share = min(max(int(total * _RESERVE_SHARE), _LEAST_RESERVE), _MOST_RESERVE)
    reserve = min(max(share, taken), total - 1)
    basis = "what other programs hold now" if taken > share else "15 % of RAM, at least 1 and at most 6 GiB"
    why.append(f"reserve {format_bytes(reserve)}: {basis}")
    bandwidth = _known_bandwidth()
    why.append(f"memory bandwidth {bandwidth / 1e9:.1f} GB/s, measured by copying with {cores()} threads")
    sets = ", ".join(instruction_sets()) or "none recognised"
    why.append(f"{cores()} cores, {platform.machine()}, instruction sets: {sets}")
    ram = Pool("ram", total, reserve, bandwidth)
    gpu = _gpu_of(devices)
    vram, backend, working_set = None, "cpu", 0
    if gpu is None:
        why.append("backend cpu: this llama.cpp build sees no GPU")
    else:
        backend = _backend(gpu)
        size = int(gpu["total_bytes"])
        if gpu["kind"] == "igpu" or backend == "metal":
            working_set = size
            why.append(f"backend {backend}: {gpu['description']}, may use {format_bytes(size)} of unified memory")
        else:
            held = max(size - int(gpu["free_bytes"]), _LEAST_VRAM_RESERVE)
            vram = Pool("vram", size, held, _VRAM_BANDWIDTH)
            why.append(f"backend {backend}: {gpu['description']} with {format_bytes(size)} of VRAM")
            why.append(f"reserve {format_bytes(held)} of it: what is held now, at least 512 MiB")
            why.append(f"bandwidth of the VRAM {_VRAM_BANDWIDTH / 1e9:.0f} GB/s, assumed: it is not measured")
    context = 8192 if total > 12 << 30 else 4096
    why.append(f"context {context} tokens: 8192 above 12 GiB of RAM, else 4096")
    return Profile(
        name="auto",
        summary=f"this machine ({platform.system()}, {format_bytes(total)} RAM)",
        backend=backend,
        threads=cores(),
        ram=ram,
        vram=vram,
        working_set_bytes=working_set,
        context=context,
        kv_type="f16",
        avoid=(),
        why=tuple(why),
    )
