"""Every family, end to end: the source framework's own model and saver, the command, the framework's own forward."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from random_checkpoints import write_checkpoint
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from converters import convert
from converters.cli import app
from converters.errors import CheckpointError
from converters.verifier import verify
from converters.verifier.worker import Workers

SWIN = {"embed_dims": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24]}


def classifier(backbone: dict[str, Any], features: int) -> dict[str, Any]:
    head = {"type": "LinearClsHead", "num_classes": 10, "in_channels": features}
    parts = {"backbone": backbone, "neck": {"type": "GlobalAveragePooling"}, "head": head}
    return {"framework": "mmpretrain", "model": {"type": "ImageClassifier", **parts}}


def detector(backbone: dict[str, Any], framework: str = "mmdet") -> dict[str, Any]:
    return {"framework": framework, "model": backbone, "wrap": "detector"}


def keras_model(**args: Any) -> dict[str, Any]:
    args = {"alpha": 0.35, "input_shape": [64, 64, 3], "classifier_activation": None, **args}
    return {"framework": "keras", "model": {"application": "MobileNetV2", "args": args}}


CASES: dict[str, tuple[dict[str, Any], str, str, dict[str, Any]]] = {  # spec, family, target, arguments
    "mmdet swin in a detector, after training with EMA": (
        {**detector({"type": "SwinTransformer", **SWIN}), "input": [2, 3, 224, 224], "training": True},
        "mmlab/swin",
        "swin_tiny_patch4_window7_224",
        {"always_partition": True, "num_classes": 0},
    ),
    "mmpretrain swin classifier": (
        {**classifier({"type": "SwinTransformer", "arch": "tiny"}, 768), "input": [2, 3, 224, 224]},
        "mmlab/swin",
        "swin_tiny_patch4_window7_224",
        {"num_classes": 10},
    ),
    "mmdet resnet in a detector": (
        detector({"type": "ResNet", "depth": 18}),
        "mmlab/resnet",
        "resnet18",
        {"num_classes": 0},
    ),
    "mmdet resnext": (
        detector({"type": "ResNeXt", "depth": 50, "groups": 32, "base_width": 4}),
        "mmlab/resnet",
        "resnext50_32x4d",
        {"num_classes": 0},
    ),
    "mmdet resnet v1d": (
        detector({"type": "ResNetV1d", "depth": 18}),
        "mmlab/resnet",
        "resnet18d",
        {"num_classes": 0},
    ),
    "mmpretrain resnet v1d classifier": (
        classifier({"type": "ResNetV1d", "depth": 18}, 512),
        "mmlab/resnet",
        "resnet18d",
        {"num_classes": 10},
    ),
    "mmseg resnet v1c": (
        detector({"type": "ResNetV1c", "depth": 50}, framework="mmseg"),
        "mmlab/resnet",
        "resnet50c",
        {"num_classes": 0},
    ),
    "keras classifier": (
        keras_model(classes=10),
        "keras/mobilenet_v2",
        "mobilenetv2_035",
        {"pad_type": "same", "bn_eps": 0.001, "num_classes": 10},
    ),
    "keras without top": (
        keras_model(include_top=False, alpha=0.5),
        "keras/mobilenet_v2",
        "mobilenetv2_050",
        {"pad_type": "same", "bn_eps": 0.001, "num_classes": 0},
    ),
}  # fmt: skip


def command(*words: Any, code: int = 0) -> Any:
    """The command's document."""
    done = CliRunner().invoke(app, [*map(str, words), "--json"])
    assert done.exit_code == code, done.output or done.exception
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", CASES)
def test_a_family_computes_its_references_function(case: str, workers: Workers, tmp_path: Path) -> None:
    spec, family, target, args = CASES[case]
    suffix = ".weights.h5" if spec["framework"] == "keras" else ".pth"
    source = write_checkpoint(spec, tmp_path / f"source{suffix}", workers)
    size = {"keras/mobilenet_v2": ["--img-size", 64], "mmlab/resnet": ["--img-size", 96], "mmlab/swin": []}[family]
    document = command("convert", source, "-o", tmp_path / "out", *size)
    assert (document["family"], document["target"]["architecture"]) == (family, target)
    assert document["target"]["args"] == args
    recording = tmp_path / "recording.npz"
    verdict = json.loads(verify(tmp_path / "out", source, keep=recording, workers=workers).to_json())
    assert verdict["passed"] and verdict["precision"] == "float64", verdict
    assert not verdict["warnings"]
    check_inside(verdict, document["modules"], alone=4 if spec["framework"] == "keras" else 0)
    if case in FAULTS:
        name, *found = FAULTS[case]
        damage(tmp_path / "out", name)
        after = verify(tmp_path / "out", source, reference=str(recording))
        faulty = [tap.target for tap in after.taps if tap.local_passed is False]
        assert not after.passed and after.first_divergence
        assert [after.first_divergence.target, after.culprit, *faulty] == [*found, found[-1]]


