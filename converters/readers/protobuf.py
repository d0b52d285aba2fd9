"""Protocol buffers on the wire: just enough to read messages whose numbers are known, with no schema compiler.

    message: (tag, value)*       tag = field number << 3 | wire type, a varint
    wire types: 0 varint | 1 eight bytes | 2 length (a varint), then that many bytes | 5 four bytes

What a length-delimited field holds (bytes, text, a message, packed numbers) only its reader knows, so `Message`
keeps the bytes and its methods say what they are. A message lies in memory, or in a file as a `Span`: then its tags
and lengths are read, and of everything else the place is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from converters.errors import DamagedCheckpoint
from converters.readers.files import SourceFile

__all__ = ["Malformed", "Message", "ReadAhead", "Span", "blame", "fields", "varint", "varints"]

MAX_FIELDS = 1 << 18  # of one message; a field of two bytes costs a hundred times its size in memory
MAX_VIEW = 1 << 20  # bytes of a field in a file that is wanted at once: a name, a shape
HEAD = 20  # bytes that a tag and a number, or a tag and a length, take at most


class Malformed(ValueError):
    """The bytes are not what they should be; `blame` turns this into a DamagedCheckpoint."""


@contextmanager
def blame(file: SourceFile, tensor: str | None = None) -> Iterator[None]:
    """Say of which file, and which tensor, something is Malformed."""
    try:
        yield
    except Malformed as error:
        raise DamagedCheckpoint(str(error), file=file.path, tensor=tensor) from error


class ReadAhead:
    """A file of which the piece read last is kept, so that a walk in small steps costs few reads."""

    PIECE = 1 << 16

    def __init__(self, source: SourceFile) -> None:
        self.source, self._start, self._piece = source, 0, memoryview(b"")

    def view(self, start: int, size: int) -> memoryview:
        """`size` bytes from `start`, which others may hold as well. Raises DamagedCheckpoint past the end."""
        at = start - self._start
        if not 0 <= at <= at + size <= len(self._piece):
            left = max(0, self.source.size - start)
            self._piece, self._start, at = self.source.read(start, max(size, min(self.PIECE, left))), start, 0
        return self._piece[at : at + size]


@dataclass(slots=True)
class Span:
    """Bytes in a file, unread."""

    file: ReadAhead
    start: int
    size: int

    @classmethod
    def whole(cls, source: SourceFile) -> Span:
        return cls(ReadAhead(source), 0, source.size)

    def __len__(self) -> int:
        return self.size

    def part(self, at: int, size: int) -> Span:
        return Span(self.file, self.start + at, size)

    def head(self, at: int) -> memoryview:
        """What a tag and what follows it can take."""
        return self.file.view(self.start + at, min(HEAD, self.size - at))

    def view(self) -> memoryview:
        """The bytes of something small."""
        if self.size > MAX_VIEW:
            raise Malformed(f"a name or a shape takes {self.size} bytes")
        return self.file.view(self.start, self.size)

    def read(self, tensor: str | None = None) -> memoryview:
        """The bytes, in memory that nobody else holds."""
        return self.file.source.read(self.start, self.size, tensor)


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


def varints(data: memoryview) -> Any:
    r"""Packed numbers as an array of uint64; a negative one is in two's complement.

    >>> varints(memoryview(b"\x05\xac\x02")).tolist()
    [5, 300]
    """
    import numpy as np

    raw = np.frombuffer(data, np.uint8)
    last = np.flatnonzero(raw < 0x80)
    first = np.concatenate(([0], last[:-1] + 1))[: len(last)]
    lengths = last - first + 1
    if len(raw) and (not len(last) or last[-1] != len(raw) - 1 or lengths.max() > 10):
        raise Malformed("packed numbers do not end where they should")
    values = np.zeros(len(last), np.uint64)
    for byte in range(lengths.max(initial=0)):
        longer = np.flatnonzero(lengths > byte)
        values[longer] |= (raw[first[longer] + byte] & np.uint64(0x7F)) << np.uint64(7 * byte)
    return values


def fields(data: memoryview | bytes | Span) -> Iterator[tuple[int, int | memoryview | Span]]:
    r"""The fields of one message in their order: number, and value (an unsigned int, or a part of `data`).

    >>> [(number, value if isinstance(value, int) else bytes(value)) for number, value in fields(b"\x08\x05\x12\x02hi")]
    [(1, 5), (2, b'hi')]
    """
    data, at = data if isinstance(data, Span) else memoryview(data), 0
    size = len(data)
    while at < size:
        head = data.head(at) if isinstance(data, Span) else data[at : at + HEAD]
        tag, used = varint(head, 0)
        number, wire = tag >> 3, tag & 7
        if not number:
            raise Malformed(f"a field at byte {at} has the number 0")
        if wire == 0:
            value, used = varint(head, used)
            at += used
            yield number, value
            continue
        if wire == 2:
            length, used = varint(head, used)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise Malformed(f"field {number} has the wire type {wire}")
        at += used
        if length > size - at:
            raise Malformed(f"field {number} has {length} bytes where {size - at} are left")
        if wire != 2:
            yield number, int.from_bytes(head[used : used + length], "little")
        else:
            yield number, data.part(at, length) if isinstance(data, Span) else data[at : at + length]
        at += length


class Message:
    r"""One message, its fields sorted by number and nothing below them parsed.

    A field that is absent has its type's default; of several values of a single field the last counts.
    Every method raises Malformed where the bytes are not of the kind it was asked for.

    >>> entry = Message(b"\x08\x03\x12\x02hi\x1a\x02\x08\x07\x1a\x02\x08\x09")
    >>> entry.integer(1), entry.text(2), [dim.integer(1) for dim in entry.messages(3)], entry.integer(4)
    (3, 'hi', [7, 9], 0)
    """

    def __init__(self, data: memoryview | bytes | Span) -> None:
        self._values: dict[int, list[int | memoryview | Span]] = {}
        for count, (number, value) in enumerate(fields(data)):
            if count == MAX_FIELDS:
                raise Malformed(f"a message has more than {MAX_FIELDS} fields")
            self._values.setdefault(number, []).append(value)

    def __contains__(self, number: int) -> bool:
        return number in self._values

    def is_bytes(self, number: int) -> bool:
        """Whether there is such a field, and it is not a number."""
        return not isinstance(self._values.get(number, [0])[-1], int)

    def integer(self, number: int) -> int:
        """An int32, int64, enum, bool or fixed number; negative ones are stored in two's complement."""
        value = self._values.get(number, [0])[-1]
        if not isinstance(value, int):
            raise Malformed(f"field {number} is not a number")
        return value - (1 << 64) if value >> 63 else value

    def integers(self, number: int) -> list[int]:
        """A repeated number, packed or not."""
        found: list[int] = []
        for value in self._values.get(number, ()):
            found += [value] if isinstance(value, int) else varints(_viewed(value)).tolist()
        return [value - (1 << 64) if value >> 63 else value for value in found]

    def view(self, number: int) -> memoryview:
        """A view of a bytes field, without copying it."""
        values = self.parts(number)
        return _viewed(values[-1]) if values else memoryview(b"")

    def text(self, number: int) -> str:
        return self.texts(number)[-1] if number in self else ""

    def texts(self, number: int) -> list[str]:
        try:
            return [str(_viewed(part), "utf-8") for part in self.parts(number)]
        except UnicodeDecodeError as error:
            raise Malformed(f"field {number} is not UTF-8") from error

    def message(self, number: int) -> Message:
        values = self.parts(number)
        return Message(values[-1] if values else b"")

    def messages(self, number: int) -> Iterator[Message]:
        """A repeated message field; each is parsed when its turn comes."""
        return (Message(value) for value in self.parts(number))

    def parts(self, number: int) -> list[memoryview | Span]:
        """All values of a field of bytes, as they lie in memory or in the file."""
        parts = [value for value in self._values.get(number, ()) if not isinstance(value, int)]
        if len(parts) < len(self._values.get(number, ())):
            raise Malformed(f"field {number} is not length-delimited")
        return parts


def _viewed(value: memoryview | Span) -> memoryview:
    return value.view() if isinstance(value, Span) else value
