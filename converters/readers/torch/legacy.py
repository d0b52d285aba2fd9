"""PyTorch legacy files: what torch.save wrote before 1.6, and still writes if asked.

Five pickles (a magic number, the protocol, facts of the machine, the object, the storages' keys), then each
storage in the order of the keys: its number of elements in 8 bytes, and its bytes. Nothing detects damage.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from converters.errors import CheckpointError, DamagedCheckpoint
from converters.readers import Contents, pickles
from converters.readers.files import SourceFile
from converters.readers.records import Record
from converters.readers.streams import FileStream
from converters.readers.torch.storages import Storage, resolve
from converters.readers.torch.symbols import MEANINGS
from converters.readers.torch.trees import build_tree, open_tensor, written_by

__all__ = ["FORMAT", "accepts", "read"]

FORMAT = "PyTorch legacy"
MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001


def accepts(path: Path, head: bytes) -> bool:
    """Whether this is a legacy file, or a tar, which `read` refuses by name."""
    return MAGIC.to_bytes(10, "little") in head[:32] or _is_tar(head)


def read(path: Path) -> Contents:
    source = SourceFile(path)
    head = bytes(source.read(0, min(source.size, 512)))
    if _is_tar(head):
        raise CheckpointError("is a tar archive", file=path, cure="unpack it; if torch < 0.1.10 wrote it, save it anew")
    first_named: dict[str, Storage] = {}

    def remember(name: Any) -> Any:
        found = resolve(name)
        if isinstance(found, Storage):
            first_named.setdefault(found.key, found)
        return found

    stream = FileStream(source, pickles.MAX_BYTES)
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

    tree = build_tree(value, path, open_tensor(record))
    return Contents(tree, (source,), "none in format", written_by(tree))


def _is_tar(head: bytes) -> bool:
    return head[257:262] == b"ustar"
