"""Fused blocks against timm's own fusion of the whole model, in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.utils import reparameterize_model

from converters import convert
from converters.changes import Ways
from converters.errors import TargetError


@pytest.mark.parametrize("architecture", ["repvgg_a0", "mobileone_s0", "fastvit_t8"])
def test_fused_weights_are_timms(architecture: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model(architecture).eval()
    for name, tensor in model.state_dict().items():
        if name.endswith(("running_var", "running_mean")):
            tensor.copy_(torch.rand_like(tensor) + 0.5)
    torch.save({"arch": architecture, "state_dict": model.state_dict()}, tmp_path / "source.pth")
    convert(tmp_path / "source.pth", tmp_path / "out", purpose="deployment")
    fused = load_file(tmp_path / "out" / "model.safetensors")
    wanted = reparameterize_model(model.double()).eval()
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(fused[name], tensor.float()) or not tensor.is_floating_point(), name
    reparameterize_model(timm.create_model(architecture)).load_state_dict(fused)


@pytest.mark.parametrize(
    ("architecture", "folded"),
    [
        ("resnet18", 20),  # each
        ("mobilenetv2_100", 52),
        ("densenet121", 59),  # where the output of a convolution is joined to others first, no
        ("regnetz_005", 65),
    ],
)
def test_a_folded_batch_norm_only_adds(architecture: str, folded: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model(architecture).eval()
    for tensor in model.state_dict().values():
        if tensor.is_floating_point() and tensor.dim() == 1:
            tensor.copy_(torch.rand_like(tensor) + 0.5)
    torch.save({"arch": architecture, "state_dict": model.state_dict()}, tmp_path / "source.pth")
    found = convert(tmp_path / "source.pth", tmp_path / "out", ways=Ways(fold_batch_norms=True))
    assert found.plan.changes[-1].text == f"{folded} batch norms were folded into the convolutions before them"
    emitted = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    plain = [one for one in emitted.modules() if isinstance(one, torch.nn.BatchNorm2d) and (one.weight == 1).all()]
    assert len(plain) == folded
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        wanted, given = model.double()(images), emitted.double()(images)
    assert (given - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert all((one.running_mean == 0).all() for one in plain)


def test_a_model_without_branches_is_told(tmp_path: Path) -> None:
    torch.save({"arch": "resnet18", "state_dict": timm.create_model("resnet18").state_dict()}, tmp_path / "source.pth")
    with pytest.raises(TargetError, match="resnet18 has no branches to fuse"):
        convert(tmp_path / "source.pth", tmp_path / "out", purpose="deployment")


def test_a_model_without_batch_norms_is_told(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224")
    torch.save({"arch": "vit_tiny_patch16_224", "state_dict": model.state_dict()}, tmp_path / "source.pth")
    with pytest.raises(TargetError, match="has no batch norm right behind a convolution"):
        convert(tmp_path / "source.pth", tmp_path / "out", ways=Ways(fold_batch_norms=True))
