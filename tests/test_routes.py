"""Every way that timm has to load a converted folder, and what each gives: the same weights, or an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import adapt_input_conv

from converters import convert

SMALL: dict[str, dict[str, Any]] = {  # architecture: arguments that make it cheap, and reach config.json
    "vit_tiny_patch16_224": {"depth": 2},
    "swin_tiny_patch4_window7_224": {"embed_dim": 24, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8]},
    "convnext_atto": {"depths": [1, 1, 2, 1]},
    "resnet18": {"layers": [1, 1, 1, 1]},
    "tf_efficientnet_lite0": {},
}
FIXED = ("vit_tiny_patch16_224", "swin_tiny_patch4_window7_224")  # built for one size
CLASSES = 7


class Converted:
    """A model, and the folder that its checkpoint became."""

    def __init__(self, architecture: str, folder: Path) -> None:
        self.architecture, self.args, self.folder = architecture, SMALL[architecture], folder / "out"
        self.file = str(self.folder / "model.safetensors")
        self.model = timm.create_model(architecture, num_classes=CLASSES, **self.args).eval()
        draw = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for tensor in self.model.state_dict().values():
                if tensor.is_floating_point():
                    tensor.copy_(torch.rand(tensor.shape, generator=draw) * 0.1 + 0.05)
        torch.save({"state_dict": self.model.state_dict()}, folder / "source.pth")
        convert(folder / "source.pth", self.folder, target=architecture, args=self.args)
        self.x = torch.rand(1, 3, 224, 224, generator=draw)

    def load(self, **more: Any) -> Any:
        return timm.create_model(f"local-dir:{self.folder}", pretrained=True, **more).eval()

    def overlaid(self, overlay: dict[str, Any], **more: Any) -> Any:
        overlay = {"file": self.file, **overlay}
        return timm.create_model(
            self.architecture, pretrained=True, pretrained_cfg_overlay=overlay, **self.args, **more
        ).eval()

    @property
    def state(self) -> dict[str, torch.Tensor]:
        return self.model.state_dict()

    @property
    def head(self) -> str:
        return str(self.model.default_cfg["classifier"])


@pytest.fixture(scope="module", params=SMALL)
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    return Converted(request.param, tmp_path_factory.mktemp("routes"))


def agree(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return len(one) == len(other) and all(map(agree, one, other))


def differing(model: Any, expected: dict[str, torch.Tensor]) -> set[str]:
    """The names of the model's tensors that are not the expected ones."""
    state = model.state_dict()
    return {name for name in state if name not in expected or not agree(state[name], expected[name])}


@torch.no_grad()
def test_three_routes_give_the_same_function(converted: Converted) -> None:
    loaded = converted.load()
    assert not differing(loaded, converted.state) and loaded.num_classes == CLASSES
    assert agree(loaded(converted.x), converted.model(converted.x))
    assert not differing(converted.overlaid({"num_classes": CLASSES}, num_classes=CLASSES), converted.state)
    args = {"num_classes": CLASSES, **converted.args}
    by_path = timm.create_model(converted.architecture, checkpoint_path=converted.file, **args)
    assert not differing(by_path, converted.state)


@torch.no_grad()
def test_the_methods_of_the_model(converted: Converted) -> None:
    loaded, model, x = converted.load(), converted.model, converted.x
    features = loaded.forward_features(x)
    assert agree(features, model.forward_features(x))
    for pre_logits in (False, True):
        ours, theirs = (m.forward_head(features, pre_logits=pre_logits) for m in (loaded, model))
        assert agree(ours, theirs)
    assert agree(loaded.get_classifier().weight, model.get_classifier().weight)
    assert agree(loaded.forward_intermediates(x), model.forward_intermediates(x))
    loaded.reset_classifier(0)
    assert agree(loaded(x), model.forward_head(features, pre_logits=True))


@torch.no_grad()
def test_features_only(converted: Converted) -> None:
    last = {"out_indices": (0, 1)} if converted.architecture.startswith("vit") else {"out_indices": (1, 3)}
    expected = converted.model.forward_intermediates(
        converted.x, indices=list(last["out_indices"]), intermediates_only=True, norm=False
    )
    loaded = converted.load(features_only=True, **last)
    last_axis = getattr(loaded, "output_fmt", "NCHW") == "NHWC"
    nchw = [feature.permute(0, 3, 1, 2) if last_axis else feature for feature in loaded(converted.x)]
    if not converted.architecture.startswith("tf_"):  # whose intermediates count from the stem
        assert agree(nchw, expected)
    overlaid = converted.overlaid({"num_classes": CLASSES}, features_only=True, **last)
    assert agree(overlaid(converted.x), loaded(converted.x))
    with pytest.raises(RuntimeError, match="state_dict"):
        args = {"features_only": True, **last, **converted.args}
        timm.create_model(converted.architecture, checkpoint_path=converted.file, **args)


def test_other_classes(converted: Converted) -> None:
    """timm keeps the body and draws a new head; by `checkpoint_path` it refuses, by an overlay it needs the count."""
    head = {f"{converted.head}.weight", f"{converted.head}.bias"}
    assert not differing(converted.load(num_classes=0), converted.state)
    assert differing(converted.load(num_classes=CLASSES + 1), converted.state) == head
    assert differing(converted.overlaid({}, num_classes=CLASSES), converted.state) == head
    with pytest.raises(RuntimeError, match="state_dict"):
        timm.create_model(converted.architecture, checkpoint_path=converted.file, num_classes=0, **converted.args)


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels(converted: Converted, channels: int) -> None:
    stem = f"{converted.model.default_cfg['first_conv']}.weight"
    expected = {**converted.state, stem: adapt_input_conv(channels, converted.state[stem])}
    assert not differing(converted.load(in_chans=channels), expected)


@torch.no_grad()
def test_another_size(converted: Converted) -> None:
    """What is built for one size is built for another; the others take any."""
    if converted.architecture not in FIXED:
        x = torch.rand(1, 3, 96, 128)
        assert agree(converted.load()(x), converted.model(x))
        return
    loaded = converted.load(img_size=256)
    resampled = {"pos_embed"} if "pos_embed" in converted.state else set()
    assert differing(loaded, converted.state) == resampled
    assert loaded(torch.rand(1, 3, 256, 256)).shape == (1, CLASSES)
    if resampled:  # set_input_size would change the windows of the others too
        by_hand = converted.load()
        by_hand.set_input_size(img_size=256)
        assert not differing(loaded, by_hand.state_dict())
