"""Chunks of an HDF5 dataset: pieces of one shape, each sent through filters, put together again.

A filter's mask bit says that a chunk skipped it. Filters are undone last to first.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from converters.errors import DamagedCheckpoint, UnsafeCheckpoint
from converters.readers.keras.hdf5.messages import FLETCHER32, GZIP, SHUFFLE, Filter

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Chunk", "fletcher32", "join_chunks"]


@dataclass(frozen=True, slots=True)
class Chunk:
    corner: tuple[int, ...]  # its first element's indices
    address: int
    nbytes: int  # as stored
    mask: int


def join_chunks(
    chunks: Iterable[Chunk],
    read: Callable[[int, int], memoryview],
    filters: tuple[Filter, ...],
    shape: tuple[int, ...],
    chunk_shape: tuple[int, ...],
    itemsize: int,
) -> memoryview:
    """The C-contiguous bytes of an array of `shape`, of which `chunks` are every part."""
    import numpy as np

    array = np.empty(shape, f"V{itemsize}")
    for chunk in chunks:
        raw = _undo(read(chunk.address, chunk.nbytes), chunk.mask, filters, math.prod(chunk_shape) * itemsize)
        part = array[tuple(slice(first, first + n) for first, n in zip(chunk.corner, chunk_shape, strict=True))]
        part[...] = np.frombuffer(raw, array.dtype).reshape(chunk_shape)[tuple(map(slice, part.shape))]
    return array.reshape(-1).view(np.uint8).data


def fletcher32(data: bytes | memoryview) -> int:
    """HDF5's checksum: Fletcher's, over big-endian words of 16 bits, with 65535 for a sum that is a multiple of it.

    >>> hex(fletcher32(bytes([1, 2, 3, 4, 5])))
    '0xe0e0906'
    """
    import numpy as np

    words = np.frombuffer(bytes(data) + b"\0" * (len(data) % 2), ">u2").astype(np.uint64)
    weights = np.arange(len(words), 0, -1, dtype=np.uint64) % 65535
    sums = (int(words.sum()), int((words * weights).sum()))
    first, second = ((one - 1) % 65535 + 1 if one else 0 for one in sums)
    return second << 16 | first


def _undo(raw: memoryview | bytes, mask: int, filters: tuple[Filter, ...], nbytes: int) -> memoryview | bytes:
    """A chunk's bytes as they were before the filters, `nbytes` of them."""
    for i, one in reversed(list(enumerate(filters))):
        if mask >> i & 1:
            continue
        if one.id == GZIP:
            raw = zlib.decompressobj().decompress(raw, nbytes + 5)
            if len(raw) > nbytes + 4:  # a checksum may have been compressed with it
                raise UnsafeCheckpoint(f"a chunk of {nbytes} bytes inflates to more")
        elif one.id == SHUFFLE:
            raw = _unshuffle(raw, one.values[0])
        elif one.id == FLETCHER32:
            raw, stored = raw[:-4], bytes(raw[-4:])
            if fletcher32(raw) != int.from_bytes(stored, "little"):
                raise DamagedCheckpoint("a chunk's Fletcher-32 differs", cure="fetch the file again")
    if len(raw) != nbytes:
        raise DamagedCheckpoint(f"a chunk of {nbytes} bytes holds {len(raw)}")
    return raw


def _unshuffle(raw: memoryview | bytes, itemsize: int) -> bytes:
    """Elements put together again whose first bytes all stood first, then their second bytes, and so on."""
    import numpy as np

    whole = len(raw) // itemsize * itemsize
    planes: NDArray[np.uint8] = np.frombuffer(raw[:whole], np.uint8).reshape(itemsize, -1)
    return planes.T.tobytes() + bytes(raw[whole:])
