"""The runner's modules in one file that a Python runs."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

_MODULES = Path(__file__).resolve().with_name("runner")
_NAME = "edgeprune_runner"  # over there, where no edgeprune is
_START = f"from {_NAME}.work import main\n\nmain()\n"


@contextmanager
def packed_runner() -> Iterator[Path]:
    """The runner as one file, which is there as long as the block lasts. The same modules make the same bytes."""
    with TemporaryDirectory(prefix="edgeprune-") as folder:
        path = Path(folder) / "runner.pyz"
        with zipfile.ZipFile(path, "w") as archive:  # stored as it is: small, and whoever looks can read it
            archive.writestr(zipfile.ZipInfo("__main__.py"), _START)  # dated 1980, whenever it is made
            for module in sorted(_MODULES.glob("*.py")):
                archive.writestr(zipfile.ZipInfo(f"{_NAME}/{module.name}"), module.read_bytes())
        yield path
