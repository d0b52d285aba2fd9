from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from converters import convert
from converters.changes import Ways
from converters.errors import TargetError
from converters.plan import Plan
from converters.preprocessing import fold_normalization, read_preprocessing
from converters.target import build_skeleton

MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
RGB = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
DETECTOR = f"model = dict(\n  data_preprocessor=dict(bgr_to_rgb=True, mean={MEAN}, std={STD}, type='D'), type='R')\n"
CAFFE = "model = dict(data_preprocessor=dict(bgr_to_rgb=False, mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0]))"
CLASSIFIER = f"""
data_preprocessor = dict(mean={MEAN}, num_classes=1000, std={STD}, to_rgb=True)
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(backend='pillow', edge='short', interpolation='bicubic', scale=256, type='ResizeEdge'),
    dict(crop_size=224, type='CenterCrop'),
]
"""
BEFORE_2022 = f"""
img_norm_cfg = dict(mean={MEAN}, std={STD}, to_rgb=True)
test_pipeline = [dict(type='Resize', size=(256, -1)), dict(type='CenterCrop', crop_size=224),
    dict(type='Normalize', **img_norm_cfg)]
"""


@pytest.mark.parametrize(
    ("text", "values", "bgr"),
    [
        (DETECTOR, RGB, False),
        (CAFFE, {"mean": [0.485, 0.456, 0.406], "std": [0.003922] * 3}, True),
        (CLASSIFIER, {**RGB, "crop_pct": 0.875, "interpolation": "bicubic"}, False),
        (BEFORE_2022, {**RGB, "crop_pct": 0.875, "interpolation": "bilinear"}, False),
        ("data_preprocessor = dict(mean=__import__('os').system('x'), std=[1])", {}, False),
        ("data_preprocessor = dict(mean=", {}, False),
        ("data_preprocessor = dict(mean=[1e400, 'x', 2], std=[1, 1, 1])", {}, False),
        ("x = " + "(" * 500 + ")" * 500, {}, False),
        ("-" * 100_000 + "x=1", {}, False),
        ("lr = 0.1", {}, False),
    ],
)
def test_a_configuration_is_data(text: str, values: dict[str, Any], bgr: bool) -> None:
    found = read_preprocessing({"meta": {"cfg": text, "epoch": 1}})
    assert (found.values, found.bgr) == (values, bgr)


@pytest.mark.parametrize("said", ["by the file", "by the user"])
def test_a_model_of_bgr_images_takes_rgb_in_timm(said: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("resnet18").eval()
    meta = {"cfg": CAFFE} if said == "by the file" else {}
    torch.save({"arch": "resnet18", "state_dict": model.state_dict(), "meta": meta}, tmp_path / "source.pth")
    done = convert(tmp_path / "source.pth", tmp_path / "out", ways=Ways(bgr=None if meta else True))
    assert [step.origin.ops.text for step in done.plan.steps if step.origin.ops.ops] == ["flip 1"]
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(loaded(x), model(x.flip(1)), rtol=1e-4, atol=1e-5)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["pretrained_cfg"]
    if meta:
        assert (config["mean"], config["std"]) == (RGB["mean"], [0.003922] * 3)
        resolved = timm.data.resolve_model_data_config(loaded)
        assert (list(resolved["mean"]), list(resolved["std"])) == (RGB["mean"], [0.003922] * 3)


def test_mean_and_std_go_into_the_first_convolution(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", depth=1).double().eval()
    torch.save({"arch": "vit_tiny_patch16_224", "state_dict": model.state_dict()}, tmp_path / "source.pth")
    convert(tmp_path / "source.pth", tmp_path / "out", target="vit_tiny_patch16_224", args={"depth": 1}, ways=FOLD)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert (list(loaded.pretrained_cfg["mean"]), list(loaded.pretrained_cfg["std"])) == ([0.0] * 3, [1.0] * 3)
    pixels = torch.rand(2, 3, 224, 224, dtype=torch.float64)
    with torch.no_grad():
        wanted = model((pixels - 0.5) / 0.5)  # the constants of this architecture's own configuration
        assert torch.allclose(loaded(pixels.float()).double(), wanted, rtol=1e-4, atol=1e-5)


def test_a_padded_convolution_takes_no_mean(tmp_path: Path) -> None:
    torch.save({"arch": "vgg11", "state_dict": timm.create_model("vgg11").state_dict()}, tmp_path / "source.pth")
    with pytest.raises(TargetError, match="pads images with zeros"):
        convert(tmp_path / "source.pth", tmp_path / "out", ways=FOLD)


def test_a_mean_that_the_source_holds_is_not_folded() -> None:
    plan = Plan(None, build_skeleton("vgg11", {}), (), {}, preprocess={"mean": {"source": "normalization.mean"}})
    with pytest.raises(TargetError, match="mean and std are tensors of the source"):
        fold_normalization(plan)


FOLD = Ways(fold_normalization=True)
