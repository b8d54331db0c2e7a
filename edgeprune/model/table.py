"""Where a GGUF header describes its tensors, found without reading the vocabulary in front of it.

Texts have no index in a GGUF: a vocabulary of 150,000 tokens and its merges are 6 MB to be walked over. For a file
far away it is cheaper to look into it here and there. What stands before the table (texts, small numbers) and
behind it (weights) is told apart by its looks, so that halving finds the table in a dozen looks. A wrong guess does
no harm: the caller takes the table only if all tensors in it add up to the file's size, and else walks.
"""

from __future__ import annotations

import re
import struct
from enum import Enum

import numpy as np

from edgeprune.model import ggml
from edgeprune.model.headers import LONGEST_NAME, MOST_DIMENSIONS, Readable

# A name with its length, and the number of extents.
_DESCRIBED = re.compile(rb"([\x01-\x3f])\x00{7}([\w.-]{1,63}?)([\x01-\x04])\x00{3}", re.ASCII)
_WINDOW = 1 << 13  # bytes of one look
_FIRST_LEAP, _FURTHEST = 1 << 20, 64 << 20
_LINKS = 12  # texts in a row that are no accident
_LARGEST_KIND = 16  # of a token
_LARGEST_EXTENT = 1 << 40  # of a tensor; what looks like one in a row of texts is larger
_LARGEST_DESCRIPTION = 8 + LONGEST_NAME + 4 + 8 * MOST_DIMENSIONS + 4 + 8


class Place(Enum):
    """Where a look at the file fell."""

    BEFORE, TABLE, BEHIND = range(3)


def find_table(data: Readable, start: int, texts: int, tensors: int) -> int | None:
    """Where the description of the first of ``tensors`` begins, or None if it was not found.

    Args:
        start: of an array of ``texts`` texts before it.
    """
    low = start + 8 * texts  # each has at least its length
    leap = _FIRST_LEAP
    while (place := _look(data, low + leap)) is Place.BEFORE and leap < _FURTHEST:
        leap *= 2
    high, low = low + leap, low + (leap // 2 if leap > _FIRST_LEAP else 0)
    if place is Place.BEFORE:
        return None
    middle = high
    while place is not Place.TABLE and high - low > _WINDOW // 2:
        middle = (low + high) // 2
        place = _look(data, middle)
        low, high = (middle, high) if place is Place.BEFORE else (low, middle)
    return _first(data, middle, tensors)


def _look(data: Readable, position: int) -> Place:
    window = data[position : position + _WINDOW]
    if len(_descriptions(window)) >= 2:
        return Place.TABLE
    # In pieces, because a look may fall on the border between texts and numbers.
    pieces = [window[begin : begin + _WINDOW // 4] for begin in range(0, len(window), _WINDOW // 4)]
    before = any(_is_text(piece) or _are_texts(piece) or _are_numbers(piece) for piece in pieces)
    return Place.BEFORE if before else Place.BEHIND


def _descriptions(window: bytes) -> list[tuple[int, int]]:
    """Begin and offset of each tensor that is described completely in ``window``."""
    found = []
    for match in _DESCRIBED.finditer(window):
        form = f"<{match[3][0]}QIQ"
        if match[1][0] != len(match[2]) or match.end() + struct.calcsize(form) > len(window):
            continue
        *shape, kind, offset = struct.unpack_from(form, window, match.end())
        if kind in ggml.BY_ID and all(0 < extent < _LARGEST_EXTENT for extent in shape):
            found.append((match.start(), offset))
    return found


def _is_text(window: bytes) -> bool:
    """A chat template or another long text."""
    return sum(byte >= 32 or byte in b"\t\n\r" for byte in window) > 0.98 * len(window) and b"\xff" not in window


def _are_texts(window: bytes) -> bool:
    """Texts one after the other, each behind its length."""
    for start in range(min(512, len(window))):
        position, links, filled = start, 0, 0
        while position + 8 <= len(window) and window[position + 2 : position + 8] == bytes(6):
            length = window[position] + 256 * window[position + 1]
            position += 8 + length
            links, filled = links + 1, filled + (length > 0)
        if position + 8 > len(window) and links >= _LINKS and 2 * filled > links:
            return True
    return False


def _are_numbers(window: bytes) -> bool:
    """Kinds of tokens, or their scores, which fall by one from token to token."""
    for shift in range(4):
        body = window[shift : len(window) - (len(window) - shift) % 4]
        kinds = np.frombuffer(body, "<u4")
        if kinds.size and kinds.max() < _LARGEST_KIND and kinds.any():
            return True
        with np.errstate(invalid="ignore", over="ignore"):
            scores = np.diff(np.frombuffer(body, "<f4").astype(np.float64))
        if scores.size and (np.abs(scores + 1) < 0.5).mean() > 0.9:
            return True
    return False


def _first(data: Readable, hit: int, tensors: int) -> int | None:
    """Where the table begins, of which ``hit`` is within reach: its first tensor has the offset 0."""
    begin, most = hit, tensors * _LARGEST_DESCRIPTION + 2 * _WINDOW
    end = hit + 2 * _WINDOW
    while end - begin <= most + 3 * _WINDOW:
        begin = max(begin - 2 * _WINDOW, 0)
        for place, offset in _descriptions(data[begin:end]):
            if offset == 0:
                return begin + place
        if begin == 0:
            break
    return None
