"""Mutants of small timm models, against what the model itself gave before."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from converters.cli import app
from converters.verifier.faults import KINDS, applied
from converters.verifier.mutants import Mutants, run_mutants
from converters.verifier.probes import probes
from converters.verifier.recording import Recording
from converters.verifier.target import load_target, run_target

Make = Callable[..., tuple[Path, Recording]]
ALL = {"channels swapped", "kernel transposed", "bias dropped", "rounded once more", "eps times 100"}
SQUARE, STATISTICS, ATTENTION = {"matrix transposed"}, {"statistics exchanged"}, {"q and k exchanged"}


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A folder with an architecture's weights, drawn and changed by `rig`, and a faithful recording."""

    def write(architecture: str, rig: Callable[[dict], Any] = dict, outputs: Any = ("logits",), **args: Any) -> Any:
        torch.manual_seed(0)
        args = {"num_classes": 10, **args}
        drawn = {
            name: draw(name, value) for name, value in timm.create_model(architecture, **args).state_dict().items()
        }
        rig(drawn)
        save_file({name: value.contiguous() for name, value in drawn.items()}, tmp_path / "model.safetensors")
        config = {"architecture": architecture, "num_classes": 10, "pretrained_cfg": {}, "model_args": args}
        (tmp_path / "config.json").write_text(json.dumps(config))
        side = args.get("img_size", 64)
        inputs = {"normal": probes((3, side, side))["normal"]}
        return tmp_path, Recording({}, inputs, run_target(tmp_path, inputs, outputs))

    return write


def draw(name: str, value: torch.Tensor) -> torch.Tensor:
    if not value.is_floating_point():
        return value
    if value.ndim > 1:
        return torch.randn_like(value) / value[0].numel() ** 0.5
    return torch.rand_like(value) + 0.5 if name.endswith(("weight", "gamma", "var")) else torch.randn_like(value) / 5


def kinds(found: Mutants, *, detected: bool = True) -> set[str]:
    return {mutant.kind for mutant in found.mutants if mutant.detected is detected}


@pytest.mark.parametrize(
    ("architecture", "args", "expected"),
    [
        ("test_resnet", {}, ALL | SQUARE | STATISTICS),
        ("test_efficientnet", {}, ALL | STATISTICS),
        ("test_convnext", {}, ALL),
        ("test_vit", {"img_size": 64}, ALL | SQUARE | ATTENTION),
        ("eva02_tiny_patch14_224", {"img_size": 56, "depth": 2}, ALL | SQUARE | ATTENTION),  # q_proj beside k_proj
    ],
)
def test_every_kind_of_mutant_is_detected(make: Make, architecture: str, args: dict, expected: set[str]) -> None:
    folder, recording = make(architecture, **args)
    found = run_mutants(folder, recording)
    assert kinds(found) == expected, found
    assert found.passed and not kinds(found, detected=False)
    assert 8 <= len(found.mutants) <= 12 and found.smallest_margin > 1e3
    assert run_mutants(folder, recording) == found
    assert run_mutants(folder, recording, seed=1) != found


def test_the_places_are_spread_over_the_depth(make: Make) -> None:
    found = run_mutants(*make("test_resnet"))
    places = list(KINDS[0].places(timm.create_model("test_resnet")))
    swapped = [places.index(one.tensor) * 3 // len(places) for one in found.mutants if one.kind == "channels swapped"]
    assert swapped == [0, 1, 2]


def test_a_damaged_model_is_mended_to_the_bit(make: Make) -> None:
    folder, _ = make("test_vit", img_size=64)
    model = load_target(folder, "float32")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rng = np.random.default_rng(0)
    for kind in KINDS:
        for place in kind.places(model):
            fault = kind.damage(model, place, rng)
            with applied(fault, [model]):
                assert not fault.changes(model)
            assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), kind.name
            assert model.norm.eps == 1e-6


def alike(state: dict) -> None:
    """Equal channels in every weight."""
    for value in state.values():
        if value.ndim > 1:
            value[:] = value[:1].clone()


def closed(state: dict) -> None:
    """The last block's branch is multiplied by zero."""
    state["layer4.0.bn2.weight"].zero_()
    state["layer4.0.bn2.bias"].zero_()


