"""A writer of sorted tables and tensor bundles that also writes what TensorFlow never would."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import google_crc32c

MAGIC = bytes.fromhex("57fb808b247547db")


def masked(data: bytes) -> int:
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) % (1 << 32)


def varint(number: int) -> bytes:
    r"""Seven bits a byte, the lowest first; a negative number in two's complement.

    >>> varint(300)
    b'\xac\x02'
    """
    number %= 1 << 64
    return bytes([number]) if number < 128 else bytes([number & 127 | 128]) + varint(number >> 7)


def message(*fields: tuple[int, int | bytes]) -> bytes:
    r"""Numbers as varints, bytes length-delimited.

    >>> message((1, 5), (2, b"hi"))
    b'\x08\x05\x12\x02hi'
    """
    return b"".join(
        varint(number << 3) + varint(value)
        if isinstance(value, int)
        else varint(number << 3 | 2) + varint(len(value)) + value
        for number, value in fields
    )


def header(shards: int = 1, *more: tuple[int, int | bytes]) -> bytes:
    return message((1, shards), (3, message((1, 1))), *more)


def entry(
    data: bytes = b"",
    shape: Iterable[int] = (),
    *more: tuple[int, int | bytes],
    dtype: int = 1,
    shard: int = 0,
    offset: int = 0,
    size: int | None = None,
    crc: int | None = None,
) -> bytes:
    """The entry of a tensor whose bytes are `data`; what is given otherwise is not checked against them."""
    dims = message(*((2, message((1, dim))) for dim in shape))
    size = len(data) if size is None else size
    place = [(3, shard), (4, offset), (5, size), (6, masked(data) if crc is None else crc)]
    return message((1, dtype), (2, dims), *place, *more)


def box(*extents: tuple[int, int]) -> tuple[int, bytes]:
    """The field of an entry that says which slice there is."""
    return 7, message(*((1, message((1, start), (2, length))) for start, length in extents))


def slice_key(name: str, *extents: tuple[int, int]) -> bytes:
    """A slice's key, for numbers from -64 to 63."""
    numbers = bytes(128 ^ number & 255 for extent in extents for number in extent)
    return b"\0" + name.encode() + b"\0\1\1" + bytes([len(extents)]) + numbers


def rows_of(rows: dict[bytes, bytes]) -> bytes:
    """A block's entries, no key shared."""
    return b"".join(b"\0" + varint(len(key)) + varint(len(value)) + key + value for key, value in rows.items())


def table(
    *blocks: bytes, listed: Iterable[int] | None = None, keys: list[bytes] | None = None, compression: int = 0
) -> bytes:
    """A table of data blocks, given as their entries; its index lists all of them, or those that `listed` numbers.

    `keys` are each block's last, where they are to be found by them.
    """
    out = b""

    def place(entries: bytes) -> bytes:
        nonlocal out
        block = entries + bytes(4) + (1).to_bytes(4, "little")
        block = (literal(block) if compression == 1 else block) + bytes([compression])
        handle = varint(len(out)) + varint(len(block) - 1)
        out += block + masked(block).to_bytes(4, "little")
        return handle

    handles = [place(entries) for entries in blocks]
    listed = range(len(blocks)) if listed is None else listed
    last = keys or [count.to_bytes(4, "big") for count in range(1 << 10)]
    index = {key: handles[number] for key, number in zip(last, listed, strict=False)}
    footer = place(b"") + place(rows_of(index))
    return out + footer.ljust(40, b"\0") + MAGIC


def literal(data: bytes) -> bytes:
    """A snappy block of one literal."""
    return varint(len(data)) + bytes([61 << 2]) + (len(data) - 1).to_bytes(2, "little") + data


def listed(name: str, shape: Iterable[int], *boxes: tuple[tuple[int, int], ...], dtype: int = 1) -> bytes:
    """A SavedSliceMeta."""
    dims = message(*((2, message((1, dim))) for dim in shape))
    return message((1, name.encode()), (2, dims), (3, dtype), *((4, box(*extents)[1]) for extents in boxes))


def first_format(rows: dict[bytes, bytes], *tensors: bytes, compression: int = 0) -> bytes:
    """A table of TensorFlow's first format: what it lists, and TensorProtos by their slices' keys."""
    meta = message((1, message(*((1, tensor) for tensor in tensors), (2, message((1, 1))))))
    saved = {key: message((2, message((3, proto)))) for key, proto in sorted(rows.items())}
    blocks = [rows_of({b"": meta}), *(rows_of({key: row}) for key, row in saved.items())]
    return table(*blocks, keys=[b"", *saved], compression=compression)


def bundle(prefix: Path, rows: dict[bytes, bytes], *shards: bytes) -> Path:
    """Write a bundle of one block and the given data files; its prefix."""
    Path(f"{prefix}.index").write_bytes(table(rows_of(dict(sorted(rows.items())))))
    for number, data in enumerate(shards):
        Path(f"{prefix}.data-{number:05}-of-{len(shards):05}").write_bytes(data)
    return prefix
