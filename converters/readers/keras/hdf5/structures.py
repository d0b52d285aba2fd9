"""The structures of HDF5 files: superblock, object headers, groups and the trees and heaps behind them.

    superblock      signature | versions, sizes | base, end of file | the root's header
    object header   version 1: version, count, size | messages (type, size, flags, body); version 2 begins "OHDR"
    group           a B-tree ("TREE") of symbol tables ("SNOD"), their names in a heap ("HEAP"); or link messages
    text            of variable length lies in global heaps ("GCOL"), by address and index

Each is read once, so all of them together are no longer than the file: a parser gives up where they are longer, which
bounds every cycle and every bomb. Malformed bytes raise ValueError, LookupError or struct.error, and CheckpointErrors
here name no file: `hdf5.faults` turns the first into the second and adds the names.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Protocol

from converters.errors import CheckpointError, DamagedCheckpoint, UnsafeCheckpoint
from converters.readers.keras.hdf5 import messages
from converters.readers.keras.hdf5.chunks import Chunk
from converters.readers.keras.hdf5.messages import AGAIN, UNDEFINED, Attribute, Filter

__all__ = ["ATTRIBUTE", "LAYOUT", "LONGEST_PATH", "SIGNATURE", "Dataset", "Parser", "Stretch"]

SIGNATURE = b"\x89HDF\r\n\x1a\n"
EXPANSION = 1100  # bytes declared for one stored; deflate reaches 1032
ROOMY_CHUNK = 16 << 20  # bytes that a chunk may take however small its dataset
LONGEST_PATH = 1024  # characters; bounds the depth of groups too
MOST_STRUCTURES = 64 << 20  # bytes; some 20,000 layers
MOST_TEXT = 32 << 20  # bytes, of all attributes together

SPACE, LINKS, TYPE, LINK, EXTERNAL, LAYOUT = 0x1, 0x2, 0x3, 0x6, 0x7, 0x8  # types of messages
FILTERS, ATTRIBUTE, CONTINUATION, SYMBOLS, ATTRIBUTES = 0xB, 0xC, 0x10, 0x11, 0x15
READ = {SPACE, LINKS, TYPE, LINK, EXTERNAL, LAYOUT, FILTERS, ATTRIBUTE, SYMBOLS, ATTRIBUTES}
GROUP_TREE, CHUNK_TREE = 0, 1


class Stretch(Protocol):
    """Bytes that can be read by position; a SourceFile is one."""

    size: int

    def read(self, offset: int, nbytes: int, tensor: str | None = None) -> memoryview:
        """Exactly these bytes, in memory that nobody else holds; DamagedCheckpoint beyond the end."""


@dataclass(frozen=True)
class Dataset:
    """A tensor's place: `nbytes` at `address`, or every one of `chunks`."""

    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    address: int
    chunk_shape: tuple[int, ...] = ()
    chunks: tuple[Chunk, ...] = ()
    filters: tuple[Filter, ...] = ()


