"""Companions: what lies beside the weights in one flat state dict, and is told by its name alone.

Optimizers keep slots beside variables, and moving averages keep a second copy of each. Which copy is a
model's own is decided here; averages in a dict of their own are the business of `wrappers`.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from converters.tensors import LazyTensor

__all__ = ["Separated", "separate"]

SHADOW = "/ExponentialMovingAverage"
SLOT = re.compile(
    r"(.+)/(Adadelta|Adagrad|Adam|AdamW|Adamax|Ftrl|LAMB|LARS|Lion|Momentum|Nadam|RMSProp|adam_m|adam_v)(_\d+)?"
)
OPTIMIZER = "/.OPTIMIZER_SLOT/"  # stands in the name of whatever an optimizer of TensorFlow 2 keeps
COUNTERS = {"global_step": "step counter", "save_counter": "step counter"}
COUNTERS |= {"beta1_power": "optimizer state", "beta2_power": "optimizer state"}


class Separated(NamedTuple):
    tensors: dict[str, LazyTensor]
    wrappers: tuple[str, ...]  # what was taken off the names of the averaged or raw copies
    set_aside: dict[str, str]  # folded pattern: reason
    has_averages: bool


def separate(tensors: dict[str, LazyTensor], averaged: bool) -> Separated:
    """The weights among `tensors`, averaged or raw; those without a second copy are in either.

    TensorFlow's shadows are called `NAME/ExponentialMovingAverage`. The EMAHook of mmcv 1.x exchanges both
    copies when it saves: the averaged weight has its own name, the raw one is `ema_` and the name with
    underscores for dots.
    """
    weights, set_aside = _without_slots(tensors)
    shadows = {name: name + SHADOW for name in weights if name + SHADOW in weights}
    raws = {name: copy for name in weights if (copy := f"ema_{name.replace('.', '_')}") in weights and copy != name}
    copies = shadows or raws
    if not copies:
        return Separated(weights, (), set_aside, False)
    chosen = copies if averaged == bool(shadows) else {}
    left = set(copies.values())
    kept = {name: weights[chosen.get(name, name)] for name in weights if name not in left}
    pattern, mark = (f"**{SHADOW}", SHADOW.strip("/")) if shadows else ("ema_*", "ema_")
    kind, other = ("averaged", "raw") if averaged else ("raw", "averaged")
    set_aside[f"** without {mark}" if chosen else pattern] = (
        f"{other} weights ({len(copies)}); the {kind} ones are taken"
    )
    return Separated(kept, (mark,) if chosen else (), set_aside, True)


def _without_slots(tensors: dict[str, LazyTensor]) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    weights: dict[str, LazyTensor] = {}
    set_aside: dict[str, str] = {}
    for name, tensor in tensors.items():
        slot = SLOT.fullmatch(name)
        if OPTIMIZER in name:
            set_aside[f"**{OPTIMIZER}**"] = "optimizer state"
        elif slot and slot[1] in tensors:
            set_aside[f"**/{slot[2]}{slot[3] or ''}"] = "optimizer state"
        elif name in COUNTERS:
            set_aside[name] = COUNTERS[name]
        else:
            weights[name] = tensor
    return weights, set_aside
