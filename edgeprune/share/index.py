"""``edgeprune.json``: what a repository holds, for programs: each GGUF with its parts, needs and measured quality."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from edgeprune.device.budget import CACHE, COMPUTE, HOST_COMPUTE, RUNTIME
from edgeprune.errors import BadFile
from edgeprune.files import check_keys, checked_int, checked_number, read_json, to_json
from edgeprune.measure.launch import Launch
from edgeprune.model.architecture import MOST_EXPERTS
from edgeprune.prove.report import EVALUATION, Report

INDEX = "edgeprune.json"
# Raised when a reader of the old format would misread the new one.
FORMAT = 1
QUALITIES = ("kl_mean", "kl_99", "same_top", "perplexity")
_MOST_BYTES = 1 << 60
_DIGEST = re.compile(r"[0-9a-f]{64}")
# A path in a repository: no way out of the folder that it is downloaded to, on any system. Windows reads neither a
# colon nor a dot or space at the end as it stands there, and takes some names for devices, whatever follows a dot.
_NAME_IN_PATH = r"[\w+()\[\]-](?:[\w.+()\[\],&@=~' -]{0,250}[\w+()\[\]~'-])?"
_PATH = re.compile(rf"(?:{_NAME_IN_PATH}/){{0,8}}{_NAME_IN_PATH}")
_DEVICE = re.compile(
    r"(?:CON|PRN|AUX|NUL|CONIN\$|CONOUT\$|(?:COM|LPT)[0-9\u00b9\u00b2\u00b3]) *(?:\..*)?", re.IGNORECASE
)
_NAME = re.compile(r"[\w+-][\w.+-]{0,200}")


@dataclass(frozen=True)
class Stored:
    """A file of the repository: its path, size and SHA-256."""

    path: str
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class Memory:
    """What llama.cpp needs, bytes; everything but ``weights_bytes`` is for ``Launch.context`` tokens.

    Attributes:
        weights_bytes: tensors.
        kv_bytes: KV cache.
        compute_bytes: compute buffers of the device that computes.
        host_compute_bytes: those of the host beside it.
        runtime_bytes: the process itself.
    """

    weights_bytes: int
    kv_bytes: int
    compute_bytes: int
    host_compute_bytes: int
    runtime_bytes: int

    @property
    def all_bytes(self) -> int:
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Entry:
    """One model of the repository.

    Attributes:
        name: of the file without ``.gguf`` and the number of the part.
        parts: one file, or those it is split into.
        made_for: the device or limit it was made for.
        experts, kept: routed experts per layer of the source and of this file.
        context_length: longest context in tokens, or 0 when the model does not say.
        types: GGML types of its matrices, those with most bytes first.
        memory, launch: what it needs when started so.
        quality: ``QUALITIES`` against the source on held-out text.
        width: channels that every expert was narrowed to, or 0 where none was.
        text: digest of the held-out text that ``quality`` is of, and of how much of it; "" where nobody says.
    """

    name: str
    parts: tuple[Stored, ...]
    made_for: str
    experts: int
    kept: int
    context_length: int
    types: tuple[str, ...]
    memory: Memory
    launch: Launch
    quality: dict[str, float]
    width: int = 0
    text: str = ""

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


def entry_of(
    report: Report,
    name: str,
    parts: Iterable[Stored],
    *,
    weights_bytes: int,
    context_length: int,
    types: Iterable[str],
) -> Entry:
    """The entry of the file that ``report`` is about."""
    lines: dict[str, int] = {}
    for pool in report.budget["pools"]:
        for line in pool["lines"]:
            lines[line["name"]] = lines.get(line["name"], 0) + line["nbytes"]
    memory = Memory(weights_bytes, *(lines.get(key, 0) for key in (CACHE, COMPUTE, HOST_COMPUTE, RUNTIME)))
    plan = report.plan
    return Entry(
        name=name,
        parts=tuple(parts),
        made_for=report.title.rpartition(" for ")[2],
        experts=plan["experts"],
        kept=plan["kept"],
        context_length=context_length,
        types=tuple(types),
        memory=memory,
        launch=replace(report.launch, threads=0),
        quality={key: float(report.quality[key]) for key in QUALITIES},
        width=plan.get("width", 0),
        text=str(report.made_from.get(EVALUATION, "")),
    )


def index_text(entries: Iterable[Entry], card_sha256: str) -> str:
    """The file's content.

    Args:
        card_sha256: of the README beside it, by which a later publication sees whether a person has changed it.
    """
    value = {"format": FORMAT, "card_sha256": card_sha256, "files": [asdict(entry) for entry in entries]}
    return to_json(value)


def read_index(path: Path, where: str) -> tuple[list[Entry], str]:
    """The entries, and the SHA-256 of the README they were published with.

    Raises:
        BadFile: not an index, of a later format, or with paths that lead out of the folder.
    """
    value = read_json(path)
    check_keys(where, value, {"format", "files", "card_sha256"}, set())
    if value["format"] != FORMAT:
        raise BadFile(f"{where} has the format {str(value['format'])[:20]}; this edgeprune reads {FORMAT}")
    if not isinstance(value["files"], list):
        raise BadFile(f"{where}: files is not a list")
    return [_entry(each, f"{where}: file {n}") for n, each in enumerate(value["files"])], str(value["card_sha256"])


def _entry(value: Mapping[str, Any], where: str) -> Entry:
    check_keys(where, value, set(Entry.__dataclass_fields__) - {"width", "text"}, {"width", "text"})
    parts, types = value["parts"], value["types"]
    if not isinstance(parts, list) or not parts or not isinstance(types, list):
        raise BadFile(f"{where} has no parts, or types that are no list")
    check_keys(f"{where}: memory", value["memory"], set(Memory.__dataclass_fields__), set())
    check_keys(f"{where}: quality", value["quality"], set(QUALITIES), set())
    memory = {key: checked_int(f"{where}: {key}", number, 0, _MOST_BYTES) for key, number in value["memory"].items()}
    experts = checked_int(f"{where}: experts", value["experts"], 1, MOST_EXPERTS)
    return Entry(
        name=_matching(f"{where}: name", value["name"], _NAME),
        parts=tuple(_stored(part, f"{where}: part {number}") for number, part in enumerate(parts)),
        made_for=_word(value["made_for"]),
        experts=experts,
        kept=checked_int(f"{where}: kept", value["kept"], 1, experts),
        width=checked_int(f"{where}: width", value.get("width", 0), 0, 1 << 32),
        context_length=checked_int(f"{where}: context_length", value["context_length"], 0, 1 << 32),
        types=tuple(_word(name) for name in types[:64]),
        memory=Memory(**memory),
        launch=Launch.from_json(value["launch"], f"{where}: launch"),
        quality={key: checked_number(f"{where}: {key}", value["quality"][key]) for key in QUALITIES},
        text=_word(value.get("text", "")),
    )


def _stored(value: Mapping[str, Any], where: str) -> Stored:
    check_keys(where, value, set(Stored.__dataclass_fields__), set())
    path = _matching(f"{where}: path", value["path"], _PATH)
    if not is_sound_path(path):
        raise BadFile(f"{where}: path = {path[:60]!r} is not what it should be")
    if not path.endswith(".gguf"):
        raise BadFile(f"{where}: {path} is not a GGUF")
    nbytes = checked_int(f"{where}: nbytes", value["nbytes"], 1, _MOST_BYTES)
    return Stored(path, nbytes, _matching(f"{where}: sha256", value["sha256"], _DIGEST))


def is_sound_path(path: str) -> bool:
    """Whether ``path`` stays in the folder that it is joined to, on any system."""
    return _PATH.fullmatch(path) is not None and not any(map(_DEVICE.fullmatch, path.split("/")))


def _matching(where: str, value: Any, form: re.Pattern[str]) -> str:
    if not isinstance(value, str) or not form.fullmatch(value):
        raise BadFile(f"{where} = {str(value)[:60]!r} is not what it should be")
    return value


def _word(value: Any) -> str:
    """A text that is only shown."""
    return "".join(letter for letter in str(value)[:80] if letter.isprintable())
