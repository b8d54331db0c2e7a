"""The command lines of llama.cpp's own programs, with what only the device knows left open."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import replace

from edgeprune.measure.launch import Launch


def server_words(launch: Launch, path: str) -> list[str]:
    """Arguments of a ``llama-server`` for the file at ``path``; ``{threads}`` and ``{port}`` stay open."""
    words = shlex.split(replace(launch, threads=0).command(path))[1:]
    return [*words, "-t", "{threads}", "-ub", _batch(launch), "--host", "127.0.0.1", "--port", "{port}"]


def bench_words(launch: Launch, path: str, speed: Mapping[str, int], *, alone: bool) -> dict[str, list[str]]:
    """Arguments of the runs of a ``llama-bench``, by name; ``{threads}`` stays open.

    Args:
        speed: ``prompt_tokens``, ``generated_tokens`` and ``repeats``.
        alone: whether it has to fill the context, too, because nobody else does.
    """
    common = ["-m", path, "-t", "{threads}", "-b", _batch(launch), "-ub", _batch(launch)]
    common += ["-ngl", str(launch.gpu_layers) if launch.gpu_layers >= 0 else "999"]
    if launch.kv_type != "F16":
        common += ["-ctk", launch.kv_type.lower(), "-ctv", launch.kv_type.lower(), "-fa", "1"]
    if launch.cpu_experts:
        common += ["--n-cpu-moe", str(launch.cpu_experts)]
    if launch.gpu_layers:
        common += ["-sm", "none"]
    if not launch.repack:
        common += ["--repack", "0"]
    common += ["-o", "jsonl", "--progress"]
    prompt, repeats = str(speed["prompt_tokens"]), ["-r", str(speed["repeats"])]
    runs = {
        "prefill": [*common, "-p", prompt, "-n", "0", *repeats],
        # Behind the prompt, where the other engines measure it.
        "decode": [*common, "-p", "0", "-n", str(speed["generated_tokens"]), "-d", prompt, *repeats],
    }
    if alone:
        runs["context"] = [*common, "-p", str(launch.context), "-n", "0", "-r", "1", "--no-warmup"]
    return runs


def _batch(launch: Launch) -> str:
    return str(min(launch.batch, launch.context))
