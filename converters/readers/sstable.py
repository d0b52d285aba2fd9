"""Sorted string tables as LevelDB writes them: the container of TensorFlow's checkpoint indexes.

    table:  data block ... | metaindex block | index block | footer
    block:  entries | restart offsets (4 bytes each) | their count (4) || compression (1) | masked CRC-32C (4)
    entry:  shared, unshared, value length (varints) | the key after its first `shared` bytes | value
    footer: handles of metaindex and index block (offset, size: varints), zeros to 40 bytes | magic (8)

A key shares its first bytes with the key before it. The index block's values are the data blocks' handles.
"""

from __future__ import annotations

from collections.abc import Iterator

from converters.errors import CheckpointError, DamagedCheckpoint, UnsafeCheckpoint
from converters.readers.files import SourceFile
from converters.readers.protobuf import Malformed, varint

__all__ = ["crc32c", "is_table", "mask_crc", "read_table"]

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
    would exhaust memory, CheckpointError where a block is compressed.
    """
    if not is_table(file):
        raise DamagedCheckpoint("has no footer of a table", file=file.path, cure="is the download complete?")
    try:
        yield from _walk(file)
    except Malformed as error:
        raise DamagedCheckpoint(f"its table is damaged: {error}", file=file.path, cure="fetch it again") from error


def _walk(file: SourceFile) -> Iterator[tuple[bytes, memoryview]]:
    footer = file.read(file.size - FOOTER, FOOTER)
    _, _, at = _handle(footer, 0)
    index_offset, index_size, _ = _handle(footer, at)
    last: bytes | None = None
    spelled = end = 0
    for _, handle in _entries(_block(file, index_offset, index_size)):
        offset, size, _ = _handle(handle, 0)
        if offset < end:
            raise Malformed(f"the block at byte {offset} overlaps the one before it")
        end = offset + size + TRAILER
        for key, value in _entries(_block(file, offset, size)):
            if last is not None and key <= last:
                raise Malformed(f"the keys of the block at byte {offset} do not ascend")
            spelled += len(key)
            if spelled > MAX_KEYS:
                raise UnsafeCheckpoint(f"its keys spell out to more than {MAX_KEYS} bytes", file=file.path)
            last = key
            yield key, value


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
    if raw[size]:
        kind = "snappy" if raw[size] == 1 else f"kind {raw[size]}"
        raise CheckpointError(f"the block at byte {offset} is compressed ({kind})", file=file.path)
    return raw[:size]


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
