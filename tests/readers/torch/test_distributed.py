"""Distributed checkpoints: what torch.distributed.checkpoint saves is read as it is loaded, chunk by chunk."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from converters.errors import CheckpointError
from converters.readers import open_checkpoint
from converters.tensors import DTYPES, from_torch

pytestmark = pytest.mark.filterwarnings("ignore")


def model() -> dict[str, torch.Tensor]:
    bits = torch.arange(48, dtype=torch.uint8)
    named = {name: bits.clone().view(getattr(torch, name)) for name in DTYPES if name not in ("bool", "uint8")}
    return {
        **named,
        "block.0.weight": torch.randn(3, 4, 2),
        "transposed": torch.randn(3, 4).T,
        "view": torch.randn(100, 100)[3:5, 2],
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 3),
    }


def test_reads_what_torch_saves(tmp_path: Path) -> None:
    weights = model()
    tree = {"model": weights, "optimizer": {"momentum": [torch.ones(2)]}, "epoch": 3}
    dcp.save(tree, checkpoint_id=tmp_path / "saved", no_dist=True)
    dcp_to_torch_save(tmp_path / "saved", tmp_path / "model.pth")
    loaded = torch.load(tmp_path / "model.pth")["model"]
    for path in (tmp_path / "saved", tmp_path / "saved" / ".metadata", tmp_path / "saved" / "__0_0.distcp"):
        found = open_checkpoint(path)
        assert (found.format, found.wrappers) == ("PyTorch distributed checkpoint", ("model",))
        assert set(found.tensors) == set(weights)
        for name, tensor in found.tensors.items():
            assert (tensor.spec.name, tensor.spec.shape) == (name, tuple(weights[name].shape))
            assert getattr(torch, tensor.spec.dtype) == weights[name].dtype
            raw = tensor.read()
            assert not raw.readonly
            assert raw == from_torch(weights[name]) == from_torch(loaded[name]), name
        assert [file.path.name for file in found.files] == [".metadata", "__0_0.distcp"]
        assert found.metadata == {"epoch": "left out: a pickled object"}
        assert found.set_aside == {"optimizer.**": "optimizer state"}


PROCESS = """
import sys
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 1))  # neither 7 nor 1 is even
mesh = init_device_mesh("cpu", (2,))
extra = {"columns": torch.arange(15.0).reshape(3, 5), "replicated": torch.arange(4.0)}
if rank == 0:
    torch.save({**net.state_dict(), **extra}, f"{folder}/full.pth")
