"""This machine as a profile, with the reason for every figure."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgeprune.device.profile import Pool, Profile
from edgeprune.units import format_bytes

# What an idle desktop and its applications take, as share and bounds; ``--memory`` overrides it.
_RESERVE_SHARE = 0.15
_LEAST_RESERVE, _MOST_RESERVE = 1 << 30, 6 << 30
_BANDWIDTH_BUFFER = 256 << 20
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "neon", "asimd", "sve", "i8mm")


def cgroup_limit_bytes(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Memory limit of this process's control group (version 2 or 1), or None."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        path = root / name
        if path.is_file():
            text = path.read_text().strip()
            if text.isdigit() and int(text) < 1 << 60:
                return int(text)
    return None


def instruction_sets() -> list[str]:
    """Instruction sets of this processor that matter for llama.cpp's kernels."""
    cpuinfo = Path("/proc/cpuinfo")
    words = set(cpuinfo.read_text().lower().split()) if cpuinfo.is_file() else set()
    return [flag for flag in _FLAGS if flag in words]


def memory_bandwidth_bytes_per_s(repeats: int = 5) -> float:
    """Best rate at which all cores together stream memory, read and write counted, in bytes per second.

    Numpy releases the interpreter lock while it copies, so threads run at once.
    """
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np

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


def cores() -> int:
    """Physical cores that this process may use."""
    import psutil

    physical = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    try:
        return max(1, min(physical, len(psutil.Process().cpu_affinity())))
    except AttributeError:  # macOS has no affinity
        return int(physical)


def _gpu_of(devices: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    gpus = [device for device in devices if device["kind"] in ("gpu", "igpu")]
    return max(gpus, key=lambda device: int(device["total_bytes"]), default=None)


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
    import psutil

    memory = psutil.virtual_memory()
    limit = cgroup_limit_bytes()
    total = min(memory.total, limit) if limit else memory.total
    why = [f"RAM {format_bytes(memory.total)}, {format_bytes(memory.available)} of it available now"]
    if limit and limit < memory.total:
        why.append(f"a control group limits this process to {format_bytes(limit)}")
    taken = total - min(memory.available, total)
    share = min(max(int(total * _RESERVE_SHARE), _LEAST_RESERVE), _MOST_RESERVE)
    reserve = min(max(share, taken), total - 1)
    basis = "what other programs hold now" if taken > share else "15 % of RAM, at least 1 and at most 6 GiB"
    why.append(f"reserve {format_bytes(reserve)}: {basis}")
    bandwidth = memory_bandwidth_bytes_per_s()
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
            held = size - int(gpu["free_bytes"])
            # The bandwidth of the card is not measured; 300 GB/s is a modest discrete GPU.
            vram = Pool("vram", size, max(held, 512 << 20), 300e9)
            why.append(f"backend {backend}: {gpu['description']} with {format_bytes(size)} of VRAM")
    return Profile(
        name="auto",
        summary=f"this machine ({platform.system()}, {format_bytes(total)} RAM)",
        backend=backend,
        threads=cores(),
        ram=ram,
        vram=vram,
        working_set_bytes=working_set,
        context=8192 if total > 12 << 30 else 4096,
        kv_type="f16",
        avoid=(),
        why=tuple(why),
    )
