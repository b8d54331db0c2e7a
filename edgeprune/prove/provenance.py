"""How a file came to be: the commands that were typed, what went in and came out, and what did the work."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from edgeprune.errors import BadFile
from edgeprune.files import check_keys


@dataclass(frozen=True)
class Provenance:
    """Everything that it takes to make a file again and to see that it is the same.

    Attributes:
        commands: as they were typed, in order.
        inputs: digest by name, SHA-256 in hexadecimal digits, some of a file and some of the settings it came of.
        outputs: SHA-256 by the name of the file; of a model in parts, as ``Build`` has it, by the first part's.
        versions: version by program, and what the machine computes with.
    """

    commands: tuple[str, ...] = ()
    inputs: Mapping[str, str] = field(default_factory=dict)
    outputs: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> Provenance:
        """What ``value`` says.

        Raises:
            BadFile: something is missing, or no text.
        """
        check_keys("the provenance", value, set(cls.__dataclass_fields__), set())
        tables = {name: _texts(name, value[name]) for name in ("inputs", "outputs", "versions")}
        commands = value["commands"]
        if not isinstance(commands, list | tuple) or not all(isinstance(command, str) for command in commands):
            raise BadFile("the provenance is damaged: commands are no list of texts")
        return cls(commands=tuple(commands), **tables)

    def after(self, command: str) -> tuple[str, ...]:
        """The commands so far, and ``command`` behind them unless it was the last already."""
        return self.commands if not command or self.commands[-1:] == (command,) else (*self.commands, command)

    def shared(self) -> Provenance:
        """The same without the folders of this machine, which are nobody else's business."""
        return replace(self, commands=tuple(map(_without_folders, self.commands)))


UNKNOWN = Provenance()


def _texts(name: str, value: Any) -> dict[str, str]:
    if not isinstance(value, Mapping) or not all(isinstance(one, str) for one in (*value, *value.values())):
        raise BadFile(f"the provenance is damaged: {name} is no table of texts")
    return dict(value)


def _without_folders(command: str) -> str:
    """``command`` with nothing but the last part of each path that begins at the root or at a home folder."""
    try:
        words = shlex.split(command)
    except ValueError:  # somebody has edited the report
        words = command.split()
    return shlex.join(map(_last_part, words))


_ELSEWHERE = re.compile(r"[/~]|[A-Za-z]:[/\\]|\.\.[/\\]")
_SEPARATORS = re.compile(r"[/\\]")


def _last_part(word: str) -> str:
    name, separator, path = word.rpartition("=")
    if not _ELSEWHERE.match(path):
        return word
    return name + separator + (_SEPARATORS.split(path.rstrip("/\\"))[-1] or path)
