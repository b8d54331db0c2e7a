"""What llama.cpp needs beside the weights, asked of llama.cpp itself with a shadow GGUF.

A shadow has the real header and, instead of data, a hole of the right length: llama.cpp only checks that
tensors lie within the file, so that a 60 GB model is priced in a second without a byte of it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune.errors import EdgepruneError, UsageError
from edgeprune.files import room_for
from edgeprune.measure import child
from edgeprune.measure.launch import Launch
from edgeprune.model.architecture import Architecture
from edgeprune.model.headers import Holed
from edgeprune.model.layout import Layout

# What only a real decode touches: code pages of the kernels, stacks and work buffers of the threads.
# 5.4 to 6.0 MiB in all on x86-64 Linux for three models; the part that grows with the model is added.
_DECODE_BYTES = int(5.2 * 2**20)
_WORK_BYTES_PER_ACTIVATION = 34 / 32  # activations are quantised to Q8_0 blocks before a product


@dataclass(frozen=True)
class Needs:
    """Memory beside the weights, bytes.

    Attributes:
        kv_bytes: KV cache of the whole context.
        compute_bytes: compute and output buffers of the device that computes.
        host_compute_bytes: the same that the host keeps beside them when a GPU computes.
        runtime_bytes: the process without weights and buffers.
        backends: names of the backends that were priced.
    """

    kv_bytes: int
    compute_bytes: int
    host_compute_bytes: int
    runtime_bytes: int
    backends: tuple[str, ...]

    @property
    def all_bytes(self) -> int:
        return self.kv_bytes + self.compute_bytes + self.host_compute_bytes + self.runtime_bytes


def _decode_bytes(architecture: Architecture, launch: Launch) -> int:
    """Memory of the CPU backend during a micro-batch of T tokens that llama.cpp does not report.

    The expert product keeps T * k entries of 8 bytes for each expert, and its quantised inputs
    (ggml-cpu.c, ``ggml_compute_forward_mul_mat_id``).
    """
    tokens = min(launch.batch, launch.context)
    routing = 8 * architecture.experts * architecture.used * tokens
    widest = max(architecture.width, architecture.used * architecture.expert_width)
    return _DECODE_BYTES + routing + int(tokens * widest * _WORK_BYTES_PER_ACTIVATION)


def price(layout: Layout, launch: Launch, architecture: Architecture) -> Needs:
    """Memory needs of a file of ``layout`` started with ``launch``.

    Raises:
        UsageError: the context is longer than the model was trained for.
    """
    if 0 < architecture.context_length < launch.context:
        raise UsageError(
            f"a context of {launch.context} tokens is longer than the model's {architecture.context_length}",
            hint=f"`--context {architecture.context_length}` is the longest",
        )
    return price_each(layout, [launch], architecture)[0]


def price_each(layout: Layout, launches: Sequence[Launch], architecture: Architecture) -> list[Needs]:
    """Memory needs of a file of ``layout`` for each of ``launches``.

    Raises:
        EdgepruneError: llama.cpp refuses the file or one of them.
    """
    priced = _asked(Holed(layout.header, layout.nbytes), launches, architecture.name)
    return [_needs(own, launch, architecture) for own, launch in zip(priced, launches, strict=True)]


def _needs(priced: dict[str, Any], launch: Launch, architecture: Architecture) -> Needs:
    buffers = priced["buffers"]
    by_backend = {name: sizes.get("compute", 0) + sizes.get("output", 0) for name, sizes in buffers.items()}
    host = sum(count for name, count in by_backend.items() if _on_host(name))
    compute = sum(by_backend.values()) - host
    if not compute:  # no device beside the host
        compute, host = host, 0
    recurrent = sum(sizes.get("RS", 0) for sizes in buffers.values())
    runtime = priced["runtime_bytes"] + _decode_bytes(architecture, launch)
    return Needs(priced["kv_bytes"] + recurrent, compute, host, runtime, tuple(buffers))


def require_loadable(file: Holed, name: str) -> None:
    """Have llama.cpp look at a file without weights, as far as its header tells; unless the temporary folder takes no
    file of that length, which says nothing of this one.

    Args:
        name: what it is called in messages.

    Raises:
        BadFile: it refuses the file; the rows say why.
        NativeCrash: it aborts on it.
    """
    if takes_shadows(file.nbytes):
        _asked(file, [Launch()], name)


def takes_shadows(nbytes: int) -> bool:
    """Whether the temporary folder takes files of that length, all of them a hole."""
    with tempfile.TemporaryFile(prefix="edgeprune-") as trial:
        try:
            trial.truncate(nbytes)
        except OSError:
            return False
    return True


def _asked(file: Holed, launches: Sequence[Launch], name: str) -> list[dict[str, Any]]:
    """What llama.cpp says of a shadow for each launch; see ``benchmark.price``."""
    with tempfile.TemporaryDirectory(prefix="edgeprune-") as folder:
        shadow = Path(folder) / "shadow.gguf"
        with room_for(shadow), shadow.open("wb") as stream:
            stream.write(file.top)
            stream.truncate(file.nbytes)
        try:
            arguments = {"shadow": str(shadow), "launches": [launch.to_json() for launch in launches]}
            priced: list[dict[str, Any]] = child.call("edgeprune.measure.benchmark:price_each", arguments)
        except EdgepruneError as error:
            cause = error.cause.replace(str(shadow), name)
            raise type(error)(cause, rows=error.rows, hint=error.hint) from error
    return priced


def _on_host(backend: str) -> bool:
    """Whether a buffer of this name is in host memory: the CPU's own, or one that a GPU's driver pins there."""
    return backend.startswith("CPU") or backend.endswith("_Host")
