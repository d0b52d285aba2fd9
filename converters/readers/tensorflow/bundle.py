"""TensorFlow's tensor bundle: `PREFIX.index`, a sorted table of entries, beside `PREFIX.data-00000-of-0000N`.

    ""            -> header: number of data files, byte order, version
    NAME          -> entry: dtype, shape, and either the place of its bytes and their CRC-32C, or its slices
    slice's key   -> entry of one slice of a partitioned variable

    header: 1 data files | 2 byte order | 3 version: 1 producer, 2 oldest reader
    entry:  1 dtype | 2 shape: 2 dimension (1 size), 3 unknown rank | 3 data file | 4 offset | 5 size | 6 masked CRC-32C
            7 slice: 1 extent on an axis (1 start, 2 length)

These are the fields of BundleHeaderProto and BundleEntryProto (tensorflow/core/protobuf/tensor_bundle.proto).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NoReturn

from converters.errors import CheckpointError, DamagedCheckpoint, UnsafeCheckpoint
from converters.readers.files import SourceFile
from converters.readers.protobuf import Malformed, Message, blame, varint
from converters.readers.tensor_protos import TENSORFLOW, tensorflow_shape
from converters.readers.tensorflow.slices import Box, check_cover, join, read_slice
from converters.readers.tensorflow.sstable import crc32c, mask_crc, read_table
from converters.tensors import DTYPES, LazyTensor, TensorSpec

__all__ = ["Bundle", "Entry", "open_bundle"]

SLICES = 7  # the field of an entry
MAX_INDEX = 1 << 23  # bytes; a thousand variables take a hundred thousand
MAX_ENTRIES = 1 << 17


@dataclass(frozen=True, slots=True)
class Entry:
    """What the index says of one tensor, or of one slice of a tensor."""

    dtype: int  # TensorFlow's DataType
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    crc: int  # masked
    pieces: tuple[tuple[Box, Entry], ...] = ()  # of a partitioned variable, which has no place of its own


@dataclass(frozen=True)
class Bundle:
    """An open bundle: its files, and its entries by name. The tensors' bytes are unread."""

    index: SourceFile
    shards: dict[int, SourceFile]
    producer: int  # version of the format
    entries: dict[str, Entry]

    def tensor(self, key: str, name: str) -> LazyTensor:
        """The numbers under `key` as the tensor `name`; the slices of a partitioned variable are joined."""
        entry = self.entries[key]
        spec = TensorSpec(name, entry.shape, TENSORFLOW.dtypes[entry.dtype])
        if not entry.pieces:
            return LazyTensor(spec, partial(self._read_numbers, entry, name))
        pieces = [(box, partial(self._read_numbers, piece, name)) for box, piece in entry.pieces]
        return LazyTensor(spec, partial(join, spec, pieces))

    def strings(self, key: str) -> list[memoryview]:
        """The elements of the string tensor under `key`, in C order."""
        entry = self.entries[key]
        file = self.shards[entry.shard]
        raw = file.read(entry.offset, entry.size, key)
        with blame(file, key):
            lengths, at = _string_lengths(raw, math.prod(entry.shape))
        crc = crc32c(b"".join(length.to_bytes(4 if length < 1 << 32 else 8, "little") for length in lengths))
        if mask_crc(crc) != int.from_bytes(raw[at : at + 4], "little") or mask_crc(crc32c(raw[at:], crc)) != entry.crc:
            self._refuse_crc(entry, key)
        at, elements = at + 4, []
        for length in lengths:
            elements.append(raw[at : at + length])
            at += length
        return elements

    def _read_numbers(self, entry: Entry, name: str) -> memoryview:
        raw = self.shards[entry.shard].read(entry.offset, entry.size, name)
        if mask_crc(crc32c(raw)) != entry.crc:
            self._refuse_crc(entry, name)
        return raw

    def _refuse_crc(self, entry: Entry, name: str) -> NoReturn:
        file = self.shards[entry.shard].path
        raise DamagedCheckpoint("its CRC-32C differs", file=file, tensor=name, cure="fetch it again")


def open_bundle(prefix: Path) -> Bundle:
    """The bundle whose files begin with `prefix`.

    Raises DamagedCheckpoint where entries contradict themselves, each other or the files' sizes, or a data file
    is missing; UnsafeCheckpoint where the index is absurdly large; CheckpointError where it is no bundle's.
    """
    index = SourceFile(prefix.with_name(f"{prefix.name}.index"))
    if index.size > MAX_INDEX:
        raise UnsafeCheckpoint(f"an index of {index.size} bytes is beyond reason", file=index.path)
    table = read_table(index)
    key, value = next(table, (None, memoryview(b"")))
    if key != b"":
        raise CheckpointError("is a table, but not a TensorFlow bundle's: it has no header", file=index.path)
    with blame(index):
        count, producer = _header(Message(value))
    entries = _entries(index, table)
    return Bundle(index, _open_shards(prefix, count, index, entries), producer, entries)


