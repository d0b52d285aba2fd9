"""Damaged and hostile states in Flax's msgpack."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from converters.errors import CheckpointError
from converters.readers import open_checkpoint

SIX = struct.pack("<6f", *range(6))
LINE = b"\x81\xa10"  # {"0": ...


def text(value: str) -> bytes:
    return b"\xd9" + bytes([len(value)]) + value.encode()


def array(shape: bytes = b"\x92\x02\x03", dtype: str = "float32", data: bytes = SIX, size: int | None = None) -> bytes:
    """Flax's extension of an array."""
    inner = b"\x93" + shape + text(dtype) + b"\xc4" + bytes([len(data) if size is None else size]) + data
    return b"\xc7" + bytes([len(inner)]) + b"\x01" + inner


def chunked(shape: bytes, *chunks: bytes) -> bytes:
    held = bytes([0x80 | len(chunks)]) + b"".join(text(str(number)) + chunk for number, chunk in enumerate(chunks))
    return (
        b"\x81\xa1w\x83" + text("__msgpack_chunked_array__") + b"\xc3" + text("shape") + shape + text("chunks") + held
    )


def opened(path: Path) -> dict[str, Any]:
    return {name: (tensor.spec, bytes(tensor.read())) for name, tensor in open_checkpoint(path).tensors.items()}


def test_a_flip_or_a_cut_raises_nothing_else(spoil: Callable[..., Any], tmp_path: Path) -> None:
    """There is no checksum: a flip of a weight's bit is a weight."""
    path, intact = tmp_path / "x", b"\x81\xa1a\x82\xa1w" + array() + b"\xa1v" + array()
    path.write_bytes(intact)
    assert {name: raw for name, (_, raw) in opened(path).items()} == {"a/w": SIX, "a/v": SIX}
    found = 0
    for at, data in spoil(intact):
        path.write_bytes(data)
        try:
            opened(path)
            assert len(data) == len(intact), at
        except CheckpointError as error:
            assert str(error).startswith(str(path)) and str(error).isprintable()
            found += 1
    assert found > 3 * len(intact)


ATTACKS: dict[str, tuple[Callable[[], bytes], str]] = {
    "a map of 2^32": (lambda: b"\xdf\xff\xff\xff\xff\xa1w\x01", "ends in the midst of 1 bytes at byte 8"),
    "a list of 2^32": (lambda: b"\x81\xa1w\xdd\xff\xff\xff\xff\x01", "w/1: ends in the midst of 1 bytes"),
    "a text of 2^32": (lambda: b"\x81\xa1w\xdb\xff\xff\xff\xff", "w: a text takes 4294967295 bytes"),
    "a key of 2^32": (lambda: b"\x82\xa1w\x01\xdb\xff\xff\xff\xff", "a text takes 4294967295 bytes"),
    "an array of 2^32": (lambda: b"\x81\xa1w\xc9\xff\xff\xff\xff\x01", "w: ends in the midst of 0 bytes"),
    "maps in maps": (lambda: b"\x81\xa1a" * 100_000 + b"\x01", "or nests them too deeply"),
    "long names": (lambda: (b"\x81\xa1a\x81\xda\x07\xff" + b"a" * 2047) * 20 + b"\x01", "or nests them too deeply"),
    "many values": (lambda: b"\x81\xa1w\xdd\x00\x0f\xff\xff" + bytes(1 << 20), "holds more than 131072 values"),
    "terabytes": (
        lambda: b"\x81\xa1w" + array(b"\x91\xcf" + (1 << 40).to_bytes(8, "big")),
        "w: has 24 bytes, but shape (1099511627776,)",
    ),
    "overflow": (
        lambda: b"\x81\xa1w" + array(b"\x92" + b"\xcf" + b"\x7f" * 8 + b"\xcf" + b"\x7f" * 8),
        "w: its shape is absurd",
    ),
    "negative": (lambda: b"\x81\xa1w" + array(b"\x92\xfe\xfd"), "w: its shape is absurd"),
    "a float in a shape": (
        lambda: b"\x81\xa1w" + array(b"\x92\x02\xca" + struct.pack(">f", 3)),
        "w: its shape makes no sense",
    ),
    "truth in a shape": (lambda: b"\x81\xa1w" + array(b"\x92\x02\xc3"), "w: its shape makes no sense"),
    "rank": (lambda: b"\x81\xa1w" + array(b"\xdd\xff\xff\xff\xff"), "w: its shape makes no sense"),
    "too few bytes": (lambda: b"\x81\xa1w" + array(size=20), "w: its array is not shape, dtype and bytes"),
    "too many bytes": (lambda: b"\x81\xa1w" + array(size=25), "w: its array is not shape, dtype and bytes"),
    "a pair": (lambda: b"\x81\xa1w\xc7\x03\x01\x92\x01\x02", "w: its array is not shape, dtype and bytes"),
    "one name": (lambda: b"\x82\xa1w" + array() + b"\xa1w" + array(), "has two values called 'w'"),
    "one name by two ways": (
        lambda: b"\x82\xa3a/w" + array() + b"\xa1a\x81\xa1w" + array(),
        "a/w: is the name of two values",
    ),
    "a key that is a map": (lambda: b"\x82\xa1w\x01\x80\x01", "a key is no name but a map"),
    "no UTF-8": (lambda: b"\x82\xa1w\x01\xa1\xff\x01", "a text is not UTF-8"),
    "nothing": (lambda: b"\x81\xa1w\xc1", "w: byte 3 begins nothing"),
    "bytes behind": (lambda: b"\x81\xa1w" + array() + b"x", "goes on for 1 bytes after its end"),
    "terminal codes": (lambda: b"\x82\xa1w\x01\xa4\x1b[2J" + array(size=20), ": \\x1b[2J: its array"),
    "chunks of another size": (lambda: chunked(LINE + b"\x07", array(b"\x91\x06")), "w: has 24 bytes, but shape (7,)"),
    "chunks of two kinds": (
        lambda: chunked(LINE + b"\x0c", array(b"\x91\x06"), array(b"\x91\x06", "int32")),
        "w: its chunks do not belong",
    ),
    "chunks that are numbers": (lambda: chunked(LINE + b"\x07", b"\x07"), "w: its chunks do not belong together"),
    "no chunks": (lambda: chunked(LINE + b"\x00"), "w: its chunks are not shape and chunks"),
    "a shape of text": (lambda: chunked(LINE + text("x"), array(b"\x91\x06")), "w: its chunks do not belong together"),
    "only a number": (lambda: b"\x81\xa1w\x07", "holds no weights, only w"),
}


@pytest.fixture(scope="module")
def outcomes(watch: Callable[..., Any]) -> dict[str, dict[str, Any]]:
    return watch({name: lambda file, make=make: file.write_bytes(make()) for name, (make, _) in ATTACKS.items()})


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_refused_in_one_line(name: str, outcomes: dict[str, dict[str, Any]]) -> None:
    """Within 2 GiB and 10 seconds each, and no other file is opened."""
    outcome = outcomes[name]
    assert outcome["broken"] == []
    assert ATTACKS[name][1] in outcome.get("refusal", outcome)
    assert outcome["refusal"].isprintable() and len(outcome["refusal"]) < 1000
