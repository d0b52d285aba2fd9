"""Sorted string tables as LevelDB writes them: the container of TensorFlow's checkpoints and of their indexes.

    table:  data block ... | metaindex block | index block | footer
    block:  entries | restart offsets (4 bytes each) | their count (4) || compression (1) | masked CRC-32C (4)
            compression: 0 none | 1 snappy
    entry:  shared, unshared, value length (varints) | the key after its first `shared` bytes | value
    footer: handles of metaindex and index block (offset, size: varints), zeros to 40 bytes | magic (8)

A key shares its first bytes with the key before it. The index block's values are the data blocks' handles; its keys
are not below the last of their block's, nor above the first of the next.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager

from converters.errors import DamagedCheckpoint, UnsafeCheckpoint
from converters.readers.files import SourceFile
from converters.readers.protobuf import Malformed, varint
from converters.readers.tensorflow.snappy import uncompress

__all__ = ["Table", "crc32c", "is_table", "mask_crc", "read_table"]

MAGIC = (0xDB4775248B80FB57).to_bytes(8, "little")
FOOTER, TRAILER = 48, 5
MAX_KEY, MAX_KEYS = 1 << 12, 1 << 26  # bytes of one key, and of all: sharing lets a long key cost three bytes


def crc32c(data: memoryview | bytes, crc: int = 0) -> int:
    """The CRC-32C of `data`, continuing from `crc`."""
    import google_crc32c
    import numpy as np

    return google_crc32c.extend(crc, np.frombuffer(data, np.uint8))


def mask_crc(crc: int) -> int:
    """A CRC as tables and bundles store it: rotated and shifted, so that a CRC over stored CRCs stays strong."""
    return ((crc >> 15 | crc << 17 & 0xFFFFFFFF) + 0xA282EAD8) & 0xFFFFFFFF


def is_table(file: SourceFile) -> bool:
    """Whether the file ends as a table does."""
    return file.size >= FOOTER and file.read(file.size - 8, 8) == MAGIC


def read_table(file: SourceFile) -> Iterator[tuple[bytes, memoryview]]:
    """The table's keys, strictly ascending, and their values; one block is in memory at a time.

    Raises DamagedCheckpoint where a checksum or the structure is wrong, UnsafeCheckpoint where the keys
    would exhaust memory.
    """
    last, budget = None, _Budget(file)
    with _damage(file):
        for _, offset, size in _blocks(file):
            for key, value in _entries(_block(file, offset, size)):
                if last is not None and key <= last:
                    raise Malformed(f"the keys of the block at byte {offset} do not ascend")
                budget.spend(key)
                last = key
                yield key, value


class Table:
    """A table in which keys are looked up; a look-up reads one block. Raises as `read_table` does."""

    def __init__(self, file: SourceFile) -> None:
        self.file = file
        budget = _Budget(file)
        self._lasts: list[bytes] = []
        self._places: list[tuple[int, int]] = []
        with _damage(file):
            for last, offset, size in _blocks(file):
                if self._lasts and last <= self._lasts[-1]:
                    raise Malformed("the keys of its index block do not ascend")
                budget.spend(last)
                self._lasts.append(last)
                self._places.append((offset, size))

    def get(self, key: bytes) -> memoryview | None:
        at = bisect_left(self._lasts, key)
        if at == len(self._lasts):
            return None
        with _damage(self.file):
            entries = _entries(_block(self.file, *self._places[at]))
            return next((value for found, value in entries if found == key), None)


class _Budget:
    """What a table's keys may take in memory."""

    def __init__(self, file: SourceFile) -> None:
        self.path, self.left = file.path, MAX_KEYS

    def spend(self, key: bytes) -> None:
        self.left -= len(key) + 1
        if self.left < 0:
            raise UnsafeCheckpoint(f"its keys spell out to more than {MAX_KEYS} bytes", file=self.path)


@contextmanager
def _damage(file: SourceFile) -> Iterator[None]:
    try:
        yield
    except Malformed as error:
        raise DamagedCheckpoint(f"its table is damaged: {error}", file=file.path, cure="fetch it again") from error


def _blocks(file: SourceFile) -> Iterator[tuple[bytes, int, int]]:
    """The data blocks in their order: key in the index block, offset, size."""
    if not is_table(file):
        raise DamagedCheckpoint("has no footer of a table", file=file.path, cure="is the download complete?")
    footer = file.read(file.size - FOOTER, FOOTER)
    _, _, at = _handle(footer, 0)
    index_offset, index_size, _ = _handle(footer, at)
    end = 0
    for key, handle in _entries(_block(file, index_offset, index_size)):
        offset, size, _ = _handle(handle, 0)
        if offset < end:
            raise Malformed(f"the block at byte {offset} overlaps the one before it")
        end = offset + size + TRAILER
        yield key, offset, size


def _handle(data: memoryview, at: int) -> tuple[int, int, int]:
    offset, at = varint(data, at)
    size, at = varint(data, at)
    return offset, size, at


def _block(file: SourceFile, offset: int, size: int) -> memoryview:
    if offset + size + TRAILER > file.size - FOOTER:
        raise Malformed(f"a block of {size} bytes at byte {offset} does not end before the footer")
    raw = file.read(offset, size + TRAILER)
    if mask_crc(crc32c(raw[: size + 1])) != int.from_bytes(raw[size + 1 :], "little"):
        raise Malformed(f"the CRC-32C of the block at byte {offset} differs")
    if raw[size] > 1:
        raise Malformed(f"the block at byte {offset} is compressed in a way that has the number {raw[size]}")
    return uncompress(raw[:size]) if raw[size] else raw[:size]


def _entries(block: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    end = len(block) - 4 - 4 * int.from_bytes(block[-4:], "little")
    if end < 0:
        raise Malformed("a block is shorter than its list of restarts")
    key, at = b"", 0
    while at < end:
        shared, at = varint(block, at)
        unshared, at = varint(block, at)
        length, at = varint(block, at)
        if shared > len(key) or unshared + length > end - at:
            raise Malformed("an entry is longer than its block")
        if shared + unshared > MAX_KEY:
            raise Malformed(f"a key has {shared + unshared} bytes")
        key = key[:shared] + block[at : at + unshared]
        value_at, at = at + unshared, at + unshared + length
        yield key, block[value_at:at]
