"""Streams: source files read forward through a small window, as pickles are."""

from __future__ import annotations

from converters.errors import UnsafeCheckpoint
from converters.readers.files import SourceFile

__all__ = ["FileStream"]

WINDOW = 1 << 16  # bytes read at once


class FileStream:
    """A source file read forward; UnsafeCheckpoint once it has given out more than `limit` bytes."""

    def __init__(self, file: SourceFile, limit: int) -> None:
        self.file, self.limit = file, limit
        self.window = b""
        self.start = 0  # of the window in the file
        self.at = 0  # in the window
        self.skipped = 0

    def tell(self) -> int:
        return self.start + self.at

    def read(self, count: int, /) -> bytes:
        self._need(count)
        data = self.window[self.at : self.at + count]
        self.at += len(data)
        return data

    def readline(self) -> bytes:
        count = 256
        while True:
            self._need(count)
            end = self.window.find(b"\n", self.at, self.at + count) + 1
            if end or self.at + count > len(self.window):
                return self.read((end or len(self.window)) - self.at)
            count *= 2

    def skip(self, count: int, /) -> bool:
        """Leave `count` bytes unread; False if the file has not so many."""
        if count > self.file.size - self.tell():
            return False
        within = min(count, len(self.window) - self.at)
        self.at += within
        self.skipped += count - within
        if count > within:
            self.window, self.start, self.at = b"", self.tell() + count - within, 0
        return True

    def _need(self, count: int) -> None:
        """Have `count` bytes in the window, or all that there are."""
        if self.at + count <= len(self.window):
            return
        here = self.tell()
        length = min(max(count, WINDOW), self.file.size - here)
        if here + length - self.skipped > self.limit + WINDOW:
            raise UnsafeCheckpoint(f"its pickles take more than {self.limit:,} bytes", file=self.file.path)
        self.window, self.start, self.at = bytes(self.file.read(here, length)), here, 0
