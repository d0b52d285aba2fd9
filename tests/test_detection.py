from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from converters.detection import Nearest, applying_families, find_nearest, find_plan, name_digest, reference_of
from converters.errors import ConverterError, MappingError, NotExpressible, PlanError, TargetError
from converters.mapping import find_mappings, load_mapping, mappings_folder
from converters.readers import Checkpoint
from converters.readers.jax.trees import arrange
from converters.routes import route
from converters.target import build_skeleton
from converters.tensors import LazyTensor, TensorSpec

PLANS = Path(__file__).parent / "plans"


def unread() -> memoryview:
    raise AssertionError("a plan reads no data")


def made_of(specs: dict[str, TensorSpec], **more: Any) -> Checkpoint:
    return Checkpoint(
        Path("source.pth"), "specs", {name: LazyTensor(spec, unread) for name, spec in specs.items()}, **more
    )


@pytest.fixture(scope="module")
def source() -> Callable[..., Checkpoint]:
    """One of the real sources that the golden plans are made of; `without` and `metadata` change it."""

    def find(family: str, title: str, without: str = "-", metadata: dict[str, Any] | None = None) -> Checkpoint:
        found = json.loads((PLANS / f"{family}.specs.json").read_text())[title]
        specs = {
            name: TensorSpec(name, tuple(shape), *(dtype or ["float32"]))
            for name, (shape, *dtype) in found["tensors"].items()
            if not name.startswith(without)
        }
        return made_of(specs, metadata=found["metadata"] if metadata is None else metadata)

    return find


@pytest.fixture(scope="module")
def timm_source() -> Callable[..., Checkpoint]:
    def build(architecture: str, metadata: dict[str, Any] | None = None, **args: Any) -> Checkpoint:
        return made_of(build_skeleton(architecture, args).specs, metadata=metadata or {})

    return build


def test_a_timm_checkpoint_that_fits_several_models_is_no_guess(timm_source):
    checkpoint = timm_source("resnet18", num_classes=5)
    with pytest.raises(PlanError) as caught:
        find_plan(checkpoint)
    assert "source.pth: fits " in str(caught.value)
    assert "timm models that compute different functions (" in str(caught.value) and "resnet18" in str(caught.value)
    assert str(caught.value).endswith("; say which with --to MODEL")
    plan = find_plan(checkpoint, target="resnet18")
    assert (plan.skeleton.architecture, plan.skeleton.args) == ("resnet18", {"num_classes": 5})


@pytest.mark.parametrize(
    "metadata", [{"arch": "resnet18"}, {"architecture": "resnet18"}, {"architecture": "resnet18.a1_in1k", "epoch": 3}]
)
def test_a_timm_checkpoint_may_name_its_model(timm_source, metadata):
    plan = find_plan(timm_source("resnet18", metadata))
    assert plan.mapping.name == "timm/native"
    assert plan.skeleton.architecture == metadata.get("arch", metadata.get("architecture"))


@pytest.mark.parametrize(
    ("change", "target", "problems"),
    [
        ((".stages.1.blocks.0.attn.", ".stages.1.blocks.0.attention."), "swin_tiny_patch4_window7_224", 10),
        ((".attn.w_msa.qkv.", ".attn.w_msa.kqv."), "swin_tiny_patch4_window7_224", 48),  # by which it is detected
    ],
)
def test_the_nearest_family_is_named(source, change, target, problems):
    checkpoint = source("mmlab/swin", "an MMDetection backbone")
    tensors = {name.replace(*change): tensor for name, tensor in checkpoint.tensors.items()}
    renamed = made_of({name: replace(tensor.spec, name=name) for name, tensor in tensors.items()})
    assert find_nearest(renamed) == Nearest("mmlab/swin", target, problems)
    few = {name: TensorSpec(name, (3,), "float32") for name in ("a.gamma", "c.gamma", "head.bias")}
    assert find_nearest(made_of(few)) is None


@pytest.mark.parametrize("arch", ["my_model", 18, ["resnet18"], ""])
def test_a_name_that_timm_does_not_know_is_no_name(timm_source, arch):
    plan = find_plan(timm_source("mobilenetv4_conv_small", {"arch": arch}))
    assert plan.skeleton.architecture == "mobilenetv4_conv_small"


