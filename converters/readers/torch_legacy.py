"""PyTorch legacy files: what torch.save wrote before 1.6, and still writes if asked.

Five pickles (a magic number, the protocol, facts of the machine, the object, the storages' keys), then each
storage in the order of the keys: its number of elements in 8 bytes, and its bytes. Nothing detects damage.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from converters.errors import CheckpointError, DamagedCheckpoint, UnknownFormat, UnsafeCheckpoint
from converters.readers import Contents, pickles
from converters.readers.files import SourceFile
from converters.readers.torch_storages import MEANINGS, Record, Storage, resolve
from converters.readers.torch_trees import build_tree

__all__ = ["FORMAT", "accepts", "read"]

FORMAT = "PyTorch legacy"
MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
WINDOW = 1 << 16  # bytes read at once


def accepts(path: Path, head: bytes) -> bool:
    """Whether this is a legacy file, or one of its kin that `read` refuses by name: a tar, a bare pickle."""
    return _is_legacy(head) or _is_tar(head) or _is_pickle(head)


def read(path: Path) -> Contents:
    source = SourceFile(path)
    head = bytes(source.read(0, min(source.size, 512)))
    if _is_tar(head):
        raise CheckpointError("is a tar archive", file=path, cure="unpack it; if torch < 0.1.10 wrote it, save it anew")
    if not _is_legacy(head):
        raise UnknownFormat(
            "is a bare pickle, not a torch.save file", file=path, cure="save its tensors as safetensors"
        )

    first_named: dict[str, Storage] = {}

    def remember(name: Any) -> Any:
        found = resolve(name)
        if isinstance(found, Storage):
            first_named.setdefault(found.key, found)
        return found

    stream = _Stream(source)
    magic, protocol, machine, value, keys = (pickles.load(stream, path, MEANINGS, remember) for _ in range(5))
    if magic != MAGIC or protocol != PROTOCOL or not isinstance(machine, dict) or not isinstance(keys, list):
        raise DamagedCheckpoint("its first pickles are not those of torch.save", file=path, cure="fetch it again")
    if machine.get("little_endian") is not True:
        raise CheckpointError("its byte order is big-endian", file=path, cure="save it on a little-endian machine")

    records: dict[str, Record] = {}
    offset = stream.tell()
    for key in keys:
        storage = first_named.get(key) if isinstance(key, str) else None
        numel = int.from_bytes(source.read(offset, 8), "little")
        if storage is None or key in records or numel != storage.numel:
            raise DamagedCheckpoint(
                "its storages are not those that its pickle names", file=path, cure="fetch it again"
            )
        records[key] = Record(source, offset + 8, storage.nbytes)
        offset += 8 + storage.nbytes
    if offset != source.size:
        raise DamagedCheckpoint(f"takes {source.size} bytes, not {offset}", file=path, cure="is the download complete?")

    def record(storage: Storage, tensor: str) -> Record:
        if storage.key not in records:
            raise DamagedCheckpoint("its storage is missing", file=path, tensor=tensor, cure="fetch it again")
        return records[storage.key]

    return Contents(build_tree(value, source, record), (source,), "none in format")


def _is_legacy(head: bytes) -> bool:
    return MAGIC.to_bytes(10, "little") in head[:32]


def _is_tar(head: bytes) -> bool:
    return head[257:262] == b"ustar"


def _is_pickle(head: bytes) -> bool:
    return head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")


class _Stream:
    """A source file read forward through a small window, as pickles are."""

    def __init__(self, file: SourceFile) -> None:
        self.file = file
        self.window = b""
        self.start = 0  # of the window in the file
        self.at = 0  # in the window

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

    def _need(self, count: int) -> None:
        """Have `count` bytes in the window, or all that there are."""
        if self.at + count <= len(self.window):
            return
        here = self.tell()
        length = min(max(count, WINDOW), self.file.size - here)
        if here + length > pickles.MAX_BYTES + WINDOW:
            raise UnsafeCheckpoint(f"its pickles take more than {pickles.MAX_BYTES:,} bytes", file=self.file.path)
        self.window, self.start, self.at = bytes(self.file.read(here, length)), here, 0
