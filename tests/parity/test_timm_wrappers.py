"""timm's own wrappers: what is saved from them comes home, and computes what the wrapper computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.utils import ModelEmaV2, ModelEmaV3

from converters import convert


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=draw) * 0.1)
    return model.eval()


FEATURES: dict[str, tuple[dict[str, Any], str, bool]] = {  # how it is wrapped, what becomes zeros, whether it is known
    "convnext_atto": ({}, "head.norm", True),  # stages_0.blocks
    "resnetv2_18": ({"feature_cls": "dict"}, "norm", True),  # stem_conv
    "mobilenetv3_small_050": ({}, "conv_head", True),
    "resnet18": ({"feature_cls": "hook"}, "", False),  # body.; as resnetblur18
    "mvitv2_tiny": ({}, "norm", True),  # model.
}


@pytest.mark.parametrize("architecture", FEATURES)
def test_a_model_that_gives_features(architecture: str, tmp_path: Path) -> None:
    args, behind, known = FEATURES[architecture]
    model = randomize(timm.create_model(architecture, features_only=True, **args))
    torch.save(model.state_dict(), tmp_path / "source.pth")
    done = convert(tmp_path / "source.pth", tmp_path / "out", target=None if known else architecture)
    filled = {step.target.name.rpartition(".")[0] for step in done.plan.steps if step.origin.fill is not None}
    assert done.plan.skeleton.architecture == architecture and filled == ({behind} - {""})
    assert bool(filled) == any("features_only=True" in caveat for caveat in done.plan.caveats)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, features_only=True).eval()
    x = torch.rand(1, *done.record["input_size"])
    with torch.no_grad():
        expected, found = model(x), loaded(x)
    expected = list(expected.values()) if isinstance(expected, dict) else expected
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))


def ema_v2(model: torch.nn.Module) -> Any:
    return ModelEmaV2(model).state_dict()


def ema_v3(model: torch.nn.Module) -> Any:
    return {"model": model.state_dict(), "model_ema": ModelEmaV3(model).state_dict()}


def training_script(model: torch.nn.Module) -> Any:
    wrong = {name: tensor * 0 for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1).state_dict()
    return {
        **{"epoch": 3, "arch": "resnet18", "version": 2, "metric": 71.0, "args": {"opt": "sgd"}},
        **{"state_dict": wrong, "state_dict_ema": ModelEmaV2(model).module.state_dict(), "optimizer": optimizer},
    }


@pytest.mark.parametrize("save", [ema_v2, ema_v3, training_script])
def test_averaged_weights(save: Any, tmp_path: Path) -> None:
    model = randomize(timm.create_model("resnet18", num_classes=7))
    torch.save(save(model), tmp_path / "source.pth")
    convert(tmp_path / "source.pth", tmp_path / "out", target="resnet18")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