def constant_keys(state: dict) -> None:
    """Of the attentions' biases only those of keys, which the softmax takes away."""
    for name, value in state.items():
        if name.endswith("qkv.bias"):
            value[: len(value) // 3] = value[-len(value) // 3 :] = 0
        elif name.endswith("bias"):
            value.zero_()


@pytest.mark.parametrize(
    ("architecture", "args", "rig", "kind", "reason"),
    [
        ("test_resnet", {}, alike, "channels swapped", "the tensors stay as they are, bit for bit"),
        ("test_vit", {"img_size": 64}, constant_keys, "bias dropped", "no output moves"),
    ],
)
def test_what_the_weights_hide_is_said_and_not_counted(
    make: Make, architecture: str, args: dict, rig: Callable, kind: str, reason: str
) -> None:
    found = run_mutants(*make(architecture, rig, **args))
    assert kind not in kinds(found) | kinds(found, detected=False)
    hidden = [one for one in found.undetectable if one.kind == kind]
    assert hidden and all(one.reason.startswith(reason) for one in hidden)
    assert found.passed  # the other kinds prove it


def test_a_hidden_place_is_drawn_again_elsewhere(make: Make) -> None:
    folder, recording = make("test_resnet", closed)
    found = [run_mutants(folder, recording, seed=seed) for seed in range(3)]
    hidden = {one.tensor.rpartition(".")[0] for one in found for one in one.undetectable}
    assert hidden and all(name.startswith("layer4.0.") for name in hidden)
    assert all(one.passed and {"channels swapped", "bias dropped"} <= kinds(one) for one in found)


def test_one_rounding_too_many_of_weights_that_are_rounded_already(make: Make) -> None:
    folder, recording = make("test_resnet", lambda state: state.update({k: half(v) for k, v in state.items()}))
    for seed in range(4):
        found = run_mutants(folder, recording, seed=seed)
        (rounded,) = (one for one in found.mutants if one.kind == "rounded once more")
        assert rounded.detail == "through bfloat16" and rounded.detected


def half(value: torch.Tensor) -> torch.Tensor:
    return value.half().float() if value.is_floating_point() else value


def test_where_nothing_can_be_detected_nothing_is_proved(make: Make) -> None:
    found = run_mutants(*make("test_resnet", lambda state: [value.zero_() for value in state.values()]))
    assert not found.mutants and not found.passed and "unproven" in str(found)


def test_a_comparison_that_sees_too_little_is_unproven(make: Make) -> None:
    """Only the stem is compared: what is done behind it moves the logits and passes."""
    folder, recording = make("test_resnet", outputs=("features.0",))
    found = run_mutants(folder, recording)
    assert not found.passed and found.undetected and found.smallest_margin < 1
    assert "channels swapped" in kinds(found, detected=False)
    assert str(found).startswith(f"unproven: {found.undetected} of {len(found.mutants)} mutants pass: ")
    assert found.document()["undetected"] == found.undetected


def test_what_the_source_does_not_have_need_not_show(make: Make) -> None:
    """The head moves the logits alone, and they are not compared."""
    folder, recording = make("test_vit", outputs=("forward_features",), img_size=64)
    assert not all(run_mutants(folder, recording, seed=seed).passed for seed in range(4))
    head = ["head.weight", "head.bias"]
    assert all(run_mutants(folder, recording, seed=seed, filled=head).passed for seed in range(4))


def test_a_bound_that_lets_everything_pass_is_unproven(make: Make) -> None:
    """The function differs by what is declared, and no module can be given the source's part in it."""
    folder, recording = make("test_resnet")
    outputs = {
        name: {p: {o: a * 1.01 for o, a in outs.items()} for p, outs in probes.items()}
        for name, probes in recording.outputs.items()
    }
    recording = replace(recording, outputs=outputs)
    declared = {"where": [], "attribute": "eps", "source": 1, "target": 2, "bound": 1e3}
    found = run_mutants(folder, recording, deviation=[declared])
    assert not found.passed and found.undetected == len(found.mutants) and found.smallest_margin < 1e-2


def test_a_float32_recording_has_the_power_too(make: Make) -> None:
    folder, recording = make("test_resnet")
    found = run_mutants(folder, replace(recording, outputs={"float32": recording.outputs["float32"]}))
    assert found.passed and 5 < found.smallest_margin < 1e7


def test_the_command(converted, folder, tmp_path) -> None:
    """A faithful conversion: proved by the whole recording, unproven by one that holds the first feature map."""
    words = ["verify", str(folder), "--source", str(converted.source), "--mutants", "--json", "--reference"]
    done = CliRunner().invoke(app, [*words, str(converted.recording)])
    document = json.loads(done.stdout)
    assert done.exit_code == 0 and document["outcome"] == "passed" and document["mutants"]["undetected"] == 0
    assert document["mutants"]["smallest_margin"] > 1e4 and json.loads((folder / "verification.json").read_text())
    with np.load(converted.recording) as archive:
        kept = {name: array for name, array in archive.items() if name in ("about", "input.normal")}
        x = archive["input.normal"]
    target = run_target(folder, {"normal": x}, ["features.1"])
    kept["float64.normal.features.1"] = target["float64"]["normal"]["features.1"]
    kept["about"] = np.array(json.dumps({k: v for k, v in json.loads(str(kept["about"])).items() if k != "taps"}))
    np.savez(tmp_path / "less.npz", **kept)
    done = CliRunner().invoke(app, [*words, str(tmp_path / "less.npz")])
    assert done.exit_code == 3 and json.loads(done.stdout)["outcome"] == "unproven"
