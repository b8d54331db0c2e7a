"""Calibration and held-out text: documents by domain, as token windows.

Files hold documents separated by lines of ``%%%%``, a file without them is one document; or JSON lines, see
``documents``. Every fourth document of a domain (of a domain with fewer: every fourth window) is held out: no expert
or type is chosen with it. The held-out windows of each domain are dealt out in turn to two halves: with one it is
chosen which of several finished files is shipped, the other is for the report. A single window is cut in two; where
it is too short for that it takes part in both, and says so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from edgeprune.errors import BadFile, UsageError
from edgeprune.measure.documents import (
    Chat,
    Document,
    holds_chats,
    is_json_lines,
    read_json_lines,
    read_plain,
    read_prepared,
)

# What the bytes of a text file mean.
PLAIN, JSON_LINES, CHATS, PREPARED = "plain", "json lines", "chats", "prepared"
# Parts of the text; the last two are halves of the held-out one.
CALIBRATION, HELD_OUT, CHOOSING, REPORTING = "calibration", "held_out", "choosing", "reporting"
HELD_OUT_EVERY = 4
SHORTEST_WINDOW = 16
_SHIPPED = Path(__file__).resolve().parent / "text"


@dataclass(frozen=True)
class TextFile:
    """One domain's text.

    Attributes:
        split: ``shared`` (part calibrates, part is held out), ``calibration``, ``held_out``, or ``reporting``: held
            out, and nothing is chosen with any of it.
        form: ``plain``; ``json lines`` without a chat; ``chats``: JSON lines with chats, which a model's template has
            to render before they can be read; ``prepared``: what edgeprune wrote, rendered chats for example.
    """

    domain: str
    path: str
    split: str = "shared"
    form: str = PLAIN

    def to_json(self) -> dict[str, str]:
        return {"domain": self.domain, "path": self.path, "split": self.split, "form": self.form}


@dataclass(frozen=True)
class Window:
    """A run of consecutive tokens of one document, decoded as a sequence of its own.

    Attributes:
        undivided: whether it is in both halves of the held-out text, its domain being too short for two.
    """

    domain: str
    tokens: tuple[int, ...]
    undivided: bool = False


def shipped_texts() -> list[TextFile]:
    """The default text: several domains and human languages, written for edgeprune."""
    return [TextFile(path.stem, str(path)) for path in sorted(_SHIPPED.glob("*.txt"))]


def parse_texts(values: Sequence[str], split: str = "shared") -> list[TextFile]:
    """``FILE`` or ``name=FILE`` arguments as text files.

    Raises:
        UsageError: a file that does not exist, or a domain named twice.
        BadFile: a line of JSON lines that is no document.
    """
    texts = []
    for value in values:
        name, separator, rest = value.partition("=")
        if separator and not name.strip():
            raise UsageError(f"'{value}' names a domain without a name", hint="--text NAME=FILE, or --text FILE")
        path = Path(rest if separator else value)
        if not path.is_file():
            raise UsageError(f"no text file {path}")
        texts.append(TextFile(name if separator else path.stem, str(path.resolve()), split, _form(path)))
    domains = [text.domain for text in texts]
    if len(set(domains)) < len(domains):
        raise UsageError("two texts have the same domain", hint="name them: --text NAME=FILE")
    return texts


def _form(path: Path) -> str:
    if not is_json_lines(path):
        return PLAIN
    return CHATS if holds_chats(path) else JSON_LINES


def texts_digest(texts: Sequence[TextFile], template: str = "") -> str:
    """SHA-256 over domains, splits and contents, and what makes text of chats.

    Args:
        template: digest of the chat template.
    """
    state = hashlib.sha256()
    for text in texts:
        how = f"{text.split}\0" if text.form == PLAIN else f"{text.split}\0{text.form}\0"
        if text.form == CHATS:
            how += f"{template}\0"
        state.update(f"{text.domain}\0{how}".encode() + Path(text.path).read_bytes())
    return state.hexdigest()


def read_documents(text: TextFile) -> list[Document]:
    """The documents of ``text``.

    Raises:
        BadFile: not UTF-8, empty, a bad line, or a chat that was not rendered.
    """
    path = Path(text.path)
    if text.form == PREPARED:
        return read_prepared(path)
    if text.form == PLAIN:
        return [Document(document) for document in read_plain(path)]
    documents = []
    for number, document in read_json_lines(path):
        if isinstance(document, Chat):
            raise BadFile(f"{path}, line {number}: a chat, which is no text before a template made it one")
        documents.append(Document(document))
    return documents


def _windows(tokens: Sequence[int], length: int) -> list[tuple[int, ...]]:
    parts = [tuple(tokens[start : start + length]) for start in range(0, len(tokens), length)]
    return [part for part in parts if len(part) >= SHORTEST_WINDOW]


def _of_split(items: list[Any], own: str, wanted: str) -> list[Any]:
    """The items of ``wanted`` (``calibration`` or ``held_out``) from a file of split ``own``."""
    if own != "shared":
        return items if own == wanted or (own, wanted) == (REPORTING, HELD_OUT) else []
    held = [item for index, item in enumerate(items) if index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1]
    rest = [item for index, item in enumerate(items) if index % HELD_OUT_EVERY != HELD_OUT_EVERY - 1]
    return held if wanted == HELD_OUT else rest


def _half(own: list[Window], part: str) -> list[Window]:
    """The windows of the half ``part`` of a domain's held-out ones, which differ in one window at most."""
    if len(own) == 1:
        (window,) = own
        middle = (len(window.tokens) + 1) // 2
        if len(window.tokens) - middle < SHORTEST_WINDOW:
            return [replace(window, undivided=True)]
        own = [replace(window, tokens=window.tokens[:middle]), replace(window, tokens=window.tokens[middle:])]
    return own[part != REPORTING :: 2]


