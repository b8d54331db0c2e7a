"""Probing this machine: control groups, GPUs, bandwidth, and a reason for every figure."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import psutil
import pytest

from edgeprune.device.probe import (
    cgroup_available_bytes,
    cgroup_cores,
    cgroup_limit_bytes,
    cores,
    memory_bandwidth_bytes_per_s,
    this_machine,
)
from edgeprune.device.profile import BACKENDS, KV_TYPES
from edgeprune.units import format_bytes

GIB = 2**30
UNLIMITED_V1 = "9223372036854771712"


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    return root


@pytest.mark.parametrize(
    ("files", "membership", "expected"),
    [
        pytest.param({}, "0::/", None, id="no control groups"),
        pytest.param({"memory.max": str(4 * GIB)}, "0::/", 4 * GIB, id="version 2, container"),
        pytest.param({"memory.max": "max"}, "0::/", None, id="version 2, unlimited"),
        pytest.param(
            {"user.slice/job.scope/memory.max": str(2 * GIB), "user.slice/memory.max": "max"},
            "0::/user.slice/job.scope",
            2 * GIB,
            id="version 2, own group",
        ),
        pytest.param(
            {"user.slice/job.scope/memory.max": "max", "user.slice/memory.max": str(3 * GIB)},
            "0::/user.slice/job.scope",
            3 * GIB,
            id="version 2, group above",
        ),
        pytest.param(
            {"a/b/memory.max": str(6 * GIB), "a/memory.max": str(5 * GIB)}, "0::/a/b", 5 * GIB, id="tightest of two"
        ),
        pytest.param({"other/memory.max": str(GIB)}, "0::/mine", None, id="version 2, group of others"),
        pytest.param(
            {"memory/memory.limit_in_bytes": str(4 * GIB)}, "4:memory:/docker/abc", 4 * GIB, id="version 1, container"
        ),
        pytest.param({"memory/memory.limit_in_bytes": UNLIMITED_V1}, "4:memory:/", None, id="version 1, unlimited"),
        pytest.param(
            {"memory/memory.limit_in_bytes": UNLIMITED_V1, "memory/job/memory.limit_in_bytes": str(GIB)},
            "5:cpu,cpuacct:/elsewhere\n4:memory:/job\n0::/",
            GIB,
            id="version 1, own group",
        ),
        pytest.param(
            {"memory/elsewhere/memory.limit_in_bytes": str(GIB)}, "5:cpu:/elsewhere", None, id="group of cpu only"
        ),
    ],
)
def test_memory_limit_of_the_control_group(
    tmp_path: Path, files: dict[str, str], membership: str, expected: int | None
) -> None:
    root = tree(tmp_path / "cgroup", files)
    tree(tmp_path, {"membership": membership})
    assert cgroup_limit_bytes(root, tmp_path / "membership") == expected


def test_memory_limit_without_a_membership_file_is_that_of_the_root(tmp_path: Path) -> None:
    tree(tmp_path, {"memory.max": str(GIB)})
    assert cgroup_limit_bytes(tmp_path, tmp_path / "missing") == GIB


@pytest.mark.parametrize(
    ("files", "membership", "expected"),
    [
        pytest.param({}, "0::/", None, id="no control groups"),
        pytest.param({"cpu.max": "max 100000"}, "0::/", None, id="version 2, unlimited"),
        pytest.param({"cpu.max": "200000 100000"}, "0::/", 2, id="version 2"),
        pytest.param({"cpu.max": "150000 100000"}, "0::/", 2, id="rounded up"),
        pytest.param({"cpu.max": "20000 100000"}, "0::/", 1, id="at least one"),
        pytest.param(
            {"a/cpu.max": "800000 100000", "a/b/cpu.max": "300000 100000"}, "0::/a/b", 3, id="tightest of two"
        ),
        pytest.param(
            {"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"},
            "2:cpu,cpuacct:/",
            4,
            id="version 1",
        ),
        pytest.param(
            {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "2:cpu:/", None, id="v1, unlimited"
        ),
    ],
)
def test_cores_granted_by_the_control_group(
    tmp_path: Path, files: dict[str, str], membership: str, expected: int | None
) -> None:
    root = tree(tmp_path / "cgroup", files)
    tree(tmp_path, {"membership": membership})
    assert cgroup_cores(root, tmp_path / "membership") == expected


def test_what_the_control_group_still_grants(tmp_path: Path) -> None:
    files = {
        "memory.max": "max",
        "a/memory.max": "1000",
        "a/memory.current": "700",
        "a/memory.stat": "anon 100\ninactive_file 400\nactive_file 50",
        "a/b/memory.max": "900",
        "a/b/memory.current": "350",
    }
    root = tree(tmp_path / "cgroup", files)
    tree(tmp_path, {"membership": "0::/a/b", "elsewhere": "0::/"})
    assert cgroup_available_bytes(root, tmp_path / "membership") == 550  # a: 1000 - (700 - 400), b: 900 - 350
    assert cgroup_available_bytes(root, tmp_path / "elsewhere") is None


def test_cores_are_no_more_than_this_machine_has() -> None:
    assert 1 <= cores() <= (psutil.cpu_count() or 1)


def test_memory_bandwidth_is_that_of_a_real_memory() -> None:
    assert 1e8 < memory_bandwidth_bytes_per_s(repeats=1) < 1e13


def device(name: str, kind: str, total_gib: float, free_gib: float, description: str = "") -> dict[str, Any]:
    return {
        "name": name,
        "description": description or name,
        "kind": kind,
        "free_bytes": int(free_gib * GIB),
        "total_bytes": int(total_gib * GIB),
    }


CPU = device("CPU", "cpu", 16, 8)


def test_machine_without_gpu_is_a_cpu_profile_with_a_reason_for_every_figure() -> None:
    profile = this_machine([CPU])
    assert (profile.name, profile.backend, profile.vram, profile.working_set_bytes) == ("auto", "cpu", None, 0)
    assert profile.kv_type in KV_TYPES
    assert profile.threads == cores()
    assert 0 < profile.ram.reserve_bytes < profile.ram.total_bytes <= psutil.virtual_memory().total
    assert profile.ram.reserve_bytes >= min(GIB, profile.ram.total_bytes - 1)
    assert profile.context in (4096, 8192)
    assert not profile.on_gpu
    why = "\n".join(profile.why)
    for figure in (
        f"RAM {format_bytes(psutil.virtual_memory().total)}",
        f"reserve {format_bytes(profile.ram.reserve_bytes)}",
        f"{profile.ram.bandwidth_bytes_per_s / 1e9:.1f} GB/s",
        f"{profile.threads} cores",
        "backend cpu",
        f"context {profile.context} tokens",
    ):
        assert figure in why


def test_discrete_gpu_is_a_pool_of_its_own_and_preferred_to_a_larger_integrated_one() -> None:
    profile = this_machine(
        [
            CPU,
            device("Vulkan1", "igpu", 24, 20, "Iris"),
            device("CUDA0", "gpu", 8, 6.5, "RTX 4060"),
            device("CUDA1", "gpu", 6, 6, "GTX 1060"),
        ]
    )
    assert profile.backend == "cuda"
    assert profile.on_gpu
    assert profile.vram is not None
    assert (profile.vram.total_bytes, profile.vram.reserve_bytes) == (8 * GIB, int(1.5 * GIB))
    assert profile.working_set_bytes == 0
    why = "\n".join(profile.why)
    for figure in ("RTX 4060 with 8.00 GiB of VRAM", "reserve 1.50 GiB", "300 GB/s, assumed"):
        assert figure in why


def test_idle_gpu_still_keeps_a_reserve() -> None:
    profile = this_machine([device("ROCm0", "gpu", 24, 24)])
    assert profile.backend == "rocm"
    assert profile.vram is not None
    assert profile.vram.reserve_bytes == 512 << 20


@pytest.mark.parametrize(
    ("gpu", "backend"),
    [
        (device("MTL0", "gpu", 2, 2, "Apple M4"), "metal"),
        (device("Vulkan0", "igpu", 2, 2, "Radeon 780M"), "vulkan"),
    ],
    ids=["Apple", "integrated"],
)
def test_unified_memory_is_one_pool_with_the_limit_of_its_gpu(gpu: dict[str, Any], backend: str) -> None:
    profile = this_machine([CPU, gpu])
    assert (profile.backend, profile.vram) == (backend, None)
    assert profile.working_set_bytes == 2 * GIB
    assert profile.usable_bytes == min(2 * GIB, profile.ram.usable_bytes)
    assert any(f"{gpu['description']}, may use 2.00 GiB of unified memory" in line for line in profile.why)
    assert backend in BACKENDS
    assert math.isfinite(profile.ram.bandwidth_bytes_per_s)
