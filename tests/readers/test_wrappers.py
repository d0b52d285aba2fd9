"""Unwrapping: which dict is the state dict, which of two copies is taken, and what is said of the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from converters.errors import CheckpointError
from converters.readers.pickles import Opaque, Symbol
from converters.readers.wrappers import Unwrapped, unwrap
from converters.tensors import LazyTensor, TensorSpec

FILE = Path("model.pth")


def tensor(mark: str = "") -> LazyTensor:
    """A tensor whose bytes tell it from others."""
    return LazyTensor(TensorSpec("as it was in the file", (), "float32"), lambda: memoryview(bytearray(mark.encode())))


def weights(mark: str = "", prefix: str = "") -> dict[str, Any]:
    return {f"{prefix}{name}": tensor(mark) for name in ("conv.weight", "bn.running_mean")}


def parameters(mark: str) -> dict[str, Any]:
    return {"conv.weight": tensor(mark)}


def marks(found: Unwrapped) -> set[str]:
    return {bytes(value.read()).decode() for value in found.tensors.values()}


NAMES = ["conv.weight", "bn.running_mean"]
OPTIMIZER = {"state": {"0": {"exp_avg": tensor()}}, "param_groups": [{"lr": 0.1}]}
OBJECT = Opaque(Symbol("builtins", "getattr"))

WRAPPED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "nothing": (weights(), ()),
    "state_dict": ({"state_dict": weights()}, ("state_dict",)),
    "two deep": ({"checkpoint": {"model": weights(), "epoch": 1}}, ("checkpoint", "model")),
    "beside others": ({"model": weights(), "optimizer": OPTIMIZER, "scaler": {"scale": tensor()}}, ("model",)),
    "unknown name": ({"encoder_q": weights(), "optimizer": OPTIMIZER, "rng_state": tensor()}, ("encoder_q",)),
    "loose tensors": ({"state_dict": weights(), "queue": tensor()}, ("state_dict",)),
    "DDP": (weights(prefix="module."), ("module.",)),
    "DDP saved by DeepSpeed": ({"module": weights(prefix="module.")}, ("module", "module.")),
    "SWA": (weights(prefix="module.") | {"n_averaged": tensor()}, ("module.",)),
    "compiled": (weights(prefix="_orig_mod."), ("_orig_mod.",)),
    "compiled DDP": (weights(prefix="module._orig_mod."), ("module.", "_orig_mod.")),
    "DDP compiled": (weights(prefix="_orig_mod.module."), ("_orig_mod.", "module.")),
    "a module's own dict": (weights() | {"bn.extra": {"table": tensor()}}, ()),
    "compiled in part": ({"conv._orig_mod.weight": tensor(), "bn.running_mean": tensor()}, ("_orig_mod.",)),
}


@pytest.mark.parametrize(("tree", "wrappers"), WRAPPED.values(), ids=WRAPPED)
def test_wrappers_are_taken_off_and_named(tree: dict[str, Any], wrappers: tuple[str, ...]) -> None:
    found = unwrap(tree, FILE)
    assert list(found.tensors) == NAMES
    assert [value.spec.name for value in found.tensors.values()] == NAMES
    assert found.wrappers == wrappers


def test_prefixes_that_some_names_lack_stay() -> None:
    tree = {"module.conv.weight": tensor(), "head.weight": tensor()}
    assert list(unwrap(tree, FILE).tensors) == list(tree)
    tree = {"backbone.conv.weight": tensor(), "backbone.bn.weight": tensor()}
    assert list(unwrap(tree, FILE).tensors) == list(tree)
    tree = {"a._orig_mod.b": tensor("1"), "a.b": tensor("2")}  # taking it off would make two of one name
    assert list(unwrap(tree, FILE).tensors) == list(tree)


MMENGINE = {"state_dict": weights("averaged"), "ema_state_dict": {"steps": tensor(), **weights("raw", "module.")}}
MMCV = {**weights("averaged"), "ema_conv_weight": tensor("raw")}
SHADOWS = {
    "conv/kernel": tensor("raw"),
    "conv/kernel/ExponentialMovingAverage": tensor("averaged"),
    "bn/moving_mean": tensor("raw"),
    "bn/moving_mean/ExponentialMovingAverage": tensor("averaged"),
}
TWO_MODELS = ("online_model", "raw"), ("ema_model", "averaged")
AVERAGED: dict[str, tuple[dict[str, Any], tuple[str, ...], tuple[str, ...]]] = {  # with ema=None or True, and False
    "timm": (
        {"state_dict": weights("raw"), "state_dict_ema": weights("averaged")},
        ("state_dict_ema",),
        ("state_dict",),
    ),
    "DeiT": ({"model": weights("raw"), "model_ema": weights("averaged")}, ("model_ema",), ("model",)),
    "DDP": (
        {"model": weights("raw", "module."), "model_ema": weights("averaged")},
        ("model_ema",),
        ("model", "module."),
    ),
    "nested": ({"net": weights("raw"), "ema": {"module": weights("averaged")}}, ("ema", "module"), ("net",)),
    "MMEngine by its log": (MMENGINE | {"message_hub": {}}, ("state_dict",), ("ema_state_dict", "module.")),
    "MMEngine by its version": (
        MMENGINE | {"meta": {"mmengine_version": "0.10.7"}},
        ("state_dict",),
        ("ema_state_dict", "module."),
    ),
    "not MMEngine": (
        {"state_dict": weights("raw"), "ema_state_dict": weights("averaged", "module.")},
        ("ema_state_dict", "module."),
        ("state_dict",),
    ),
    **{
        name: ({"model": weights("raw"), name: weights("averaged")}, (name,), ("model",))
        for name in ("ema", "params_ema", "averaged_model", "swa_state_dict", "model_avg")
    },
    "one dict of both": (
        {f"{model}.{name}": tensor(mark) for model, mark in TWO_MODELS for name in NAMES},
        ("ema_model",),
        ("online_model",),
    ),
    "TensorFlow": (SHADOWS, ("ExponentialMovingAverage",), ()),
}


@pytest.mark.parametrize(("tree", "averaged", "raw"), AVERAGED.values(), ids=AVERAGED)
def test_averaged_weights_are_preferred(tree: dict[str, Any], averaged: tuple[str, ...], raw: tuple[str, ...]) -> None:
    for ema, mark, wrappers in [(None, "averaged", averaged), (True, "averaged", averaged), (False, "raw", raw)]:
        found = unwrap(tree, FILE, ema=ema)
        assert (marks(found), found.wrappers) == ({mark}, wrappers)
        other = "averaged" if mark == "raw" else "raw"
        assert any(f"{other} weights" in reason for reason in found.set_aside.values())


def test_mmcv_exchanges_both_copies_of_parameters() -> None:
    found = unwrap(MMCV, FILE)
    assert (list(found.tensors), marks(found), found.wrappers) == (NAMES, {"averaged"}, ())
    assert found.set_aside == {"ema_*": "raw weights (1); the averaged ones are taken"}
    found = unwrap(MMCV, FILE, ema=False)
    assert bytes(found.tensors["conv.weight"].read()) == b"raw"
    assert found.wrappers == ("ema_",)
    assert found.set_aside == {"** without ema_": "averaged weights (1); the raw ones are taken"}


def test_variables_without_a_shadow_are_in_either() -> None:
    tree = {**SHADOWS, "step_size": tensor("alone")}
    assert marks(unwrap(tree, FILE)) == {"averaged", "alone"}
    assert marks(unwrap(tree, FILE, ema=False)) == {"raw", "alone"}


def test_incomplete_averages_are_not_preferred() -> None:
    tree = {"model": weights("raw"), "model_ema": parameters("averaged")}
    found = unwrap(tree, FILE)
    assert (marks(found), found.wrappers) == ({"raw"}, ("model",))
    assert found.set_aside == {"model_ema.**": "averaged weights without 1 of the tensors"}
    assert marks(unwrap(tree, FILE, ema=True)) == {"averaged"}


def test_optimizer_slots_of_tensorflow() -> None:
    slots = ["RMSProp", "RMSProp_1", "Momentum", "Adam", "Adam_1", "Adagrad", "AdamW", "LAMB", "adam_m"]
    tree = {
        "conv/kernel": tensor(),
        "conv/Adam": tensor(),  # a variable of that name: `conv` is none
        **{f"conv/kernel/{slot}": tensor() for slot in slots},
        "conv/kernel/.OPTIMIZER_SLOT/optimizer/m": tensor(),
        "optimizer/.OPTIMIZER_SLOT/learning_rate": tensor(),
        "global_step": tensor(),
    }
    found = unwrap(tree, FILE)
    assert list(found.tensors) == ["conv/kernel", "conv/Adam"]
    assert found.set_aside == {
        **{f"**/{slot}": "optimizer state" for slot in slots},
        "**/.OPTIMIZER_SLOT/**": "optimizer state",
        "global_step": "step counter",
    }


def test_what_lies_beside_is_metadata_or_set_aside() -> None:
    tree = {
        "model": weights() | {"_extra_state": OBJECT},
        "optimizer": OPTIMIZER,
        "lr_scheduler": {"base": tensor()},
        "cuda_rng_state": tensor(),
        "amp_scaler": {"scale": tensor()},
        "queue": tensor(),
        "teacher": weights(),
        "epoch": 300,
        "args": Opaque(Symbol("argparse", "Namespace"), state={"model": "deit_small", "lr": 0.1}),
        "classes": ["cat", "dog"],
        "log": {"loss": [1.0, float("inf")], "hub": OBJECT, "blob": b"\0" * 100},
        "__metadata__": {"format": "pt"},
    }
    found = unwrap(tree, FILE)
    assert found.set_aside == {
        "optimizer.**": "optimizer state",
        "lr_scheduler.**": "scheduler state",
        "cuda_rng_state": "random generator state",
        "amp_scaler.**": "loss scaler state",
        "queue": "lies beside the state dict",
        "teacher.**": "lies beside the state dict",
    }
    assert found.metadata == {
        "_extra_state": "<builtins.getattr>",
        "epoch": 300,
        "args": {"model": "deit_small", "lr": 0.1},
        "classes": ["cat", "dog"],
        "log": {"loss": [1.0, float("inf")], "hub": "<builtins.getattr>", "blob": "<bytes>"},
        "__metadata__": {"format": "pt"},
    }


def test_metadata_is_bounded() -> None:
    doubling: list[Any] = []
    for _ in range(100):
        doubling = [doubling, doubling]
    itself: dict[str, Any] = {}
    itself["itself"] = itself
    tree = {"model": weights(), "a": doubling, "b": itself, "c": ["x" * 1000] * 10_000, "d": 1 << 100_000}
    assert len(str(unwrap(tree, FILE).metadata)) < 3_000_000


@pytest.mark.parametrize(
    ("key", "mark"),
    [("student", "s"), ("teacher", "t"), ("nested.backbone", "n"), ("nested", "n"), ("with.dots", "d")],
)
def test_a_key_chooses(key: str, mark: str) -> None:
    tree = {
        "student": {"model": weights("s")},
        "teacher": weights("t", "module."),
        "nested": {"backbone": weights("n"), "epoch": 1},
        "with.dots": weights("d"),
    }
    found = unwrap(tree, FILE, key=key)
    assert (list(found.tensors), marks(found)) == (NAMES, {mark})
    assert ".".join(found.wrappers).startswith(key)
    assert len(found.set_aside) == 3


MOCO = {
    "state_dict": {**weights("q", "module.encoder_q."), **weights("k", "module.encoder_k."), "module.queue": tensor()}
}
MOCO_3 = {"state_dict": {**weights("b", "module.base_encoder."), **weights("m", "module.momentum_encoder.")}}
DINO = {  # the teacher was not wrapped
    "student": {**weights("s", "module.backbone."), "module.head.weight": tensor()},
    "teacher": {**weights("t", "backbone."), "head.weight": tensor()},
    "optimizer": OPTIMIZER,
    "epoch": 1,
}
DINO_2 = {"model": {**weights("s", "student.backbone."), **weights("t", "teacher.backbone."), "loss.center": tensor()}}
BYOL = {**weights("o", "online_network."), **weights("t", "target_network."), "predictor.weight": tensor()}
SOLO = {"state_dict": {**weights("b", "backbone."), **weights("m", "momentum_backbone.")}}
IN_ONE = {**weights("raw", "model."), **weights("averaged", "model_ema."), "model_ema.decay": tensor()}


@pytest.mark.parametrize(
    ("tree", "key", "mark", "wrappers"),
    [
        (MOCO, "module.encoder_q", "q", ("state_dict", "module.", "encoder_q")),
        (MOCO, "encoder_k", "k", ("state_dict", "module.", "encoder_k")),
        (MOCO, "state_dict.module.encoder_q", "q", ("state_dict", "module.", "encoder_q")),
        (MOCO_3, "module.base_encoder", "b", ("state_dict", "module.", "base_encoder")),
        (DINO, "teacher.backbone", "t", ("teacher", "backbone")),
        (DINO, "student.backbone", "s", ("student", "module.", "backbone")),
        (DINO, "student.module.backbone", "s", ("student", "module.", "backbone")),
        (DINO_2, "teacher.backbone", "t", ("model", "teacher.backbone")),
        (BYOL, "online_network", "o", ("online_network",)),
        (SOLO, "momentum_backbone", "m", ("state_dict", "momentum_backbone")),
        (IN_ONE, "model", "raw", ("model",)),
        ({"model": weights("w", "module.")}, "model.module", "w", ("model", "module.")),
    ],
)
def test_a_key_may_be_a_prefix_of_names(tree: dict[str, Any], key: str, mark: str, wrappers: tuple[str, ...]) -> None:
    found = unwrap(tree, FILE, key=key)
    assert (list(found.tensors), marks(found), found.wrappers) == (NAMES, {mark}, wrappers)
    assert [value.spec.name for value in found.tensors.values()] == NAMES


def test_a_prefix_of_both_raw_and_averaged_weights() -> None:
    tree = {"model": weights("raw", "backbone."), "model_ema": {**weights("averaged", "backbone."), "head.w": tensor()}}
    for ema, mark, wrapper in [(None, "averaged", "model_ema"), (False, "raw", "model")]:
        found = unwrap(tree, FILE, key="backbone", ema=ema)
        assert (marks(found), found.wrappers) == ({mark}, (wrapper, "backbone"))


def test_what_a_prefix_leaves_is_set_aside() -> None:
    beside = "lies beside the state dict"
    tree = {**weights(prefix="module.net."), "n_averaged": tensor()}
    assert unwrap(tree, FILE, key="module.net").set_aside == {"n_averaged": "averaging counter"}
    assert unwrap(MOCO, FILE, key="encoder_q").set_aside == {"encoder_k.**": beside, "queue": beside}
    assert unwrap(DINO, FILE, key="teacher.backbone").set_aside == {
        "student.**": beside,
        "optimizer.**": "optimizer state",
        "head.**": beside,
    }


@pytest.mark.parametrize(
    ("tree", "names"),
    [
        (MOCO, "encoder_q, encoder_k and loose tensors; choose one, as in --key encoder_q"),
        (MOCO_3, "base_encoder, momentum_encoder; choose one, as in --key base_encoder"),
        (DINO, "student, teacher; choose one, as in --key student"),
        (DINO_2, "student, teacher, loss; choose one, as in --key student"),
        (BYOL, "online_network, target_network, predictor; choose one, as in --key online_network"),
        (SOLO, "backbone, momentum_backbone; choose one, as in --key backbone"),
    ],
)
def test_a_model_and_its_moving_average_are_not_guessed_between(tree: dict[str, Any], names: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        unwrap(tree, FILE)
    assert str(caught.value) == f"model.pth: holds several state dicts: {names}"


def test_a_prefix_of_averages_is_known_as_their_dict_is() -> None:
    for ema, mark, wrapper in [(None, "averaged", "model_ema"), (False, "raw", "model")]:
        found = unwrap(IN_ONE, FILE, ema=ema)
        assert (marks(found) - {""}, found.wrappers) == ({mark}, (wrapper,))


def test_parts_that_are_alike_but_follow_nobody_are_one_model() -> None:
    tree = {**weights("1", "head."), **weights("2", "head_dist."), **weights("3", "target."), "student.a": tensor()}
    assert list(unwrap(tree, FILE).tensors) == list(tree)


@pytest.mark.parametrize(
    ("names", "how"),
    [
        (("parametrizations.weight.original0", "parametrizations.weight.original1"), "weight norm"),
        (("weight_g", "weight_v"), "weight norm"),
        (("parametrizations.weight.original", "parametrizations.weight.0._u"), "spectral norm"),
        (("weight_orig", "weight_u", "weight_v"), "spectral norm"),
        (("weight_orig", "weight_mask"), "pruning"),
    ],
)
def test_weights_in_parts_are_noted(names: tuple[str, ...], how: str) -> None:
    tree = weights() | {f"head.last.{name}": tensor() for name in names}
    found = unwrap(tree, FILE)
    assert list(found.tensors) == list(tree)
    (note,) = found.notes
    assert note.startswith(f"in the two parts of {how}: 1 of the weights, such as head.last.weight; make it whole with")
    assert unwrap(weights() | {"head.weight_g": tensor()}, FILE).notes == ()


def test_prefixes_without_end_are_refused() -> None:
    tree = {}
    for depth in range(400):
        tree |= {f"{'model.' * depth}model.w": tensor(), f"{'model.' * depth}model_ema.w": tensor()}
    with pytest.raises(CheckpointError):
        unwrap(tree, FILE)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "an unknown prefix": (
        MOCO,
        {"key": "encoder"},
        "has no encoder to choose; it has: state_dict, encoder_q, encoder_k, qu",
    ),
    "a prefix in part": (
        MOCO,
        {"key": "encoder_q.conv.w"},
        "has no encoder_q.conv.w to choose; it has: state_dict, enc",
    ),
    "a prefix below several": (DINO, {"key": "backbone"}, "has no backbone to choose; it has: student, teacher, optim"),
    "two of unknown names": (
        {"student": weights(), "teacher": weights()},
        {},
        "holds several state dicts: student, teacher; choose one, as in --key student",
    ),
    "two of known names": (
        {"model": weights(), "state_dict": weights()},
        {},
        "holds several state dicts: state_dict, model;",
    ),
    "beside loose tensors": (
        {"backbone": weights(), "queue": tensor()},
        {},
        "holds several state dicts: backbone and loose tensors; choose one, as in --key backbone",
    ),
    "an unknown key": ({"a": weights(), "b": {}}, {"key": "c"}, "has no c to choose; it has: a, b"),
    "an unknown key below": ({"a": {"b": weights()}}, {"key": "a.c"}, "has no c to choose; it has: b"),
    "a key of a tensor": (weights(), {"key": "conv.weight"}, "has no conv.weight to choose; it has: conv, bn"),
    "no averages": ({"model": weights()}, {"ema": True}, "holds no averaged weights; leave --ema out"),
    "only averages": ({"model_ema": weights()}, {"ema": False}, "holds averaged weights only, in model_ema; leave"),
    "an optimizer": (OPTIMIZER, {}, "holds no weights, only optimizer state"),
    "an optimizer, wrapped": ({"optimizer": OPTIMIZER, "epoch": 3}, {}, "holds no weights, only optimizer state"),
    "no tensors": ({"epoch": 3, "names": ["a"]}, {}, "holds no weights, only epoch, names"),
    "nothing": ({}, {}, "holds no weights, only nothing"),
    "an adapter": (
        weights() | {"q.lora_A.weight": tensor()},
        {},
        "q.lora_A.weight: is an adapter's, not a model's; merge",
    ),
    "quantized": (
        {"fc.scale": tensor(), "fc.zero_point": tensor()},
        {},
        "fc.zero_point: is quantized; convert the float",
    ),
    "an object": (weights() | {"head.weight": OBJECT}, {}, "head.weight: is no tensor but a builtins.getattr"),
    "tensors in part": ({"model": {"w": Opaque(Symbol("torch", "DTensor"), "is a part")}}, {}, "w: is a part"),
}


@pytest.mark.parametrize(("tree", "options", "words"), REFUSED.values(), ids=REFUSED)
def test_refusals(tree: dict[str, Any], options: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        unwrap(tree, FILE, **options)
    assert str(caught.value).startswith(f"model.pth: {words}")
    assert "\n" not in str(caught.value)


def test_wrappers_without_end_are_refused() -> None:
    tree = weights()
    for _ in range(20):
        tree = {"model": tree}
    with pytest.raises(CheckpointError):
        unwrap(tree, FILE)
    itself: dict[str, Any] = {"w": Opaque(Symbol("a", "b"))}
    itself["model"] = itself
    with pytest.raises(CheckpointError):
        unwrap(itself, FILE)


@pytest.mark.parametrize("shadow", [True, False])
def test_names_without_a_second_copy_are_never_dropped(shadow: bool) -> None:
    """An `ema_` name or a shadow whose weight is not there is a weight of its own."""
    name = "gone/ExponentialMovingAverage" if shadow else "ema_gone"
    assert name in unwrap({**weights(), name: tensor()}, FILE).tensors
