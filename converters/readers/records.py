"""Records: runs of bytes in a file that have one CRC-32, which is checked before any of them is given out.

Of a large one it is calculated by a second thread while the first one reads on.
"""

from __future__ import annotations

import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from converters.errors import DamagedCheckpoint
from converters.readers.files import CHUNK, PIECE, Seen

__all__ = ["Bytes", "Record"]


class Bytes(Protocol):
    """A file or a part of one: `SourceFile`, `Window`."""

    @property
    def path(self) -> Path: ...

    def read(self, offset: int, nbytes: int, tensor: str | None = None, seen: Seen | None = None) -> memoryview: ...

    def copy(self, offset: int, nbytes: int, tensor: str, file: int, at: int) -> None: ...

    def expect(self, offset: int, nbytes: int, crc: int, tensor: str) -> None: ...


@dataclass(slots=True)
class Record:
    """A run of bytes in a file, with its CRC-32 where the file has one."""

    file: Bytes
    offset: int
    nbytes: int
    crc: int | None = None
    checked: bool = False

    def read(self, start: int, nbytes: int, tensor: str) -> memoryview:
        """Part of the record; the CRC-32, which is the whole record's, is checked before any part is given out."""
        if self.crc is not None and nbytes == self.nbytes:
            checksum = _Checksum()
            raw = self.file.read(self.offset, nbytes, tensor, checksum.add)
            self._compare(checksum.result(), tensor)
            return raw
        raw = self.file.read(self.offset + start, nbytes, tensor)
        if self.crc is not None and not self.checked:
            crc = 0
            for at in range(0, self.nbytes, CHUNK):
                crc = zlib.crc32(self.file.read(self.offset + at, min(CHUNK, self.nbytes - at), tensor), crc)
            self._compare(crc, tensor)
            self.checked = True
        return raw

    def _compare(self, crc: int, tensor: str) -> None:
        if crc != self.crc:
            raise DamagedCheckpoint("its CRC-32 differs", file=self.file.path, tensor=tensor, cure="fetch it again")


_BESIDE = ThreadPoolExecutor(1)


class _Checksum:
    """The CRC-32 of all pieces, in their order."""

    def __init__(self) -> None:
        self.crc, self.last = 0, Future[None]()
        self.last.set_result(None)

    def add(self, piece: memoryview) -> None:
        if len(piece) < PIECE:
            self.last.result()
            self._add(piece)
        else:
            self.last = _BESIDE.submit(self._add, piece)

    def _add(self, piece: memoryview) -> None:
        self.crc = zlib.crc32(piece, self.crc)

    def result(self) -> int:
        self.last.result()
        return self.crc
