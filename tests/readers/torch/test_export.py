"""torch.export archives: parameters and buffers as the exported program's own state dict has them."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from converters.errors import CheckpointError
from converters.readers import open_checkpoint
from converters.tensors import DTYPES, from_torch

pytestmark = pytest.mark.filterwarnings("ignore")
CONFIG = "model/data/weights/model_weights_config.json"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
        self.fc = nn.Linear(2, 2).bfloat16()
        self.fc.weight = nn.Parameter(torch.randn(4, 4, dtype=torch.bfloat16)[::2, 1:3].T)
        self.again = self.fc
        self.register_buffer("table", torch.arange(6)[2:])
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("cache", torch.ones(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = (self.stem(x).mean((2, 3)) * self.mask + self.cache).bfloat16()
        return self.again(self.fc(x)) + self.table.sum()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    path = tmp_path_factory.mktemp("export") / "model.pt2"
    program = torch.export.export(Net().eval(), (torch.ones(1, 1, 5, 5),))
    torch.export.save(program, path)
    return path, dict(program.state_dict)


def test_reads_what_torch_exports(saved: tuple[Path, dict[str, torch.Tensor]]) -> None:
    path, expected = saved
    found = open_checkpoint(path)
    assert (found.format, found.integrity) == ("torch.export archive", "CRC-32 of every record")
    assert set(found.tensors) == set(expected) == set(torch.export.load(path).state_dict)
    for name, tensor in found.tensors.items():
        assert (tensor.spec.name, tensor.spec.shape) == (name, tuple(expected[name].shape))
        assert getattr(torch, tensor.spec.dtype) == expected[name].dtype
        assert tensor.read() == from_torch(expected[name]), name


def test_the_dtypes_are_those_of_the_schema() -> None:
    from torch._export.serde.serialize import _TORCH_TO_SERIALIZE_DTYPE as NUMBERS

    from converters.readers.torch.export import SCALARS

    assert {NUMBERS[getattr(torch, name)]: name for name in DTYPES} == SCALARS


def test_an_archive_of_older_torch(tmp_path: Path) -> None:
    torch.save(Net().state_dict(), tmp_path / "inner")
    with zipfile.ZipFile(tmp_path / "model.pt2", "w") as archive:
        archive.writestr("serialized_exported_program.json", "{}")
        archive.writestr("serialized_state_dict.pt", (tmp_path / "inner").read_bytes())
    expected = torch.load(tmp_path / "inner")
    found = open_checkpoint(tmp_path / "model.pt2")
    assert found.format == "torch.export archive"
    assert {name: bytes(tensor.read()) for name, tensor in found.tensors.items()} == {
        name: bytes(from_torch(tensor)) for name, tensor in expected.items()
    }


def rewrite(path: Path, target: Path, change: Callable[[dict[str, Any]], None], copies: int = 1) -> Path:
    """The archive with its weights' config changed, or several programs in it."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w") as archive:
        for info in source.infolist():
            if info.filename != CONFIG:
                archive.writestr(info.filename, source.read(info))
        config = json.loads(source.read(CONFIG))
        change(config["config"])
        for copy in range(copies):
            archive.writestr(CONFIG.replace("/model_w", f"/model{copy}_w"), json.dumps(config))
    return target


def test_several_programs_are_several_state_dicts(saved: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    path = rewrite(saved[0], tmp_path / "model.pt2", lambda config: None, copies=2)
    with pytest.raises(CheckpointError, match=r"holds several state dicts: model0, model1; choose one, as in --key"):
        open_checkpoint(path)
    assert set(open_checkpoint(path, key="model1").tensors) == set(saved[1])


def meta(config: dict[str, Any]) -> dict[str, Any]:
    return config["stem.0.weight"]["tensor_meta"]


FAULTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "pickled": (lambda c: c["stem.0.weight"].update(use_pickle=True), "stem.0.weight: is pickled in the archive"),
    "missing": (lambda c: c["stem.0.weight"].update(path_name="weight_99"), "stem.0.weight: has no model/data/weights"),
    "elsewhere": (lambda c: c["stem.0.weight"].update(path_name="../../x"), "stem.0.weight: has no model/data/weights"),
    "no name": (lambda c: c["stem.0.weight"].update(path_name=None), "stem.0.weight: has no model/data/weights"),
    "no entry": (lambda c: c.update({"stem.0.weight": None}), "its weights_config.json makes no sense"),
    "dtype": (lambda c: meta(c).update(dtype=11), "stem.0.weight: is of dtype 11, which is not converted"),
    "odd bytes": (lambda c: c["table"]["tensor_meta"].update(dtype=10, sizes=[{"as_int": 9}]), "table: "),
    "larger": (lambda c: meta(c).update(sizes=[{"as_int": 9}] * 4), "stem.0.weight: reaches beyond its storage"),
    "offset": (lambda c: meta(c).update(storage_offset={"as_int": 1}), "stem.0.weight: reaches beyond its storage"),
    "negative": (lambda c: meta(c).update(storage_offset={"as_int": -1}), "stem.0.weight: its offset, shape or"),
    "symbolic": (lambda c: meta(c).update(sizes=[{"as_expr": "s0"}]), "its weights_config.json makes no sense"),
    "expanded": (
        lambda c: meta(c).update(sizes=[{"as_int": 10**6}] * 2, strides=[{"as_int": 0}] * 2),
        "stem.0.weight: is an expanded view",
    ),
}


@pytest.mark.parametrize(("change", "words"), FAULTS.values(), ids=FAULTS)
def test_faults(
    change: Callable[[dict[str, Any]], Any],
    words: str,
    saved: tuple[Path, dict[str, torch.Tensor]],
    tmp_path: Path,
) -> None:
    path = rewrite(saved[0], tmp_path / "model.pt2", change)
    with pytest.raises(CheckpointError, match=rf"^[^\n]*model\.pt2: ({words})[^\n]*$"):
        open_checkpoint(path)