def check_inside(verdict: Any, modules: Any, alone: int) -> None:
    """Every pair is compared. Keras pads before some convolutions, in layers of their own, so that those of timm
    take another input and cannot be given the reference's."""
    assert {tap["target"] for tap in verdict["taps"]} == modules.keys() and verdict["unchecked"] == []
    assert verdict["first_divergence"] is verdict["culprit"] is None and verdict["audit"] == []
    assert max(tap["error"] for tap in verdict["taps"]) < 1e-12
    unforced = [tap for tap in verdict["taps"] if tap["local_passed"] is None]
    assert len(unforced) == alone and all("its input is (2, " in tap["reason"] for tap in unforced)
    assert all(tap["local_passed"] for tap in verdict["taps"] if tap not in unforced)


FAULTS = {  # case: the tensor whose first two rows are exchanged, the first module that differs, the one to blame
    "mmdet swin in a detector, after training with EMA": (
        "layers.2.blocks.3.attn.relative_position_bias_table",
        "layers.2.blocks.3.attn.proj",  # the first whose output shows it
        "layers.2.blocks.3.attn",
    ),
    "keras classifier": ("blocks.4.1.conv_pwl.weight", "blocks.4.1.conv_pwl", "blocks.4.1.conv_pwl"),
}


def damage(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name][[0, 1]] = tensors[name][[1, 0]]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_corrupted_conversion_fails(workers: Workers, tmp_path: Path) -> None:
    """The same comparison must be able to fail: two channels of one weight exchanged, in the written file."""
    spec = CASES["mmdet resnet in a detector"][0]
    source = write_checkpoint(spec, tmp_path / "source.pth", workers)
    command("convert", source, "-o", tmp_path / "out", "--img-size", 96)
    damage(tmp_path / "out", "layer3.0.conv2.weight")
    verdict = command("verify", tmp_path / "out", "--source", source, code=3)
    failed = {one["output"] for one in verdict["comparisons"] if not one["passed"]}
    assert failed == {"features.3", "features.4", "forward_features"}
    assert verdict["first_divergence"]["target"] == verdict["culprit"] == "layer3.0.conv2"


def test_tensorflow_efficientnet_takes_its_averaged_weights(tmp_path: Path) -> None:
    script = Path(__file__).with_name("tensorflow_efficientnet.py")
    subprocess.run([sys.executable, script, tmp_path, "64"], check=True, capture_output=True)
    document = command("convert", tmp_path / "model.ckpt", "-o", tmp_path / "out", "--img-size", 64)
    assert document["wrappers"] == ["ExponentialMovingAverage"]
    assert document["target"] == {"architecture": "tf_efficientnet_b0", "args": {"num_classes": 10}}
    recording = tmp_path / "recording.npz"
    verdict = command("verify", tmp_path / "out", "--source", tmp_path / "model.ckpt", "--reference", recording)
    assert verdict["passed"] and verdict["precision"] == "float64"


