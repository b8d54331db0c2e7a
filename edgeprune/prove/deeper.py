"""What `verify` measures beyond a fit: speed at several depths, loops, questions, slices, other people's logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeprune.errors import BadFile
from edgeprune.files import check_keys, checked_int, checked_number
from edgeprune.measure.divergence import Quality
from edgeprune.prove.paired import Paired, mean_of


@dataclass(frozen=True)
class Speed:
    """Speed with ``depth`` tokens in the context already.

    Attributes:
        prefill, decode: median, least and most of the repeats, tokens per second.
        first_token_seconds: from an empty context, with a prompt of ``depth`` tokens; None at depth 0.
    """

    depth: int
    prefill: tuple[float, float, float]
    decode: tuple[float, float, float]
    first_token_seconds: float | None

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Speed:
        check_keys("a speed", value, set(cls.__dataclass_fields__), set())
        first = value["first_token_seconds"]
        return cls(
            checked_int("depth", value["depth"], 0, 1 << 27),
            _three("prefill", value["prefill"]),
            _three("decode", value["decode"]),
            None if first is None else checked_number("first_token_seconds", first),
        )


@dataclass(frozen=True)
class Loops:
    """Long generations of original and candidate on the same prompts, in one mode.

    Attributes:
        mode: ``greedy`` or ``sampled``.
        length: most tokens of a generation.
        looping: which of them loop.
        repeated: mean repeated share of the original and of the candidate.
        change: candidate less original, and its 95 % confidence interval.
        example: last words of the candidate where it loops and the original does not, or "".
    """

    mode: str
    length: int
    looping: Paired
    repeated: tuple[float, float]
    change: tuple[float, float, float]
    example: str

    @classmethod
    def of(
        cls, mode: str, length: int, original: Sequence[Mapping[str, Any]], candidate: Sequence[Mapping[str, Any]]
    ) -> Loops:
        """From what ``measure.loops`` says of each generation."""
        shares = [[float(one["repeated_share"]) for one in own] for own in (original, candidate)]
        lost = (b["end"] for a, b in zip(original, candidate, strict=True) if b["loops"] and not a["loops"])
        return cls(
            mode,
            length,
            Paired.of([one["loops"] for one in original], [one["loops"] for one in candidate]),
            (float(np.mean(shares[0])), float(np.mean(shares[1]))),
            mean_of(np.subtract(shares[1], shares[0]).tolist()),
            next(lost, ""),
        )

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Loops:
        check_keys("a loop probe", value, set(cls.__dataclass_fields__), set())
        original, candidate = (checked_number("repeated", share) for share in value["repeated"])
        return cls(
            str(value["mode"]),
            checked_int("length", value["length"], 1, 1 << 27),
            Paired.from_json(value["looping"]),
            (original, candidate),
            _three("change", value["change"]),
            str(value["example"]),
        )


@dataclass(frozen=True)
class Task:
    """Questions that original and candidate answered.

    Attributes:
        name: of the file.
        form: its format.
        total: questions in it, of which some were asked.
        right: who answered which rightly.
        file: what the file and format are known by, or "".
    """

    name: str
    form: str
    total: int
    right: Paired
    file: str = ""

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Task:
        check_keys("a task", value, set(cls.__dataclass_fields__) - {"file"}, {"file"})
        total = checked_int("total", value["total"], 1, 1 << 40)
        right = Paired.from_json(value["right"])
        return cls(str(value["name"]), str(value["form"]), total, right, str(value.get("file", "")))


@dataclass(frozen=True)
class Named:
    """Quality on a slice of text, or against a file of log-probabilities of llama-perplexity.

    Attributes:
        name: of the slice or file.
        quality: ``Quality`` as JSON.
        file: what the file is known by, or "".
    """

    name: str
    quality: dict[str, Any]
    file: str = ""

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Named:
        check_keys("a quality with a name", value, set(cls.__dataclass_fields__) - {"file"}, {"file"})
        return cls(str(value["name"]), _quality(value["quality"]), str(value.get("file", "")))


@dataclass(frozen=True)
class Deeper:
    """Everything of this kind that was measured of one file; what nobody asked for is empty.

    Attributes:
        speeds: by depth.
        loops: by mode.
        tasks: by file and format.
        bases: quality by file of log-probabilities.
        slices: quality by slice.
        objects: which requests for JSON, under a grammar, were answered to the end; None if none were made.
    """

    speeds: tuple[Speed, ...] = ()
    loops: tuple[Loops, ...] = ()
    tasks: tuple[Task, ...] = ()
    bases: tuple[Named, ...] = ()
    slices: tuple[Named, ...] = ()
    objects: Paired | None = None

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Deeper:
        """What ``value`` says.

        Raises:
            BadFile: something is missing, or of another kind than a report holds.
        """
        check_keys("the deeper verification", value, set(cls.__dataclass_fields__), set())
        try:
            return cls(
                speeds=tuple(Speed.from_json(one) for one in value["speeds"]),
                loops=tuple(Loops.from_json(one) for one in value["loops"]),
                tasks=tuple(Task.from_json(one) for one in value["tasks"]),
                bases=tuple(Named.from_json(one) for one in value["bases"]),
                slices=tuple(Named.from_json(one) for one in value["slices"]),
                objects=Paired.from_json(value["objects"]) if value["objects"] is not None else None,
            )
        except (TypeError, ValueError, KeyError) as error:
            raise BadFile(f"the deeper verification is damaged: {error}") from error


NOTHING = Deeper()


def _three(where: str, value: Sequence[Any]) -> tuple[float, float, float]:
    first, second, third = (checked_number(where, one) for one in value)
    return first, second, third


def _quality(value: Mapping[str, Any]) -> dict[str, Any]:
    names = set(Quality.__dataclass_fields__)
    check_keys("a quality", value, names, set())
    return {name: checked_number(name, value[name]) for name in names}
