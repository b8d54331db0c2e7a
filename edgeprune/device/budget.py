"""The memory budget: named bytes per pool that sum to what the pool has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edgeprune.device.profile import Profile
from edgeprune.units import format_bytes

CACHE, COMPUTE = "KV cache", "compute buffers"
RUNTIME, HOST_COMPUTE = "runtime (process, libraries)", "compute buffers of the host"
SYSTEM, DESKTOP = "system and applications", "desktop and driver"  # what others hold of RAM and of VRAM


@dataclass(frozen=True)
class Line:
    """One named amount of bytes in a pool."""

    name: str
    nbytes: int


@dataclass(frozen=True)
class PoolBudget:
    """A pool's memory, line by line.

    Attributes:
        total_bytes: of the pool; the lines and the remainder sum to it.
        lines: what is spoken for before any weight.
    """

    pool: str
    total_bytes: int
    lines: tuple[Line, ...]

    @property
    def weights_bytes(self) -> int:
        """What is left for weights; negative when the lines alone exceed the pool."""
        return self.total_bytes - sum(line.nbytes for line in self.lines)


@dataclass(frozen=True)
class Budget:
    """What weights may take.

    Attributes:
        pools: RAM first, then VRAM if there is any.
        file_limit_bytes: most bytes of the file itself, or None.
        basis: where the buffer sizes come from, one line.
    """

    pools: tuple[PoolBudget, ...]
    file_limit_bytes: int | None
    basis: str

    @property
    def weights_bytes(self) -> int:
        """Most bytes of weights over all pools; the file limit, which includes the header, is separate."""
        return sum(max(0, pool.weights_bytes) for pool in self.pools)

    def pool(self, name: str) -> PoolBudget | None:
        return next((pool for pool in self.pools if pool.pool == name), None)

    def rows(self) -> list[tuple[str, str]]:
        """The table that a user checks: label and figure."""
        rows = []
        for pool in self.pools:
            rows.append((f"{pool.pool.upper()}", format_bytes(pool.total_bytes)))
            rows += [(f"  {line.name}", format_bytes(line.nbytes)) for line in pool.lines]
            rows.append(("  left for weights", format_bytes(pool.weights_bytes)))
        if self.file_limit_bytes is not None:
            rows.append(("file size limit", format_bytes(self.file_limit_bytes)))
        return rows

    def to_json(self) -> dict[str, Any]:
        return {
            "pools": [
                {
                    "pool": pool.pool,
                    "total_bytes": pool.total_bytes,
                    "lines": [{"name": line.name, "nbytes": line.nbytes} for line in pool.lines],
                    "weights_bytes": pool.weights_bytes,
                }
                for pool in self.pools
            ],
            "file_limit_bytes": self.file_limit_bytes,
            "basis": self.basis,
        }


def make_budget(
    profile: Profile,
    *,
    kv_bytes: int,
    compute_bytes: int,
    runtime_bytes: int,
    host_compute_bytes: int = 0,
    memory_bytes: int | None = None,
    file_limit_bytes: int | None = None,
    basis: str = "",
) -> Budget:
    """The budget on ``profile`` after what llama.cpp needs beside the weights.

    Args:
        kv_bytes, compute_bytes: KV cache and compute buffers, as llama.cpp prices them.
        runtime_bytes: the process itself: libraries, vocabulary.
        host_compute_bytes: compute buffers that stay in host memory when a GPU computes.
        memory_bytes: usable memory given by the user, instead of the profile's RAM less its reserve.
        file_limit_bytes: most bytes of the file.

    KV cache and compute buffers go to the VRAM of a discrete GPU, whose layers they serve.
    """
    if memory_bytes is not None:
        total, reserve = memory_bytes, 0
    else:
        total, reserve = profile.ram.total_bytes, profile.ram.total_bytes - profile.usable_ram_bytes
    ram_lines = [Line(SYSTEM, reserve)] if reserve else []
    ram_lines.append(Line(RUNTIME, runtime_bytes))
    if host_compute_bytes:
        ram_lines.append(Line(HOST_COMPUTE, host_compute_bytes))
    buffers = [Line(CACHE, kv_bytes), Line(COMPUTE, compute_bytes)]
    if profile.vram is None or memory_bytes is not None:
        return Budget((PoolBudget("ram", total, (*ram_lines, *buffers)),), file_limit_bytes, basis)
    vram_lines = (Line(DESKTOP, profile.vram.reserve_bytes), *buffers)
    return Budget(
        (
            PoolBudget("ram", total, tuple(ram_lines)),
            PoolBudget("vram", profile.vram.total_bytes, vram_lines),
        ),
        file_limit_bytes,
        basis,
    )
