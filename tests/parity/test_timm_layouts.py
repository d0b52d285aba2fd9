"""Older layouts of timm's own, on random weights under a past release's own names, against timm's own conversions.

What a past release calls its tensors is in tests/plans/timm/, written by tools/write_golden_plans.py. Where timm has
no conversion any more, its models' tensors, in the order in which they have always been, are the reference.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file

from converters import convert

PLANS = Path(__file__).parents[1] / "plans" / "timm"
State = dict[str, torch.Tensor]


def filtered(module: str) -> Callable[[State, Any], State]:
    return lambda state, model: import_module(f"timm.models.{module}").checkpoint_filter_fn(dict(state), model)


def in_order(state: State, model: Any) -> State:
    """Each of the model's tensors, from the one at the same place."""
    kept = [tensor for name, tensor in state.items() if not name.endswith("attention_bias_idxs")]
    return dict(zip(model.state_dict(), kept, strict=True))


def pools_behind(state: State, model: Any) -> State:
    return filtered("pit")(
        {re.sub(r"transformers\.(\d)\.pool", r"pools.\1", name): t for name, t in state.items()}, model
    )


CASES: dict[str, tuple[str, str, Callable[[State, Any], State], int]] = {  # specs, architecture, reference, steps apart
    "levit_before_0_9": ("0.6.13", "levit_128s", in_order, 0),
    "pit_before_0_9": ("0.6.13", "pit_ti_224", pools_behind, 0),
    "poolformer_before_0_9": ("0.6.13", "poolformer_s12", filtered("metaformer"), 0),
    "sequencer_before_0_9": ("0.6.13", "sequencer2d_s", filtered("sequencer"), 0),
    "swin_before_0_9": ("0.6.13, v1", "swin_tiny_patch4_window7_224", filtered("swin_transformer"), 0),
    "swin_v2_cr_before_0_9": ("0.6.13", "swinv2_cr_tiny_224", filtered("swin_transformer_v2_cr"), 0),
    "tnt_before_1_0_20": ("1.0.9", "tnt_s_legacy_patch16_224", filtered("tnt"), 0),
    "tresnet_before_0_9": ("0.6.13", "tresnet_m", filtered("tresnet"), 1),  # timm adds eps in float32
    "native": ("1.0.9, with buffers", "efficientvit_m0", filtered("efficientvit_msra"), 0),
}


@pytest.mark.parametrize("family", CASES)
def test_an_older_layout_comes_home(family: str, tmp_path: Path) -> None:
    title, architecture, reference, steps = CASES[family]
    source = json.loads((PLANS / f"{family}.specs.json").read_text("utf-8"))[title]
    draw = torch.Generator().manual_seed(0)
    state = {name: weights(draw, *given) for name, given in source["tensors"].items()}
    state |= {name: tensor.abs() for name, tensor in state.items() if name.endswith("running_var")}
    torch.save({**source["metadata"], "state_dict": state}, tmp_path / "source.pth")
    done = convert(tmp_path / "source.pth", tmp_path / "out", allow_deviation=True)
    assert (done.plan.mapping.name, done.plan.skeleton.architecture) == (f"timm/{family}", architecture)
    found = load_file(tmp_path / "out" / "model.safetensors")
    with torch.device("meta"):
        model = timm.create_model(architecture)
    expected = reference(state, model)
    assert found.keys() == model.state_dict().keys() and expected.keys() <= found.keys()
    assert all(not found[name].any() for name in found.keys() - expected.keys())  # counters that the source lacks
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, rtol=steps * 2**-23, atol=0), name


def weights(draw: torch.Generator, shape: list[int], dtype: str = "float32") -> torch.Tensor:
    if dtype != "float32":
        return torch.randint(9, shape, generator=draw).to(getattr(torch, dtype))
    return torch.randn(shape, generator=draw)
