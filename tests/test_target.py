from __future__ import annotations

import pytest
import timm
import torch

from converters.errors import TargetError
from converters.names import Pattern, split
from converters.target import build_skeleton, is_known, traits_of


def test_a_skeleton_has_timms_own_specs_and_no_data():
    skeleton = build_skeleton("resnet18", {"num_classes": 10, "in_chans": 1})
    state = timm.create_model("resnet18", num_classes=10, in_chans=1).state_dict()
    found = {name: (spec.shape, spec.dtype) for name, spec in skeleton.specs.items()}
    assert found == {name: (tuple(t.shape), str(t.dtype).split(".")[1]) for name, t in state.items()}
    assert all(tensor.device.type == "meta" for tensor in skeleton.model.state_dict().values())
    assert not skeleton.model.training
    assert {("layer1",), split("layer1.0.conv1"), split("fc.bias")} <= skeleton.modules
    assert build_skeleton("resnet18", {"in_chans": 1, "num_classes": 10}) is skeleton


@pytest.mark.parametrize(
    ("name", "traits"),
    [
        ("resnet18", (("fc",), ("conv1",), 1000, 3)),
        ("deit_tiny_distilled_patch16_224", (("head", "head_dist"), ("patch_embed.proj",), 1000, 3)),
        ("vit_base_patch16_clip_224.openai", (("head",), ("patch_embed.proj",), 512, 3)),
    ],
)
def test_traits(name, traits):
    found = traits_of(name)
    assert (found.classifiers, found.first_convs, found.num_classes, found.in_chans) == traits


@pytest.mark.parametrize(
    ("name", "cure"),
    [
        ("resnet_18", "did you mean resnet18"),
        ("mobilenetv2_35", "did you mean mobilenetv2_"),
        ("no such thing at all", "see timm.list_models()"),
        ("hf-hub:timm/resnet18.a1_in1k", "see timm.list_models()"),
        ("local-dir:here", "see timm.list_models()"),
        ("../resnet18", "did you mean resnet18"),
        ("", "see timm.list_models()"),
    ],
)
def test_unknown_architectures(name, cure):
    for ask in (traits_of, lambda name: build_skeleton(name, {})):
        with pytest.raises(TargetError) as caught:
            ask(name)
        assert str(caught.value).startswith(f"timm {timm.__version__} has no model `{name}`; {cure}")


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        ({"colour": "red"}, "timm's resnet18 does not take colour='red': "),
        ({"num_classes": "ten"}, "timm's resnet18 does not take num_classes='ten': "),
        ({"block": None, "in_chans": -1}, "timm's resnet18 does not take block=None, in_chans=-1: "),
        ({"pretrained": True}, "`pretrained` is no argument of an architecture: it loads weights or settings"),
        ({"checkpoint_path": "x.pth", "in_chans": 1}, "`checkpoint_path` is no argument of an architecture"),
        ({"pretrained_cfg_overlay": {"file": "x.pth"}}, "`pretrained_cfg_overlay` is no argument of an architecture"),
    ],
)
def test_arguments_that_timm_does_not_take(args, problem):
    with pytest.raises(TargetError) as caught:
        build_skeleton("resnet18", args)
    assert str(caught.value).startswith(problem)
    assert "\n" not in str(caught.value)


def test_modules_are_numbered_in_order():
    skeleton = build_skeleton("mobilenetv2_035", {})
    found = skeleton.number(Pattern.parse("blocks.{s}.{b}"))
    assert [(one["s"], one["b"]) for one in found] == [
        (s, b) for s, depth in enumerate([1, 2, 3, 4, 3, 3, 1]) for b in range(depth)
    ]
    assert skeleton.number(Pattern.parse("nothing.{i}")) == []


def test_a_model_of_features_alone_has_no_classes():
    skeleton = build_skeleton("mobilenetv2_035", {"features_only": True})
    assert (skeleton.model.num_classes, skeleton.model.num_features) == (0, 0)
    assert not any(name.startswith(("conv_head", "classifier")) for name in skeleton.specs)


def test_architectures_are_timms():
    assert is_known("resnet18") and not is_known("resnet19")
    assert torch.get_default_device().type == "cpu"  # building on meta leaves nothing behind
