"""Where the weights go: as much on the GPU as fits, told in llama.cpp's own options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import toys

from edgeprune.decide.placement import ALL_LAYERS, place
from edgeprune.device.budget import Budget, Line, PoolBudget
from edgeprune.device.profile import Profile, find_profile
from edgeprune.measure.launch import Launch
from edgeprune.model.architecture import Architecture, read_architecture
from edgeprune.model.gguf import GgufFile

LAYERS = 5
CACHE, COMPUTE, RUNTIME = 50_000, 7_000, 11_000
LAUNCH = Launch(context=1024, threads=4)
Make = Callable[[str], Architecture]


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A narrow model of five layers of an architecture; ``tied`` has no output matrix of its own."""
    made: dict[str, Architecture] = {}

    def make(arch: str) -> Architecture:
        if arch not in made:
            path = tmp_path_factory.mktemp("narrow") / f"{arch}.gguf"
            real = "qwen3moe" if arch == "tied" else arch
            toys.synthetic_gguf(path, real, layers=LAYERS, width=32, expert_width=32)
            whole = read_architecture(GgufFile(path))
            own = [tensor for tensor in whole.tensors if arch != "tied" or tensor.role != "output"]
            made[arch] = replace(whole, tensors=tuple(own))
        return made[arch]

    return make


def weights(architecture: Architecture) -> dict[str, int]:
    return {tensor.name: tensor.nbytes for tensor in architecture.tensors}


def one_pool(left: int) -> Budget:
    lines = (Line("runtime (process, libraries)", RUNTIME), Line("KV cache", CACHE), Line("compute buffers", COMPUTE))
    return Budget((PoolBudget("ram", left + RUNTIME + CACHE + COMPUTE, lines),), None, "")


def two_pools(ram_left: int, vram_left: int) -> Budget:
    host = PoolBudget("ram", ram_left + RUNTIME, (Line("runtime (process, libraries)", RUNTIME),))
    device = PoolBudget(
        "vram", vram_left + CACHE + COMPUTE, (Line("KV cache", CACHE), Line("compute buffers", COMPUTE))
    )
    return Budget((host, device), None, "")


def expected(architecture: Architecture, gpu_layers: int, cpu_experts: int) -> tuple[int, int, int]:
    """(host, device, cache on the host) as llama.cpp divides them, from its rule in ``load_tensors``."""
    count = LAYERS + 1 if gpu_layers == ALL_LAYERS else gpu_layers
    start = max(LAYERS + 1 - count, 0)
    tied = all(tensor.name != "output.weight" for tensor in architecture.tensors)
    host = device = 0
    for tensor in architecture.tensors:
        position = LAYERS if tensor.layer < 0 else tensor.layer
        on_device = start <= position < start + count and tensor.name != "token_embd.weight"
        if "_exps." in tensor.name and tensor.layer < cpu_experts:
            on_device = False
        if on_device:
            device += tensor.nbytes
        else:
            host += tensor.nbytes
        if tensor.name == "token_embd.weight" and tied and start <= LAYERS < start + count:
            device += tensor.nbytes
    blocks_on_device = sum(start <= block < start + count for block in range(LAYERS))
    return host, device, CACHE - CACHE * blocks_on_device // LAYERS


def test_unified_memory_takes_all_or_nothing(described: Make) -> None:
    architecture = described("qwen3moe")
    total = sum(weights(architecture).values())
    profile = find_profile("cpu-16gb")
    found = place(architecture, 8, weights(architecture), one_pool(total), profile, LAUNCH)
    assert found is not None
    assert found.launch == LAUNCH
    assert found.weight_bytes == {"ram": total}
    assert found.pool_bytes == {"ram": total + RUNTIME + CACHE + COMPUTE}
    assert place(architecture, 8, weights(architecture), one_pool(total - 1), profile, LAUNCH) is None


@pytest.mark.parametrize(
    ("name", "gpu_layers"),
    [("cpu-16gb", 0), ("macbook-air-16gb", ALL_LAYERS), ("steam-deck", ALL_LAYERS), ("rtx-4090-24gb", 0)],
    ids=["CPU", "Apple", "integrated GPU", "discrete GPU given only a host size"],
)
def test_one_pool_is_served_by_what_computes_in_it(described: Make, name: str, gpu_layers: int) -> None:
    architecture = described("qwen3moe")
    found = place(architecture, 8, weights(architecture), one_pool(10**9), find_profile(name), LAUNCH)
    assert found is not None
    assert (found.launch.gpu_layers, found.launch.cpu_experts) == (gpu_layers, 0)


ALL_OPTIONS = [(ALL_LAYERS, n) for n in range(LAYERS + 1)] + [(n, LAYERS) for n in range(LAYERS, 0, -1)] + [(0, 0)]