def _spread(own: Sequence[Window], count: int) -> list[Window]:
    """``count`` windows spread over the whole of a domain's text, not its beginning: joined collections change
    their subject along the way."""
    return [own[position * len(own) // count] for position in range(count)]


def _tokens(own: Sequence[Window]) -> int:
    return sum(len(window.tokens) for window in own)


def _counts(by_domain: list[list[Window]], most_tokens: int) -> list[int]:
    """How many windows each domain gives so that their spread has ``most_tokens`` at most, domains taking turns.

    Spread windows differ in length from the first ones, with which the turns are counted; so a domain gives back
    what is too much, and takes what is left.
    """
    counts, total = [0] * len(by_domain), 0
    for turn in zip_longest(*by_domain):
        for index, window in enumerate(turn):
            if window is not None and total + len(window.tokens) <= most_tokens:
                counts[index] += 1
                total += len(window.tokens)
    taken = [_tokens(_spread(own, count)) for own, count in zip(by_domain, counts, strict=True)]

    def change(index: int, step: int) -> bool:
        """Change one count, unless that makes the whole too large."""
        count = counts[index] + step
        if count > len(by_domain[index]):
            return False
        tokens = _tokens(_spread(by_domain[index], count))
        if step > 0 and sum(taken) - taken[index] + tokens > most_tokens:
            return False
        counts[index], taken[index] = count, tokens
        return True

    while sum(taken) > most_tokens:
        change(max(range(len(taken)), key=lambda i: taken[i]), -1)
    while any(change(index, 1) for index in sorted(range(len(taken)), key=lambda i: taken[i])):
        pass
    return counts


def _taking_turns(by_domain: list[list[Window]], most_tokens: int) -> list[Window]:
    """Windows of every domain in turn until ``most_tokens`` are reached."""
    counts = _counts(by_domain, most_tokens)
    spread = [_spread(own, count) for own, count in zip(by_domain, counts, strict=True)]
    return [window for turn in zip_longest(*spread) for window in turn if window is not None]


@dataclass
class LeftOut:
    """Documents of one domain that are too short for a window.

    Attributes:
        documents, of: how many, of all that were looked at.
        tokens: that they have together.
    """

    documents: int = 0
    of: int = 0
    tokens: int = 0

    def see(self, tokens: Sequence[int]) -> Sequence[int]:
        """Count the document of ``tokens``, which are handed back."""
        self.of += 1
        if len(tokens) < SHORTEST_WINDOW:
            self.documents += 1
            self.tokens += len(tokens)
        return tokens


def windows(
    texts: Sequence[TextFile],
    split: str,
    length: int,
    most_tokens: int,
    tokenize: Callable[[Document], Sequence[int]],
    left_out: dict[str, LeftOut] | None = None,
) -> list[Window]:
    """Windows of at most ``length`` tokens, domains taking turns, ``most_tokens`` in all.

    Args:
        split: ``calibration``, ``held_out``, or a half of that: ``choosing`` or ``reporting``.
        tokenize: document to token ids.
        left_out: filled with what is too short, by domain.

    Raises:
        BadFile: the text is too short to give a single window.
    """
    length = min(length, max(most_tokens, SHORTEST_WINDOW))
    by_domain: list[list[Window]] = []
    halved = split in (CHOOSING, REPORTING)
    whole = HELD_OUT if halved else split
    for text in texts:
        documents, seen = read_documents(text), LeftOut()
        if left_out is not None:
            left_out[text.domain] = seen
        if len(documents) >= HELD_OUT_EVERY:
            parts = [_windows(seen.see(tokenize(d)), length) for d in _of_split(documents, text.split, whole)]
            chosen = [part for document in parts for part in document]
        else:
            parts = [_windows(seen.see(tokenize(document)), length) for document in documents]
            chosen = _of_split([part for document in parts for part in document], text.split, whole)
        own = [Window(text.domain, tokens) for tokens in chosen]
        if halved and text.split == REPORTING:
            own = own if split == REPORTING else []
        elif halved:
            own = _half(own, split)
        by_domain.append(own)
    taken = _taking_turns(by_domain, most_tokens)
    if not taken:
        raise BadFile(
            f"the text gives no {whole.replace('_', '-')} windows of {SHORTEST_WINDOW} tokens or more",
            hint="give a longer text, a few hundred kB is good",
        )
    return taken
