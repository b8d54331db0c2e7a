"""Which files of a repository make up the model that was asked for."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from edgeprune.errors import BadFile, Unsupported, UsageError
from edgeprune.model.checkpoint import INDEX, SINGLE, SMALL, weight_files
from edgeprune.model.hub import HubFile, Listing
from edgeprune.model.parts import numbered, part_name
from edgeprune.units import format_bytes

CONFIG = "config.json"
# Needed too, because it names the licence.
_CARD = "README.md"
_FURTHER_TEMPLATE = re.compile(r"additional_chat_templates/[^/]+\.jinja")
LARGEST_SMALL = 256 << 20  # bytes
# GGUF files that are no language models.
_COMPANIONS = re.compile(r"mmproj|imatrix", re.IGNORECASE)
_MOST_SHOWN = 24


@dataclass(frozen=True)
class Gguf:
    """A model in one GGUF file of a repository, or in the parts that it is split into.

    Attributes:
        label: its path without ``.gguf`` and without the number of a part.
        files: in the order of the parts.
    """

    label: str
    files: tuple[HubFile, ...]

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


def has_checkpoint(listing: Listing) -> bool:
    """Whether the repository is a checkpoint; one that has GGUF files too is one only with safetensors."""
    weights = any("/" not in path and path.endswith(".safetensors") for path in listing.files)
    return CONFIG in listing.files and (weights or not ggufs(listing))


def ggufs(listing: Listing) -> list[Gguf]:
    """The GGUF models of the repository, ordered by size."""
    found: dict[str, list[str]] = {}
    for path in sorted(path for path in listing.files if path.endswith(".gguf")):
        place, part = PurePosixPath(path), numbered(PurePosixPath(path).name)
        label = str(place.with_name(part[0])) if part else path.removesuffix(".gguf")
        count = part[2] if part else 1
        found.setdefault(f"{label}\0{count}", []).append(path)
    models = [Gguf(key.split("\0")[0], tuple(listing.files[path] for path in paths)) for key, paths in found.items()]
    return sorted(models, key=lambda model: (model.size, model.label))


def chosen_gguf(listing: Listing) -> Gguf:
    """The GGUF that the user named by file or quantisation; the only one if nothing was said.

    Raises:
        UsageError: none or several fit; lists what there is.
        BadFile: the repository lacks a part of it.
    """
    models, wanted = ggufs(listing), listing.name.wanted
    exact = [model for model in models if any(file.path == wanted for file in model.files)]
    if not exact:
        candidates = [model for model in models if not _COMPANIONS.search(model.label)]
        exact = [model for model in candidates if not wanted or _is_called(model.label, wanted)]
    if len(exact) != 1:
        raise _unclear(listing, wanted, exact or models, bool(exact))
    _require_all_parts(listing, exact[0])
    return exact[0]


def _is_called(label: str, quant: str) -> bool:
    """Whether the file's name ends in ``quant`` as a word of its own, or its folder is called so."""
    word = re.compile(rf"(?:.*[-._])?{re.escape(quant)}", re.IGNORECASE)
    place = PurePosixPath(label)
    return any(word.fullmatch(part) for part in (place.name, place.parent.name))


def _unclear(listing: Listing, wanted: str, models: list[Gguf], several: bool) -> UsageError:
    repo = listing.name.repo
    if not models:
        return UsageError(f"{repo} holds no GGUF files", hint=f"see what it is with `edgeprune inspect {repo}`")
    if not wanted:
        cause = f"{repo} holds {len(models)} GGUF models and no checkpoint: say which"
    elif several:
        cause = f"{len(models)} GGUF models of {repo} are called {wanted}"
    else:
        cause = f"{repo} holds no GGUF {wanted}"
    rows = [(model.files[0].path, format_bytes(model.size)) for model in models[:_MOST_SHOWN]]
    if len(models) > _MOST_SHOWN:
        rows.append(("and others", str(len(models) - _MOST_SHOWN)))
    return UsageError(cause, rows=rows, hint=f"write {repo}:FILE, or the end of its name as {repo}:Q4_K_M")


def _require_all_parts(listing: Listing, model: Gguf) -> None:
    """Refuse a split model of which the repository lacks a part."""
    part = numbered(PurePosixPath(model.files[0].path).name)
    if part is None:
        return
    there = {file.path for file in model.files}
    folder = PurePosixPath(model.files[0].path)
    wanted = [str(folder.with_name(part_name(part[0], index, part[2]))) for index in range(part[2])]
    missing = [path for path in wanted if path not in there]
    if missing:
        raise BadFile(f"{listing.name.repo} lacks {missing[0]}, one of the {part[2]} parts of this model")


def small_files(listing: Listing) -> list[HubFile]:
    """What a checkpoint needs beside its weights."""
    files = [
        file
        for path, file in listing.files.items()
        if path == _CARD or ("/" not in path and path.endswith(SMALL)) or _FURTHER_TEMPLATE.fullmatch(path)
    ]
    large = next((file for file in files if file.size > LARGEST_SMALL), None)
    if large is not None:
        raise BadFile(
            f"{listing.name.repo} has {large.path} of {format_bytes(large.size)}, which is no configuration"
        )
    return sorted(files, key=lambda file: file.path)


def weights_of(listing: Listing, index: bytes | None) -> list[HubFile]:
    """The safetensors of a checkpoint.

    Args:
        index: content of its ``model.safetensors.index.json`` if it has one; other safetensors beside what it names
            are copies in another form.

    Raises:
        BadFile: the index is no index, or names files that are not there.
        Unsupported: weights only as pickles.
    """
    repo = listing.name.repo
    if SINGLE in listing.files:  # first, as for transformers, where an index is there as well
        return [listing.files[SINGLE]]
    if index is None:
        pickles = any(path.endswith((".bin", ".pt", ".pth")) for path in listing.files)
        if pickles and not any(path.endswith(".safetensors") for path in listing.files):
            raise Unsupported(
                f"{repo} has its weights as Python pickles, which can run code when they are opened",
                hint="look for a repository, or a revision, with safetensors",
            )
        raise BadFile(f"{repo} holds neither {SINGLE} nor {INDEX}: it is no checkpoint of a language model")
    try:
        names = weight_files(json.loads(index), f"{repo}/{INDEX}")
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{repo}/{INDEX} is no JSON: {str(error)[:80]}") from error
    missing = [name for name in names if name not in listing.files]
    if missing:
        raise BadFile(f"{repo} lacks {missing[0]}, one of its {len(names)} files of weights")
    return [listing.files[name] for name in names]
