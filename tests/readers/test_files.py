"""Source files: read, copied and checked by position."""

from __future__ import annotations

import errno
import hashlib
import os
import zlib
from pathlib import Path

import pytest

from converters.errors import CheckpointError, DamagedCheckpoint, UnknownFormat
from converters.readers import files, open_checkpoint
from converters.readers.files import SourceFile, Window

BYTES = bytes(range(256)) * 5


@pytest.fixture
def source(tmp_path: Path) -> SourceFile:
    path = tmp_path / "source"
    path.write_bytes(BYTES)
    return SourceFile(path)


@pytest.mark.parametrize("chunk", [1, 7, 100, 256, 10_000])
@pytest.mark.parametrize("flipped", [None, 30, 299, 1279])
def test_one_pass_hashes_and_compares_every_crc(
    source: SourceFile, chunk: int, flipped: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "CHUNK", chunk)
    for start, end in ((20, 40), (40, 300), (1000, 1280)):
        source.expect(start, end - start, zlib.crc32(BYTES[start:end]), f"tensor {start}")
    if flipped is None:
        assert source.sha256() == hashlib.sha256(BYTES).hexdigest()
        return
    damaged = bytearray(BYTES)
    damaged[flipped] ^= 1
    source.path.write_bytes(damaged)
    with pytest.raises(DamagedCheckpoint, match=r"tensor (20|40|1000): its CRC-32 differs"):
        source.sha256()


@pytest.mark.parametrize("refusal", [None, errno.EXDEV, errno.EINVAL])
def test_a_copy_does_not_depend_on_the_systems_help(
    source: SourceFile, refusal: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if refusal:

        def refuse(*_: object) -> int:
            raise OSError(refusal, "no")

        monkeypatch.setattr(os, "copy_file_range", refuse)
    out = os.open(tmp_path / "out", os.O_RDWR | os.O_CREAT)
    Window(source, 10, 500).copy(5, 300, "tensor", out, 3)
    os.close(out)
    assert (tmp_path / "out").read_bytes() == bytes(3) + BYTES[15:315]


def test_a_source_that_shrinks_is_told(source: SourceFile, tmp_path: Path) -> None:
    os.truncate(source.path, 100)
    out = os.open(tmp_path / "out", os.O_RDWR | os.O_CREAT)
    with pytest.raises(CheckpointError, match="tensor: became shorter"):
        source.copy(0, 1280, "tensor", out, 0)
    os.close(out)
    with pytest.raises(CheckpointError, match="was written to while it was read"):
        source.check_unchanged()


OTHERS = {  # what is at the path: what it is called
    b"": "is empty",
    b"<!DOCTYPE html>\n<html>": "is an HTML page, not a checkpoint; the download went wrong",
    b"version https://git-lfs.github.com/spec/v1\n": "is a git-LFS pointer, not the weights; run `git lfs pull`",
    b'{"message": "not found"}': "is JSON text, not a checkpoint",
    bytes(5000): "begins with nothing but zeros; is the download complete",
    b"\x7fELF": "is not a checkpoint of any known format",
}


@pytest.mark.parametrize("content", OTHERS, ids=OTHERS.values())
def test_what_is_no_checkpoint_is_called_what_it_is(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UnknownFormat, match=rf"model\.safetensors: {OTHERS[content]}"):
        open_checkpoint(path)
    path.unlink()
    with pytest.raises(UnknownFormat, match="is a folder without a checkpoint"):
        open_checkpoint(tmp_path)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, reason in ((tmp_path / "pipe", "not a regular file"), (tmp_path / "absent", "does not exist")):
        with pytest.raises(CheckpointError, match=reason):
            SourceFile(path)
