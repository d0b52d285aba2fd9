"""What users change on the way: timm loads the result, and where timm makes the same change, it computes the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from converters import convert, verify
from converters.changes import Ways
from converters.errors import ConverterError, ReferenceFailed, TargetError
from converters.readers import open_checkpoint
from converters.verifier.rounding import unrounded
from converters.verifier.subject import read_subject


def saved(architecture: str, path: Path, **args: Any) -> torch.nn.Module:
    """A timm model with weights that hide nothing, and its checkpoint, which names it."""
    torch.manual_seed(0)
    model = timm.create_model(architecture, **args).eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) * 0.2)
    torch.save({"arch": architecture, "state_dict": model.state_dict()}, path)
    return model


def loaded(folder: Path, **args: Any) -> torch.nn.Module:
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **args).eval()


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # architecture, the source's own, what is asked for
    "ViT, larger images": ("vit_tiny_patch16_224", {}, {"img_size": 288}),
    "ViT, images that are not square": ("vit_tiny_patch16_224", {}, {"img_size": [160, 224]}),
    "ViT with registers": ("vit_small_patch14_reg4_dinov2", {"depth": 1}, {"img_size": 224}),
    "ViT, smaller patches": ("vit_tiny_patch16_224", {"depth": 2}, {"patch_size": 8, "img_size": 112}),
    "Swin, larger windows": ("swin_tiny_patch4_window7_224", {}, {"window_size": 8, "img_size": 256}),
    "BEiT, larger images": ("beit_base_patch16_224", {"depth": 2}, {"img_size": 256}),
    "one channel": ("resnet18", {}, {"in_chans": 1}),
    "four channels": ("convnext_atto", {}, {"in_chans": 4}),
    "space to depth": ("tresnet_m", {}, {"in_chans": 1}),
    "no classifier": ("tf_efficientnet_b0", {}, {"num_classes": 0}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_change_is_the_one_that_timm_makes(case: str, tmp_path: Path) -> None:
    """The same file, brought to the same arguments by timm's own loader, which calculates in float32."""
    architecture, own, asked = CASES[case]
    saved(architecture, tmp_path / "source.pth", **own)
    args = {key: value for key, value in asked.items() if key != "img_size"}
    done = convert(
        tmp_path / "source.pth", tmp_path / "out", target=architecture, args=own | args, img_size=asked.get("img_size")
    )
    assert done.record["changes"] and done.plan.skeleton.args == {**own, **asked}
    ours = loaded(tmp_path / "out").state_dict()
    overlay = {"file": str(tmp_path / "source.pth")}
    given = {**own, **asked}
    theirs = timm.create_model(architecture, pretrained=True, pretrained_cfg_overlay=overlay, **given).state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.allclose(ours[name], tensor, rtol=1e-4, atol=2e-5), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    channels, height, width = config["pretrained_cfg"]["input_size"]
    assert len(config["pretrained_cfg"]["mean"]) == channels
    if size := asked.get("img_size"):
        assert [height, width] == (size if isinstance(size, list) else [size, size])


@pytest.mark.parametrize(
    ("architecture", "own"),
    [
        ("vit_tiny_patch16_224", {"img_size": 320, "depth": 2}),
        ("vit_tiny_patch16_224", {"patch_size": 8, "img_size": 112, "depth": 2}),
        ("swin_tiny_patch4_window7_224", {"window_size": 8, "img_size": 256, "depths": [1, 1, 1, 1]}),
        ("beit_base_patch16_224", {"img_size": 288, "depth": 1}),
        ("resnet18", {"num_classes": 21, "in_chans": 5}),
    ],
)
def test_lossless_comes_first(architecture: str, own: dict[str, Any], tmp_path: Path) -> None:
    """The source's own sizes are read off its shapes; nothing is resampled."""
    model = saved(architecture, tmp_path / "source.pth", **own)
    others = {key: value for key, value in own.items() if key.startswith("depth")}
    done = convert(tmp_path / "source.pth", tmp_path / "out", target=architecture, args=others)
    assert not done.record["changes"]
    found = loaded(tmp_path / "out").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())


