"""Taps and teacher forcing: what differs first, what is to blame, and that drift is neither."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from converters.verifier.local import compare_taps
from converters.verifier.recording import Recording, read_recording
from converters.verifier.references.tap_records import record_taps, save
from converters.verifier.references.torch_modules import Modules
from converters.verifier.subject import read_subject
from converters.verifier.taps import Pair
from converters.verifier.target import load_target
from converters.verifier.verdict import Tap, Unchecked, Verdict

IMAGES = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)


@dataclass(frozen=True)
class Found:
    taps: tuple[Tap, ...]
    unchecked: tuple[Unchecked, ...]

    @property
    def verdict(self) -> Verdict:
        return Verdict((), {}, {}, self.taps, self.unchecked)

    @property
    def first(self) -> str | None:
        return self.verdict.first_divergence and self.verdict.first_divergence.target

    @property
    def faulty(self) -> list[str]:
        return [tap.target for tap in self.taps if tap.local_passed is False]


def look(model: nn.Module, recording: Recording, pairs: Any, deviation: Any = ()) -> Found:
    return Found(*compare_taps(model, recording, pairs, deviation))


@pytest.fixture
def resnet(tapped) -> nn.Module:
    return load_target(tapped.folder, "float64")


def look_at_resnet(tapped, model: nn.Module) -> Found:
    return look(model, read_recording(tapped.recording), read_subject(tapped.folder).modules)


def test_a_faithful_conversion_agrees_in_every_module(tapped, resnet):
    found = look_at_resnet(tapped, resnet)
    assert len(found.taps) == 56 and not found.unchecked
    assert all(tap.passed and tap.local_passed for tap in found.taps)
    assert max(tap.error for tap in found.taps) < 1e-13
    names = [tap.target for tap in found.taps]
    assert names[:4] == ["conv1", "bn1", "layer1.0.conv1", "layer1.0.bn1"] and names[-2:] == ["layer4", "fc"]
    assert [tap.depth for tap in found.taps] == list(range(56))


@torch.no_grad()
def wrong_weight(model):
    weight = model.layer3[1].conv2.weight
    weight[5, 3, 1, 1] += weight.abs().max()


def wrong_activation(model):
    model.layer2[0].act1 = nn.GELU()


def wrong_pool(model):
    model.maxpool = nn.AvgPool2d(3, 2, 1)


@torch.no_grad()
def wrong_shortcut(model):
    model.layer3[0].downsample[1].running_mean[0] += 1


def wrong_eps(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-3


@pytest.mark.parametrize(
    ("spoil", "first", "faulty", "reason"),
    [
        (wrong_weight, "layer3.1.conv2", ["layer3.1.conv2"], None),
        (wrong_activation, "layer2.0.conv2", ["layer2.0"], "what reaches layer2.0.conv2 is already wrong"),
        (wrong_pool, "layer1.0.conv1", ["layer1"], "what reaches layer1 is already wrong"),
        (wrong_shortcut, "layer3.0.downsample.1", ["layer3.0.downsample.1"], None),
        (wrong_eps, "bn1", [f"{name}bn1" for name in ("", "layer1.0.")], None),
    ],
)  # fmt: skip
def test_the_module_at_fault_is_named(tapped, resnet, spoil, first, faulty, reason):
    spoil(resnet)
    found = look_at_resnet(tapped, resnet)
    assert found.first == first and len(found.verdict.first_divergence.channels) > 3
    assert found.faulty[: len(faulty)] == faulty and found.verdict.culprit == faulty[0]
    assert len(found.faulty) == (20 if spoil is wrong_eps else 1)
    assert next(tap.reason for tap in found.taps if tap.local_passed is False) == reason
    (channels,) = np.nonzero(np.array(found.verdict.first_divergence.channels) > 1e-10)
    assert spoil is not wrong_weight or channels.tolist() == [5]


class Chain(nn.Module):
    """Parts one behind the other, on the mean of an image's rows."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.mean(2).flatten(1)
        for part in self.children():
            x = part(x)
        return x


@pytest.fixture
def record(tmp_path: Path) -> Callable[..., Recording]:
    """A recording of a model's taps, by the worker's own code."""

    def write(model: nn.Module, pairs: list[Pair], **limits: int) -> Recording:
        job = {"inputs": [pair.source for pair in pairs], "outputs": [pair.output for pair in pairs], **limits}
        x = IMAGES.astype(np.float64)

        def run(x: np.ndarray) -> Any:
            with torch.no_grad():
                return model(torch.from_numpy(x))

        path = tmp_path / "recording.npz"
        with zipfile.ZipFile(path, "w") as archive:
            about = record_taps(Modules(model, run), job, "normal", x, archive)
            about |= {"recording": 1, "source": {"sha256": "0"}}
            save(archive, "about", np.array(json.dumps(about)))
            save(archive, "input.normal", IMAGES)
            save(archive, "float64.normal.logits", run(x).numpy())
        return read_recording(path)

    return write


def pair(target: str, source: str = "", **more: str) -> Pair:
    return Pair(target, source or target, 1, more.pop("output", source or target), **more)


def centred(width: int = 24, offset: float = 1e6) -> dict[str, nn.Module]:
    """Matrices that lift their outputs by much, and norms that take it away again: little is left of float64."""
    torch.manual_seed(0)
    parts: dict[str, nn.Module] = {}
    for number in range(4):
        parts[f"fc{number}"], parts[f"bn{number}"] = nn.Linear(width, width).double(), nn.BatchNorm1d(width).double()
        nn.init.constant_(parts[f"fc{number}"].bias, offset)
        nn.init.constant_(parts[f"bn{number}"].running_mean, offset)
    return parts


