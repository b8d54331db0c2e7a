"""Models split over several GGUF files, as llama.cpp's gguf-split names and marks them.

The parts are called ``PREFIX-00001-of-00003.gguf`` and so on. The first has all metadata; every part has
``split.no`` (from 0), ``split.count`` and ``split.tensors.count``, the number of tensors in all parts
(src/llama-model-loader.cpp). Parts are never joined on the disk.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from edgeprune.errors import BadFile
from edgeprune.model.headers import SCALARS, Header

PREFIX = "split."
_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def part_name(prefix: str, number: int, count: int) -> str:
    """File name of part ``number``, from 0, of ``count``."""
    return f"{prefix}-{number + 1:05d}-of-{count:05d}.gguf"


def numbered(name: str) -> tuple[str, int, int] | None:
    """Prefix, number from 0, and count that the name of a part says, or None for other names."""
    match = _NAME.fullmatch(name)
    if match is None or not 0 < int(match[2]) <= int(match[3]):
        return None
    return match[1], int(match[2]) - 1, int(match[3])


def stem(path: Path) -> str:
    """Name of the model's file without its ending, and without the number if it is a part."""
    found = numbered(path.name)
    return found[0] if found else path.stem


def all_parts(path: Path) -> list[Path]:
    """The files of the model whose first part, or only file, is ``path``, by their names."""
    found = numbered(path.name)
    if found is None:
        return [path]
    return [path.with_name(part_name(found[0], index, found[2])) for index in range(found[2])]


def first_part(path: Path) -> Path:
    """The file that llama.cpp is to be given for the model that ``path`` is, or is a part of."""
    found = numbered(path.name)
    if found is None or found[2] == 1:
        return path
    first = path.with_name(part_name(found[0], 0, found[2]))
    return first if first.is_file() else path


def names_of_parts(name: str, header: Header) -> list[str]:
    """File names of all parts of the model whose file ``name`` has this header; of a whole model, ``name`` alone.

    Raises:
        BadFile: the name is not that of the part that the metadata speak of.
    """
    count = _number(header, "count")
    if count <= 1:
        return [name]
    found, number = numbered(name), _number(header, "no")
    if found is None or found[1:] != (number, count):
        which = f"part {number + 1}" if 0 <= number < count else "one"
        raise BadFile(
            f"{header.path} is {which} of {count} parts by its metadata, which its name does not say",
            hint=f"llama.cpp wants the name {part_name('MODEL', max(number, 0), count)}",
        )
    return [part_name(found[0], index, count) for index in range(count)]


def joined(headers: Sequence[Header]) -> Header:
    """One header for a model of several parts, given in their order; tensors know the part that holds them.

    Raises:
        BadFile: parts of different models, twice the same, or not all tensors.
    """
    first, count = headers[0], len(headers)
    if count == 1:
        return first
    tensors = dict(first.tensors)
    for index, header in enumerate(headers):
        _require_part(header, index, first)
        if index == 0:
            continue
        twice = next((name for name in header.tensors if name in tensors), None)
        if twice is not None:
            raise BadFile(f"{header.path} holds {twice}, which an earlier part has too: parts of different models")
        tensors |= {name: replace(info, part=index) for name, info in header.tensors.items()}
    wanted = _number(first, "tensors.count")
    if wanted != len(tensors):
        raise BadFile(
            f"{first.path} and its other {count - 1} parts hold {len(tensors)} tensors, the metadata say {wanted}",
            hint="parts of different models lie side by side; get all of them again",
        )
    return replace(first, tensors=tensors, size=sum(header.size for header in headers))


def _require_part(header: Header, index: int, first: Header) -> None:
    """Refuse a part that is not part ``index`` of the model that begins with ``first``."""
    for key in ("count", "tensors.count"):
        if _number(header, key) != _number(first, key):
            raise BadFile(
                f"{header.path} is of another model than {first.path.name}: {PREFIX}{key} is "
                f"{_number(header, key)} and {_number(first, key)}",
                hint="get the parts of one model",
            )
    if _number(header, "no") != index:
        raise BadFile(
            f"{header.path} is part {_number(header, 'no') + 1} by its metadata, where part {index + 1} is due",
            hint="it was renamed, or is a copy of another part; get it again",
        )
    for key in ("general.architecture", "general.name"):
        own = header.entries.get(key)
        if own is not None and own != first.entries.get(key):
            raise BadFile(f"{header.path} is of another model than {first.path.name}: {key} differs")


def _number(header: Header, key: str) -> int:
    """A number about the split, -1 when there is none."""
    entry = header.entries.get(PREFIX + key)
    # llama.cpp wants u16 and i32 here; one that is an array or a text means nothing.
    value = entry.value() if entry is not None and entry.kind in SCALARS else -1
    return int(value) if isinstance(value, int) else -1