placements = {"columns": [Shard(1)], "replicated": [Replicate()]}
placed = {name: distribute_tensor(value, mesh, placements[name]) for name, value in extra.items()}
fully_shard(net, mesh=mesh)
dcp.save({"model": {**net.state_dict(), **placed}}, checkpoint_id=f"{folder}/sharded")
torch.distributed.destroy_process_group()
"""


def test_a_model_that_two_processes_share(tmp_path: Path) -> None:
    children = [
        subprocess.Popen([sys.executable, "-W", "ignore", "-c", PROCESS, str(rank), tmp_path]) for rank in range(2)
    ]
    assert [child.wait(timeout=120) for child in children] == [0, 0]
    expected = torch.load(tmp_path / "full.pth")
    found = open_checkpoint(tmp_path / "sharded")
    assert len(found.files) == 3
    assert set(found.tensors) == set(expected)
    assert all(found.tensors[name].read() == from_torch(tensor) for name, tensor in expected.items())


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tensors = {"w": torch.arange(12.0).reshape(3, 4), "v": torch.ones(5)}
    dcp.save(tensors, checkpoint_id=tmp_path / "saved", no_dist=True)
    return tmp_path / "saved"


def edit(change: Callable[[Metadata], Any]) -> Callable[[Path], Any]:
    def run(folder: Path) -> None:
        metadata = pickle.loads((folder / ".metadata").read_bytes())
        change(metadata)
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))

    return run


def place(metadata: Metadata, **changes: Any) -> None:
    info = next(info for key, info in metadata.storage_data.items() if key.fqn == "w")
    for name, value in changes.items():
        object.__setattr__(info, name, value)


def chunks(*boxes: tuple[tuple[int, ...], tuple[int, ...]], size: tuple[int, ...] = (3, 4)) -> Callable[[Path], Any]:
    """Cut `w` into boxes (offsets, sizes) that are all stored in the place of the whole."""

    def change(metadata: Metadata) -> None:
        key = next(key for key in metadata.storage_data if key.fqn == "w")
        info = metadata.storage_data.pop(key)
        cut = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in boxes]
        properties = TensorProperties(dtype=torch.float32)
        metadata.state_dict_metadata["w"] = TensorStorageMetadata(properties, torch.Size(size), cut)
        metadata.storage_data |= {MetadataIndex("w", chunk.offsets): info for chunk in cut}

    return edit(change)


def link(folder: Path) -> None:
    (folder / "__0_0.distcp").rename(folder.parent / "outside")
    (folder / "__0_0.distcp").symlink_to(folder.parent / "outside")


def cut_short(folder: Path) -> None:
    data = (folder / "__0_0.distcp").read_bytes()
    (folder / "__0_0.distcp").write_bytes(data[:-100])


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "parent": (edit(lambda m: place(m, relative_path="../x")), r"\.metadata: needs \.\./x, which is no file beside it"),
    "absolute": (
        edit(lambda m: place(m, relative_path="/etc/passwd")),
        r"\.metadata: needs /etc/passwd, which is no f",
    ),
    "no name": (edit(lambda m: place(m, relative_path=3)), r"\.metadata: needs 3, which is no file beside it"),
    "link": (link, r"\.metadata: needs __0_0\.distcp, a link that leaves the folder; copy the file there"),
    "missing file": (
        lambda folder: (folder / "__0_0.distcp").unlink(),
        r"\.metadata: needs __0_0\.distcp, which is mi",
    ),
    "no metadata": (lambda folder: (folder / ".metadata").unlink(), r"saved: is a folder without a checkpoint"),
    "cut short": (cut_short, r"__0_0\.distcp: bytes \d+ to \d+ lie outside its \d+; is the download complete"),
    "offset": (edit(lambda m: place(m, offset=10**9)), r"__0_0\.distcp: bytes \d+ to \d+ lie outside its"),
    "negative offset": (edit(lambda m: place(m, offset=-1)), r"\.metadata: its pickle makes no sense"),
    "transformed": (edit(lambda m: place(m, transform_descriptors=["zstd"])), r"w: is compressed or otherwise transf"),
    "not stored": (
        edit(lambda m: m.storage_data.clear()),
        r"\.metadata: [wv]: its chunk at \(0(, 0|,)\) is not stored",
    ),
    "no planner data": (edit(lambda m: setattr(m, "planner_data", 3)), r"\.metadata: its pickle makes no sense"),
    "no chunks": (chunks(), r"\.metadata: w: its chunks do not tile it"),
    "a gap": (chunks(((0, 0), (2, 4))), r"\.metadata: w: its chunks do not tile it"),
    "beyond": (chunks(((0, 0), (2, 4)), ((2, 0), (2, 2))), r"\.metadata: w: its chunks do not tile it"),
    "overlap": (chunks(((0, 0), (2, 4)), ((1, 0), (1, 4))), r"\.metadata: w: its chunks do not tile it"),
    "huge": (chunks(((0, 0), (10**6, 10**6)), size=(10**6, 10**6)), r"\.metadata: w: takes more than there is"),
    "other rank": (chunks(((0,), (12,))), r"\.metadata: its pickle makes no sense"),
    "many": (
        chunks(*(((0, at), (1, 1)) for at in range(4000)), size=(1, 4000)),
        r"\.metadata: w: (is cut into too many chunks|takes more than there is)",
    ),
    "another pickle": (
        lambda folder: (folder / ".metadata").write_bytes(pickle.dumps({"w": 1})),
        "its pickle makes no",
    ),
}


@pytest.mark.parametrize(("break_it", "words"), FAULTS.values(), ids=FAULTS)
def test_faults(break_it: Callable[[Path], Any], words: str, saved: Path) -> None:
    break_it(saved)
    with pytest.raises(CheckpointError, match=rf"^[^\n]*{words}[^\n]*$"):
        open_checkpoint(saved)


def test_a_chunk_must_be_what_the_metadata_says(saved: Path) -> None:
    chunks(((0, 0), (1, 4)), ((1, 0), (2, 4)))(saved)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: w: its chunk at \(0, 0\) is not what \.metadata says"):
        open_checkpoint(saved).tensors["w"].read()


def test_a_flipped_bit_is_found(saved: Path) -> None:
    data = bytearray((saved / "__0_0.distcp").read_bytes())
    data[data.index(torch.ones(5).numpy().tobytes())] ^= 1
    (saved / "__0_0.distcp").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: v: its CRC-32 differs; fetch it again"):
        open_checkpoint(saved).tensors["v"].read()


def test_nothing_is_read_before_it_is_asked_for(saved: Path) -> None:
    specs = open_checkpoint(saved).specs
    size = (saved / "__0_0.distcp").stat().st_size
    (saved / "__0_0.distcp").write_bytes(bytes(size))
    found = open_checkpoint(saved)
    assert found.specs == specs
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: does not end with a zip directory"):
        found.tensors["w"].read()
