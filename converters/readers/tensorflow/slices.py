"""Slices: the parts in which TensorFlow saves a partitioned variable, and the variable that they make up.

A TensorSliceProto (tensorflow/core/framework/tensor_slice.proto) has an extent on each axis (1: 1 start, 2 length);
an extent without length is the whole axis. A slice's key is its tensor's name and its extents in OrderedCode
(tensorflow/core/lib/strings/ordered_code.h).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import product

from converters.readers.protobuf import Malformed, Message
from converters.tensors import DTYPES, TensorSpec

__all__ = ["Box", "check_cover", "join", "read_slice"]

MAX_SPLIT_AXES = 3  # TensorFlow's own partitioners split one

Box = tuple[tuple[int, int], ...]  # start and length on each axis


def read_slice(part: Message, name: str, shape: tuple[int, ...]) -> tuple[Box, bytes]:
    """What a TensorSliceProto takes of a tensor, and its key."""
    extents = [(extent.integer(1), extent.integer(2) if 2 in extent else -1) for extent in part.messages(1)]
    if len(extents) != len(shape):
        raise Malformed(f"a slice has {len(extents)} axes, not {len(shape)}")
    box = tuple((at, d - at if n < 0 else n) for (at, n), d in zip(extents, shape, strict=True))
    return box, _key(name, extents)


def check_cover(shape: tuple[int, ...], boxes: list[Box]) -> None:
    """Raise Malformed unless every element of `shape` lies in exactly one box.

    A sum of boxes is known by its signed corners (its mixed derivative), so no box is compared with another.

    >>> check_cover((4, 2), [((0, 3), (0, 2)), ((3, 1), (0, 2))])
    >>> check_cover((4, 2), [((0, 3), (0, 2)), ((2, 1), (0, 2))])
    Traceback (most recent call last):
    converters.readers.protobuf.Malformed: its 2 slices overlap or do not cover its shape (4, 2)
    """
    axes = [axis for axis, length in enumerate(shape) if any(box[axis] != (0, length) for box in boxes)]
    if len(axes) > MAX_SPLIT_AXES:
        raise Malformed(f"its slices split {len(axes)} axes; {MAX_SPLIT_AXES} is what is read here")
    corners: Counter[tuple[int, ...]] = Counter()
    for box, sign in [*((box, 1) for box in boxes), (tuple((0, length) for length in shape), -1)]:
        for ends in product(*(((box[a][0], 1), (box[a][0] + box[a][1], -1)) for a in axes)):
            corners[tuple(at for at, _ in ends)] += sign * math.prod(s for _, s in ends)
    if any(corners.values()):
        raise Malformed(f"its {len(boxes)} slices overlap or do not cover its shape {shape}")


def join(spec: TensorSpec, pieces: Iterable[tuple[Box, Callable[[], memoryview]]]) -> memoryview:
    """The tensor that `pieces` cover once; one of them is in memory at a time."""
    import numpy as np

    element = np.dtype(f"V{DTYPES[spec.dtype][1]}")
    raw = bytearray(spec.nbytes)
    whole = np.frombuffer(raw, element).reshape(spec.shape)
    for box, read in pieces:
        place = tuple(slice(start, start + length) for start, length in box)
        whole[place] = np.frombuffer(read(), element).reshape([length for _, length in box])
    return memoryview(raw)


def _key(name: str, extents: list[tuple[int, int]]) -> bytes:
    r"""Where a table keeps a slice: name, rank, and start and length (-1: the whole axis) on each axis.

    >>> _key("w", [(0, 2), (64, -1)])
    b'\x00w\x00\x01\x01\x02\x80\x82\xc0@\x7f'
    """
    escaped = name.encode().replace(b"\0", b"\0\xff")
    numbers = b"".join(_ordered(number) for extent in extents for number in extent)
    return b"\0" + escaped + b"\0\1" + (bytes([1, len(extents)]) if extents else b"\0") + numbers


def _ordered(number: int) -> bytes:
    """OrderedCode's signed number: n bytes in two's complement, the first n bits flipped."""
    n = (~number if number < 0 else number).bit_length() // 7 + 1
    return ((number ^ ((1 << n) - 1) << 7 * n) & (1 << 8 * n) - 1).to_bytes(n, "big")