def test_classes_are_kept_by_number(tmp_path: Path) -> None:
    model = saved("resnet18", tmp_path / "source.pth", num_classes=11)
    x = torch.randn(2, 3, 64, 64)
    for number, (kept, wanted) in enumerate([(slice(1, None), list(range(1, 11))), ((3, 0, 10), [3, 0, 10])]):
        out = tmp_path / f"out{number}"
        done = convert(tmp_path / "source.pth", out, ways=Ways(classes=kept))
        assert [change.inside for change in done.plan.changes] == [False]
        with torch.no_grad():
            assert torch.allclose(loaded(out)(x), model(x)[:, wanted], rtol=1e-5)
    with pytest.raises(TargetError, match="the source has 11 classes, and 11 is none of them; count from 0"):
        convert(tmp_path / "source.pth", tmp_path / "no", ways=Ways(classes=(11,)))


def test_a_new_classifier_is_zero(tmp_path: Path) -> None:
    model = saved("resnet18", tmp_path / "source.pth")
    convert(tmp_path / "source.pth", tmp_path / "out", args={"num_classes": 7})
    found, x = loaded(tmp_path / "out"), torch.randn(2, 3, 64, 64)
    assert found(x).shape == (2, 7) and not found(x).any()
    assert torch.equal(found.forward_features(x), model.forward_features(x))
    assert "7 new classes" in (tmp_path / "out" / "README.md").read_text()


def test_an_alpha_channel_changes_nothing(tmp_path: Path) -> None:
    model = saved("resnet18", tmp_path / "source.pth")
    convert(tmp_path / "source.pth", tmp_path / "out", args={"in_chans": 4}, ways=Ways(alpha=True))
    x = torch.randn(2, 4, 64, 64)
    assert torch.equal(loaded(tmp_path / "out")(x), model(x[:, :3]))


def test_a_model_of_trained_windows_remembers_them(tmp_path: Path) -> None:
    """SwinV2 scales its coordinates by the windows of its training."""
    own = {"depths": [1, 1, 1, 1]}
    saved("swinv2_tiny_window8_256", tmp_path / "source.pth", **own)
    target = {"target": "swinv2_tiny_window8_256", "args": {**own, "window_size": 16}}
    done = convert(tmp_path / "source.pth", tmp_path / "out", img_size=512, **target)
    assert done.plan.skeleton.args["pretrained_window_sizes"] == [8, 8, 8, 8]


def test_what_has_no_normalizer_is_told(tmp_path: Path) -> None:
    saved("mixer_s32_224", tmp_path / "source.pth")
    with pytest.raises(ConverterError, match=r"nothing brings timm's blocks\.0\..*fc1\.weight from 256x49 to 256x64"):
        convert(tmp_path / "source.pth", tmp_path / "out", img_size=256)


def test_a_changed_function_is_not_verified(tmp_path: Path) -> None:
    saved("resnet18", tmp_path / "source.pth")
    convert(tmp_path / "source.pth", tmp_path / "out", args={"in_chans": 1})
    with pytest.raises(ReferenceFailed, match=r"was changed on request \(channels 3 -> 1, sum: conv1\.weight"):
        verify(tmp_path / "out", tmp_path / "source.pth", reference="timm:resnet18")


def test_a_verification_knows_the_tensors_that_were_changed(tmp_path: Path) -> None:
    saved("resnet18", tmp_path / "source.pth")
    convert(tmp_path / "source.pth", tmp_path / "out", ways=Ways(classes=slice(1, None)))
    subject = read_subject(tmp_path / "out")
    assert subject.changed == {"fc.weight", "fc.bias"} and not subject.changes
    assert unrounded(subject, open_checkpoint(tmp_path / "source.pth")) == ({}, None)
