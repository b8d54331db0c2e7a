"""What a file costs to run, in a child process that imports little beside llama.cpp: its memory counts, too."""

from __future__ import annotations

import re
import statistics as stdlib_statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.measure.child import peak_memory_bytes
from edgeprune.measure.launch import Launch
from edgeprune.measure.llama import Session, backend_devices, buffer_sizes, build_of_llama, session
from edgeprune.measure.meanwhile import Meanwhile

_FILL_SECONDS = 20.0


def price(shadow: str, launch: dict[str, Any]) -> dict[str, Any]:
    """What llama.cpp would allocate beside the weights, without loading any.

    Args:
        shadow: a GGUF whose header is real and whose data need not be.

    Returns:
        ``buffers``: bytes by backend and kind; ``kv_bytes``: of the whole cache; ``runtime_bytes``: peak
        memory of this process, which holds the libraries and the vocabulary but no weights.
    """
    with session(Path(shadow), Launch(**launch), no_alloc=True, single_output=True) as opened:
        lines = opened.log.lines
        return {
            "buffers": buffer_sizes(lines),
            "kv_bytes": _cache_bytes(lines),
            "runtime_bytes": peak_memory_bytes(),
        }


def price_each(shadow: str, launches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """``price`` for several launches, one after the other."""
    return [price(shadow, launch) for launch in launches]


_CACHE_LINE = re.compile(r"llama_kv_cache\S*: size =\s*([0-9.]+) MiB")


def _cache_bytes(lines: list[str]) -> int:
    """Bytes of the KV cache from the ``size = ... MiB`` lines; sliding-window models print two."""
    sizes = (float(match[1]) for line in lines if (match := _CACHE_LINE.match(line)))
    return int(sum(sizes) * 2**20)


def benchmark(
    model: str,
    launch: dict[str, Any],
    prompt_tokens: int,
    generated_tokens: int,
    repeats: int = 3,
    processor_time: bool = False,
) -> dict[str, Any]:
    """Speed and peak memory with the plan's own launch settings.

    The prompt is deterministic and spread over the vocabulary, so that many experts take part.

    Args:
        processor_time: count what this thread used instead of what passed, which says nothing with several threads
            but is undisturbed by other programs with one.

    Returns:
        prefill and decode tokens per second (medians over ``repeats``; ``best``: of them), the first token's delay in
        seconds, peak memory in bytes with as much of the context filled as 20 seconds allow; ``device_bytes``: what
        was then taken of the memory of graphics cards; ``others``: the share of all cores that other programs used
        meanwhile, or None after too short a time; ``ggml``: its version; ``processors``: what llama.cpp computes
        with here.
    """
    settings, clock = Launch(**launch), time.thread_time if processor_time else time.perf_counter
    prefill, decode, finite = [], [], True
    before = _free_on_devices()
    with session(Path(model), settings, single_output=True) as opened:
        meanwhile = Meanwhile()
        random = np.random.default_rng(0)
        prompt = random.integers(0, opened.vocabulary_size, prompt_tokens).tolist()
        batch = min(settings.batch, settings.context)
        for _ in range(repeats):
            started = clock()
            logits = _fill(opened, prompt, batch).copy()
            prefill.append(prompt_tokens / (clock() - started))
            token = int(logits[-1].argmax())
            started = clock()
            for step in range(generated_tokens):
                token = int(opened.extend([token], prompt_tokens + step, all_logits=False)[-1].argmax())
            decode.append(generated_tokens / (clock() - started))
            finite = finite and bool(np.isfinite(logits).all())
        filled = _fill_context(opened, random, batch)
        others = meanwhile.others()
        taken = sum(max(0, before[name] - free) for name, free in _free_on_devices().items())
    return {
        "prefill_per_s": stdlib_statistics.median(prefill),
        "decode_per_s": stdlib_statistics.median(decode),
        "best": {"prefill_per_s": max(prefill), "decode_per_s": max(decode)},
        "prompt_tokens": prompt_tokens,
        "context": settings.context,
        "first_token_seconds": prompt_tokens / stdlib_statistics.median(prefill),
        "peak_bytes": peak_memory_bytes(),
        "device_bytes": taken,
        "filled_tokens": filled,
        "finite": finite,
        "others": others,
        "ggml": build_of_llama(),
        "processors": [f"{device['name']}: {device['description']}" for device in backend_devices()],
    }


def _free_on_devices() -> dict[str, int]:
    """Free memory in bytes of every discrete GPU that llama.cpp sees."""
    return {device["name"]: device["free_bytes"] for device in backend_devices() if device["kind"] == "gpu"}


def _fill(opened: Session, prompt: list[int], batch: int) -> Any:
    """Decode ``prompt`` from an empty cache; logits of its last token."""
    opened.clear()
    logits = None
    for start in range(0, len(prompt), batch):
        logits = opened.extend(prompt[start : start + batch], start, all_logits=False)
    return logits


def _fill_context(opened: Session, random: np.random.Generator, batch: int) -> int:
    """Fill the context from its beginning, in full batches, because memory is at its peak at the end.

    Stops after ``_FILL_SECONDS``; returns how many tokens the context then holds.
    """
    opened.clear()
    deadline, start = time.monotonic() + _FILL_SECONDS, 0
    while start < opened.launch.context and time.monotonic() < deadline:
        count = min(batch, opened.launch.context - start)
        opened.extend(random.integers(0, opened.vocabulary_size, count).tolist(), start, all_logits=False)
        start += count
    return start
