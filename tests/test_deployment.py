"""Fused blocks against timm's own fusion of the whole model, in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.utils import reparameterize_model

from converters import convert
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


def test_a_model_without_branches_is_told(tmp_path: Path) -> None:
    torch.save({"arch": "resnet18", "state_dict": timm.create_model("resnet18").state_dict()}, tmp_path / "source.pth")
    with pytest.raises(TargetError, match="resnet18 has no branches to fuse"):
        convert(tmp_path / "source.pth", tmp_path / "out", purpose="deployment")
