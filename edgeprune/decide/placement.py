"""Where the weights go: which layers on the GPU, whose experts in host memory, and how fast that decodes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from edgeprune.device.budget import CACHE, COMPUTE, Budget
from edgeprune.device.profile import Profile
from edgeprune.measure.launch import Launch
from edgeprune.model.architecture import Architecture

# Share of a pool's peak bandwidth that decoding reaches; estimators in the field use 0.5 to 0.7.
_BANDWIDTH_SHARE = 0.6
# Scheduling cost of one layer's graph nodes per token on a CPU.
_SECONDS_PER_LAYER = 40e-6
ALL_LAYERS = -1
# What ``--n-cpu-moe`` keeps in host memory (llama.cpp, common/common.h): biases of experts too.
_CPU_MOE = re.compile(r"\.ffn_(up|down|gate|gate_up)_(ch|)exps")
# llama.cpp makes a second copy of a tied embedding matrix where the output product is computed.
_OUTPUT_COPY = "token_embd.weight (output)"


@dataclass(frozen=True)
class Placement:
    """A feasible launch.

    Attributes:
        launch: the settings.
        pool_bytes: peak memory by pool, everything counted.
        weight_bytes: weights by pool.
        decode_per_s: predicted tokens per second at the start of the context.
    """

    launch: Launch
    pool_bytes: dict[str, int]
    weight_bytes: dict[str, int]
    decode_per_s: float


def _blocks(architecture: Architecture) -> int:
    """Blocks as ``--n-gpu-layers`` counts them."""
    return 1 + max(tensor.layer for tensor in architecture.tensors)


def _blocks_on_gpu(architecture: Architecture, gpu_layers: int) -> int:
    """Blocks that ``gpu_layers`` moves: the output counts as the last layer, so 1 moves it alone."""
    blocks = _blocks(architecture)
    return blocks if gpu_layers == ALL_LAYERS else max(0, gpu_layers - 1)


def _has_output(architecture: Architecture) -> bool:
    """Whether the output matrix is a tensor of its own, and not the embedding matrix."""
    return any(tensor.role == "output" for tensor in architecture.tensors)


def _split(
    architecture: Architecture, nbytes: Mapping[str, int], gpu_layers: int, cpu_experts: int
) -> dict[str, dict[str, int]]:
    """Bytes by pool and tensor, as llama.cpp assigns them (``load_tensors`` in src/llama-model.cpp).

    The token embedding is looked up on the host, whatever the settings.
    """
    pools: dict[str, dict[str, int]] = {"ram": {}, "vram": {}}
    first_on_gpu = _blocks(architecture) - _blocks_on_gpu(architecture, gpu_layers)
    for tensor in architecture.tensors:
        if tensor.layer < 0:
            on_gpu = gpu_layers != 0 and tensor.role != "embedding"
        elif tensor.layer < cpu_experts and _CPU_MOE.search(tensor.name):
            on_gpu = False
        else:
            on_gpu = tensor.layer >= first_on_gpu
        pools["vram" if on_gpu else "ram"][tensor.name] = nbytes[tensor.name]
    if gpu_layers != 0 and not _has_output(architecture):
        pools["vram"][_OUTPUT_COPY] = nbytes.get("token_embd.weight", 0)
    return pools


def _read_per_token(
    architecture: Architecture, kept: int, tensors: Mapping[str, int], *, embedding_is_output: bool
) -> float:
    """Bytes of weights read for one token out of ``tensors``; of a mere embedding a row, which is nothing."""
    described = {tensor.name: tensor for tensor in architecture.tensors}
    total = 0.0
    for name, count in tensors.items():
        tensor = described.get(name)
        if tensor is None:
            total += count
        elif tensor.is_expert:
            total += count * architecture.used / kept
        elif tensor.role != "embedding" or embedding_is_output:
            total += count
    return total


def _decode_per_s(
    architecture: Architecture, kept: int, split: Mapping[str, Mapping[str, int]], profile: Profile
) -> float:
    bandwidth = {"ram": profile.ram.bandwidth_bytes_per_s}
    if profile.vram is not None:
        bandwidth["vram"] = profile.vram.bandwidth_bytes_per_s
    multiplied = not _has_output(architecture) and _OUTPUT_COPY not in split["vram"]
    seconds = _SECONDS_PER_LAYER * architecture.layers
    for pool, rate in bandwidth.items():
        read = _read_per_token(architecture, kept, split[pool], embedding_is_output=multiplied)
        seconds += read / (rate * _BANDWIDTH_SHARE)
    return 1.0 / seconds


def place(
    architecture: Architecture,
    kept: int,
    nbytes: Mapping[str, int],
    budget: Budget,
    profile: Profile,
    launch: Launch,
    *,
    fixed: bool = False,
) -> Placement | None:
    """A feasible placement of tensors with ``nbytes`` each, or None.

    Args:
        fixed: only the placement that ``launch`` itself says.

    On one pool there is nothing to choose. On a discrete GPU as much as possible goes to its memory:
    everything; else the experts of the first layers stay in host memory, as few layers as needed; else
    whole layers stay too, as few as needed.
    """
    ram, vram = budget.pools[0], budget.pool("vram")
    if vram is None:
        total = sum(nbytes.values())
        if total > ram.weights_bytes:
            return None
        # A memory size given for a machine with a discrete GPU is that of the host.
        unified = profile.on_gpu and profile.vram is None
        settings = launch if fixed else replace(launch, gpu_layers=ALL_LAYERS if unified else 0)
        split: dict[str, dict[str, int]] = {"ram": dict(nbytes), "vram": {}}
        used = sum(line.nbytes for line in ram.lines) + total
        speed = _decode_per_s(architecture, kept, split, profile)
        return Placement(settings, {"ram": used}, {"ram": total}, speed)
    blocks = _blocks(architecture)
    cache, compute = (next(line.nbytes for line in vram.lines if line.name == name) for name in (CACHE, COMPUTE))
    lines = {pool.pool: sum(line.nbytes for line in pool.lines) for pool in budget.pools}
    options = [(ALL_LAYERS, experts) for experts in range(blocks + 1)]
    options += [(layers, blocks) for layers in range(blocks, 0, -1)] + [(0, 0)]
    if fixed:
        options = [(launch.gpu_layers, launch.cpu_experts)]
    for gpu_layers, cpu_experts in options:
        split = _split(architecture, nbytes, gpu_layers, cpu_experts)
        host, device = sum(split["ram"].values()), sum(split["vram"].values())
        # The cache of a block is where the block is.
        moved = cache - cache * _blocks_on_gpu(architecture, gpu_layers) // blocks
        if gpu_layers == 0:  # nothing computes on the GPU, and nothing is kept there
            moved += compute
        fits = gpu_layers == 0 or device <= vram.weights_bytes + moved
        if fits and host + moved <= ram.weights_bytes:
            settings = replace(launch, gpu_layers=gpu_layers, cpu_experts=cpu_experts)
            used_bytes = {"ram": lines["ram"] + host + moved, "vram": lines["vram"] + device - moved}
            speed = _decode_per_s(architecture, kept, split, profile)
            return Placement(settings, used_bytes, {"ram": host, "vram": device}, speed)
    return None
