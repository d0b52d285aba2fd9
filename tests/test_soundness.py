from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch

from converters import convert
from converters.errors import CheckpointError

ONE = "layer1.0.conv1.weight"


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return timm.create_model("resnet18").state_dict()


@pytest.mark.parametrize(
    ("tensor", "value", "dtype", "fault"),
    [
        (ONE, float("nan"), "source", "holds NaN"),
        (ONE, float("inf"), "source", "holds infinity"),
        (ONE, float("-inf"), "source", "holds infinity"),
        (ONE, float("nan"), "bfloat16", "holds NaN"),
        ("fc.bias", float("nan"), "float16", "holds NaN"),
        ("bn1.running_var", -1.0, "source", "is a variance, and holds -1"),
        ("bn1.running_mean", -1.0, "source", None),
        ("bn1.running_var", -9e-6, "source", None),  # eps is 1e-5
    ],
)
def test_what_gives_nan_is_refused(
    weights: dict[str, torch.Tensor], tensor: str, value: float, dtype: str, fault: str | None, tmp_path: Path
) -> None:
    state = {name: one.clone() for name, one in weights.items()}
    state[tensor].view(-1)[-1] = value
    torch.save({"arch": "resnet18", "state_dict": state}, tmp_path / "source.pth")
    if fault is None:
        convert(tmp_path / "source.pth", tmp_path / "out", dtype=dtype)
        return
    with pytest.raises(CheckpointError) as told:
        convert(tmp_path / "source.pth", tmp_path / "out", dtype=dtype)
    cure = "take an earlier checkpoint, or pass --allow-nan to have it so"
    assert str(told.value) == f"{tmp_path / 'source.pth'}: {tensor}: {fault}; {cure}"
    assert [path.name for path in tmp_path.iterdir()] == ["source.pth"]
    convert(tmp_path / "source.pth", tmp_path / "out", dtype=dtype, allow_nan=True)


def test_how_many_are_told(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    state = {name: one * float("nan") for name, one in weights.items() if one.is_floating_point()}
    torch.save({"arch": "resnet18", "state_dict": {**weights, **state}}, tmp_path / "source.pth")
    with pytest.raises(CheckpointError, match=r"conv1.weight: holds NaN \(and 101 more tensors do\)"):
        convert(tmp_path / "source.pth", tmp_path / "out")
