"""PyTorch files: whatever torch.save writes is read bit for bit as torch.load reads it, in both formats."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from converters.errors import CheckpointError, DamagedCheckpoint
from converters.readers import Checkpoint, open_checkpoint
from converters.tensors import DTYPES, from_torch, to_torch


def every_dtype() -> dict[str, torch.Tensor]:
    bits = torch.arange(48, dtype=torch.uint8)
    tensors = {name: bits.clone().view(getattr(torch, name)) for name in DTYPES if name not in ("bool", "uint8")}
    return {**tensors, "uint8": bits, "bool": bits % 3 == 0}


def views() -> dict[str, torch.Tensor]:
    base = torch.randn(6, 5, 4)
    return {
        "whole": base,
        "row": base[2],
        "tail": base[4:],
        "column": base[:, 1],
        "every other": base[1::2, ::2, 1::2],
        "transposed": base.transpose(0, 2),
        "half": base.half().permute(2, 0, 1),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "one of each": base[:, :1, :1].transpose(1, 2),
        "expanded": torch.arange(3.0).expand(4, 3),
        "overlapping": torch.arange(10.0).as_strided((4, 4), (1, 2)),
        "complex": torch.view_as_complex(torch.randn(3, 4, 2)).T,
    }


def kinds() -> dict[str, torch.Tensor]:
    tied = torch.randn(3, 2)
    marked = torch.randn(2)
    marked.note = "an attribute"  # type: ignore[attr-defined]
    parameter = nn.Parameter(torch.randn(2))
    parameter.note = "an attribute"  # type: ignore[attr-defined]
    return {
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0),
        "no rows": torch.empty(0, 3),
        "no columns": torch.empty(3, 0),
        "special": torch.tensor([float("nan"), -0.0, float("inf"), 1e-45]),
        "tied": tied,
        "tied too": tied,
        "tied in part": tied[1:],
        "parameter": nn.Parameter(torch.randn(2, 2)),
        "parameter with an attribute": parameter,
        "tensor with an attribute": marked,
        "buffer": nn.Buffer(torch.randn(2)),
        "nämé/with.dots": torch.randn(1),
    }


def assert_equal(checkpoint: Checkpoint, expected: dict[str, torch.Tensor]) -> None:
    assert list(checkpoint.tensors) == list(expected)
    for name, tensor in checkpoint.tensors.items():
        assert (tensor.spec.name, tensor.spec.shape) == (name, tuple(expected[name].shape))
        assert getattr(torch, tensor.spec.dtype) == expected[name].dtype
        raw = tensor.read()
        assert not raw.readonly
        assert raw == from_torch(expected[name]), name


@pytest.fixture(params=[True, False], ids=["zip", "legacy"])
def save(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Path]:
    def save(value: Any, **options: Any) -> Path:
        torch.save(value, tmp_path / "model.pth", _use_new_zipfile_serialization=request.param, **options)
        return tmp_path / "model.pth"

    return save


@pytest.mark.parametrize("make", [every_dtype, views, kinds])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_reads_what_torch_saves(make: Callable[[], dict[str, Any]], protocol: int, save: Callable[..., Path]) -> None:
    saved = make()
    path = save({"state_dict": saved, "epoch": 3}, pickle_protocol=protocol)
    found = open_checkpoint(path)
    assert_equal(found, saved)
    if make is not every_dtype or zipfile.is_zipfile(path):  # torch.load itself fails on a legacy file with uint16
        assert_equal(found, torch.load(path, weights_only=False)["state_dict"])
    assert (found.wrappers, found.metadata) == (("state_dict",), {"epoch": 3})


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
        self.head = nn.Linear(2, 3, bias=False)
        self.register_buffer("table", torch.arange(3))
        self.register_buffer("cache", torch.ones(1), persistent=False)
        self.again = self.head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.stem(x).mean((2, 3)))


def test_a_module_pickled_whole_is_its_state_dict(save: Callable[..., Path]) -> None:
    net = Net()
    found = open_checkpoint(save({"model": net, "args": None}))
    assert found.wrappers == ("model",)
    assert {name: spec.shape for name, spec in found.specs.items()} == {
        name: tuple(tensor.shape) for name, tensor in net.state_dict().items()
    }
    for name, tensor in net.state_dict().items():
        assert found.tensors[name].read() == from_torch(tensor)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["script", "trace", "for mobiles"])
def test_torchscript_is_its_state_dict(how: str, tmp_path: Path) -> None:
    net, path = Net().eval(), tmp_path / "model.pt"
    script = torch.jit.trace(net, torch.ones(1, 1, 5, 5)) if how == "trace" else torch.jit.script(net)
    script._save_for_lite_interpreter(str(path)) if how == "for mobiles" else script.save(path)
    found = open_checkpoint(path)
    assert found.writer == "TorchScript"
    expected = {**torch.jit.load(path).state_dict(), **net.state_dict()}
    assert set(found.tensors) - {"cache"} == set(expected) - {"cache"}  # it does not say that a buffer is transient
    assert all(found.tensors[name].read() == from_torch(tensor) for name, tensor in expected.items())


@pytest.mark.filterwarnings("ignore")
def test_frozen_torchscript_is_refused_by_name(tmp_path: Path) -> None:
    torch.jit.freeze(torch.jit.script(Net().eval())).save(tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"model\.pt: is frozen TorchScript: its weights are constants of its c"):
        open_checkpoint(tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("beside", "writer"),
    [
        ({"pytorch-lightning_version": "2.5.1", "hyper_parameters": {"lr": 0.1}}, "PyTorch Lightning 2.5.1"),
        ({"meta": {"mmengine_version": "0.10.7"}}, "MMEngine 0.10.7"),
        ({"meta": {"mmcv_version": "1.7.2"}}, "MMCV 1.7.2"),
        ({"epoch": 3}, None),
    ],
)
def test_a_trainer_that_left_its_version_is_the_writer(
    beside: dict[str, Any], writer: str | None, save: Callable[..., Path]
) -> None:
    found = open_checkpoint(save({"state_dict": {"model.fc.weight": torch.ones(2)}, **beside}))
    assert (found.writer, found.metadata) == (writer, beside)
    assert list(found.tensors) == ["model.fc.weight"]  # a mapping's `strip` takes such a prefix off


def deflate(path: Path, which: str) -> None:
    """Write the archive anew with members that end in `which` deflated."""
    with zipfile.ZipFile(path) as source:
        members = {info.filename: source.read(info) for info in source.infolist()}
    with zipfile.ZipFile(path, "w") as target:
        for name, data in members.items():
            method = zipfile.ZIP_DEFLATED if name.endswith(which) else zipfile.ZIP_STORED
            target.writestr(name, data, compress_type=method)


def test_a_deflated_pickle_is_read_and_a_deflated_tensor_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save({"w": torch.ones(100)}, path)
    deflate(path, "data.pkl")
    assert_equal(open_checkpoint(path), {"w": torch.ones(100)})
    deflate(path, "data/0")
    with pytest.raises(CheckpointError, match=r"model\.pth: w: is compressed in the file; load and save it again"):
        open_checkpoint(path)


@pytest.mark.parametrize("wanted", [slice(0, 100), slice(20, 30)], ids=["the whole record", "a part of it"])
def test_a_flipped_bit_is_found_when_its_tensor_is_read(wanted: slice, tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save({"sound": torch.ones(4), "w": torch.arange(100.0)[wanted]}, path)
    data = bytearray(path.read_bytes())
    data[data.index(torch.arange(100.0).numpy().tobytes()) + 4 * 50] ^= 1  # outside the part that is wanted
    path.write_bytes(data)
    found = open_checkpoint(path)
    assert found.integrity == "CRC-32 of every record"
    assert to_torch(found.tensors["sound"].read(), found.specs["sound"]).tolist() == [1, 1, 1, 1]
    with pytest.raises(DamagedCheckpoint, match=r"^.*model\.pth: w: its CRC-32 differs; fetch it again$"):
        found.tensors["w"].read()


def test_files_without_crc_say_so(tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.ones(4)}, tmp_path / "model.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    found = open_checkpoint(tmp_path / "model.pth")
    assert found.integrity == "none: 1 of 1 records were saved without CRC-32"
    assert_equal(found, {"w": torch.ones(4)})


@contextmanager
def process_group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def distributed() -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    with process_group():
        return distribute_tensor(torch.ones(4, 2), init_device_mesh("cpu", (1,)), [Shard(0)])


class Sharded:
    """A ShardedTensor that can be pickled: that needs the process group."""

    def __reduce_ex__(self, protocol: int) -> Any:
        from torch.distributed._shard import sharded_tensor
        from torch.distributed._shard.sharding_spec import ChunkShardingSpec

        with process_group():
            spec = ChunkShardingSpec(dim=0, placements=["rank:0/cpu"])  # type: ignore[list-item]
            return sharded_tensor.ones(spec, 4, 2).__reduce_ex__(protocol)


def sharded() -> Any:
    return Sharded()


def float_zero_points() -> torch.Tensor:
    return torch.quantize_per_channel(torch.ones(2, 3), torch.ones(2), torch.zeros(2), 0, torch.quint8)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "sparse": (lambda: torch.eye(2).to_sparse(), "is sparse"),
    "conjugated": (lambda: torch.ones(2, dtype=torch.complex64).conj(), "is conjugated or negated lazily"),
    "quantized": (float_zero_points, "is quantized with zero points that are no integers; dequantize it"),
    "meta": (lambda: torch.empty(2, device="meta"), "has no data"),
    "bare storage": (lambda: torch.UntypedStorage(4), "is a bare storage"),
    "complex128": (lambda: torch.ones(2, dtype=torch.complex128), "is of dtype complex128"),
    "expanded": (lambda: torch.ones(1).expand(1000, 1000), "is an expanded view: 4 bytes would become 4000000"),
    "uninitialized": (lambda: nn.LazyLinear(3).weight, "was never initialized"),
    "DTensor": (distributed, "is one process's part of a distributed tensor"),
    "ShardedTensor": (sharded, "is one process's part of a distributed tensor"),
    "an object": (lambda: slice(1, 2), "is no tensor but a builtins.slice"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "words"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_plain_tensor_is_refused_by_name(make: Callable[[], Any], words: str, tmp_path: Path) -> None:
    torch.save({"sound": torch.ones(1), "w": make()}, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=rf"^.*model\.pth: w: {words}[^\n]*$"):
        open_checkpoint(tmp_path / "model.pth")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.ones(2), "holds a bare tensor, not a state dict; save model.state_dict()"),
        (3, "holds a int, not a state dict"),
        (slice(1), "holds a builtins.slice, not a state dict"),
    ],
)
def test_what_is_no_state_dict_is_refused(value: Any, words: str, tmp_path: Path) -> None:
    torch.save(value, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(tmp_path / "model.pth")


def test_a_tensor_takes_memory_of_its_own_size(save: Callable[..., Path]) -> None:
    path = save({"model": {str(i): torch.zeros(1 << 20) for i in range(8)}})
    tracemalloc.start()
    try:
        found = open_checkpoint(path)
        opened = tracemalloc.get_traced_memory()[1]
        for tensor in found.tensors.values():
            tensor.read()
        read = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert opened < 1 << 20
    assert read < 5 << 20


RUNNER = """
import sys
sys.path.insert(0, sys.argv[2])
from converters.readers import open_checkpoint
found = open_checkpoint(sys.argv[1])
for tensor in found.tensors.values():
    tensor.read()
