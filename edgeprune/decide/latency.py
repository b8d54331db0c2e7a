"""How fast a plan will be where its products were measured: the sum over what a token meets on its way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from edgeprune.measure.rates import KernelRates
from edgeprune.model import ggml
from edgeprune.model.architecture import Architecture, Tensor

_CACHE_TYPE = "F16"  # of the cache, as a prompt's tokens are multiplied with it


@dataclass(frozen=True)
class Speed:
    """Tokens per second: of a prompt, and of an answer after it."""

    prefill_per_s: float
    decode_per_s: float


def _work(architecture: Architecture, tensor: Tensor, kept: int, width: int) -> float:
    """Weights of ``tensor`` that one token is multiplied with."""
    weights = prod(tensor.kept_shape(kept, width))
    if tensor.is_expert:
        return weights * architecture.used / kept
    tied = not any(other.role == "output" for other in architecture.tensors)
    is_product = len(tensor.shape) > 1 and (tensor.role != "embedding" or tied)
    return float(weights) if is_product else 0.0


def _attention(architecture: Architecture, depth: float) -> float:
    """Products with the cache of one token at ``depth``: its queries with the keys, their weights with the values.

    As wide as what the output matrix of the attention takes in; layers without one have no such cache.
    """
    widths = [tensor.shape[0] for tensor in architecture.tensors if tensor.name.endswith("attn_output.weight")]
    return 2 * depth * sum(widths)


def speed(
    architecture: Architecture,
    kept: int,
    types: Mapping[str, str],
    rates: KernelRates,
    *,
    prompt_tokens: int,
    threads: int,
    bandwidth: float,
    width: int = 0,
) -> Speed | None:
    """Speed with ``kept`` experts in ``types``; None where a type was not measured.

    Args:
        types: GGML type by tensor, for those that have another than their own.
        prompt_tokens: length of the prompt, and depth at which decoding begins.
        threads: that share the products.
        bandwidth: of the memory, bytes per second, which they share, too.
        width: channels of every expert, or 0 for all.
    """
    works = {tensor.name: _work(architecture, tensor, kept, width) for tensor in architecture.tensors}
    met = [tensor for tensor in architecture.tensors if works[tensor.name]]
    nbytes = sum(_nbytes(tensor, kept, types, width) for tensor in met)
    token_bytes = sum(works[tensor.name] * _bytes_per_weight(tensor, types) for tensor in met)
    # A dense matrix is met again after all that one token meets, an expert after about all of the file.
    dense_fetch, expert_fetch = (rates.stream(int(size)) - rates.stream(0) for size in (token_bytes, nbytes))
    least = 1 / bandwidth if threads > 1 and nbytes >= rates.streams[-1][0] else 0.0
    decode = _attention(architecture, prompt_tokens) * rates.cache / threads
    prefill = _attention(architecture, prompt_tokens / 2) * rates.dense_batch[_CACHE_TYPE] / threads
    for tensor in met:
        work, kind = works[tensor.name], types.get(tensor.name, tensor.type)
        one, many = (rates.experts, rates.experts_batch) if tensor.is_expert else (rates.dense, rates.dense_batch)
        if kind not in one or kind not in many:
            return None
        row = tensor.kept_shape(kept, width)[0]
        bytes_per_weight = _bytes_per_weight(tensor, types)
        fetching = expert_fetch if tensor.is_expert else dense_fetch
        # Products were measured with weights in the nearest cache; fetching them from further off comes on top, and
        # threads together are not faster than the memory with what no cache holds.
        alone = one[kind] + bytes_per_weight * fetching + rates.rows[0] / row
        decode += work * max(alone / threads, bytes_per_weight * least)
        # Only the last token of a prompt has logits.
        together = many[kind] + rates.rows[1] / row
        prefill += work * together / threads / (prompt_tokens if tensor.role in ("output", "embedding") else 1)
    decode += _besides(architecture, rates.besides)
    prefill += _besides(architecture, rates.besides_batch)
    return Speed(1 / prefill, 1 / decode)


def _bytes_per_weight(tensor: Tensor, types: Mapping[str, str]) -> float:
    return ggml.BY_NAME[types.get(tensor.name, tensor.type)].bits_per_weight / 8


def _nbytes(tensor: Tensor, kept: int, types: Mapping[str, str], width: int) -> int:
    return ggml.tensor_bytes(types.get(tensor.name, tensor.type), tensor.kept_shape(kept, width))


def _besides(architecture: Architecture, seconds: tuple[float, float, float]) -> float:
    """What llama.cpp takes for a token beside its products, from ``KernelRates.besides``."""
    fixed, layer, element = seconds
    return fixed + architecture.layers * (layer + element * architecture.width)
