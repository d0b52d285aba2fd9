"""PyTorch zip files: what torch.save writes since 1.6, and TorchScript archives.

A zip of stored members below one folder: `data.pkl` names the tensors, `data/KEY` holds a storage's bytes,
`byteorder` says which end comes first. Code in TorchScript archives is not looked at.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from converters.errors import CheckpointError, DamagedCheckpoint
from converters.readers import Contents, pickles
from converters.readers.files import SourceFile
from converters.readers.records import Record
from converters.readers.torch.storages import Storage, resolve
from converters.readers.torch.symbols import MEANINGS
from converters.readers.torch.trees import build_tree, open_tensor, written_by
from converters.readers.zip_archive import AGAIN, ZipArchive

__all__ = ["FORMAT", "Pickled", "accepts", "check_byte_order", "read"]

FORMAT = "PyTorch zip"
INTEGRITY = "CRC-32 of every record"


def accepts(path: Path, head: bytes) -> bool:
    """Whether this is a zip with a `data.pkl` (or one whose directory is lost, of which nobody can say more)."""
    if not head.startswith(b"PK\x03\x04"):
        return False
    try:
        names = ZipArchive.open(SourceFile(path)).members
    except CheckpointError:
        return True
    return any(name.endswith("data.pkl") for name in names)


def read(path: Path) -> Contents:
    file = SourceFile(path)
    archive = ZipArchive.open(file)
    pickled = Pickled(archive)
    tree = build_tree(pickled.value, path, open_tensor(pickled.find))
    root, writer = pickled.root, written_by(tree)
    if f"{root}constants.pkl" in archive.members:
        writer = "TorchScript"
        if not tree and f"{root}constants/0" in archive.members:
            cure = "save it before torch.jit.freeze or optimize_for_inference"
            raise CheckpointError("is frozen TorchScript: its weights are constants of its code", file=path, cure=cure)
    return Contents(tree, (file,), pickled.integrity, writer)


class Pickled:
    """What one archive of torch.save holds: its pickle's value, and the records of its storages as they are found."""

    def __init__(self, archive: ZipArchive) -> None:
        path = archive.file.path
        self.archive, self.root = archive, _find_root(archive)
        self.records: dict[str, Record] = {}
        check_byte_order(archive, self.root)
        stream = io.BytesIO(archive.content(f"{self.root}data.pkl", pickles.MAX_BYTES))
        self.value: Any = pickles.load(stream, path, MEANINGS, resolve)
        if stream.read(1):
            raise DamagedCheckpoint("bytes follow the pickle in its data.pkl", file=path, cure=AGAIN)

    def find(self, storage: Storage, tensor: str) -> Record:
        """The record of a storage; `tensor` asks for it."""
        if storage.key not in self.records:
            self.records[storage.key] = self.archive.record(f"{self.root}data/{storage.key}", tensor)
        return self.records[storage.key]

    @property
    def integrity(self) -> str:
        """How damage to the records found so far is told."""
        unchecked = sum(record.crc is None and record.nbytes > 0 for record in self.records.values())
        return f"none: {unchecked} of {len(self.records)} records were saved without CRC-32" if unchecked else INTEGRITY


def _find_root(archive: ZipArchive) -> str:
    """The folder that holds data.pkl, with its slash."""
    found = [name for name in archive.members if f"/{name}".endswith("/data.pkl")]
    if len(found) != 1:
        problem = f"holds {len(found) or 'no'} data.pkl"
        raise CheckpointError(problem, file=archive.file.path, cure="save model.state_dict() with torch.save")
    return found[0].removesuffix("data.pkl")


def check_byte_order(archive: ZipArchive, root: str) -> None:
    """Raise CheckpointError where the archive's numbers do not begin with their low byte."""
    order = bytes(archive.content(f"{root}byteorder", 16)) if f"{root}byteorder" in archive.members else b"little"
    if order != b"little":
        cure = "save it on a little-endian machine"
        raise CheckpointError(f"its byte order is {order!r}", file=archive.file.path, cure=cure)
