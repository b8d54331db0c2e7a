"""Where the weights go: which layers on the GPU, whose experts in host memory, and how fast that decodes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from edgeprune.device.budget import Budget
from edgeprune.device.profile import Profile
from edgeprune.measure.launch import Launch
from edgeprune.model.architecture import Architecture

# Share of a pool's peak bandwidth that decoding reaches; estimators in the field use 0.5 to 0.7.
_BANDWIDTH_SHARE = 0.6
# Scheduling cost of one layer's graph nodes per token on a CPU.
_SECONDS_PER_LAYER = 40e-6
ALL_LAYERS = -1


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


def _split(
    architecture: Architecture, nbytes: Mapping[str, int], gpu_layers: int, cpu_experts: int
) -> dict[str, dict[str, int]]:
    """Bytes by pool and tensor. The token embedding is looked up on the host; the output matrix is on the
    GPU when every layer is."""
    pools: dict[str, dict[str, int]] = {"ram": {}, "vram": {}}
    first_on_gpu = 0 if gpu_layers == ALL_LAYERS else architecture.layers - gpu_layers
    for tensor in architecture.tensors:
        if tensor.layer < 0:
            on_gpu = gpu_layers == ALL_LAYERS and tensor.role != "embedding"
        else:
            on_gpu = tensor.layer >= first_on_gpu
            if tensor.is_expert and tensor.layer < cpu_experts:
                on_gpu = False
        pools["vram" if on_gpu else "ram"][tensor.name] = nbytes[tensor.name]
    tied = not any(tensor.role == "output" for tensor in architecture.tensors)
    if tied and gpu_layers == ALL_LAYERS:  # llama.cpp keeps a second copy as output matrix
        pools["vram"]["token_embd.weight (output)"] = nbytes.get("token_embd.weight", 0)
    return pools


def _read_per_token(architecture: Architecture, kept: int, tensors: Mapping[str, int]) -> float:
    """Bytes of weights read for one token out of ``tensors``."""
    described = {tensor.name: tensor for tensor in architecture.tensors}
    has_output = any(tensor.role == "output" for tensor in architecture.tensors)
    total = 0.0
    for name, count in tensors.items():
        tensor = described.get(name)
        if tensor is None or (tensor.role == "embedding" and not has_output):
            total += count
        elif tensor.is_expert:
            total += count * architecture.used / kept
        elif tensor.role != "embedding":
            total += count
    return total


def _decode_per_s(
    architecture: Architecture, kept: int, split: Mapping[str, Mapping[str, int]], profile: Profile
) -> float:
    bandwidth = {"ram": profile.ram.bandwidth_bytes_per_s}
    if profile.vram is not None:
        bandwidth["vram"] = profile.vram.bandwidth_bytes_per_s
    seconds = _SECONDS_PER_LAYER * architecture.layers
    for pool, rate in bandwidth.items():
        seconds += _read_per_token(architecture, kept, split[pool]) / (rate * _BANDWIDTH_SHARE)
    return 1.0 / seconds


def place(
    architecture: Architecture,
    kept: int,
    nbytes: Mapping[str, int],
    budget: Budget,
    profile: Profile,
    launch: Launch,
) -> Placement | None:
    """The fastest feasible placement of tensors with ``nbytes`` each, or None.

    On one pool there is nothing to choose. On a discrete GPU as much as possible goes to its memory:
    everything; else the experts of the first layers stay in host memory, as few layers as needed; else
    whole layers stay too.
    """
    ram, vram = budget.pools[0], budget.pool("vram")
    if vram is None:
        total = sum(nbytes.values())
        if total > ram.weights_bytes:
            return None
        settings = replace(launch, gpu_layers=ALL_LAYERS if profile.on_gpu else 0)
        split: dict[str, dict[str, int]] = {"ram": dict(nbytes), "vram": {}}
        used = sum(line.nbytes for line in ram.lines) + total
        speed = _decode_per_s(architecture, kept, split, profile)
        return Placement(settings, {"ram": used}, {"ram": total}, speed)
    options = [(ALL_LAYERS, experts) for experts in range(architecture.layers + 1)]
    options += [(layers, architecture.layers) for layers in range(architecture.layers - 1, -1, -1)]
    for gpu_layers, cpu_experts in options:
        split = _split(architecture, nbytes, gpu_layers, cpu_experts)
        host, device = sum(split["ram"].values()), sum(split["vram"].values())
        cache = next(line.nbytes for line in vram.lines if line.name == "KV cache")
        share = 1.0 if gpu_layers == ALL_LAYERS else gpu_layers / architecture.layers
        moved = int(cache * (1 - share))  # the cache of layers on the host is on the host
        if device <= vram.weights_bytes + moved and host + moved <= ram.weights_bytes:
            settings = replace(launch, gpu_layers=gpu_layers, cpu_experts=cpu_experts)
            lines = {pool.pool: sum(line.nbytes for line in pool.lines) for pool in budget.pools}
            used_bytes = {"ram": lines["ram"] + host + moved, "vram": lines["vram"] + device - moved}
            speed = _decode_per_s(architecture, kept, split, profile)
            return Placement(settings, used_bytes, {"ram": host, "vram": device}, speed)
    return None
