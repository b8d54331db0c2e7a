"""Wall time of what a user waits for: `edgeprune --help`, and a whole fit of the demo model.

    python tests/benchmarks/times.py

Each in a process of its own; help as the best of five, the fit once, in a fresh folder.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time

EDGEPRUNE = [sys.executable, "-m", "edgeprune"]


def seconds(command: list[str], folder: str) -> float:
    started = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        print(f"edgeprune --help: {min(seconds([*EDGEPRUNE, '--help'], folder) for _ in range(5)):.2f} s")
        for target in (["--device", "auto"], ["--file-size", "4MB"]):
            name = " ".join(target)
            print(
                f"edgeprune fit demo {name}: {seconds([*EDGEPRUNE, 'fit', 'demo', *target], folder):.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
