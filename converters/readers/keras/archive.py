"""Keras archives: a zip of `config.json`, `metadata.json` and `model.weights.h5`, stored as they are.

The weights are read in place. Their CRC-32 is checked once, before the first tensor is.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

from converters.errors import CheckpointError, DamagedCheckpoint, UnsafeCheckpoint
from converters.readers.files import SourceFile
from converters.readers.keras.hdf5 import Stretch
from converters.readers.records import Record
from converters.readers.zip_archive import AGAIN, ZipArchive

__all__ = ["CONFIG", "METADATA", "WEIGHTS", "Archive", "is_archive", "open_archive"]

CONFIG, METADATA, WEIGHTS = "config.json", "metadata.json", "model.weights.h5"
MOST_TEXT = 8 << 20  # bytes of a member of text
MOST_INFLATED = 256 << 20  # bytes of weights that somebody compressed


@dataclass(frozen=True)
class Archive:
    weights: Stretch
    config: bytes
    metadata: bytes


def is_archive(path: Path) -> bool:
    """Whether the zip file at `path` holds a config and weights."""
    try:
        return {CONFIG, WEIGHTS} <= ZipArchive.open(SourceFile(path)).members.keys()
    except CheckpointError:
        return False


def open_archive(source: SourceFile) -> Archive:
    """Find the three members. Raises CheckpointError."""
    archive = ZipArchive.open(source)
    metadata = bytes(archive.content(METADATA, MOST_TEXT)) if METADATA in archive.members else b"{}"
    return Archive(_open_weights(archive), bytes(archive.content(CONFIG, MOST_TEXT)), metadata)


def _open_weights(archive: ZipArchive) -> Stretch:
    """The weights, where they lie in the file; or inflated, if there are few."""
    info, start = archive.locate(WEIGHTS)
    path = archive.file.path
    if info.compress_type == zipfile.ZIP_STORED:
        return _Member(Record(archive.file, start, info.file_size, info.CRC), info.file_size)
    if info.file_size > MOST_INFLATED:
        problem, cure = f"unpacks to more than {MOST_INFLATED >> 20} MB", "store it without compression"
        raise UnsafeCheckpoint(problem, file=path, tensor=WEIGHTS, cure=cure)
    return _Inflated(path, archive.content(WEIGHTS, MOST_INFLATED))


@dataclass
class _Member:
    """A member that is stored as it is."""

    record: Record
    size: int

    def read(self, offset: int, nbytes: int, tensor: str | None = None) -> memoryview:
        _fit(offset, nbytes, self.size, self.record.file.path, tensor)
        if tensor is None:  # of what says where tensors lie, which is checked by its sense
            return self.record.file.read(self.record.offset + offset, nbytes)
        return self.record.read(offset, nbytes, WEIGHTS)


class _Inflated:
    """A member that was compressed."""

    def __init__(self, file: Path, data: bytes | memoryview) -> None:
        self.file, self.data, self.size = file, memoryview(data), len(data)

    def read(self, offset: int, nbytes: int, tensor: str | None = None) -> memoryview:
        _fit(offset, nbytes, self.size, self.file, tensor)
        return memoryview(bytearray(self.data[offset : offset + nbytes]))


def _fit(offset: int, nbytes: int, size: int, file: Path, tensor: str | None) -> None:
    if offset < 0 or nbytes < 0 or offset + nbytes > size:
        problem = f"bytes {offset} to {offset + nbytes} lie outside the {size} of {WEIGHTS}"
        raise DamagedCheckpoint(problem, file=file, tensor=tensor, cure=AGAIN)
