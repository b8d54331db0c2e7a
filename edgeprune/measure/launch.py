"""How llama.cpp is started: one set of settings for measuring, for the plan and for the user."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from edgeprune.errors import BadFile
from edgeprune.files import check_keys, checked_int
from edgeprune.model.architecture import MOST_LAYERS

# Types that llama.cpp can store the K and V cache in (common/arg.cpp).
KV_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q5_0", "Q5_1", "Q4_0", "Q4_1", "IQ4_NL")
# Smallest and largest value of each number; beyond them no model and no machine exists.
_RANGES = {
    "context": (1, 1 << 27),
    "gpu_layers": (-1, MOST_LAYERS + 1),  # the output counts as a layer
    "cpu_experts": (0, MOST_LAYERS + 1),
    "threads": (0, 4096),
    "batch": (1, 1 << 20),
}
_SWITCHES = ("mmap", "repack")


# How speed is measured, and predicted: after a prompt of so many tokens, over so many more.
_PROMPT, _GENERATED = 512, 48


def generated_tokens(context: int) -> int:
    """Tokens that are generated to measure speed in a context of ``context`` tokens."""
    return min(_GENERATED, max(1, context // 8))


def prompt_tokens(context: int) -> int:
    """Tokens of the prompt before them."""
    return max(1, min(_PROMPT, context - generated_tokens(context) - 1))


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

    @classmethod
    def from_json(cls, value: Mapping[str, Any], where: str) -> Launch:
        """The settings in ``value``, which a stranger may have written: they end up in a line for a shell.

        Raises:
            BadFile: an unknown key, or a value of another kind or beyond all sense.
        """
        check_keys(where, value, set(), {*_RANGES, *_SWITCHES, "kv_type"})
        for key in value.keys() & _RANGES.keys():
            checked_int(f"{where}: {key}", value[key], *_RANGES[key])
        for key in _SWITCHES:
            if not isinstance(value.get(key, False), bool):
                raise BadFile(f"{where}: {key} = {str(value[key])[:40]!r} is neither true nor false")
        kv_type = str(value.get("kv_type", cls.kv_type)).upper()
        if kv_type not in KV_TYPES:
            raise BadFile(
                f"{where}: kv_type = {kv_type[:40]!r} is no type of the KV cache",
                hint=f"known: {', '.join(KV_TYPES)}",
            )
        return cls(**{**value, "kv_type": kv_type})

    def command(self, path: str, repository: str = "") -> str:
        """The ``llama-server`` line with these settings for a file, or for that of a ``repository`` on the Hub."""
        file = ["-hf", shlex.quote(repository), "-hff"] if repository else ["-m"]
        words = ["llama-server", *file, shlex.quote(path), "-c", str(self.context)]
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
