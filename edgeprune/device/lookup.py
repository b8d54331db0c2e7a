"""Finding what is described in TOML files by name: at an explicit path, the user's own, or shipped with edgeprune."""

from __future__ import annotations

import difflib
from pathlib import Path

import platformdirs

from edgeprune.errors import UsageError
from edgeprune.files import data_folder


def user_folder(kind: str) -> Path:
    """Where the user's own files of a ``kind`` live, ``profiles`` or ``devices``; they win over shipped ones."""
    return Path(platformdirs.user_config_dir("edgeprune")) / kind


def known_files(kind: str) -> dict[str, Path]:
    """All files of a ``kind`` by name, the user's own over the shipped ones."""
    paths = {path.stem: path for path in sorted(data_folder(kind).glob("*.toml"))}
    paths.update({path.stem: path for path in sorted(user_folder(kind).glob("*.toml"))})
    return dict(sorted(paths.items()))


def found_file(kind: str, what: str, name: str, way_out: str) -> Path:
    """The file called ``name``, or at the path ``name`` if that ends in ``.toml``.

    Args:
        what: one of them is called in messages.
        way_out: end of the hint when there is none.

    Raises:
        UsageError: there is none; suggests near names.
    """
    if name.endswith(".toml"):
        if not Path(name).is_file():
            raise UsageError(f"no {what.removeprefix('device ')} file {name}")
        return Path(name)
    paths = known_files(kind)
    if name not in paths:
        near = difflib.get_close_matches(name, paths, n=3, cutoff=0.4)
        known = f"did you mean {' or '.join(near)}? " if near else ""
        raise UsageError(f"no {what} '{name}'", hint=known + way_out)
    return paths[name]
