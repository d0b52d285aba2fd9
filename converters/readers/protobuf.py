"""Protocol buffers on the wire: just enough to read messages whose numbers are known, with no schema compiler.

    message: (tag, value)*       tag = field number << 3 | wire type, a varint
    wire types: 0 varint | 1 eight bytes | 2 length (a varint), then that many bytes | 5 four bytes

What a length-delimited field holds (bytes, text, a message, packed numbers) only its reader knows, so `Message`
keeps the bytes and its methods say what they are.
"""

from __future__ import annotations

from collections.abc import Iterator

__all__ = ["Malformed", "Message", "fields", "varint"]

MAX_FIELDS = 1 << 18  # of one message; a field of two bytes costs a hundred times its size in memory


class Malformed(ValueError):
    """The bytes are not what they should be; whoever knows the file turns this into a CheckpointError."""


def varint(data: memoryview | bytes, at: int) -> tuple[int, int]:
    r"""The unsigned number that begins at `at`, and where it ends: seven bits a byte, the lowest first.

    >>> varint(b"\xac\x02", 0)
    (300, 2)
    """
    if at < len(data) and data[at] < 0x80:  # most are this short
        return data[at], at + 1
    value = shift = 0
    while at < len(data) and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            if value >> 64:
                break
            return value, at
    raise Malformed(f"no number ends at byte {at}")


def fields(data: memoryview | bytes) -> Iterator[tuple[int, int | memoryview]]:
    r"""The fields of one message in their order: number, and value (an unsigned int, or a view of the bytes).

    >>> [(number, value if isinstance(value, int) else bytes(value)) for number, value in fields(b"\x08\x05\x12\x02hi")]
    [(1, 5), (2, b'hi')]
    """
    data, at = memoryview(data), 0
    while at < len(data):
        tag, at = varint(data, at)
        number, wire = tag >> 3, tag & 7
        if not number:
            raise Malformed(f"a field before byte {at} has the number 0")
        if wire == 0:
            value, at = varint(data, at)
            yield number, value
            continue
        if wire == 2:
            length, at = varint(data, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise Malformed(f"field {number} has the wire type {wire}")
        if length > len(data) - at:
            raise Malformed(f"field {number} has {length} bytes where {len(data) - at} are left")
        raw = data[at : at + length]
        at += length
        yield number, raw if wire == 2 else int.from_bytes(raw, "little")


class Message:
    r"""One message, its fields sorted by number and nothing below them parsed.

    A field that is absent has its type's default; of several values of a single field the last counts.
    Every method raises Malformed where the bytes are not of the kind it was asked for.

    >>> entry = Message(b"\x08\x03\x12\x02hi\x1a\x02\x08\x07\x1a\x02\x08\x09")
    >>> entry.integer(1), entry.text(2), [dim.integer(1) for dim in entry.messages(3)], entry.integer(4)
    (3, 'hi', [7, 9], 0)
    """

    def __init__(self, data: memoryview | bytes) -> None:
        self._values: dict[int, list[int | memoryview]] = {}
        for count, (number, value) in enumerate(fields(data)):
            if count == MAX_FIELDS:
                raise Malformed(f"a message has more than {MAX_FIELDS} fields")
            self._values.setdefault(number, []).append(value)

    def __contains__(self, number: int) -> bool:
        return number in self._values

    def integer(self, number: int) -> int:
        """An int32, int64, enum, bool or fixed number; negative ones are stored in two's complement."""
        value = self._values.get(number, [0])[-1]
        if isinstance(value, memoryview):
            raise Malformed(f"field {number} is not a number")
        return value - (1 << 64) if value >> 63 else value

    def view(self, number: int) -> memoryview:
        """A view of a bytes field, without copying it."""
        values = self._views(number)
        return values[-1] if values else memoryview(b"")

    def text(self, number: int) -> str:
        try:
            return str(self.view(number), "utf-8")
        except UnicodeDecodeError as error:
            raise Malformed(f"field {number} is not UTF-8") from error

    def messages(self, number: int) -> Iterator[Message]:
        """A repeated message field; each is parsed when its turn comes."""
        return (Message(value) for value in self._views(number))

    def _views(self, number: int) -> list[memoryview]:
        views = [value for value in self._values.get(number, ()) if isinstance(value, memoryview)]
        if len(views) < len(self._values.get(number, ())):
            raise Malformed(f"field {number} is not length-delimited")
        return views
