"""Quantized tensors and state dicts: read as torch dequantizes them, bit for bit, and reported as lossy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.ao import quantization as quant

from converters.errors import CheckpointError
from converters.readers import open_checkpoint
from converters.tensors import from_torch

pytestmark = pytest.mark.filterwarnings("ignore")
W = torch.randn(6, 5, 4) * 3


def quantized() -> dict[str, torch.Tensor]:
    return {
        "symmetric": torch.quantize_per_tensor(W, 0.0237, 0, torch.qint8),
        "qint8": torch.quantize_per_tensor(
            W, 1 / 64, 7, torch.qint8
        ),  # a power of two: else it depends on the processor
        "quint8": torch.quantize_per_tensor(W, 1 / 64, 77, torch.quint8),
        "channels": torch.quantize_per_channel(W, torch.rand(6) + 0.01, torch.arange(6) - 3, 0, torch.qint8),
        "inner axis": torch.quantize_per_channel(W, torch.rand(5) + 0.01, torch.arange(5), 1, torch.quint8),
        "transposed": torch.quantize_per_tensor(W, 0.1, 0, torch.qint8).permute(2, 0, 1),
        "parameter": nn.Parameter(torch.quantize_per_tensor(W, 0.1, 0, torch.qint8), requires_grad=False),
        "scalar": torch.quantize_per_tensor(torch.tensor(3.0), 0.1, 0, torch.qint8),
        "empty": torch.quantize_per_tensor(torch.empty(0, 2), 0.1, 1, torch.qint8),
    }


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_a_quantized_tensor_is_what_torch_makes_of_it(is_zip: bool, tmp_path: Path) -> None:
    saved = quantized()
    torch.save(saved, tmp_path / "model.pth", _use_new_zipfile_serialization=is_zip)
    found = open_checkpoint(tmp_path / "model.pth")
    for name, tensor in saved.items():
        assert (found.specs[name].dtype, found.specs[name].shape) == ("float32", tuple(tensor.shape))
        raw = found.tensors[name].read()
        assert not raw.readonly
        assert raw == from_torch(tensor.dequantize()), name
    assert found.notes == (
        "dequantized from qint8: 7 of the tensors, which are not as they were trained",
        "dequantized from quint8: 2 of the tensors, which are not as they were trained",
    )


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = quant.QuantStub(), quant.DeQuantStub()
        self.conv, self.fc = nn.Conv2d(1, 2, 3), nn.Linear(2, 3)
        self.alone = nn.Linear(3, 2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dequant(self.alone(self.fc(self.conv(self.quant(x)).mean((2, 3)))))


def dynamic() -> nn.Module:
    return quant.quantize_dynamic(Net().eval(), {nn.Linear}, dtype=torch.qint8)


def static() -> nn.Module:
    net = Net().eval()
    net.qconfig = quant.get_default_qconfig(torch.backends.quantized.engine)
    prepared = quant.prepare(net)
    prepared(torch.randn(4, 1, 5, 5))
    return quant.convert(prepared)


def traced_by_fx() -> nn.Module:
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    x = torch.randn(4, 1, 5, 5)
    prepared = prepare_fx(Net().eval(), quant.get_default_qconfig_mapping(), (x,))
    prepared(x)
    return convert_fx(prepared)


def float_weights(net: nn.Module) -> dict[str, torch.Tensor]:
    found = {}
    for name in ("conv", "fc", "alone"):
        layer = net.get_submodule(name)
        for leaf in ("weight", "bias"):
            value: Any = getattr(layer, leaf)
            value = value() if callable(value) else value
            if value is not None:
                found[f"{name}.{leaf}"] = value.dequantize() if value.is_quantized else value
    return found


@pytest.mark.parametrize("make", [dynamic, static, traced_by_fx])
def test_a_quantized_state_dict_has_the_names_of_the_float_one(make: Any, tmp_path: Path) -> None:
    net = make()
    torch.save({"state_dict": net.state_dict()}, tmp_path / "model.pth")
    found = open_checkpoint(tmp_path / "model.pth")
    expected = float_weights(net)
    assert set(found.tensors) == set(expected) == {"conv.weight", "conv.bias", "fc.weight", "fc.bias", "alone.weight"}
    assert all(found.tensors[name].read() == from_torch(tensor) for name, tensor in expected.items())
    count = 2 if make is dynamic else 3
    assert found.notes == (f"dequantized from qint8: {count} of the tensors, which are not as they were trained",)
    assert list(found.set_aside) == ["** of scale and zero_point"]


def test_a_scripted_quantized_module(tmp_path: Path) -> None:
    net = dynamic()
    torch.jit.script(net).save(tmp_path / "model.pt")
    found = open_checkpoint(tmp_path / "model.pt")
    assert all(found.tensors[name].read() == from_torch(tensor) for name, tensor in float_weights(net).items())


def test_a_packed_convolution_is_refused_by_name(tmp_path: Path) -> None:
    torch.jit.script(static()).save(tmp_path / "model.pt")
    with pytest.raises(
        CheckpointError, match=r"^.*model\.pt: conv: is a quantized layer with its weights packed; conv"
    ):
        open_checkpoint(tmp_path / "model.pt")


def test_a_scale_without_zero_point_is_a_weight(tmp_path: Path) -> None:
    torch.save({"a.weight": quantized()["qint8"], "a.scale": torch.ones(1)}, tmp_path / "model.pth")
    assert set(open_checkpoint(tmp_path / "model.pth").tensors) == {"a.weight", "a.scale"}
    torch.save({"a.scale": torch.ones(1), "a.zero_point": torch.ones(1)}, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=r"a\.zero_point: is quantized"):
        open_checkpoint(tmp_path / "model.pth")
