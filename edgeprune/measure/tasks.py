"""The measurements as tasks for a child process: pure functions of files and numbers.

Every function here runs in a child (``edgeprune.measure.child.call``) and returns JSON-like values.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import statistics as stdlib_statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgeprune.errors import BadFile, NotFinite
from edgeprune.files import digest, require_space, room_for
from edgeprune.measure.channels import Channels
from edgeprune.measure.child import peak_memory_bytes
from edgeprune.measure.divergence import Quality, Reference, TokenScores, summarise
from edgeprune.measure.documents import Document
from edgeprune.measure.launch import Launch
from edgeprune.measure.llama import EvalCallback, Session, backend_devices, buffer_sizes, build_of_llama, session
from edgeprune.measure.meanwhile import Meanwhile
from edgeprune.measure.observers import ChannelMask, Disturbance, Masks, RouterMask
from edgeprune.measure.statistics import Statistics
from edgeprune.measure.text import LeftOut, TextFile, Window, windows
from edgeprune.model.gguf import GgufFile
from edgeprune.model.soundness import first_not_finite

if TYPE_CHECKING:
    from edgeprune.measure.collector import Collector

Progress = Callable[[int, int], None]
_FILL_SECONDS = 20.0
# A shard is what a killed pass loses at most; but every one of them is as large on the disk as all statistics.
_SHARD_TOKENS, _MOST_SHARDS = 1 << 13, 16


def _texts(rows: list[dict[str, str]]) -> list[TextFile]:
    return [TextFile(**row) for row in rows]


def _launch(window: int, threads: int) -> Launch:
    return Launch(context=window, batch=window, threads=threads)


def chosen_windows(
    opened: Session,
    texts: list[dict[str, str]],
    split: str,
    window: int,
    most: int,
    left_out: dict[str, LeftOut] | None = None,
) -> list[Window]:
    """The windows of ``split``, in the model's tokens; ``left_out`` as for ``text.windows``."""

    def ids(document: Document) -> Sequence[int]:
        return document.tokens or opened.tokenize(document.text, special=document.special)

    return windows(_texts(texts), split, window, most, ids, left_out)


def _calibration(
    opened: Session, texts: list[dict[str, str]], window: int, most: int
) -> tuple[list[list[Window]], dict[str, Any]]:
    """Shards of the calibration text, and what is to be said of the text: see ``collect``."""
    short: dict[str, LeftOut] = {}
    shards = _shards(chosen_windows(opened, texts, "calibration", window, most, short))
    held_out = True
    if any(text["split"] == "shared" for text in texts):
        try:
            chosen_windows(opened, texts, "held_out", window, window)
        except BadFile:
            held_out = False
    left_out = {name: [own.documents, own.of, own.tokens] for name, own in short.items() if own.documents}
    return shards, {"held_out": held_out, "left_out": left_out}


