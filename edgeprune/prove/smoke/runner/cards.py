"""Graphics cards, as llama.cpp's library tells of them."""

from __future__ import annotations

import ctypes
from typing import Any

_GPU = 1  # enum ggml_backend_dev_type; integrated ones use the memory of the system


def free_on_gpus(library: Any) -> dict[str, int]:
    """Free memory in bytes of every graphics card that llama.cpp sees, by name; empty where it cannot tell."""
    found: dict[str, int] = {}
    try:
        count, get, kind = (getattr(library, f"ggml_backend_dev_{name}") for name in ("count", "get", "type"))
        name, memory = library.ggml_backend_dev_name, library.ggml_backend_dev_memory
    except AttributeError:
        return found
    count.restype, get.restype, get.argtypes = ctypes.c_size_t, ctypes.c_void_p, [ctypes.c_size_t]
    kind.argtypes, name.restype, name.argtypes = [ctypes.c_void_p], ctypes.c_char_p, [ctypes.c_void_p]
    memory.argtypes = [ctypes.c_void_p, ctypes.POINTER(ctypes.c_size_t), ctypes.POINTER(ctypes.c_size_t)]
    for index in range(count()):
        device = get(index)
        if kind(device) == _GPU:
            free, total = ctypes.c_size_t(), ctypes.c_size_t()
            memory(device, ctypes.byref(free), ctypes.byref(total))
            found[name(device).decode()] = free.value
    return found


def taken(before: dict[str, int], now: dict[str, int]) -> int | None:
    """Bytes by which the free memory of the devices fell together; None without devices."""
    return sum(max(0, free - now.get(name, free)) for name, free in before.items()) if before else None


class _BufferOverride(ctypes.Structure):
    """``struct llama_model_tensor_buft_override``: where tensors matching a pattern are kept."""

    _fields_ = (("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p))


def expert_override(binding: Any, layers: int) -> ctypes.Array[_BufferOverride]:
    """Overrides that keep the experts of blocks 0 to ``layers`` - 1 in host memory."""
    host = binding._lib.ggml_backend_cpu_buffer_type
    host.restype = ctypes.c_void_p
    patterns = [rf"blk\.{layer}\.ffn_(up|down|gate|gate_up)_(ch|)exps".encode() for layer in range(layers)]
    return (_BufferOverride * (layers + 1))(*[_BufferOverride(pattern, host()) for pattern in patterns])
