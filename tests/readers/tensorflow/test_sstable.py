"""Tables are walked in order, block by block, and whatever is wrong with one is said in a line."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

from converters.errors import DamagedCheckpoint, UnsafeCheckpoint
from converters.readers.files import SourceFile
from converters.readers.tensorflow.sstable import Table, crc32c, is_table, mask_crc, read_table

write = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("bundle_writer.py"))))
GOOD = write.table(b"\0\3\1abc1" + b"\2\1\2x23", b"\0\1\0d", b"")


WIDE = write.table(b"\0\1\1a1\1\1\1b2", b"\0\1\1c3\0\1\1e5", keys=[b"b", b"e"])


def rows(raw: bytes, folder: Path) -> list[tuple[bytes, bytes]]:
    (folder / "t").write_bytes(raw)
    return [(key, bytes(value)) for key, value in read_table(SourceFile(folder / "t"))]


def test_crc32c_is_castagnolis() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(memoryview(bytearray(b"56789")), crc32c(b"1234")) == 0xE3069283
    assert crc32c(b"") == 0
    assert mask_crc(0xE3069283) == 0xC78AB0E5


def test_keys_share_their_beginnings_and_blocks_follow_each_other(tmp_path: Path) -> None:
    assert rows(GOOD, tmp_path) == [(b"abc", b"1"), (b"abx", b"23"), (b"d", b"")]


@pytest.mark.parametrize(
    ("key", "value"), [(b"a", b"1"), (b"ab", b"2"), (b"c", b"3"), (b"d", None), (b"e", b"5"), (b"", None), (b"f", None)]
)
def test_a_key_is_looked_up(key: bytes, value: bytes | None, tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(WIDE)
    found = Table(SourceFile(tmp_path / "t")).get(key)
    assert (found if found is None else bytes(found)) == value


def test_a_compressed_block_is_read(tmp_path: Path) -> None:
    assert rows(write.table(b"\0\3\1abc1", compression=1), tmp_path) == [(b"abc", b"1")]


@pytest.mark.parametrize("size", range(0, len(GOOD), 7))
def test_a_shorter_file_is_no_table(size: int, tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(GOOD[:size])
    assert not is_table(SourceFile(tmp_path / "t"))
    with pytest.raises(DamagedCheckpoint, match="no footer"):
        rows(GOOD[:size], tmp_path)


def test_a_flipped_bit_changes_nothing_or_is_found(tmp_path: Path) -> None:
    found = 0
    for at in range(len(GOOD)):
        damaged = bytearray(GOOD)
        damaged[at] ^= 1 << at % 8
        try:
            assert rows(bytes(damaged), tmp_path) == rows(GOOD, tmp_path)
        except DamagedCheckpoint:
            found += 1
    assert found > len(GOOD) // 2  # the rest is the metaindex block and padding


@pytest.mark.parametrize(
    ("raw", "error", "words"),
    [
        (write.table(b"\0\1\0b\0\1\0a"), DamagedCheckpoint, "do not ascend"),
        (write.table(b"\0\1\0a", b"\0\1\0a"), DamagedCheckpoint, "do not ascend"),
        (write.table(b"\0\1\0a", b"\0\1\0b", listed=[0, 1, 1]), DamagedCheckpoint, "overlaps the one before"),
        (write.table(b"\0\1\0a", b"\0\1\0b", listed=[1, 0]), DamagedCheckpoint, "overlaps the one before"),
        (write.table(b"\3\1\0a"), DamagedCheckpoint, "longer than its block"),
        (write.table(b"\0\1\x7fa"), DamagedCheckpoint, "longer than its block"),
        (write.table(b"\0\xff\xff\xff\xff\xff\xff\xff\xff\xff\1\0a"), DamagedCheckpoint, "longer than its block"),
        (write.table(b"\xff" * 20), DamagedCheckpoint, "no number ends"),
        (write.table(b"\0\x88\x27\0" + b"k" * 5000), DamagedCheckpoint, "a key has 5000 bytes"),
        (write.table(b"", compression=2), DamagedCheckpoint, "in a way that has the number 2"),
        (b"\xff" * 40 + write.MAGIC, DamagedCheckpoint, "no number ends"),
        (b"\0\0\0\x7f".ljust(40, b"\0") + write.MAGIC, DamagedCheckpoint, "does not end before the footer"),
    ],
)
def test_a_malformed_table_is_refused(raw: bytes, error: type, words: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=words) as caught:
        rows(raw, tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "t: "))


def test_keys_that_spell_out_to_more_than_the_file_are_refused(tmp_path: Path) -> None:
    step = b"".join(b"\xfd\x1f\2\0" + number.to_bytes(2, "big") for number in range(1, 20000))
    raw = write.table(b"\0\xff\x1f\0" + b"k" * 4093 + b"\0\0" + step)
    assert len(raw) < 130_000
    with pytest.raises(UnsafeCheckpoint, match="spell out"):
        rows(raw, tmp_path)