class Parser:
    """The structures of one file, each read when it is asked for; bytes are counted against three rooms."""

    def __init__(self, stretch: Stretch) -> None:
        self.stretch = stretch
        self.room = min(2 * stretch.size + (64 << 10), MOST_STRUCTURES)  # bytes of structures still to be read
        self.text_room = MOST_TEXT
        self.data_room = stretch.size  # bytes of tensors, as stored
        self.heaps: dict[int, dict[int, memoryview]] = {}

    def take(self, address: int, nbytes: int) -> memoryview:
        """Bytes of a structure."""
        self.charge(nbytes)
        return self.stretch.read(address, nbytes)

    def charge(self, nbytes: int) -> None:
        self.room -= nbytes
        if self.room < 0:
            raise UnsafeCheckpoint("its structures lie within one another, or are too many")

    def root(self) -> int:
        """The address of the root's header."""
        head = self.take(0, min(100, self.stretch.size))
        if bytes(head[:8]) != SIGNATURE:
            raise ValueError("no HDF5 where it should be")
        if len(head) < 100:
            raise DamagedCheckpoint(f"ends after {len(head)} bytes", cure="is the download complete?")
        version = head[8]
        if version > 3:
            raise CheckpointError(f"is HDF5 with a superblock of version {version}", cure=AGAIN)
        old, after = version < 2, 24 if version == 0 else 28
        sizes = head[13:15] if old else head[9:11]
        base, _, end, *rest = struct.unpack_from("<6Q" if old else "<4Q", head, after if old else 12)
        if bytes(sizes) != b"\x08\x08" or base:
            raise CheckpointError("is HDF5 with addresses of an unusual form", cure=AGAIN)
        if end > self.stretch.size:
            problem = f"ends after {self.stretch.size} of {end} bytes"
            raise DamagedCheckpoint(problem, cure="is the download complete?")
        return int(rest[2] if old else rest[0])

    def messages(self, address: int) -> Iterator[tuple[int, int, memoryview]]:
        """Type, position and body of the messages in an object header."""
        head = self.take(address, 16)
        new = bytes(head[:4]) == b"OHDR"
        if new:
            flags = head[5]
            at = address + 6 + 16 * bool(flags & 0x20) + 4 * bool(flags & 0x10)
            width = 1 << (flags & 3)
            blocks = [(at + width, int.from_bytes(self.take(at, width), "little"))]
            prefix = 6 if flags & 4 else 4
        elif head[0] == 1:
            blocks, prefix = [(address + 16, *struct.unpack_from("<I", head, 8))], 8
        else:
            raise ValueError(f"no object header at {address}")
        for start, size in blocks:  # which grows
            block, at = self.take(start, size), 0
            while at + prefix <= size:
                kind, length, flags = struct.unpack_from("<BHB" if new else "<HHB", block, at)
                body = block[at + prefix : at + prefix + length]
                if kind == CONTINUATION:
                    next_start, next_size = struct.unpack_from("<QQ", body)
                    blocks.append((next_start + 4, next_size - 8) if new else (next_start, next_size))
                elif kind in READ:
                    if flags & 2:
                        raise CheckpointError("shares parts of its description with others", cure=AGAIN)
                    yield kind, start + at + prefix, body
                at += prefix + length

    def links(self, header: list[tuple[int, int, memoryview]]) -> Iterator[tuple[str, int]]:
        """Name and address of a group's members; UNDEFINED for links that are not hard."""
        for kind, _, body in header:
            if kind == LINK:
                yield messages.parse_link(body)
            elif kind == SYMBOLS:
                yield from self.symbols(*struct.unpack_from("<QQ", body))
            elif kind in (LINKS, ATTRIBUTES):
                tracked = (8 if kind == LINKS else 2) * (body[1] & 1)
                if struct.unpack_from("<Q", body, 2 + tracked)[0] != UNDEFINED:
                    raise CheckpointError("is stored in a newer form of HDF5 (a fractal heap)", cure=AGAIN)

    def symbols(self, tree: int, heap: int) -> Iterator[tuple[str, int]]:
        head = self.take(heap, 32)
        size, _, address = struct.unpack_from("<QQQ", head, 8)
        names = bytes(self.take(address, size))
        for _, node in self.leaves(tree, GROUP_TREE, 8):
            signature, count = struct.unpack("<4s2xH", self.take(node, 8))
            if signature != b"SNOD" or bytes(head[:4]) != b"HEAP":
                raise ValueError("no symbol table where one should be")
            table = self.take(node + 8, 40 * count)
            for at in range(0, 40 * count, 40):
                start, child, cache = struct.unpack_from("<QQI", table, at)
                end = names.index(0, start, start + LONGEST_PATH)
                yield names[start:end].decode(), child if cache != 2 else UNDEFINED  # 2: a soft link

    def leaves(self, root: int, kind: int, width: int) -> Iterator[tuple[memoryview, int]]:
        """Key (of `width` bytes) and address of what a B-tree leads to."""
        pending: list[tuple[int, int | None]] = [(root, None)]
        while pending:
            address, expected = pending.pop()
            signature, found, level, count = struct.unpack_from("<4sBBH", self.take(address, 24))
            if signature != b"TREE" or found != kind or expected not in (None, level):
                raise ValueError("no B-tree where one should be")
            body = self.take(address + 24, count * (width + 8))
            for at in range(0, count * (width + 8), width + 8):
                (child,) = struct.unpack_from("<Q", body, at + width)
                if level:
                    pending.append((child, level - 1))
                else:
                    yield body[at : at + width], child

    def dataset(self, header: list[tuple[int, int, memoryview]]) -> Dataset:
        parts = {kind: (body, position) for kind, position, body in header}
        if EXTERNAL in parts:
            raise UnsafeCheckpoint("keeps its values in another file (external storage)")
        layout = messages.parse_layout(*parts[LAYOUT])
        datatype, shape = messages.parse_type(parts[TYPE][0]), messages.parse_shape(parts[SPACE][0])
        if datatype.dtype is None or shape is None:
            raise CheckpointError(f"holds {datatype.words if shape is not None else 'nothing'}, which is no tensor")
        nbytes = math.prod(shape) * datatype.size
        if layout.chunk is None:
            if layout.nbytes != nbytes or (nbytes and layout.address + nbytes > self.stretch.size):
                problem = f"takes {nbytes} bytes; {layout.nbytes} are said to be stored at {layout.address}"
                raise DamagedCheckpoint(problem, cure="is the download complete?")
            self.spend(nbytes)
            return Dataset(shape, datatype.dtype, nbytes, layout.address)
        filters = messages.parse_filters(parts[FILTERS][0]) if FILTERS in parts else ()
        chunks = tuple(self.chunks(layout.address, len(layout.chunk)))
        stored = sum(chunk.nbytes for chunk in chunks)
        self.spend(stored)
        largest = math.prod(layout.chunk)
        if nbytes > EXPANSION * stored or largest > max(nbytes, ROOMY_CHUNK):
            raise UnsafeCheckpoint(f"declares {nbytes} bytes in chunks of {largest}, and stores {stored}")
        *chunk_shape, itemsize = layout.chunk
        grid = set(_corners(shape, chunk_shape, len(chunks)))
        if itemsize != datatype.size or len(grid) != len(chunks) or grid != {chunk.corner for chunk in chunks}:
            raise DamagedCheckpoint("its chunks are not those that its shape asks for", cure="fetch it again")
        return Dataset(shape, datatype.dtype, nbytes, layout.address, tuple(chunk_shape), chunks, filters)

    def chunks(self, tree: int, width: int) -> Iterator[Chunk]:
        if tree == UNDEFINED:
            return
        for key, address in self.leaves(tree, CHUNK_TREE, 8 + 8 * width):
            nbytes, mask, *corner = struct.unpack(f"<II{width}Q", key)
            yield Chunk(tuple(corner[:-1]), address, nbytes, mask)

    def spend(self, nbytes: int) -> None:
        """Account for bytes of a tensor."""
        self.data_room -= nbytes
        if self.data_room < 0:
            raise UnsafeCheckpoint("shares its bytes with other tensors: together they are larger than the file")

    def texts(self, attribute: Attribute) -> list[str]:
        datatype, value = attribute.datatype, attribute.value
        if datatype.text is None and value:  # an empty list is one of floats
            raise ValueError(f"holds {datatype.words or datatype.dtype}, not text")
        found = []
        for at in range(0, len(value), datatype.size or 1):
            if datatype.text == "fixed":
                piece = bytes(value[at : at + datatype.size])
            else:
                length, address, index = struct.unpack_from("<IQI", value, at)
                piece = bytes(self.heap(address)[index][:length]) if length else b""
            self.text_room -= len(piece)
            if self.text_room < 0:
                raise UnsafeCheckpoint(f"holds more than {MOST_TEXT >> 20} MB of text")
            found.append(piece.partition(b"\0")[0].decode())
        return found

    def heap(self, address: int) -> dict[int, memoryview]:
        """What a global heap holds, by index."""
        if address not in self.heaps:
            signature, size = struct.unpack("<4s4xQ", self.take(address, 16))
            if signature != b"GCOL" or size > MOST_TEXT:
                raise ValueError("no heap where one should be")
            heap, at, objects = self.take(address, size), 16, self.heaps.setdefault(address, {})
            while at + 16 <= size:
                index, length = struct.unpack_from("<H6xQ", heap, at)
                if not index:  # the free space at the end
                    break
                objects[index] = heap[at + 16 : at + 16 + length]
                at += 16 + -(-length // 8) * 8
        return self.heaps[address]


def _corners(shape: tuple[int, ...], chunk_shape: list[int], most: int) -> Iterator[tuple[int, ...]]:
    """The first indices of every chunk; of none where there would be more than `most`."""
    if len(shape) != len(chunk_shape) or not all(chunk_shape):
        raise ValueError("chunks of another rank")
    if math.prod(-(-n // step) for n, step in zip(shape, chunk_shape, strict=True)) <= most:
        yield from product(*(range(0, n, step) for n, step in zip(shape, chunk_shape, strict=True)))
