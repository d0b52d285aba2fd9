"""Weights for a `features_only=True` model load with `load_state_dict`, strictly, and give its features."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from converters import convert

MODELS = ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "convnext_atto", "resnet18", "tf_efficientnet_b0"]


@pytest.mark.parametrize("architecture", MODELS)
def test_features_load_strictly(architecture: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model(architecture).eval()
    torch.save({"arch": architecture, "state_dict": model.state_dict()}, tmp_path / "source.pth")
    done = convert(tmp_path / "source.pth", tmp_path / "out", target=architecture, purpose="features")
    assert "no feature needs it" in done.record["drops"].values()
    wrapped = timm.create_model(architecture, features_only=True).eval()
    wrapped.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"), strict=True)
    direct = timm.create_model(
        architecture, features_only=True, pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "source.pth")}
    ).eval()
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(wrapped(x), direct(x), strict=True))
