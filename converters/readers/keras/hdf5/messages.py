"""The messages of an HDF5 object header: what an object is, of what type and shape, and where its values lie.

    dataspace   version, rank, flags, ... | dimensions (8 bytes each)
    datatype    class + version << 4, bits (3 bytes), size (4) | properties of the class
    layout      version, class | address, size; or the values themselves; or rank + 1, index, chunk dimensions
    filters     version, count | id, length of the name, flags, count of values | name | values
    attribute   version, flags, sizes of name, datatype and dataspace (2 bytes each) | these three | the value

The functions raise ValueError, IndexError or struct.error on bytes that make no sense, and CheckpointError (without
a file's name) on what is sound and is not read.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

from converters.errors import CheckpointError, UnsafeCheckpoint

__all__ = [
    "AGAIN",
    "FLETCHER32",
    "GZIP",
    "SHUFFLE",
    "UNDEFINED",
    "Attribute",
    "Datatype",
    "Filter",
    "Layout",
    "parse_attribute",
    "parse_filters",
    "parse_layout",
    "parse_link",
    "parse_shape",
    "parse_type",
]

UNDEFINED = (1 << 64) - 1  # the address of what was never stored
GZIP, SHUFFLE, FLETCHER32 = 1, 2, 3
AGAIN = "load and save it again with Keras"
FLOATS = {  # bytes; sign bit; offset, bits; exponent at, bits; mantissa at, bits; bias
    (2, 15, 0, 16, 10, 5, 0, 10, 15): "float16",
    (2, 15, 0, 16, 7, 8, 0, 7, 127): "bfloat16",
    (4, 31, 0, 32, 23, 8, 0, 23, 127): "float32",
    (8, 63, 0, 64, 52, 11, 0, 52, 1023): "float64",
}
KINDS = (
    *("integers", "floats", "times", "text", "bit fields", "opaque values", "records", "references"),
    *("enumerations", "values of variable length", "arrays"),
)


@dataclass(frozen=True)
class Datatype:
    size: int  # bytes an element
    dtype: str | None = None  # a key of DTYPES
    text: str | None = None  # "fixed" or "variable" for strings
    words: str = ""  # for messages


@dataclass(frozen=True)
class Layout:
    """Where values lie: `address` of them, or of the index of chunks where there is a `chunk` shape."""

    address: int
    nbytes: int = 0
    chunk: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Filter:
    id: int
    values: tuple[int, ...]


@dataclass(frozen=True)
class Attribute:
    datatype: Datatype
    shape: tuple[int, ...] | None
    value: memoryview


def parse_shape(body: memoryview) -> tuple[int, ...] | None:
    """The dimensions; None for a dataspace of no element."""
    version, rank, _, kind = body[:4]
    if version not in (1, 2) or rank > 32:
        raise ValueError("a dataspace of an unknown form")
    if version == 2 and kind == 2:
        return None
    return struct.unpack_from(f"<{rank}Q", body, 8 if version == 1 else 4)


def parse_type(body: memoryview) -> Datatype:
    kind, bits = body[0] & 15, int.from_bytes(body[1:4], "little")
    (size,) = struct.unpack_from("<I", body, 4)
    words = KINDS[kind] + " of an unusual form" * (kind < 2)
    if kind == 0:
        offset, precision = struct.unpack_from("<HH", body, 8)
        if size in (1, 2, 4, 8) and not bits & 1 and (offset, precision) == (0, 8 * size):
            return Datatype(size, f"{'' if bits & 8 else 'u'}int{precision}")
    elif kind == 1 and bits & 0xFF == 0x20:  # little-endian, no padding, the leading 1 is not stored
        return Datatype(size, FLOATS.get((size, bits >> 8, *struct.unpack_from("<HH4BI", body, 8))), words=words)
    elif kind == 3:
        return Datatype(size, text="fixed", words=words)
    elif kind == 5 and size == 2:  # how Keras stores bfloat16; not every form says so in an attribute
        return Datatype(size, "bfloat16")
    elif kind == 8 and size == 1 and bytes(body[20:]).replace(b"\0", b"") == b"FALSETRUE\x01":
        return Datatype(size, "bool")
    elif kind == 9 and size == 16 and bits & 15 == 1:
        return Datatype(size, text="variable", words=words)
    return Datatype(size, words=words)


def parse_layout(body: memoryview, position: int) -> Layout:
    """`position` is where in the file the message's body begins: small values lie in it."""
    version, kind = body[0], body[1]
    if kind == 3:
        raise UnsafeCheckpoint("takes its values from other files (a virtual dataset)")
    if version in (3, 4) and kind == 0:
        return Layout(position + 4, *struct.unpack_from("<H", body, 2))
    if version in (3, 4) and kind == 1:
        return Layout(*struct.unpack_from("<QQ", body, 2))
    if version == 3 and kind == 2:
        rank, address = struct.unpack_from("<BQ", body, 2)
        return Layout(address, chunk=struct.unpack_from(f"<{rank}I", body, 11))
    raise CheckpointError(f"is laid out in a form that is not read (version {version}, class {kind})", cure=AGAIN)


def parse_filters(body: memoryview) -> tuple[Filter, ...]:
    version, count = body[0], body[1]
    at, filters = (8 if version == 1 else 2), []
    for _ in range(count):
        (number,) = struct.unpack_from("<H", body, at)
        if version == 1 or number >= 256:
            length, _, values = struct.unpack_from("<3H", body, at + 2)
            at += 8 + length
        else:
            _, values = struct.unpack_from("<2H", body, at + 2)
            at += 6
        filters.append(Filter(number, struct.unpack_from(f"<{values}I", body, at)))
        at += 4 * (values + values % 2 if version == 1 else values)
    numbers = [one.id for one in filters]
    if len(set(numbers)) < count or not {GZIP, SHUFFLE, FLETCHER32}.issuperset(numbers):
        raise CheckpointError(f"is stored through HDF5 filters {numbers}, of which some are not read", cure=AGAIN)
    return tuple(filters)


def parse_attribute(body: memoryview) -> tuple[str, Attribute]:
    version, flags, *sizes = struct.unpack_from("<BB3H", body)
    if version not in (1, 2, 3) or (version > 1 and flags):
        raise ValueError("an attribute of an unknown form")
    at, parts = (9 if version == 3 else 8), []
    for size in sizes:
        parts.append(body[at : at + size])
        at += _padded(size) if version == 1 else size
    name, datatype, shape = bytes(parts[0]).partition(b"\0")[0], parse_type(parts[1]), parse_shape(parts[2])
    nbytes = datatype.size * math.prod(shape) if shape is not None else 0
    if at + nbytes > len(body):
        raise ValueError("an attribute that is cut off")
    return name.decode(), Attribute(datatype, shape, body[at : at + nbytes])


def parse_link(body: memoryview) -> tuple[str, int]:
    """A link's name and the address that it leads to; UNDEFINED for one that is soft or leads to another file."""
    flags = body[1]
    at = 2 + bool(flags & 8) + 8 * bool(flags & 4) + bool(flags & 16)
    width = 1 << (flags & 3)
    start = at + width
    end = start + int.from_bytes(body[at:start], "little")
    is_hard = not flags & 8 or body[2] == 0
    return bytes(body[start:end]).decode(), struct.unpack_from("<Q", body, end)[0] if is_hard else UNDEFINED


def _padded(size: int) -> int:
    return -(-size // 8) * 8
