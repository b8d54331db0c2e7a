"""What llama.cpp needs beside the weights, asked of llama.cpp itself with a shadow GGUF.

A shadow has the real header and, instead of data, a hole of the right length: llama.cpp only checks that
tensors lie within the file, so that a 60 GB model is priced in a second without a byte of it.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from edgeprune.errors import UsageError
from edgeprune.measure import child
from edgeprune.measure.launch import Launch
from edgeprune.model.architecture import Architecture
from edgeprune.model.layout import Layout


@dataclass(frozen=True)
class Needs:
    """Memory beside the weights, bytes.

    Attributes:
        kv_bytes: KV cache of the whole context.
        compute_bytes: compute and output buffers over all backends.
        runtime_bytes: the process without weights and buffers.
        backends: names of the backends that were priced.
    """

    kv_bytes: int
    compute_bytes: int
    runtime_bytes: int
    backends: tuple[str, ...]


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
    with tempfile.TemporaryDirectory(prefix="edgeprune-") as folder:
        shadow = Path(folder) / "shadow.gguf"
        with shadow.open("wb") as stream:
            stream.write(layout.header)
            stream.truncate(layout.nbytes)
        priced = child.call("edgeprune.measure.tasks:price", {"shadow": str(shadow), "launch": launch.to_json()})
    buffers = priced["buffers"]
    compute = sum(sizes.get("compute", 0) + sizes.get("output", 0) for sizes in buffers.values())
    recurrent = sum(sizes.get("RS", 0) for sizes in buffers.values())
    return Needs(priced["kv_bytes"] + recurrent, compute, priced["runtime_bytes"], tuple(buffers))