def test_a_headless_timm_checkpoint_is_found(timm_source):
    plan = find_plan(timm_source("mobilenetv4_conv_small", num_classes=0))
    assert plan.skeleton.args == {"num_classes": 0}


@pytest.mark.parametrize(("architecture", "channels"), [("test_vit", 1), ("tresnet_m", 3), ("tresnet_m", 1)])
def test_input_channels_are_those_of_the_image(timm_source, architecture, channels):
    """TResNet folds 4x4 pixels into channels before its first convolution."""
    plan = find_plan(timm_source(architecture, {"arch": architecture}, in_chans=channels))
    assert plan.skeleton.args.get("in_chans", 3) == channels


def test_a_target_that_does_not_fit_is_diagnosed(timm_source):
    with pytest.raises(PlanError, match="does not close on resnet34"):
        find_plan(timm_source("resnet18"), target="resnet34")
    with pytest.raises(TargetError, match="did you mean resnet18"):
        find_plan(timm_source("resnet18"), target="resnet_18")


def test_arguments_reach_the_skeleton_over_the_familys_own(source):
    checkpoint = source("mmlab/swin", "an MMDetection backbone")
    plan = find_plan(checkpoint, args={"always_partition": False, "drop_path_rate": 0.1})
    assert plan.skeleton.args == {"always_partition": False, "drop_path_rate": 0.1, "num_classes": 0}
    with pytest.raises(TargetError, match=r"does not take .*colour='red'"):
        find_plan(checkpoint, args={"colour": "red"})
    with pytest.raises(TargetError, match="`checkpoint_path` is no argument"):
        find_plan(checkpoint, args={"checkpoint_path": "source.pth"})


def test_a_family_is_taken_by_name_or_path(source, family):
    checkpoint = source("mmlab/swin", "an MMPretrain classifier")
    assert find_plan(checkpoint, family="mmlab/swin").mapping.name == "mmlab/swin"
    assert find_plan(checkpoint, family=str(find_mappings()["mmlab/swin"])).steps
    with pytest.raises(MappingError, match="there is no family `swim`"):
        find_plan(checkpoint, family="swim")


def test_the_reference_is_the_one_whose_evidence_is_there(source):
    for title, runner, args in [
        ("an MMPretrain classifier", "mmpretrain", {}),
        ("an MMDetection backbone", "mmdet", {"always_partition": True, "num_classes": 0}),
    ]:
        checkpoint = source("mmlab/swin", title)
        mapping = load_mapping("mmlab/swin")
        assert reference_of(mapping, checkpoint, route(mapping, checkpoint.specs)).runner == runner
        assert find_plan(checkpoint).skeleton.args == args


def test_a_family_without_a_reference_has_none(source):
    mapping, checkpoint = load_mapping("timm/native"), source("timm/native", "named")
    assert reference_of(mapping, checkpoint, route(mapping, checkpoint.specs)) is None


PYTORCH = "model = dict(backbone=dict(type='ResNet', depth=18, style='pytorch'))"
DEEPLAB = "backbone=dict(\n    type='ResNetV1c', strides=(1, 2, 1, 1),\n    dilations=(1, 1, 2, 4))"
MMENGINE = DEEPLAB.replace("(1, 1, 2, 4)", "(\n        1,\n        1,\n        2,\n        4,\n    )")