def collect(
    model: str,
    output: str,
    scratch: str,
    texts: list[dict[str, str]],
    window: int,
    most_tokens: int,
    weights: list[str],
    experts: int,
    arch: str,
    made_from: dict[str, Any],
    reservoir_tokens: int = 0,
    layers: list[int] | None = None,
    tokens_only: bool = False,
    beside: list[dict[str, str]] | None = None,
    threads: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """One pass over the calibration text; writes ``Statistics`` to ``output``.

    The text is worked off in shards, each a part of one domain, whose statistics are kept in the folder
    ``scratch`` until all are there: a killed pass goes on after the last finished one.

    Args:
        reservoir_tokens: how many tokens are kept whole, spread at random over the text.
        layers: first layer and the one after the last that are looked at, instead of all; the model is not
            computed further.
        tokens_only: the sums are not wanted, only tokens and the moments of ``weights``.
        beside: other texts, of which ``most_tokens`` are read after those of ``texts``.

    Returns:
        tokens seen and peak memory in bytes; ``left_out``: by domain, how many documents were too short, of how many,
        and their tokens; ``held_out``: whether the text leaves any to be held out.
    """
    # Here, because what these import would count as memory of the other tasks, which are to show llama.cpp's.
    from edgeprune.measure.arena import Arena
    from edgeprune.measure.collector import Collector
    from edgeprune.measure.merging import merge

    folder, names = Path(scratch), frozenset(weights)
    folder.mkdir(parents=True, exist_ok=True)
    observer = Switch()
    with room_for(Path(output)), session(Path(model), _launch(window, threads), observer) as opened:
        shards, found = _calibration(opened, texts, window, most_tokens)
        shards += _calibration(opened, beside, window, most_tokens)[0] if beside else []
        kept = _kept_positions([part for shard in shards for part in shard], reservoir_tokens)
        total, done = sum(map(len, shards)), 0
        paths: list[Path] = []
        for index, shard in enumerate(shards):
            path = folder / f"statistics-{digest(made_from)[:16]}-{index:04d}.safetensors"
            own = kept[done : done + len(shard)]
            paths.append(path)
            if not _is_statistics(path):
                arena = Arena(folder)
                collector = Collector(
                    experts,
                    arena,
                    gates_input=arch == "llama4",
                    capacity=sum(map(len, own)) if reservoir_tokens else None,
                    weights=names,
                    only=None if layers is None else range(*layers),
                    tokens_only=tokens_only,
                )
                observer.current = collector
                for part, positions in zip(shard, own, strict=True):
                    collector.kept = positions
                    logits = opened.run(part.tokens)
                    if layers is None:
                        finite(model, logits)
                    collector.end_window()
                    done += 1
                    if progress is not None:
                        progress(done, total)
                _saved(collector, shard, window, made_from, path)
            else:
                done += len(shard)
    merge(paths, Path(output), made_from)
    for path in paths:
        path.unlink()
    tokens = sum(len(part.tokens) for shard in shards for part in shard)
    return {"tokens": tokens, "peak_bytes": peak_memory_bytes(), **found}


def collect_layerwise(
    model: str,
    checkpoint: str,
    output: str,
    scratch: str,
    texts: list[dict[str, str]],
    window: int,
    most_tokens: int,
    weights: list[str],
    experts: int,
    made_from: dict[str, Any],
    reservoir_tokens: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The same over the checkpoint that ``model`` was converted from, run by torch, with gradients.

    The windows and the kept tokens are those of ``collect``; of ``model`` only the tokenizer is used.
    """
    from edgeprune.measure.layerwise.engine import Text, measure

    opened = Session(Path(model), Launch(), vocab_only=True)
    with contextlib.closing(opened):
        shards, found = _calibration(opened, texts, window, most_tokens)
    parts = [part for shard in shards for part in shard]
    text = Text(parts, _kept_positions(parts, reservoir_tokens))
    measure(
        Path(checkpoint), text, Path(output), Path(scratch), weights, experts, window, made_from, progress=progress
    )
    return found


def _shards(chosen: list[Window]) -> list[list[Window]]:
    """The windows of each domain, in runs of at most ``_SHARD_TOKENS`` tokens or one window; of long texts in longer
    runs, so that there are no more than about ``_MOST_SHARDS``."""
    most = max(_SHARD_TOKENS, sum(len(part.tokens) for part in chosen) // _MOST_SHARDS)
    by_domain: dict[str, list[Window]] = {}
    for part in chosen:
        by_domain.setdefault(part.domain, []).append(part)
    shards: list[list[Window]] = []
    for own in by_domain.values():
        tokens = most
        for part in own:
            if tokens + len(part.tokens) > most:
                shards.append([])
                tokens = 0
            shards[-1].append(part)
            tokens += len(part.tokens)
    return shards


def _kept_positions(chosen: list[Window], most: int) -> list[npt.NDArray[np.intp]]:
    """Which positions of each window go into the reservoir: ``most`` of all tokens, equally likely."""
    bounds = np.cumsum([0, *(len(part.tokens) for part in chosen)])
    picked = np.random.default_rng(0).choice(bounds[-1], min(most, int(bounds[-1])), replace=False)
    picked.sort()
    return [picked[(picked >= a) & (picked < b)] - a for a, b in itertools.pairwise(bounds)]


def _is_statistics(path: Path) -> bool:
    with contextlib.suppress(BadFile):
        Statistics.load(path)
        return True
    return False


def _saved(collector: Collector, shard: list[Window], window: int, made_from: dict[str, Any], path: Path) -> None:
    tokens, moments = sum(len(part.tokens) for part in shard), collector.moments
    layers, reservoirs = collector.layers(), collector.reservoirs()
    Statistics([shard[0].domain], tokens, window, layers, moments, made_from, reservoirs).save(path)


def finite(model: str, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """``logits`` of a window, of which the last row has seen every token.

    Raises:
        NotFinite: they are not; names the tensor that is to blame, if one can be found.
    """
    if np.isfinite(logits[-1]).all():
        return logits
    blamed = first_not_finite(GgufFile(Path(model)))
    raise NotFinite(
        f"{model} computes values that are not finite",
        rows=[("holds NaN or infinity", blamed)] if blamed else [],
        hint="the file is damaged, or overflowed when it was made; get it again",
    )


def reference(
    model: str,
    output: str,
    texts: list[dict[str, str]],
    split: str,
    window: int,
    most_tokens: int,
    threads: int = 0,
    progress: Progress | None = None,
) -> dict[str, int]:
    """Log-probabilities of ``model`` over the ``split`` of the text, for later comparisons."""
    partial = Path(output + ".partial")
    partial.unlink(missing_ok=True)
    with room_for(Path(output)), session(Path(model), _launch(window, threads)) as opened:
        chosen = chosen_windows(opened, texts, split, window, most_tokens)
        kept = Reference(partial, opened.vocabulary_size)
        require_space(partial.parent, kept.nbytes(part.tokens for part in chosen))
        for index, part in enumerate(chosen):
            kept.append(finite(model, opened.run(part.tokens)))
            if progress is not None:
                progress(index + 1, len(chosen))
    partial.replace(output)
    return {"tokens": sum(len(part.tokens) for part in chosen), "windows": len(chosen)}


def compared(
    opened: Session, chosen: list[Window], kept: Reference, progress: Progress | None
) -> Iterator[TokenScores]:
    """Scores of every one of the ``chosen`` windows against what is ``kept`` of them."""
    kept.rewind()
    for index, part in enumerate(chosen):
        yield kept.compare(opened.run(part.tokens), part.tokens)
        if progress is not None:
            progress(index + 1, len(chosen))


def divergence(
    model: str,
    reference: str,
    texts: list[dict[str, str]],
    split: str,
    window: int,
    most_tokens: int,
    masks: list[dict[str, list[int]] | None],
    experts: int = 0,
    narrowed: list[dict[str, Any] | None] | None = None,
    threads: int = 0,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Quality of ``model`` against the stored reference, once for each router mask.

    Args:
        masks: each None, or kept expert ids by layer (as text, JSON has no integer keys).
        narrowed: beside each mask None, or ``{"width": kept channels of every expert, "channels": file with their
            order}``.

    Returns:
        for each mask ``{"all": Quality, "domains": {name: Quality}, "windows": [[tokens, nats], ...], "undivided":
        [domains that are in both halves of the held-out text]}`` as JSON.
    """
    results = []
    observer = Switch()
    with session(Path(model), _launch(window, threads), observer) as opened:
        chosen = chosen_windows(opened, texts, split, window, most_tokens)
        kept = Reference(Path(reference), opened.vocabulary_size)
        for number, mask in enumerate(masks):
            current = _masks(mask, experts, narrowed[number] if narrowed else None)
            observer.current = current
            report = _scaled(progress, number, len(masks))
            scores = list(compared(opened, chosen, kept, report))
            current.check()
            results.append(_by_domain(scores, chosen))
    return results


def _masks(mask: dict[str, list[int]] | None, experts: int, narrowed: dict[str, Any] | None) -> Masks:
    """Observers that take out what is not in ``mask`` and ``narrowed``, as for ``divergence``."""
    found: list[RouterMask | ChannelMask] = []
    if mask:
        found.append(RouterMask({int(layer): ids for layer, ids in mask.items()}, experts))
    if narrowed:
        found.append(ChannelMask(Channels.load(Path(narrowed["channels"])), narrowed["width"]))
    return Masks(found)


def _by_domain(scores: list[TokenScores], chosen: list[Window]) -> dict[str, Any]:
    domains: dict[str, list[TokenScores]] = {}
    for score, part in zip(scores, chosen, strict=True):
        domains.setdefault(part.domain, []).append(score)
    return {
        "all": summarise(scores).to_json(),
        "domains": {name: summarise(own).to_json() for name, own in domains.items()},
        "windows": [[len(score.divergence), float(score.divergence.sum(dtype=np.float64))] for score in scores],
        "undivided": sorted({part.domain for part in chosen if part.undivided}),
    }


class Switch:
    """An observer whose behaviour can be exchanged between passes of one session."""

    def __init__(self) -> None:
        self.current: EvalCallback | None = None

    def __call__(self, node: Any, ask: bool) -> bool:
        return self.current is not None and self.current(node, ask)


def _scaled(progress: Progress | None, number: int, count: int) -> Progress | None:
    if progress is None:
        return None
    return lambda done, total: progress(number * total + done, count * total)


def disturb(
    model: str,
    reference: str,
    texts: list[dict[str, str]],
    split: str,
    window: int,
    most_tokens: int,
    sites: list[dict[str, Any]],
    threads: int = 0,
    progress: Progress | None = None,
) -> list[float | None]:
    """Mean KL divergence in nats per token, for noise at each of ``sites`` in turn; None where the graph
    has no such product.

    Args:
        sites: each ``{"weight": name, "lookup": bool, "relative_square": size of the error}``.
    """
    results = []
    observer = Switch()
    with session(Path(model), _launch(window, threads), observer) as opened:
        chosen = chosen_windows(opened, texts, split, window, most_tokens)
        kept = Reference(Path(reference), opened.vocabulary_size)
        for number, site in enumerate(sites):
            disturbance = Disturbance(
                site["weight"],
                lookup=site["lookup"],
                relative_square=site["relative_square"],
                seed=number,
            )
            observer.current = disturbance
            quality: Quality = summarise(list(compared(opened, chosen, kept, None)))
            results.append(quality.kl_mean if disturbance.touched else None)
            if progress is not None:
                progress(number + 1, len(sites))
    return results


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


def tokenize(model: str, texts: list[str], special: bool = False) -> list[list[int]]:
    """llama.cpp's token ids of each text, from the vocabulary alone; ``special``: framed, special tokens parsed."""
    opened = Session(Path(model), Launch(), vocab_only=True)
    with contextlib.closing(opened):
        return [opened.tokenize(text, framed=special, special=special) for text in texts]
