"""Records: runs of bytes in a file that have one CRC-32, which is checked before any of them is given out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from isal.isal_zlib import crc32

from converters.errors import DamagedCheckpoint
from converters.readers.files import CHUNK, Seen

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
            return self._read_checked(tensor)
        if self.crc is not None and not self.checked:
            self._check(tensor)
        return self.file.read(self.offset + start, nbytes, tensor)

    def _read_checked(self, tensor: str) -> memoryview:
        crc = 0

        def add(piece: memoryview) -> None:  # while it is in the processor's cache
            nonlocal crc
            crc = crc32(piece, crc)

        raw = self.file.read(self.offset, self.nbytes, tensor, add)
        self._compare(crc, tensor)
        return raw

    def _check(self, tensor: str) -> None:
        crc = 0
        for at in range(0, self.nbytes, CHUNK):
            crc = crc32(self.file.read(self.offset + at, min(CHUNK, self.nbytes - at), tensor), crc)
        self._compare(crc, tensor)
        self.checked = True

    def _compare(self, crc: int, tensor: str) -> None:
        if crc != self.crc:
            raise DamagedCheckpoint("its CRC-32 differs", file=self.file.path, tensor=tensor, cure="fetch it again")
