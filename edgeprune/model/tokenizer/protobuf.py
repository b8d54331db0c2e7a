"""The wire format of protocol buffers, as far as a SentencePiece model needs it.

A message is a row of fields: a key, which is the field's number and how its value is written, and the value. See
https://protobuf.dev/programming-guides/encoding/.
"""

from __future__ import annotations

from collections.abc import Iterator

from edgeprune.errors import BadFile

_VARINT, _EIGHT_BYTES, _LENGTH, _FOUR_BYTES = 0, 1, 2, 5
_LONGEST_VARINT = 10


def fields(message: bytes, where: str) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field: an int for one written as a varint (64 bits, unsigned), else its bytes.

    Raises:
        BadFile: the message is cut off, or is none.
    """
    position = 0
    while position < len(message):
        key, position = _varint(message, position, where)
        number, written = key >> 3, key & 7
        if not number:
            raise BadFile(f"{where} is no protocol buffer: a field without a number at byte {position:,}")
        if written == _VARINT:
            value, position = _varint(message, position, where)
            yield number, value
            continue
        if written == _LENGTH:
            length, position = _varint(message, position, where)
        elif written in (_EIGHT_BYTES, _FOUR_BYTES):
            length = 8 if written == _EIGHT_BYTES else 4
        else:
            raise BadFile(f"{where} is no protocol buffer: a value of kind {written} at byte {position:,}")
        if length > len(message) - position:
            raise BadFile(f"{where} is cut off: {length:,} bytes claimed at byte {position:,} of {len(message):,}")
        yield number, message[position : position + length]
        position += length


def _varint(message: bytes, position: int, where: str) -> tuple[int, int]:
    """Seven bits a byte, the lowest first, and where it ends."""
    value = 0
    for offset, byte in enumerate(message[position : position + _LONGEST_VARINT]):
        value |= (byte & 0x7F) << (7 * offset)
        if byte < 0x80:
            return value & (2**64 - 1), position + offset + 1
    raise BadFile(f"{where} is no protocol buffer, or cut off: a number without an end at byte {position:,}")
