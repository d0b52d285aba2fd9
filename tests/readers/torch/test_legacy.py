"""PyTorch legacy files: what only they have; test_zip_file.py compares both formats with torch.load."""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from converters.errors import CheckpointError
from converters.readers import open_checkpoint
from converters.readers.torch.legacy import MAGIC, PROTOCOL
from converters.tensors import to_torch

MACHINE = {"protocol_version": PROTOCOL, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
TEN = struct.pack("<q10f", 10, *range(10))


class View:
    """Pickles as a tensor over a storage that the persistent id `name` describes."""

    def __init__(self, name: tuple[Any, ...], offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
        self.name, self.arguments = name, (offset, shape, strides, False, OrderedDict())

    def __reduce__(self) -> Any:
        return torch._utils._rebuild_tensor_v2, (Named(self.name), *self.arguments)


class Named:
    def __init__(self, name: tuple[Any, ...]) -> None:
        self.name = name


def write(
    path: Path,
    value: Any,
    keys: Any,
    storages: bytes,
    machine: Any = MACHINE,
    magic: int = MAGIC,
    protocol: int = PROTOCOL,
) -> Path:
    """A legacy file, pickle by pickle."""
    stream = io.BytesIO()
    for part in (magic, protocol, machine):
        pickle.dump(part, stream, 2)

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return value.name if isinstance(value, Named) else None

    Pickler(stream, 2).dump(value)
    pickle.dump(keys, stream, 2)
    path.write_bytes(stream.getvalue() + storages)
    return path


def named(view: tuple[str, int, int] | None = None, numel: int = 10) -> tuple[Any, ...]:
    return ("storage", torch.FloatStorage, "1", "cpu", numel, view)


def test_a_view_of_a_storage_is_read_at_its_offset(tmp_path: Path) -> None:
    value = {"w": View(named(("7", 3, 5)), 1, (2, 2), (2, 1)), "all": View(named(), 0, (10,), (1,))}
    path = write(tmp_path / "model.pth", value, ["1"], TEN)
    loaded = torch.load(path, weights_only=True)
    for name, tensor in open_checkpoint(path).tensors.items():
        assert torch.equal(to_torch(tensor.read(), tensor.spec), loaded[name])
    assert open_checkpoint(path).integrity == "none in format"


def test_a_python_2_pickle(tmp_path: Path) -> None:
    """Byte strings for text, long integers, an OrderedDict built from a list of pairs."""
    torch.save(OrderedDict(w=torch.arange(3)), tmp_path / "model.pth", _use_new_zipfile_serialization=False)
    data = (tmp_path / "model.pth").read_bytes()
    start = data.index(b"ccollections\nOrderedDict\n")
    end = data.index(b"X\x01\x00\x00\x00w")
    pairs = b"ccollections\nOrderedDict\nq\x00]]U\x01wa"
    data = (
        data[:start]
        + pairs
        + data[end + 6 :].replace(b"K\x03\x85", b"\x8a\x01\x03\x85", 1).replace(b"s.", b"aa\x85R.", 1)
    )
    (tmp_path / "model.pth").write_bytes(data)
    found = open_checkpoint(tmp_path / "model.pth").tensors["w"]
    assert to_torch(found.read(), found.spec).tolist() == [0, 1, 2]


def refused(**changes: Any) -> Callable[[Path], Path]:
    usual = {"value": {"w": View(named(), 0, (10,), (1,))}, "keys": ["1"], "storages": TEN}
    return lambda path: write(path, **{**usual, **changes})


def tar(path: Path) -> Path:
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("pickle"))
    return path


REFUSED = {
    "tar": (tar, "is a tar archive; unpack it"),
    "other protocol": (refused(protocol=1002), "its first pickles are not those of torch.save"),
    "big-endian": (refused(machine={**MACHINE, "little_endian": False}), "its byte order is big-endian"),
    "no facts": (refused(machine={}), "its byte order is big-endian"),
    "keys are no list": (refused(keys="1"), "its first pickles are not those"),
    "unknown key": (refused(keys=["2"]), "its storages are not those that its pickle names"),
    "key twice": (refused(keys=["1", "1"], storages=TEN + TEN), "its storages are not those"),
    "keys of another type": (refused(keys=[["1"]]), "its storages are not those"),
    "other length": (refused(storages=b"\x09" + TEN[1:]), "its storages are not those"),
    "negative length": (refused(storages=b"\xff" * 8 + TEN[8:]), "its storages are not those"),
    "missing storage": (refused(keys=[], storages=b""), "w: its storage is missing"),
    "cut": (refused(storages=TEN[:-1]), r"takes \d+ bytes, not \d+; is the download complete"),
    "trailing bytes": (refused(storages=TEN + b"\0"), r"takes \d+ bytes, not \d+"),
    "view beyond its storage": (refused(value={"w": View(named(("7", 8, 5)), 0, (1,), (1,))}), "makes no sense"),
    "tensor beyond its view": (refused(value={"w": View(named(("7", 3, 5)), 0, (6,), (1,))}), "w: reaches beyond"),
    "endless pickle": (lambda path: path.write_bytes(MAGIC_PICKLE + b"B\xff\xff\xff\x7f") and path, "breaks off"),
}  # fmt: skip
MAGIC_PICKLE = pickle.dumps(MAGIC, 2)


@pytest.mark.parametrize(("make", "words"), REFUSED.values(), ids=REFUSED)
def test_refusals(make: Callable[[Path], Path], words: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"^.*model\.pth: [^\n]*{words}[^\n]*$"):
        open_checkpoint(make(tmp_path / "model.pth"))


def test_a_pickle_larger_than_any_is_refused(tmp_path: Path) -> None:
    """A sparse file: nothing of it is read beyond the length that its pickle claims."""
    path = tmp_path / "model.pth"
    path.write_bytes(MAGIC_PICKLE + b"B" + struct.pack("<I", 1 << 30))
    with path.open("r+b") as file:
        file.truncate(2 << 30)
    with pytest.raises(CheckpointError, match="its pickles take more than 268,435,456 bytes"):
        open_checkpoint(path)