@pytest.mark.parametrize(
    ("metadata", "outcome"),
    [
        ({}, 2),
        ({"cfg": PYTORCH}, 0),
        ({"cfg": PYTORCH.replace(", style='pytorch'", "")}, 0),
        ({"cfg": PYTORCH.replace("pytorch", "caffe")}, "the stride of a block is on its 1x1 convolution"),
        ({"cfg": PYTORCH.replace("'pytorch'", '"caffe"')}, "the stride of a block is on its 1x1 convolution"),
        ({"cfg": DEEPLAB}, "its stages are dilated"),
        ({"cfg": MMENGINE}, "its stages are dilated"),
        ({"cfg": MMENGINE + ", contract_dilation=True"}, "its stages are dilated, and in blocks of two convolutions"),
        ({"cfg": PYTORCH.replace("ResNet", "TridentResNet")}, "it is a TridentNet"),
        ({"cfg": "something else"}, 2),
        ({"cfg": {1: float("nan"), "x": [None]}}, 2),
    ],
)
def test_refusals(source, metadata, outcome):
    checkpoint = source("mmlab/resnet", "an MMDetection backbone", metadata=metadata)
    if isinstance(outcome, int):
        caveats = find_plan(checkpoint).caveats
        assert len(caveats) == outcome
        assert all(caveat.startswith("the file does not say whether ") for caveat in caveats)
    else:
        with pytest.raises(NotExpressible) as caught:
            find_plan(checkpoint)
        assert str(caught.value).startswith(f"source.pth: is of mmlab/resnet, but timm cannot compute it: {outcome}")


TRAINING_STATES = ("params/{} opt/0/mu/w step", "opt/target/{} opt/state/step extra/time", "target/{} state/step")


@pytest.mark.parametrize("state", TRAINING_STATES)
@pytest.mark.parametrize("family", [name for name in find_mappings() if name.startswith("jax/")])
def test_training_states_of_jax(source, family, state):
    """The weights of a family are found whatever the state that they lie in."""
    title = next(iter(json.loads((PLANS / f"{family}.specs.json").read_text())))
    bare = source(family, title)
    weights, *others = state.split()
    tensors = {weights.format(name): tensor for name, tensor in bare.tensors.items()}
    found = arrange(tensors | {name: LazyTensor(TensorSpec(name, (), "float32"), unread) for name in others})
    specs = {name: replace(tensor.spec, name=name) for name, tensor in found.tree.items()}
    assert find_plan(made_of(specs)).skeleton == find_plan(bare).skeleton


KERAS = "targets: {mobilenetv2_035: {grey: [0.4]}}\ndetect: [Conv1]\nleaves: keras\n"


def test_what_a_family_says_of_every_file(family, source):
    """A caveat; settings that differ between targets; images whose channels are the other way round."""
    rules = load_mapping("keras/mobilenet_v2").path.read_text("utf-8").partition("leaves: keras\n")[2]
    rules = re.sub(r"preprocess:.*", "preprocess: {mean: $grey, bgr: true, input_size: [3, 96, 96]}", rules)
    args = "target_args: {pad_type: same, bn_eps: 0.001}\ncaveat: mind the gap\n"
    plan = find_plan(source("keras/mobilenet_v2", "a classifier"), family=str(family(args + rules, KERAS).path))
    assert plan.caveats == ("mind the gap",) and plan.preprocess == {"mean": [0.4], "input_size": [3, 96, 96]}
    assert [step.target.name for step in plan.steps if "flip 1" in step.origin.ops.text] == ["conv_stem.weight"]


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ("conv2_block1_0_conv/kernel=1 conv2_block1_3_bn/gamma=1", "the stride of a block is on its first 1x1"),
        ("conv2_block1_preact_bn/gamma=1 post_bn/gamma=1", "the stride of a stage is in its last block"),
        ("stem_conv1/kernel=1 separable_conv_1_reduction_left1_stem_1/depthwise_kernel=1", "it pads with zeros before"),
        (" ".join(f"conv2d_{n}/kernel=1 batch_normalization_{n}/beta=1" for n in range(200, 294)), "its average pools"),
    ],
)
def test_keras_models_that_timm_cannot_express(specs, names, reason):
    with pytest.raises(NotExpressible, match=reason):
        find_plan(made_of(specs(names)))