def ddp(state: dict[str, Any]) -> dict[str, Any]:
    return {"arch": "resnet18", "state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}


def halved(state: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor.half() for name, tensor in state.items()}


def nested(state: dict[str, Any]) -> dict[str, Any]:
    return {"model": {name: tensor.bfloat16() for name, tensor in state.items()}}


def before_0_9(state: dict[str, Any]) -> dict[str, Any]:
    return {old_swin(name): tensor for name, tensor in state.items()}


TIMM: dict[str, tuple[str, dict[str, Any], Any, list[str]]] = {  # architecture, arguments, how it is saved, options
    "DDP": ("resnet18", {"num_classes": 7}, ddp, []),
    "fp16": ("vit_tiny_patch16_224", {"num_classes": 7}, halved, ["--to", "vit_tiny_patch16_224"]),
    "bf16": ("convnext_atto", {}, nested, []),
    "Swin before 0.9": ("swin_tiny_patch4_window7_224", {"num_classes": 7}, before_0_9, []),
}


def old_swin(name: str) -> str:
    parts = name.replace("head.fc.", "head.").split(".")
    if len(parts) > 2 and parts[2] == "downsample":
        parts[1] = str(int(parts[1]) - 1)
    return ".".join(parts)


@pytest.mark.parametrize("case", TIMM)
def test_timm_checkpoints_come_home(case: str, tmp_path: Path) -> None:
    architecture, args, wrap, options = TIMM[case]
    torch.manual_seed(0)
    model = timm.create_model(architecture, **args).eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) * 0.1)
    saved = wrap(model.state_dict())
    torch.save(saved, tmp_path / "source.pth")
    command("convert", tmp_path / "source.pth", "-o", tmp_path / "out", *options)
    weights = next((v for v in saved.values() if isinstance(v, dict)), saved)
    dtype = next(iter(weights.values())).dtype
    model.to(dtype).float()
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(model(x), loaded(x))


def test_a_features_only_vit_comes_home(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", features_only=True).eval()
    torch.save(model.state_dict(), tmp_path / "source.pth")
    document = command("convert", tmp_path / "source.pth", "-o", tmp_path / "out", "--to", "vit_tiny_patch16_224")
    assert document["family"] == "timm/features"
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, features_only=True).eval()
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(model(x), loaded(x), strict=True))


def test_a_caffe_style_is_refused_where_the_file_says_so(workers: Workers, tmp_path: Path) -> None:
    style = detector({"type": "ResNet", "depth": 50, "style": "caffe"})
    source = write_checkpoint(style, tmp_path / "source.pth", workers)
    done = subprocess.run(
        [sys.executable, "-m", "converters", "convert", source, "-o", tmp_path / "out"], capture_output=True, text=True
    )
    assert done.returncode == 1 and "1x1 convolution" in done.stderr and not (tmp_path / "out").exists()
    state = torch.load(source, weights_only=True)["state_dict"]
    torch.save(state, tmp_path / "bare.pth")  # now nothing can tell: converted, and said so
    document = command("convert", tmp_path / "bare.pth", "-o", tmp_path / "out", "--img-size", 96)
    assert any("caffe" in caveat for caveat in document["caveats"])
    assert "caffe" in (tmp_path / "out" / "README.md").read_text()
    verdict = verify(tmp_path / "out", tmp_path / "bare.pth", workers=workers)
    assert verdict.passed  # against MMDetection's default style, which these weights then have
    assert np.isfinite([max(one.sample_errors) for one in verdict.comparisons]).all()


def test_rotary_tables_that_timm_does_not_compute_are_refused(tmp_path: Path) -> None:
    """MMPretrain's EVA02 has the right ones from published files; by those that it computes it is another function."""
    model = {"type": "ViTEVA02", "arch": "tiny", "img_size": 56, "patch_size": 14}
    source = write_checkpoint({"framework": "mmpretrain", "model": model}, tmp_path / "source.pth")
    with pytest.raises(CheckpointError, match="freqs_cos: is not what eva02_tiny_patch14_224 computes for itself"):
        convert(source, tmp_path / "out", family="mmlab/eva02", target="eva02_tiny_patch14_224", allow_deviation=True)
    assert not (tmp_path / "out").exists()