@pytest.mark.parametrize("arch", ["qwen3moe", "tied", "gpt-oss", "deepseek2"])
@pytest.mark.parametrize("ram_share", [0.4, 0.7, 1.3])
def test_least_possible_stays_on_the_host(described: Make, arch: str, ram_share: float) -> None:
    """Over VRAM sizes from nothing to plenty, the choice is the first option that fits, found by trying all."""
    architecture = described(arch)
    total = sum(weights(architecture).values())
    seen = set()
    for twentieth in range(-2, 29):
        vram_left, ram_left = total * twentieth // 20, int(total * ram_share)
        budget = two_pools(ram_left, vram_left)
        found = place(architecture, 8, weights(architecture), budget, find_profile("rtx-4060-8gb"), LAUNCH)
        fitting = [
            option
            for option in ALL_OPTIONS
            for host, device, moved in [expected(architecture, *option)]
            for idle in [COMPUTE if option == (0, 0) else 0]  # nothing computes on the GPU then
            if host + moved + idle <= ram_left and (idle or device <= vram_left + moved)
        ]
        if not fitting:
            assert found is None
            continue
        assert found is not None
        option = (found.launch.gpu_layers, found.launch.cpu_experts)
        assert option == fitting[0]
        host, device, moved = expected(architecture, *option)
        assert found.weight_bytes == {"ram": host, "vram": device}
        idle = COMPUTE if option == (0, 0) else 0
        on_card = COMPUTE + CACHE - moved + device - idle
        assert found.pool_bytes == {"ram": RUNTIME + host + moved + idle, "vram": on_card}
        assert all(found.pool_bytes[pool.pool] <= max(pool.total_bytes, 0) for pool in budget.pools)
        seen.add(option)
    assert len(seen) >= (6 if ram_share > 1 else 2)


def test_everything_is_on_a_gpu_that_is_large_enough(described: Make) -> None:
    architecture = described("qwen3moe")
    nbytes = weights(architecture)
    embedding = nbytes["token_embd.weight"]
    needed = sum(nbytes.values()) - embedding
    profile = find_profile("rtx-4060-8gb")
    found = place(architecture, 8, nbytes, two_pools(10**9, needed), profile, LAUNCH)
    assert found is not None
    assert (found.launch.gpu_layers, found.launch.cpu_experts) == (ALL_LAYERS, 0)
    assert found.weight_bytes == {"ram": embedding, "vram": needed}
    # A byte less, and the experts of one layer stay in host memory.
    found = place(architecture, 8, nbytes, two_pools(10**9, needed - 1), profile, LAUNCH)
    assert found is not None
    assert (found.launch.gpu_layers, found.launch.cpu_experts) == (ALL_LAYERS, 1)


def test_first_layers_of_the_gpu_option_are_the_output_and_the_last_blocks(described: Make) -> None:
    """``-ngl 1`` moves the output matrix and no block, so room for the output alone is used by it."""
    architecture = described("qwen3moe")
    nbytes = weights(architecture)
    outside = nbytes["output.weight"] + nbytes["output_norm.weight"]
    profile = find_profile("rtx-4060-8gb")
    # The cache stays with the blocks on the host, which leaves its room to weights.
    found = place(architecture, 8, nbytes, two_pools(10**9, outside - CACHE), profile, LAUNCH)
    assert found is not None
    assert (found.launch.gpu_layers, found.weight_bytes["vram"]) == (1, outside)
    found = place(architecture, 8, nbytes, two_pools(10**9, outside - CACHE - 1), profile, LAUNCH)
    assert found is not None
    assert (found.launch.gpu_layers, found.launch.cpu_experts, found.weight_bytes["vram"]) == (0, 0, 0)


def speed(
    architecture: Architecture, nbytes: dict[str, int], budget: Budget, profile: Profile, kept: int = 8
) -> float:
    found = place(architecture, kept, nbytes, budget, profile, LAUNCH)
    assert found is not None
    return found.decode_per_s


def test_only_experts_in_use_are_read_for_a_token(described: Make) -> None:
    """By hand: 2 of 8 experts, everything else whole, the embedding not at all, 60 % of the bandwidth."""
    architecture = described("qwen3moe")
    nbytes = {tensor.name: 10**6 for tensor in architecture.tensors}
    experts = 3 * LAYERS
    rest = len(nbytes) - experts - 1
    profile = find_profile("cpu-16gb")
    read = 10**6 * (experts * 2 / 8 + rest)
    seconds = read / (profile.ram.bandwidth_bytes_per_s * 0.6) + LAYERS * 40e-6
    assert speed(architecture, nbytes, one_pool(10**9), profile) == pytest.approx(1 / seconds)
    # Half the experts at half the bytes: as many bytes per token as before.
    halved = {tensor.name: 10**6 // (2 if tensor.is_expert else 1) for tensor in architecture.tensors}
    assert speed(architecture, halved, one_pool(10**9), profile, kept=4) == pytest.approx(1 / seconds)


def test_tied_embedding_is_read_once_as_output(described: Make) -> None:
    """On a GPU the second copy is read there, and the one on the host is only looked up."""
    tied, profile = described("tied"), find_profile("rtx-4060-8gb")
    assert profile.vram is not None
    nbytes = {tensor.name: 10**6 for tensor in tied.tensors}
    blocks = 3 * LAYERS * 2 / 8 + len(nbytes) - 3 * LAYERS - 1
    on_gpu = 10**6 * (blocks + 1) / (profile.vram.bandwidth_bytes_per_s * 0.6)
    assert speed(tied, nbytes, two_pools(10**9, 10**9), profile) == pytest.approx(1 / (on_gpu + LAYERS * 40e-6))
    on_host = 10**6 * (blocks + 1) / (profile.ram.bandwidth_bytes_per_s * 0.6)
    assert speed(tied, nbytes, two_pools(10**9, -CACHE), profile) == pytest.approx(1 / (on_host + LAYERS * 40e-6))


def test_more_on_the_gpu_is_faster(described: Make, tmp_path: Path) -> None:
    architecture, profile = described("qwen3moe"), find_profile("rtx-4060-8gb")
    nbytes = {name: 1000 * count for name, count in weights(architecture).items()}
    total = sum(nbytes.values())
    speeds = [speed(architecture, nbytes, two_pools(2 * total, total * n // 10), profile) for n in range(11)]
    assert speeds == sorted(speeds)
    assert speeds[-1] > 3 * speeds[0]
