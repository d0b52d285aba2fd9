"""Zip archives of tensors: stored members, found through a directory that must agree with them.

What Python's zipfile reads of the directory is checked against the local headers; data is read by position.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path

from isal.isal_zlib import crc32

from converters.errors import CheckpointError, DamagedCheckpoint, UnsafeCheckpoint, printable
from converters.readers.files import Seen, SourceFile, Window
from converters.readers.records import Record

__all__ = ["AGAIN", "ZipArchive"]

MAX_DIRECTORY = 16 << 20  # bytes; some 200,000 members
AGAIN = "fetch it again"


@dataclass(frozen=True)
class ZipArchive:
    """A zip file's directory. Data is found through the local headers, which must agree with it."""

    file: SourceFile | Window
    members: dict[str, zipfile.ZipInfo]
    bounds: list[int]  # where members begin, and where the directory does

    @classmethod
    def open(cls, file: SourceFile | Window) -> ZipArchive:
        path = file.path
        if file.size < 22 or file.read(file.size - 22, 4) != b"PK\x05\x06":
            raise DamagedCheckpoint("does not end with a zip directory", file=path, cure="is the download complete?")
        try:
            with zipfile.ZipFile(_Seekable(file)) as archive:
                infos, end = archive.infolist(), archive.start_dir
        except (zipfile.BadZipFile, struct.error, ValueError, NotImplementedError, OverflowError, LookupError) as error:
            raise DamagedCheckpoint("its zip directory is malformed", file=path, cure=AGAIN) from error
        members = {info.orig_filename: info for info in infos}
        bounds = [*sorted(info.header_offset for info in infos), end]
        if bounds[0] != 0:
            raise UnsafeCheckpoint("its zip members do not begin where the file does", file=path, cure=AGAIN)
        if len(members) != len(infos):
            raise UnsafeCheckpoint("two of its zip members have one name", file=path, cure=AGAIN)
        for name in members:
            if name.startswith("/") or ".." in name.split("/") or name[1:3] == ":/" or {"\\", "\0"} & set(name):
                raise UnsafeCheckpoint(f"a zip member would leave its folder: {printable(name)}", file=path)
        return cls(file, members, bounds)

    def record(self, name: str, tensor: str | None = None) -> Record:
        """A member's place in the file; only of stored ones, since a deflated one cannot be read by position."""
        late = _Late(self, name) if self.file.is_remote and name in self.members else None
        info, start = (self.members[name], 0) if late else self.locate(name, tensor)
        if info.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(
                "is compressed in the file", file=self.file.path, tensor=tensor or name, cure="load and save it again"
            )
        return Record(late or self.file, start, info.file_size, info.CRC or None)

    def content(self, name: str, limit: int) -> bytes | memoryview:
        """A small member's bytes, inflated if need be; UnsafeCheckpoint beyond `limit`."""
        info, start = self.locate(name)
        if max(info.file_size, info.compress_size) > limit:
            raise UnsafeCheckpoint(f"its {printable(name)} takes more than {limit:,} bytes", file=self.file.path)
        raw: bytes | memoryview = self.file.read(start, info.compress_size)
        if info.compress_type == zipfile.ZIP_DEFLATED:
            try:
                raw = zlib.decompressobj(-15).decompress(raw, info.file_size + 1)
            except zlib.error as error:
                raise DamagedCheckpoint(f"its {printable(name)} does not inflate", file=self.file.path) from error
        if len(raw) != info.file_size or (info.CRC and crc32(raw) != info.CRC):
            raise DamagedCheckpoint(
                f"the size or CRC-32 of its {printable(name)} differs", file=self.file.path, cure=AGAIN
            )
        return raw

    def locate(self, name: str, tensor: str | None = None) -> tuple[zipfile.ZipInfo, int]:
        """A member and the offset of its data."""
        info = self.members.get(name)
        if info is None:
            raise DamagedCheckpoint(f"has no {printable(name)}", file=self.file.path, tensor=tensor, cure=AGAIN)
        header = bytes(self.file.read(info.header_offset, 30, tensor))
        signature, _, flags, method, _, _, crc, packed, size, named, extra = struct.unpack("<4s5H3I2H", header)
        start = info.header_offset + 30 + named + extra
        spelled = bytes(self.file.read(info.header_offset + 30, named, tensor))
        sizes = (crc, packed, size)
        agrees = (
            signature == b"PK\x03\x04"
            and spelled == info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437")
            and (flags, method) == (info.flag_bits, info.compress_type)
            and (flags & 8 or 0xFFFFFFFF in sizes or sizes == (info.CRC, info.compress_size, info.file_size))
            and (method == zipfile.ZIP_DEFLATED or (method == 0 and info.compress_size == info.file_size))
            and not flags & 1  # encrypted
            and start + info.compress_size <= self.bounds[bisect_right(self.bounds, info.header_offset)]
        )
        if not agrees:
            raise DamagedCheckpoint(
                f"the two headers of zip member {printable(name)} differ or make no sense",
                file=self.file.path,
                tensor=tensor,
                cure=AGAIN,
            )
        return info, start


@dataclass(frozen=True)
class _Late:
    """A member of a remote archive, whose local header is fetched, and must agree, when its data is."""

    archive: ZipArchive
    name: str

    @property
    def path(self) -> Path:
        return self.archive.file.path

    def read(self, offset: int, nbytes: int, tensor: str | None = None, seen: Seen | None = None) -> memoryview:
        start = self.archive.locate(self.name, tensor)[1]
        return self.archive.file.read(start + offset, nbytes, tensor, seen)

    def copy(self, offset: int, nbytes: int, tensor: str, file: int, at: int) -> None:
        start = self.archive.locate(self.name, tensor)[1]
        self.archive.file.copy(start + offset, nbytes, tensor, file, at)

    def expect(self, offset: int, nbytes: int, crc: int, tensor: str) -> None:
        """Nothing: what is hashed whole was fetched whole, and is no longer remote."""


class _Seekable(io.RawIOBase):
    """A source file in the form that zipfile asks for."""

    def __init__(self, file: SourceFile | Window) -> None:
        self.file, self.position = file, 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.file.size}[whence]
        if self.position < 0:
            raise ValueError("a seek before the file")
        return self.position

    def read(self, size: int = -1) -> bytes:
        left = max(self.file.size - self.position, 0)
        count = left if size < 0 else min(size, left)
        if count > MAX_DIRECTORY:
            raise UnsafeCheckpoint(f"its zip directory takes more than {MAX_DIRECTORY:,} bytes", file=self.file.path)
        data = bytes(self.file.read(self.position, count))
        self.position += count
        return data