heavy = {"mmengine", "numpy", "torch", "timm", "tensorflow", "h5py"} & set(sys.modules)
print(len(found.tensors), "mmengine_version" in found.metadata["meta"], heavy or "none")
"""


def test_an_mmengine_runner_file_opens_without_mmengine(tmp_path: Path) -> None:
    """Its training log pickles builtins.getattr and numpy arrays; its EMAHook exchanges both weights."""
    from mmengine.model import BaseModel
    from mmengine.runner import Runner
    from torch.utils.data import DataLoader

    class Model(BaseModel):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))

        def train_step(self, data: Any, optim_wrapper: Any) -> Any:
            return super().train_step({"images": data}, optim_wrapper)

        def forward(self, images: torch.Tensor, mode: str = "loss") -> Any:
            return {"loss": (self.net(images) - 3).square().mean()}

    runner = Runner(
        Model(),
        str(tmp_path),
        train_dataloader=DataLoader(torch.randn(8, 1, 2, 2), batch_size=2),
        train_cfg={"by_epoch": True, "max_epochs": 1},
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.1, "momentum": 0.9}},
        param_scheduler={"type": "MultiStepLR", "milestones": [1]},
        custom_hooks=[{"type": "EMAHook", "momentum": 0.3}],
        default_hooks={"logger": {"type": "LoggerHook", "interval": 1}},
        log_level="ERROR",
    )
    runner.train()
    path = tmp_path / "epoch_1.pth"
    average = next(hook for hook in runner.hooks if type(hook).__name__ == "EMAHook").ema_model.module.state_dict()
    raw = runner.model.state_dict()
    assert not torch.equal(raw["net.0.weight"], average["net.0.weight"])

    found = open_checkpoint(path)
    assert_equal(found, average)
    assert found.wrappers == ("state_dict",)
    assert found.set_aside == {
        "optimizer.**": "optimizer state",
        "ema_state_dict.**": "raw weights, which MMEngine's EMAHook exchanges when it saves",
    }
    assert found.metadata["message_hub"]["runtime_info"]["epoch"] == 0
    found = open_checkpoint(path, ema=False)
    assert_equal(found, raw)
    assert found.wrappers == ("ema_state_dict", "module.")
    assert found.set_aside["steps"] == "averaging counter"

    root = str(Path(__file__).parents[3])
    child = subprocess.run(
        [sys.executable, "-c", RUNNER, path, root], capture_output=True, text=True, check=False, timeout=60
    )
    assert (child.stdout.strip(), child.stderr) == ("7 True none", "")
