"""Source files: opened once, read by position, never mapped (a mapped file that shrinks kills the process)."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from isal.isal_zlib import crc32

from converters.errors import CheckpointError, DamagedCheckpoint
from converters.readers.memory import Memory

__all__ = ["SourceFile", "Window", "is_url", "refuse_neighbour"]

CHUNK = 8 << 20
PIECE = 1 << 20  # stays in the cache of a core, for who is told of it

Seen = Callable[[memoryview], object]


class SourceFile:
    """A regular file, open for reading at any offset.

    Raises CheckpointError when the path is missing, unreadable, or not a regular file (a pipe or a device
    would block or never end). A path of another kind (`RemotePath`) says in `source_file` which subclass reads it.
    """

    _memory: Memory
    is_remote = False  # whether a read may take a request to a server

    def __new__(cls, path: str | os.PathLike[str]) -> SourceFile:
        file = object.__new__(getattr(path, "source_file", cls))
        file._memory = Memory()
        return file

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if "://" in os.fspath(path):
            raise refuse_neighbour(path)
        self.path = Path(path)
        try:
            self._fd = os.open(self.path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise CheckpointError(_why(error), file=self.path) from error
        self._stat = os.fstat(self._fd)
        if not stat.S_ISREG(self._stat.st_mode):
            self.close()
            raise CheckpointError("is not a regular file", file=self.path)
        self.size = self._stat.st_size
        self._crcs: dict[int, tuple[int, int, str]] = {}  # offset: bytes, CRC-32, tensor

    def read(self, offset: int, nbytes: int, tensor: str | None = None, seen: Seen | None = None) -> memoryview:
        """Exactly `nbytes` bytes from `offset` in writable memory of their own; `seen` is told each piece that is in.

        Raises DamagedCheckpoint if the file is shorter.
        """
        if offset < 0 or nbytes < 0 or offset + nbytes > self.size:
            raise DamagedCheckpoint(
                f"bytes {offset} to {offset + nbytes} lie outside its {self.size}",
                file=self.path,
                tensor=tensor,
                cure="is the download complete?",
            )
        buffer, done = self._memory.take(nbytes), 0
        while done < nbytes:
            try:
                count = self._read_into(buffer[done : done + PIECE] if seen else buffer[done:], offset + done)
            except OSError as error:
                raise CheckpointError(_why(error), file=self.path, tensor=tensor) from error
            if count == 0:
                raise CheckpointError("became shorter while it was read", file=self.path, tensor=tensor)
            if seen:
                seen(buffer[done : done + count])
            done += count
        return buffer

    def _read_into(self, buffer: memoryview, offset: int) -> int:
        return os.preadv(self._fd, [buffer], offset)

    def copy(self, offset: int, nbytes: int, tensor: str, file: int, at: int) -> None:
        """Copy bytes to an open file without bringing them into memory, where the system can."""
        while nbytes and hasattr(os, "copy_file_range"):
            try:
                count = os.copy_file_range(self._fd, file, nbytes, offset, at)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
                    raise
                break  # not between these two files
            if count == 0:
                raise CheckpointError("became shorter while it was read", file=self.path, tensor=tensor)
            offset, at, nbytes = offset + count, at + count, nbytes - count
        while nbytes:
            raw = self.read(offset, min(nbytes, CHUNK), tensor)
            count = os.pwrite(file, raw, at)
            offset, at, nbytes = offset + count, at + count, nbytes - count

    def expect(self, offset: int, nbytes: int, crc: int, tensor: str) -> None:
        """Have `sha256` compare the CRC-32 of these bytes on its way; they overlap no others."""
        self._crcs.setdefault(offset, (nbytes, crc, tensor))

    def sha256(self) -> str:
        """The content's SHA-256 in hex. Raises DamagedCheckpoint where an expected CRC-32 differs."""
        digest, buffer, offset = hashlib.sha256(), memoryview(bytearray(CHUNK)), 0
        expected = deque(sorted((start, *rest) for start, rest in self._crcs.items()))
        crc = 0
        while count := self._read_into(buffer, offset):
            digest.update(buffer[:count])
            while expected and expected[0][0] < offset + count:
                start, nbytes, wanted, tensor = expected[0]
                piece = buffer[max(start - offset, 0) : min(start + nbytes - offset, count)]
                crc = crc32(piece, crc)
                if start + nbytes > offset + count:
                    break
                if crc != wanted:
                    raise DamagedCheckpoint("its CRC-32 differs", file=self.path, tensor=tensor, cure="fetch it again")
                expected.popleft()
                crc = 0
            offset += count
        return digest.hexdigest()

    def check_unchanged(self) -> None:
        """Raise CheckpointError if the file was written to since it was opened."""
        now = os.fstat(self._fd)
        if (now.st_size, now.st_mtime_ns) != (self._stat.st_size, self._stat.st_mtime_ns):
            raise CheckpointError("was written to while it was read", file=self.path, cure="convert a copy")

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self.close()


@dataclass(frozen=True)
class Window:
    """A stretch of a source file, read as if it were a file of its own. Raises DamagedCheckpoint if it is not there."""

    file: SourceFile
    start: int
    size: int

    def __post_init__(self) -> None:
        if self.start < 0 or self.size < 0 or self.start + self.size > self.file.size:
            problem = f"bytes {self.start} to {self.start + self.size} lie outside its {self.file.size}"
            raise DamagedCheckpoint(problem, file=self.file.path, cure="is the download complete?")

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def is_remote(self) -> bool:
        return self.file.is_remote

    def read(self, offset: int, nbytes: int, tensor: str | None = None, seen: Seen | None = None) -> memoryview:
        """As `SourceFile.read`, from this stretch."""
        if offset < 0 or nbytes < 0 or offset + nbytes > self.size:
            problem = f"bytes {offset} to {offset + nbytes} of its part at {self.start} lie outside {self.size}"
            raise DamagedCheckpoint(problem, file=self.path, tensor=tensor)
        return self.file.read(self.start + offset, nbytes, tensor, seen)

    def copy(self, offset: int, nbytes: int, tensor: str, file: int, at: int) -> None:
        """As `SourceFile.copy`, from this stretch."""
        self.file.copy(self.start + offset, nbytes, tensor, file, at)

    def expect(self, offset: int, nbytes: int, crc: int, tensor: str) -> None:
        """As `SourceFile.expect`, for bytes of this stretch."""
        self.file.expect(self.start + offset, nbytes, crc, tensor)


def is_url(source: str | os.PathLike[str]) -> bool:
    """Whether this is the text of a URL.

    >>> is_url("hf://org/repo/model.pth"), is_url("C:/model.pth")
    (True, False)
    """
    return isinstance(source, str) and "://" in source


def refuse_neighbour(url: str | os.PathLike[str]) -> CheckpointError:
    """Of a remote source only the file that the user named is opened."""
    problem = "lies beside the one file that was named, and is not opened"
    return CheckpointError(problem, file=url, cure="fetch the folder and give its path")


def _why(error: OSError) -> str:
    words = {errno.ENOENT: "does not exist", errno.EACCES: "may not be read", errno.EISDIR: "is a folder"}
    return words.get(error.errno or 0, os.strerror(error.errno or 0).lower())