@pytest.mark.parametrize("width", [192, 64])
def test_a_refusal_of_the_logits_alone(source, specs, width):
    """Without its classifier the source may be had, whatever shape the classifier has."""
    found = source("jax/vision_transformer", "flax, vit_tiny_patch16_224")
    representation = f"pre_logits/kernel=192x{width} pre_logits/bias={width} head/kernel={width}x10"
    checkpoint = made_of({**found.specs, **specs(representation)})
    with pytest.raises(NotExpressible, match=r"a tanh .*; pass --num-classes 0 to have it without its classifier"):
        find_plan(checkpoint, args={"num_classes": 7})
    plan = find_plan(checkpoint, args={"num_classes": 0})
    removed, gone = "the classifier was removed on request", "the representation layer, which goes with the classifier"
    assert {name: drop.reason for name, drop in plan.drops.items()} == {
        **{f"head/{leaf}": removed for leaf in ("kernel", "bias")},
        **{f"pre_logits/{leaf}": gone for leaf in ("kernel", "bias")},
    }
    assert [change.text for change in plan.changes] == ["the classifier was removed"]
    assert (plan.skeleton.model.num_classes, plan.unchanged.model.num_classes) == (0, 10)


def test_a_family_without_targets_is_refused(family, specs):
    mapping = family("", head="targets: none\ndetect: [a]\nrefuse: [{reason: it has wheels}]\n")
    with pytest.raises(NotExpressible, match="it has wheels"):
        find_plan(made_of(specs("a=1")), family=str(mapping.path))


@pytest.mark.parametrize(
    ("sources", "names"), [("\x1b[31mred=1 b=1 c=1 d=1", r"\x1b[31mred, b, c, ..."), ("a=1", "a"), ("", "it has none")]
)
def test_a_checkpoint_of_no_family(specs, sources, names):
    with pytest.raises(PlanError) as caught:
        find_plan(made_of(specs(sources)))
    assert str(caught.value).startswith(
        f"source.pth: is of no family that is known here, and no timm model has its tensors ({names}); name "
    )
    assert str(caught.value).endswith("with --family (" + ", ".join(find_mappings()) + ")")


def test_an_argument_that_no_candidate_takes_is_named(timm_source):
    with pytest.raises(TargetError, match=r"does not take colour='red'"):
        find_plan(timm_source("mobilenetv4_conv_small"), args={"colour": "red"})


def test_applying_families_come_with_those_for_few_targets_first(source):
    swin = applying_families(source("timm/swin_before_0_9", "0.6.13, v1"))
    assert [mapping.name for mapping in swin] == ["timm/swin_before_0_9", "timm/native", "timm/only_features"]
    few = applying_families(source("tensorflow/efficientnet", "b0"))
    assert [mapping.name for mapping in few] == ["tensorflow/efficientnet", "timm/native", "timm/only_features"]


@pytest.mark.parametrize("name", [name for name in find_mappings() if (PLANS / f"{name}.specs.json").is_file()])
def test_no_two_families_close_on_one_source(source, name):
    """Kin may have the names that a family is detected by; then their plans tell them apart, whatever their order."""
    for title in json.loads((PLANS / f"{name}.specs.json").read_text()):
        checkpoint = source(name, title)
        few = [mapping.name for mapping in applying_families(checkpoint) if not mapping.any_target]
        assert load_mapping(name).any_target or name in few
        for other in few:
            if other != name:
                with pytest.raises(ConverterError):
                    find_plan(checkpoint, family=other)


def test_the_nearest_target_is_diagnosed(source):
    checkpoint = source("tensorflow/efficientnet", "b2", without="efficientnet-b2/head/conv2d")
    with pytest.raises(PlanError) as caught:
        find_plan(checkpoint)
    lines = str(caught.value).splitlines()
    assert lines[0].endswith(": mappings/tensorflow/efficientnet.yaml does not close on tf_efficientnet_b2 (1 problem)")
    assert lines[1].split() == ["1", "target", "has", "no", "origin:", "conv_head.weight"]


def test_the_index_knows_timms_models():
    index = json.loads((mappings_folder() / "timm" / "index.json").read_text())
    for name in ("resnet18", "vit_tiny_patch16_224", "mobilenetv2_035"):
        assert name in index[name_digest(build_skeleton(name, {"num_classes": 0}).specs)]


def test_the_digest_knows_neither_order_nor_heads():
    assert name_digest(["a", "b", "head.fc.weight"]) == name_digest(["b", "a", "norm.weight"])
    assert name_digest(["a", "b"]) != name_digest(["a", "c"])
