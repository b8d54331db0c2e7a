"""Peak memory and time of healing one layer of a large model, a quarter of whose experts is dropped.

    python tests/benchmarks/heal_layer.py --experts 64 --width 2048 --expert-width 768 --tokens 8192

The layer is made up: weights and inputs are noise, and the original sends tokens to the same experts with larger
coefficients, so that there is something to fit; --type encodes its experts. Peak memory is that of
the child process, with the pages of the mapped files that are in memory; beside it stands that of a child that loads
the same modules and does nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import synthetic

from edgeprune.decide.plan import Plan, Prediction
from edgeprune.measure.activation import GATED
from edgeprune.measure.launch import Launch
from edgeprune.measure.replay import LayerExperts
from edgeprune.measure.reservoir import Reservoir
from edgeprune.measure.statistics import InputMoments, Statistics
from edgeprune.model.architecture import read_architecture
from edgeprune.model.gguf import GgufFile
from edgeprune.units import format_bytes

_CHILD = """
import json, sys, time
from edgeprune.build.staged import heal_layers
from edgeprune.measure.child import peak_memory_bytes
arguments, started = json.loads(sys.argv[1]), time.perf_counter()
found = heal_layers(**arguments) if arguments else {}
seconds = time.perf_counter() - started
print(json.dumps({"seconds": seconds, "peak": peak_memory_bytes(), "found": found}))
"""


def model(folder: Path, size: synthetic.Size) -> GgufFile:
    """The layer's file, with noise in its matrices of experts."""
    path = synthetic.shadow(folder / "model.gguf", size)
    random, file = np.random.default_rng(0), GgufFile(path)
    with path.open("r+b") as stream:
        for info in file.tensors.values():
            if "exps" not in info.name:
                continue
            stream.seek(info.offset)
            for _ in range(size.experts):
                rows = random.standard_normal(info.shape[0] * info.shape[1], np.float32) / info.shape[0] ** 0.5
                stream.write((rows.view(np.uint32) >> 16).astype(np.uint16).tobytes())  # BF16, towards zero
    return GgufFile(path)


def answered(file: GgufFile, tokens: Reservoir) -> Reservoir:
    """``tokens`` with what the layer's experts make of them."""
    experts = LayerExperts(file, read_architecture(file), 0)
    y = np.zeros_like(tokens.x)
    for expert in range(experts.count):
        own = experts[expert]
        rows, slot = np.nonzero(tokens.ids == expert)
        y[rows] += tokens.gates[rows, slot][:, None] * (own.hidden(tokens.x[rows], GATED["silu"]) @ own.down.T)
        experts.release(expert)
    return replace(tokens, y=y)


def measured(arguments: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-c", _CHILD, json.dumps(arguments)]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, number in (("experts", 64), ("used", 8), ("width", 2048), ("expert-width", 768), ("tokens", 8192)):
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--type", default="", help="GGML type of the experts, for example Q4_K.")
    given = parser.parse_args()
    size = synthetic.Size(1, given.experts, given.used, given.width, given.expert_width, 512, 4, 4)
    kept = tuple(range(size.experts // 4, size.experts))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = model(folder, size)
        architecture = read_architecture(file)
        student = synthetic.reservoir(replace(size, experts=len(kept)), given.tokens)
        ids, gates = np.array(kept)[student.ids], np.float32(1.5) * student.gates
        teacher = answered(file, replace(student, ids=ids.astype(student.ids.dtype), gates=gates))
        moments = {
            t.name: InputMoments(np.ones((len(kept), t.shape[0])), np.ones(len(kept)), np.zeros(len(kept)))
            for t in architecture.tensors
            if t.is_expert
        }
        for label, tokens in (("teacher", teacher), ("student", student)):
            Statistics(["text"], given.tokens, 512, {}, moments, {"of": label}, {0: tokens}).save(folder / label)
        counts = (size.experts, len(kept))
        keep = {0: kept}
        types = {t.name: given.type.upper() for t in architecture.tensors if t.is_expert and given.type}
        plan = Plan(architecture.arch, *counts, keep, types, Launch(), "made up", "user", Prediction(), {}, heal=True)
        arguments = {
            "model": str(file.path),
            "plan": plan.to_json(),
            "store": str(folder / "store"),
            "layers": [0, 1],
        }
        idle = measured({})
        texts = {label: str(folder / label) for label in ("teacher", "student")}
        found = measured({**arguments, **texts, "layers": [0, 1]})
    matrices = 3 * len(kept) * size.width * size.expert_width * 4
    print(f"kept experts in F32 {format_bytes(matrices)}; {given.tokens:,} tokens")
    print(
        f"peak {format_bytes(int(found['peak']))}, idle {format_bytes(int(idle['peak']))}; {found['seconds']:.0f} s"
    )
    print(found["found"])


if __name__ == "__main__":
    main()