class Noisy(nn.Linear):
    """A matrix of another library, which sums in another order."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        signs = torch.randn(x.shape[0], self.out_features, generator=torch.Generator().manual_seed(1)).sign().double()
        return super().forward(x) * (1 + 2.0**-52 * signs)


class Folded(nn.BatchNorm1d):
    """The same norm, written as a factor and a summand."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        factor = self.weight / (self.running_var + self.eps).sqrt()
        return x * factor + (self.bias - self.running_mean * factor)


def as_kind(model: Chain, kind: type[nn.Module], prefix: str) -> Chain:
    for name, module in model.named_children():
        if name.startswith(prefix):
            module.__class__ = kind
    return model


def test_drift_is_no_defect(record):
    pairs = [pair(name) for name in centred()]
    reference = as_kind(Chain(**centred()).eval(), Noisy, "fc")
    found = look(Chain(**centred()).eval(), record(reference, pairs), pairs)
    assert found.first == "bn0" and max(tap.error for tap in found.taps) > 1e-10
    assert all(tap.local_passed for tap in found.taps) and found.verdict.culprit is None
    assert "no module is at fault by itself" in found.verdict._where()


def test_a_module_that_rounds_much_on_its_own_is_no_defect(record):
    """Its error is beyond what its sums explain, and not beyond what its input's last digit does to it."""
    pairs = [pair(name) for name in centred()]
    target = as_kind(Chain(**centred()).eval(), Folded, "bn")
    found = look(target, record(Chain(**centred()).eval(), pairs), pairs)
    bn0 = next(tap for tap in found.taps if tap.target == "bn0")
    assert bn0.local_error > 64 * 2.0**-53 * 24**0.5 and bn0.local_passed and bn0.local_bound < 1e-7
    with torch.no_grad():
        target.bn2.bias[3] += 1e-6
    found = look(target, record(Chain(**centred()).eval(), pairs), pairs)
    assert found.faulty == ["bn2"]


class Twice(nn.Module):
    """A module that is called more than once, one that is not called, and one that takes its tensor by name."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.idle, self.named = nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.named(input=self.shared(self.shared(x.mean(2).flatten(1))))


def test_what_cannot_be_checked_is_listed_with_its_reason(record):
    torch.manual_seed(0)
    model = Twice().double().eval()
    pairs = [pair("shared"), pair("idle"), pair("named"), pair("gone"), pair("lost", "shared")]
    found = look(model, record(model, pairs), pairs)
    assert [(tap.target, tap.local_passed) for tap in found.taps] == [("shared", True), ("named", None)]
    assert found.taps[1].reason == (
        "not on the reference's own input: the reference runs no named, or its input is no tensor"
    )
    assert {one.target: one.reason for one in found.unchecked} == {
        "idle": "timm runs no idle",
        "gone": "timm runs no gone",
        "lost": "timm runs no lost",
    }
    bare = replace(record(model, pairs), taps=None)
    assert {one.reason for one in look(model, bare, pairs).unchecked} == {"the reference recorded no taps"}
    small = look(model, record(model, pairs, bytes=500), pairs)
    assert "the recording had no room for it" in {one.reason for one in small.unchecked}


class Tokens(nn.Module):
    """An image as tokens, through a matrix."""

    def __init__(self, flat: bool) -> None:
        super().__init__()
        self.flat, self.fc = flat, nn.Linear(3, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.permute(0, 2, 3, 1)
        return self.fc(x.flatten(1, 2) if self.flat else x).flatten(1).mean(1)


def test_layouts_and_orders_that_are_not_declared_are_unchecked_or_differ(record):
    torch.manual_seed(0)
    source, target = Tokens(True).double(), Tokens(False).double()
    target.load_state_dict(source.state_dict())
    recording = record(source, [pair("fc")])
    (unchecked,) = look(target, recording, [pair("fc")]).unchecked
    assert unchecked.reason == "its output is (2, 64, 6) in the reference and (2, 8, 8, 6) in timm"
    tokens = pair("fc", layout="b h w c -> b (h w) c")
    (tap,) = look(target, recording, [tokens]).taps
    assert tap.passed and tap.local_passed
    with torch.no_grad():
        target.fc.weight.copy_(target.fc.weight.flip(0))
        target.fc.bias.copy_(target.fc.bias.flip(0))
    (tap,) = look(target, recording, [tokens]).taps
    assert not tap.passed and len(tap.channels) == 6
    (tap,) = look(target, recording, [replace(tokens, order="flip 0")]).taps
    assert tap.passed and tap.local_passed


def test_a_declared_deviation_widens_what_it_names(record):
    torch.manual_seed(0)
    parts = {
        "fc": nn.Linear(24, 24).double(),
        "norm": nn.LayerNorm(24, eps=1e-6).double(),
        "head": nn.Linear(24, 5).double(),
    }
    pairs = [pair(name) for name in parts]
    recording = record(Chain(**parts), pairs)
    parts["norm"].eps = 1e-5
    found = look(Chain(**parts), recording, pairs)
    assert found.faulty == ["norm"] and [tap.passed for tap in found.taps] == [True, False, False]
    declared = {"where": ["norm"], "attribute": "eps", "source": 1e-6, "target": 1e-5, "bound": 1e-3, "reason": "r"}
    found = look(Chain(**parts), recording, pairs, [declared])
    assert not found.faulty and all(tap.passed and tap.bound == 1e-3 for tap in found.taps)
    with torch.no_grad():
        parts["head"].bias += 1e-6  # within the bound of the outputs, and nobody declared it
    assert look(Chain(**parts), recording, pairs, [declared]).faulty == ["head"]