def _header(header: Message) -> tuple[int, int]:
    """The number of data files and the version of the format's writer."""
    version = header.message(3)
    if header.integer(2):
        raise Malformed("was written on a big-endian machine, which is not read here")
    if version.integer(2) > 1:
        raise Malformed(f"asks for a reader of version {version.integer(2)}; 1 is known")
    if not 0 < header.integer(1) < 1 << 31:
        raise Malformed(f"counts {header.integer(1)} data files")
    return header.integer(1), version.integer(1)


def _entries(index: SourceFile, table: Iterator[tuple[bytes, memoryview]]) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    partitioned: dict[str, memoryview] = {}
    slices: dict[bytes, Entry] = {}
    for count, (key, value) in enumerate(table):
        if count == MAX_ENTRIES:
            raise UnsafeCheckpoint(f"lists more than {MAX_ENTRIES} tensors", file=index.path)
        name = key.decode("utf-8", "backslashreplace")
        with blame(index, name):
            message = Message(value)
            if key.startswith(b"\0"):
                if SLICES in message:
                    raise Malformed("is a slice that has slices")
                slices[key] = _entry(message)
                continue
            if name.encode() != key:
                raise Malformed("its name is not UTF-8")
            entries[name] = _entry(message)
            if SLICES in message:
                partitioned[name] = value
    for name, value in partitioned.items():
        with blame(index, name):
            pieces = tuple(_pieces(name, entries[name], Message(value), slices))
            entries[name] = replace(entries[name], pieces=pieces)
    for key in slices:
        with blame(index, key.decode("utf-8", "backslashreplace")):
            raise Malformed("is the slice of no tensor")
    return entries


def _entry(message: Message) -> Entry:
    dims = tensorflow_shape(message.message(2))
    dtype, size = message.integer(1), message.integer(5)
    kind = TENSORFLOW.dtypes.get(dtype)
    if kind and SLICES not in message and size != math.prod(dims) * DTYPES[kind][1]:
        raise Malformed(f"its {size} bytes are not a {kind} tensor of shape {dims}")
    return Entry(dtype, dims, message.integer(3), message.integer(4), size, message.integer(6))


def _pieces(name: str, whole: Entry, message: Message, slices: dict[bytes, Entry]) -> Iterator[tuple[Box, Entry]]:
    """Take the slices of `whole` out of `slices`; together they must cover it once."""
    boxes = []
    for part in message.messages(SLICES):
        box, key = read_slice(part, name, whole.shape)
        piece = slices.pop(key, None)
        if piece is None:
            raise Malformed(f"its slice {box} is missing")
        if piece.dtype != whole.dtype or piece.shape != tuple(length for _, length in box):
            raise Malformed(f"its slice {box} holds another dtype or shape")
        boxes.append(box)
        yield box, piece
    check_cover(whole.shape, boxes)


def _open_shards(prefix: Path, count: int, index: SourceFile, entries: dict[str, Entry]) -> dict[int, SourceFile]:
    """The data files that hold anything, every entry checked to lie within one, and no two on the same bytes."""
    shards: dict[int, SourceFile] = {}
    places = [(piece, name) for name, entry in entries.items() for _, piece in entry.pieces or (((), entry),)]
    end = 0
    for place, name in sorted(places, key=lambda row: (row[0].shard, row[0].offset, row[0].size)):
        if place.shard not in range(count):
            raise DamagedCheckpoint(f"lies in data file {place.shard} of {count}", file=index.path, tensor=name)
        if place.shard not in shards:
            path = prefix.with_name(f"{prefix.name}.data-{place.shard:05}-of-{count:05}")
            shards[place.shard] = _open_shard(path, name)
            end = 0
        file, stop = shards[place.shard], place.offset + place.size
        if not 0 <= place.offset <= stop <= file.size:
            problem = f"bytes {place.offset} to {stop} lie outside its {file.size}"
            raise DamagedCheckpoint(problem, file=file.path, tensor=name, cure="is the download complete?")
        if place.size and place.offset < end:
            raise DamagedCheckpoint("shares bytes with another tensor", file=file.path, tensor=name)
        end = max(end, stop)
    return shards


def _open_shard(path: Path, name: str) -> SourceFile:
    try:
        return SourceFile(path)
    except CheckpointError as error:
        raise DamagedCheckpoint(error.problem, file=path, tensor=name, cure="it belongs beside the index") from error


def _string_lengths(raw: memoryview, count: int) -> tuple[list[int], int]:
    """The lengths that stand before the strings, and where they end: there is their CRC, then the strings."""
    lengths: list[int] = []
    at = 0
    while len(lengths) < count:
        length, at = varint(raw, at)
        lengths.append(length)
    if at + 4 + sum(lengths) != len(raw):
        raise Malformed(f"strings of {sum(lengths)} bytes in {len(raw)}")
    return lengths, at
