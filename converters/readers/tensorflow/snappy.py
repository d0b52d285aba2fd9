"""Snappy blocks, uncompressed: how tables hold what takes less room that way.

    block:   size when uncompressed (a varint) | element ...
    element: literal: tag (length - 1) << 2 | 0, the length in 1 to 4 further bytes where it is above 60; the bytes
             copy:    tag & 3 says how many bytes hold the distance back: 1 (and three bits of the tag), 2 or 4

This is the format_description.txt of google/snappy. A copy may overlap what it makes.
"""

from __future__ import annotations

from converters.readers.protobuf import Malformed, varint

__all__ = ["uncompress"]

MOST = 32  # times its size that a block can grow: a copy of 64 bytes takes 3


def uncompress(block: memoryview | bytes) -> memoryview:
    r"""The bytes that were compressed. Raises Malformed.

    >>> bytes(uncompress(b"\x09\x08abc\x09\x03"))
    b'abcabcabc'
    """
    size, at = varint(block, 0)
    if size > MOST * len(block):
        raise Malformed(f"{len(block)} bytes do not uncompress to {size}")
    out, end = bytearray(), len(block)
    while at < end and len(out) <= size:
        tag, at = block[at], at + 1
        kind, number = tag & 3, tag >> 2
        if kind == 0:
            wide = max(0, number - 59)
            length = (int.from_bytes(block[at : at + wide], "little") if wide else number) + 1
            at += wide + length
            out += block[at - length : at]
            continue
        length, wide, high = ((number & 7) + 4, 1, tag >> 5 << 8) if kind == 1 else (number + 1, 2 * kind - 2, 0)
        distance = high | int.from_bytes(block[at : at + wide], "little")
        at += wide
        start = len(out) - distance
        if not 0 <= start < len(out):
            raise Malformed(f"a copy goes back {distance} bytes from byte {len(out)}")
        out += (out[start : start + length] * (length // distance + 1))[:length]
    if at != end:
        raise Malformed(f"a block of {end} bytes ends at byte {at}")
    if len(out) != size:
        raise Malformed(f"a block uncompresses to {len(out)} bytes, not {size}")
    return memoryview(out)
