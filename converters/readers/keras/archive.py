"""Keras archives: a zip of `config.json`, `metadata.json` and `model.weights.h5`, stored as they are.

The weights are read in place. Their CRC-32 is checked once, before the first tensor is.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path

from converters.errors import DamagedCheckpoint, UnsafeCheckpoint
from converters.readers.files import SourceFile
from converters.readers.keras.hdf5 import Stretch, faults

__all__ = ["CONFIG", "METADATA", "WEIGHTS", "Archive", "is_archive", "open_archive"]

CONFIG, METADATA, WEIGHTS = "config.json", "metadata.json", "model.weights.h5"
MOST_TEXT = 8 << 20  # bytes of a member of text
MOST_INFLATED = 256 << 20  # bytes of weights that somebody compressed
MOST_DIRECTORY = 16 << 20
PIECE = 8 << 20
AGAIN = "fetch the file again"


@dataclass(frozen=True)
class Archive:
    weights: Stretch
    config: bytes
    metadata: bytes


def is_archive(path: Path) -> bool:
    """Whether the zip file at `path` holds a config and weights."""
    try:
        with zipfile.ZipFile(_Stream(SourceFile(path))) as archive:
            return {CONFIG, WEIGHTS} <= set(archive.namelist())
    except (OSError, EOFError, LookupError, RuntimeError, ValueError, struct.error, zipfile.BadZipFile):
        return False


def open_archive(source: SourceFile) -> Archive:
    """Find the three members. Raises CheckpointError."""
    with faults(source.path), zipfile.ZipFile(_Stream(source)) as archive:
        names = archive.namelist()
        for member in (CONFIG, METADATA, WEIGHTS):
            if names.count(member) > 1:
                raise UnsafeCheckpoint("is the name of two members", tensor=member)
        metadata = _extract(archive, METADATA, MOST_TEXT) if METADATA in names else b"{}"
        return Archive(_locate(archive, source), _extract(archive, CONFIG, MOST_TEXT), metadata)


def _locate(archive: zipfile.ZipFile, source: SourceFile) -> Stretch:
    """The weights, where they lie in the file; or inflated, if there are few."""
    info = archive.getinfo(WEIGHTS)
    if info.compress_type != zipfile.ZIP_STORED:
        return _Inflated(source.path, _extract(archive, WEIGHTS, MOST_INFLATED))
    archive.open(info).close()  # raises where the member's own header differs from the directory
    start = info.header_offset + 30 + sum(struct.unpack("<HH", source.read(info.header_offset + 26, 4)))
    if info.compress_size != info.file_size or start + info.file_size > archive.start_dir:
        raise DamagedCheckpoint("does not fit into the archive", tensor=WEIGHTS, cure=AGAIN)
    return _Member(source, start, info.file_size, info.CRC)


def _extract(archive: zipfile.ZipFile, member: str, most: int) -> bytes:
    """A member's bytes; their CRC-32 is checked."""
    if archive.getinfo(member).file_size > most:
        cure = "store it without compression" if member == WEIGHTS else None
        raise UnsafeCheckpoint(f"unpacks to more than {most >> 20} MB", tensor=member, cure=cure)
    return archive.read(member)


@dataclass
class _Member:
    """A member that is stored as it is."""

    source: SourceFile
    start: int
    size: int
    crc: int
    is_checked: bool = field(default=False, init=False)

    def read(self, offset: int, nbytes: int, tensor: str | None = None) -> memoryview:
        if tensor is not None and not self.is_checked:
            self._check()
        _fit(offset, nbytes, self.size, self.source.path, tensor)
        return self.source.read(self.start + offset, nbytes, tensor)

    def _check(self) -> None:
        crc = 0
        for at in range(0, self.size, PIECE):
            crc = zlib.crc32(self.source.read(self.start + at, min(PIECE, self.size - at)), crc)
        if crc != self.crc:
            raise DamagedCheckpoint("its CRC-32 differs", file=self.source.path, tensor=WEIGHTS, cure=AGAIN)
        self.is_checked = True


class _Inflated:
    """A member that was compressed."""

    def __init__(self, file: Path, data: bytes) -> None:
        self.file, self.data, self.size = file, memoryview(data), len(data)

    def read(self, offset: int, nbytes: int, tensor: str | None = None) -> memoryview:
        _fit(offset, nbytes, self.size, self.file, tensor)
        return memoryview(bytearray(self.data[offset : offset + nbytes]))


def _fit(offset: int, nbytes: int, size: int, file: Path, tensor: str | None) -> None:
    if offset < 0 or nbytes < 0 or offset + nbytes > size:
        problem = f"bytes {offset} to {offset + nbytes} lie outside the {size} of {WEIGHTS}"
        raise DamagedCheckpoint(problem, file=file, tensor=tensor, cure=AGAIN)


class _Stream(io.RawIOBase):
    """A source file in the form that zipfile asks for."""

    def __init__(self, source: SourceFile) -> None:
        self.source, self.at = source, 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + (0, self.at, self.source.size)[whence]
        if self.at < 0:
            raise ValueError("a seek before the file")
        return self.at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self.source.size - self.at)
        count = left if size < 0 else min(size, left)
        if count > MOST_DIRECTORY:
            raise ValueError(f"a zip directory of {count} bytes")
        self.at += count
        return bytes(self.source.read(self.at - count, count))
