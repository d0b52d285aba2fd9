"""What paired modules declare: differences are named and counted, other ways to say the same are not."""

from __future__ import annotations

import pytest
from torch import nn

from converters.verifier.audit import audit
from converters.verifier.recording import read_recording
from converters.verifier.references.torch_modules import Modules
from converters.verifier.subject import read_subject
from converters.verifier.taps import Pair
from converters.verifier.target import load_target


def findings(source: nn.Module | dict, target: nn.Module, names: list[str], deviation=()) -> list[str]:
    pairs = [Pair(name, name, 1, name) for name in names]
    declared = source if isinstance(source, dict) else Modules(source, source).describe(names)
    return [str(finding) for finding in audit(target, declared, pairs, deviation)]


def test_a_faithful_conversion_has_no_findings_and_an_eps_is_counted(tapped):
    model, subject = load_target(tapped.folder, "float64"), read_subject(tapped.folder)
    declared = read_recording(tapped.recording).modules
    assert len(declared) == 56 and declared["bn1"]["eps"] == 1e-5
    assert audit(model, declared, subject.modules) == ()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-3
    (finding,) = audit(model, declared, subject.modules)
    assert str(finding) == "BatchNorm2d eps 0.001, source 1e-05, 20 modules"
    assert finding.modules[0] == "bn1" and len(finding.modules) == 20


CONV = {"in_channels": 4, "out_channels": 4, "kernel_size": 3}


def conv(**how) -> nn.Module:
    return nn.Sequential(nn.Conv2d(**CONV, **how))


class Conv2dSame(nn.Conv2d):
    """Pads when it runs, as timm's of this name."""


@pytest.mark.parametrize(
    ("source", "target", "found"),
    [
        (conv(padding=1), conv(padding=(1, 1)), []),
        (conv(padding=1), conv(padding=2, dilation=2), ["Conv2d dilation 2, source 1", "Conv2d padding 2, source 1"]),
        (conv(stride=(2, 1)), conv(stride=2), ["Conv2d stride 2, source [2, 1]"]),
        (conv(groups=2), conv(), ["Conv2d groups 1, source 2"]),
        (nn.Sequential(nn.LayerNorm(4)), nn.Sequential(nn.LayerNorm(4, 1e-6)), ["LayerNorm eps 1e-06, source 1e-05"]),
        (nn.Sequential(nn.LeakyReLU(1)), nn.Sequential(nn.LeakyReLU(2)), ["LeakyReLU negative_slope 2, source 1"]),
        ({"0": {"kind": "Conv2D", "padding": "same", "stride": 1, "kernel_size": 3}}, conv(padding=1), []),
        (
            {"0": {"kind": "Conv2D", "padding": "same", "stride": 2, "kernel_size": 3}},
            conv(padding=1, stride=2),
            ["Conv2d padding 1, source same"],
        ),
        ({"0": {"kind": "Conv2D", "padding": "same", "stride": 2}}, nn.Sequential(Conv2dSame(**CONV, stride=2)), []),
        ({"0": {"kind": "Conv2D", "padding": "valid", "stride": 2}}, conv(padding=1, stride=2), []),  # who knows
        ({"0": {"kind": "Dense", "activation": "relu"}}, conv(), []),
        ({}, conv(), []),
    ],
)  # fmt: skip
def test_what_is_said_in_other_words(source, target, found):
    assert findings(source, target, ["0"]) == [f"{text}, 1 module" for text in found]


def mlp(activation: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Sequential(activation), nn.Linear(4, 4)))


def test_activations_speak_through_the_module_around_them():
    found = findings(mlp(nn.GELU()), mlp(nn.GELU("tanh")), ["0", "0.0", "0.2"])
    assert found == ["Sequential GELU approximate tanh, source none, 1 module"]
    assert findings(mlp(nn.GELU()), mlp(nn.ReLU()), ["0"]) == []  # which no attribute tells


def test_a_declared_deviation_is_told_as_such():
    source, target = nn.Sequential(nn.LayerNorm(4, 1e-6)), nn.Sequential(nn.LayerNorm(4))
    declared = {"where": ["0"], "attribute": "eps", "source": 1e-6, "target": 1e-5, "bound": 2e-5, "reason": "fixed"}
    (text,) = findings(source, target, ["0"], [declared])
    assert text == "LayerNorm eps 1e-05, source 1e-06, 1 module (declared: fixed)"
    for other in ({**declared, "source": 1e-7}, {**declared, "where": ["1"]}):
        (text,) = findings(source, target, ["0"], [other])
        assert "declared" not in text
