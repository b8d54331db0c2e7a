"""The memory budget: lines that sum to the pool, to the byte."""

from __future__ import annotations

import pytest

from edgeprune.device.budget import Budget, make_budget
from edgeprune.device.profile import find_profile, known_profiles

KV, COMPUTE, RUNTIME = 805_306_369, 314_572_801, 123_456_789
GIB = 2**30


def budget(name: str, memory_bytes: int | None = None, file_limit_bytes: int | None = None) -> Budget:
    return make_budget(
        find_profile(name),
        kv_bytes=KV,
        compute_bytes=COMPUTE,
        runtime_bytes=RUNTIME,
        memory_bytes=memory_bytes,
        file_limit_bytes=file_limit_bytes,
        basis="as priced",
    )


@pytest.mark.parametrize("name", sorted(known_profiles()))
def test_lines_and_remainder_sum_to_each_pool(name: str) -> None:
    profile, made = find_profile(name), budget(name)
    totals = {"ram": profile.ram.total_bytes}
    if profile.vram is not None:
        totals["vram"] = profile.vram.total_bytes
    assert {pool.pool: pool.total_bytes for pool in made.pools} == totals
    for pool in made.pools:
        assert sum(line.nbytes for line in pool.lines) + pool.weights_bytes == pool.total_bytes
        assert all(line.nbytes > 0 for line in pool.lines)
    # Every need is met exactly once.
    needs = [line.nbytes for pool in made.pools for line in pool.lines]
    assert sum(needs) == sum(totals.values()) - profile.usable_bytes + KV + COMPUTE + RUNTIME


def test_unified_memory_has_one_pool_limited_by_its_gpu() -> None:
    made = budget("macbook-air-16gb")
    assert [pool.pool for pool in made.pools] == ["ram"]
    assert made.pool("vram") is None
    assert made.weights_bytes == 10922 * 2**20 - KV - COMPUTE - RUNTIME


def test_discrete_gpu_holds_cache_and_compute_buffers() -> None:
    made = budget("rtx-4090-24gb")
    ram, vram = made.pool("ram"), made.pool("vram")
    assert ram is not None
    assert vram is not None
    assert [line.name for line in ram.lines] == ["system and applications", "runtime (process, libraries)"]
    assert {line.name: line.nbytes for line in vram.lines}["KV cache"] == KV
    assert {line.name: line.nbytes for line in vram.lines}["compute buffers"] == COMPUTE
    assert made.weights_bytes == ram.weights_bytes + vram.weights_bytes


@pytest.mark.parametrize("name", ["cpu-8gb", "macbook-air-16gb", "rtx-4090-24gb"])
def test_memory_given_by_the_user_replaces_pools_and_reserves(name: str) -> None:
    made = budget(name, memory_bytes=10 * GIB)
    assert [pool.pool for pool in made.pools] == ["ram"]
    assert made.pools[0].total_bytes == 10 * GIB
    assert "system and applications" not in [line.name for line in made.pools[0].lines]
    assert made.weights_bytes == 10 * GIB - KV - COMPUTE - RUNTIME


def test_memory_below_the_needs_leaves_nothing_and_says_how_much_is_short() -> None:
    made = budget("cpu-8gb", memory_bytes=GIB)
    assert made.weights_bytes == 0
    assert made.pools[0].weights_bytes == GIB - KV - COMPUTE - RUNTIME < 0
    assert dict(made.rows())["  left for weights"].startswith("-")


def test_table_names_every_line_and_the_file_limit() -> None:
    made = budget("rtx-4060-8gb", file_limit_bytes=5 * GIB)
    assert [label for label, _ in made.rows()] == [
        "RAM",
        "  system and applications",
        "  runtime (process, libraries)",
        "  left for weights",
        "VRAM",
        "  desktop and driver",
        "  KV cache",
        "  compute buffers",
        "  left for weights",
        "file size limit",
    ]
    value = made.to_json()
    assert value["file_limit_bytes"] == 5 * GIB
    assert value["basis"] == "as priced"
    assert [pool["pool"] for pool in value["pools"]] == ["ram", "vram"]
    for pool in value["pools"]:
        assert sum(line["nbytes"] for line in pool["lines"]) + pool["weights_bytes"] == pool["total_bytes"]
