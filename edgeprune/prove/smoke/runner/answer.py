"""What an engine says, and how it says that it cannot."""

from __future__ import annotations

from collections.abc import Callable

Tick = Callable[[int, int], None]
LOG_LINES = 6  # of the end of a log that are told


class Failure(Exception):
    """A step went wrong: one line, and the end of the log."""

    def __init__(self, cause: str, log: list[str]) -> None:
        super().__init__(cause)
        self.cause, self.log = cause, log


class Unusable(Exception):
    """Nothing can be run here at all: one line, and the way out."""

    def __init__(self, cause: str, hint: str) -> None:
        super().__init__(cause)
        self.cause, self.hint = cause, hint


class Answer:
    """What a model said after a prompt: tokens, text, whether all logits were finite, and seconds that it took.

    ``finite`` is None where the engine does not tell.
    """

    def __init__(self, tokens: list[int], text: str, finite: bool | None, prefill_s: float, decode_s: float) -> None:
        self.tokens, self.text, self.finite = tokens, text, finite
        self.prefill_s, self.decode_s = prefill_s, decode_s


def both(first: bool | None, second: bool | None) -> bool | None:
    """False if either is; None, which is unknown, if either is and none is False."""
    return False if first is False or second is False else first and second


def once(tokens: list[int], special: bool) -> list[int]:
    """``tokens`` without a second BOS where a chat template has written one, too."""
    return tokens[1:] if special and len(tokens) > 1 and tokens[0] == tokens[1] else tokens
