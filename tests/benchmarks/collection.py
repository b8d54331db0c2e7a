"""The whole calibration pass against llama.cpp's own collection of an importance matrix, on the same text.

    python tests/benchmarks/collection.py MODEL.gguf TEXT.txt --imatrix path/to/llama-imatrix

``llama-imatrix`` is built from the sources that llama-cpp-python's source distribution carries
(``cmake --build build --target llama-imatrix``). Both read the text as windows of 512 tokens and load the model anew.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from pathlib import Path

import click

from edgeprune.measure import child
from edgeprune.model.architecture import read_architecture
from edgeprune.model.gguf import GgufFile

WINDOW = 512


def theirs(program: str, model: str, text: str, chunks: int, folder: str, threads: int) -> float:
    command = [program, "-m", model, "-f", text, "-o", f"{folder}/i.gguf", "-c", str(WINDOW), "-b", str(WINDOW)]
    command += ["--chunks", str(chunks), "--no-ppl", "-t", str(threads), "-ngl", "0"]
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started


def ours(model: str, text: str, tokens: int, folder: str) -> tuple[float, int]:
    architecture = read_architecture(GgufFile(Path(model)))
    arguments = {
        "model": model,
        "output": f"{folder}/statistics.safetensors",
        "scratch": folder,
        "texts": [{"domain": "text", "path": text, "split": "calibration"}],
        "window": WINDOW,
        "most_tokens": tokens,
        "weights": [tensor.name for tensor in architecture.tensors if tensor.quantisable],
        "experts": architecture.experts,
        "arch": architecture.arch,
        "made_from": {},
        "reservoir_tokens": 8192,
    }
    started = time.perf_counter()
    done = child.call("edgeprune.measure.calibration:collect", arguments)
    return time.perf_counter() - started, int(done["peak_bytes"])


@click.command()
@click.argument("model", type=click.Path(exists=True))
@click.argument("text", type=click.Path(exists=True))
@click.option("--imatrix", required=True, help="The program llama-imatrix.")
@click.option("--chunks", default=48, show_default=True, help="Windows of 512 tokens.")
@click.option("--repeats", default=3, show_default=True)
def main(model: str, text: str, imatrix: str, chunks: int, repeats: int) -> None:
    times: dict[str, list[float]] = {"llama-imatrix": [], "edgeprune": []}
    peak = 0
    for _ in range(repeats):  # in turn, so that both meet the same machine
        with tempfile.TemporaryDirectory() as folder:
            times["llama-imatrix"].append(theirs(imatrix, model, text, chunks, folder, os.cpu_count() or 1))
            seconds, peak = ours(model, text, chunks * WINDOW, folder)
            times["edgeprune"].append(seconds)
    for name, own in times.items():
        click.echo(f"{name:<14} " + " ".join(f"{seconds:6.1f}" for seconds in own) + " s")
    best = {name: min(own) for name, own in times.items()}
    click.echo(f"ratio {best['edgeprune'] / best['llama-imatrix']:.2f} (best of {repeats})")
    size = Path(model).stat().st_size
    above = (peak - size) / 2**20
    click.echo(f"peak memory {peak / 2**20:.0f} MiB, {above:.0f} MiB above the model")


if __name__ == "__main__":
    main()
