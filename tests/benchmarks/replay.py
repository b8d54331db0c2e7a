"""Replay elimination of one layer at full size: seconds and peak memory.

    python tests/benchmarks/replay.py [--tokens 8192] [--experts 128] [--repeats 3]

The layer has the extents of Qwen3-30B-A3B's (k = 8, width 2048, expert width 768, BF16) and random weights, the
reservoir random tokens and what the layer makes of them. Needs 2 GB of disk in the temporary folder. Ranks in a
process of its own, whose peak memory includes everything: interpreter, mapped pages of the files, tokens.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import synthetic

Floats = npt.NDArray[np.float32]


def weights(shape: Any, seed: int) -> npt.NDArray[Any]:
    """A tensor as it stands in the file: BF16 where it is a matrix, F32 else."""
    random = np.random.default_rng(seed)
    count = int(np.prod(shape.shape))
    values = random.standard_normal(count, np.float32) / np.float32(shape.shape[0] ** 0.5)
    return values if shape.type == "F32" else (values.view(np.uint32) >> 16).astype(np.uint16)


def written(path: Path, size: synthetic.Size) -> None:
    """The one-layer model with random weights."""
    from edgeprune.model.gguf import DEFAULT_ALIGNMENT, align, header

    shapes = synthetic.tensors(size)
    with path.open("wb") as stream:
        stream.write(header(synthetic.metadata(size), shapes, DEFAULT_ALIGNMENT))
        for seed, shape in enumerate(shapes):
            stream.write(weights(shape, seed).data)
            stream.write(bytes(align(shape.nbytes, DEFAULT_ALIGNMENT) - shape.nbytes))


def output(path: Path, x: Floats, ids: npt.NDArray[Any], gates: Floats) -> Floats:
    """What the layer answers to ``x``, float32 [R, D]."""
    from edgeprune.measure.activation import GATED
    from edgeprune.measure.replay import LayerExperts
    from edgeprune.model.architecture import read_architecture
    from edgeprune.model.gguf import GgufFile

    file = GgufFile(path)
    experts = LayerExperts(file, read_architecture(file), 0)
    y = np.zeros_like(x)

    def part(expert: int) -> tuple[npt.NDArray[Any], Floats]:
        token, slot = np.nonzero(ids == expert)
        own = experts[expert]
        return token, gates[token, slot][:, None] * (own.hidden(x[token], GATED["silu"]) @ own.down.T)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for token, answer in pool.map(part, range(experts.count)):
            y[token] += answer
    return y


def measured(path: Path, model: Path, size: synthetic.Size, tokens: int, renormalised: bool) -> None:
    """Statistics with nothing but a reservoir."""
    from edgeprune.measure.statistics import Statistics

    kept = synthetic.reservoir(size, tokens, renormalised=renormalised)
    kept = replace(kept, y=output(model, kept.x, kept.ids, kept.gates))
    Statistics(["text"], tokens, 512, {}, {}, {}, {0: kept}).save(path)


def ranked(model: str, statistics: str, stops: list[int]) -> None:
    """Rank the layer in this process; print seconds, peak memory and errors."""
    from edgeprune.decide.replaying import rank
    from edgeprune.measure.child import peak_memory_bytes

    started = time.perf_counter()
    found = rank(model, statistics, "replay", stops, {})
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "processor": time.process_time(), "peak": peak_memory_bytes(), **found}))


@click.command()
@click.option("--tokens", default=8192, show_default=True, help="Tokens of the reservoir.")
@click.option("--experts", default=128, show_default=True)
@click.option("--repeats", default=3, show_default=True)
@click.option("--bare", is_flag=True, help="Coefficients are bare probabilities, which is the dearest rule.")
@click.option("--folder", type=click.Path(file_okay=False), help="Keep the model here, for another run.")
def main(tokens: int, experts: int, repeats: int, bare: bool, folder: str | None) -> None:
    from edgeprune.measure.child import _POLITE
    from edgeprune.model.architecture import read_architecture
    from edgeprune.model.gguf import GgufFile

    with tempfile.TemporaryDirectory() as scratch:
        place = Path(folder or scratch)
        place.mkdir(parents=True, exist_ok=True)
        size = synthetic.Size(layers=1, experts=experts, vocabulary=512)
        model = place / f"layer-{experts}.gguf"
        statistics = place / f"statistics-{experts}-{tokens}{'-bare' if bare else ''}.safetensors"
        if not model.is_file():
            written(model, size)
        if not statistics.is_file():
            measured(statistics, model, size, tokens, not bare)
        stops = sorted(read_architecture(GgufFile(model)).allowed_counts(), reverse=True)[1:]
        for _ in range(repeats):
            command = [sys.executable, __file__, "--child", str(model), str(statistics), json.dumps(stops)]
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=_POLITE | os.environ)
            found = json.loads(done.stdout)
            click.echo(f"{found['seconds']:.1f} s, {found['processor']:.1f} s of processor time", nl=False)
            click.echo(f", peak memory {found['peak'] / 2**20:.0f} MiB", nl=False)
            click.echo(f"; load of the machine {os.getloadavg()[0]:.1f}; {found['reasons'] or ''}")
        for stop, error in zip(stops, found["errors"].get("0", []), strict=False):
            click.echo(f"  K={stop:<4} relative squared error {error:.4f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        ranked(sys.argv[2], sys.argv[3], json.loads(sys.argv[4]))
    else:
        main()
