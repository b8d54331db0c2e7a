"""How llama.cpp is started: one set of settings for measuring, for the plan and for the user."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Launch:
    """How llama.cpp is started, for measuring and for the user alike.

    Attributes:
        context: tokens of KV cache.
        kv_type: GGML type of the K and V cache.
        gpu_layers: layers on the GPU, counted from the last; -1 means all.
        cpu_experts: number of first layers whose experts stay in host memory.
        threads: worker threads; 0 means one per core.
        batch: tokens per micro-batch (n_ubatch).
        mmap: map the file; otherwise it is read into memory.
        repack: copy weights into the layout that suits the CPU, which doubles their memory under mmap.
    """

    context: int = 512
    kv_type: str = "F16"
    gpu_layers: int = 0
    cpu_experts: int = 0
    threads: int = 0
    batch: int = 512
    mmap: bool = True
    repack: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def command(self, path: str) -> str:
        """The ``llama-server`` line with these settings."""
        words = ["llama-server", "-m", shlex.quote(path), "-c", str(self.context)]
        if self.kv_type != "F16":
            words += ["-ctk", self.kv_type.lower(), "-ctv", self.kv_type.lower(), "-fa", "on"]
        # Printed for 0 too: llama-server moves layers to a GPU by itself when nothing is said.
        words += ["-ngl", "all" if self.gpu_layers < 0 else str(self.gpu_layers)]
        if self.cpu_experts:
            words += ["--n-cpu-moe", str(self.cpu_experts)]
        if self.threads:
            words += ["-t", str(self.threads)]
        if not self.repack:
            words.append("--no-repack")
        if self.gpu_layers:  # as the plan counts it; without it the model is spread over all cards
            words += ["-sm", "none"]
        # The server keeps earlier prompts and checkpoints in host memory, up to 8 GiB, unless told not to; the plan
        # promises a peak.
        return " ".join([*words, "-np", "1", "--cache-ram", "0", "--ctx-checkpoints", "0"])
