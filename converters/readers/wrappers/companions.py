"""Companions: what lies beside the weights in one flat state dict, and is told by its name alone.

Optimizers keep slots beside variables, moving averages keep a second copy of each, and quantized layers the
scales of what flows between them. Which copy is a model's own is decided here; averages in a dict of their own
are the business of `wrappers`.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any, NamedTuple

from converters.tensors import LazyTensor

__all__ = ["Separated", "annotate", "separate", "unpack"]

SHADOW = "/ExponentialMovingAverage"
SLOT = re.compile(
    r"(.+)/(Adadelta|Adagrad|Adam|AdamW|Adamax|Ftrl|LAMB|LARS|Lion|Momentum|Nadam|RMSProp|adam_m|adam_v)(_\d+)?"
)
OPTIMIZER = "/.OPTIMIZER_SLOT/"  # stands in the name of whatever an optimizer of TensorFlow 2 keeps
COUNTERS = dict.fromkeys(("global_step", "save_counter", "step"), "step counter")
COUNTERS |= {"beta1_power": "optimizer state", "beta2_power": "optimizer state"}
PACKED = "_packed_params."  # of torch's quantized linear layers
PARAMETRIZED = "parametrizations.weight."
PARTS = [  # two names of one weight that is stored in parts: by what, and how it is made whole
    (f"{PARAMETRIZED}original0", f"{PARAMETRIZED}original1", "weight norm", "parametrize.remove_parametrizations"),
    ("weight_g", "weight_v", "weight norm", "remove_weight_norm"),
    (f"{PARAMETRIZED}original", f"{PARAMETRIZED}0._u", "spectral norm", "parametrize.remove_parametrizations"),
    ("weight_orig", "weight_u", "spectral norm", "remove_spectral_norm"),
    ("weight_orig", "weight_mask", "pruning", "prune.remove"),
]


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
    if any(tensor.lossy for tensor in weights.values()):
        scales = _activation_scales(weights)
        weights = {name: weights[name] for name in weights if name not in scales}
        if scales:
            set_aside["** of scale and zero_point"] = f"quantization of activations ({len(scales)})"
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
        elif name in COUNTERS and not (name == "step" and tensor.spec.shape):
            set_aside[name] = COUNTERS[name]
        else:
            weights[name] = tensor
    return weights, set_aside


def unpack(node: dict[str, Any]) -> dict[str, Any]:
    """`node` with the weights and biases that torch's quantized linear layers pack into a pair of their own."""
    found: dict[str, Any] = {}
    for name, value in node.items():
        stem = name.removesuffix(f"{PACKED}_packed_params")
        weight, bias = f"{stem}weight", f"{stem}bias"
        if stem != name and isinstance(value, dict) and isinstance(value.get("0"), LazyTensor) and weight not in node:
            found[weight] = value["0"]
            if isinstance(value.get("1"), LazyTensor):
                found[bias] = value["1"]
        elif not name.endswith(f"{PACKED}dtype"):
            found[name] = value
    return found


def annotate(tensors: dict[str, LazyTensor]) -> tuple[str, ...]:
    """What a person should know of these weights: that their values are not the trained ones, or not whole."""
    lossy = Counter(tensor.lossy for tensor in tensors.values() if tensor.lossy)
    notes = [f"{how}: {count} of the tensors, which are not as they were trained" for how, count in lossy.items()]
    for first, second, how, remove in PARTS:
        stems = [name.removesuffix(first) for name in tensors if name.endswith(first)]
        stems = [stem for stem in stems if stem + second in tensors and (not stem or stem[-1] in "./")]
        if stems:
            weight = re.sub(r"[^\w.\-/]", "_", f"{stems[0]}weight"[-80:])
            cure = f"make it whole with torch.nn.utils.{remove} and save again"
            notes.append(f"in the two parts of {how}: {len(stems)} of the weights, such as {weight}; {cure}")
    return tuple(notes)


def _activation_scales(tensors: dict[str, LazyTensor]) -> set[str]:
    """The names of scales and zero points that stand beside each other."""
    pairs = ((name, re.sub(r"scale(?=[^.]*$)", "zero_point", name)) for name in tensors)
    return {name for pair in pairs if pair[0] != pair[1] and pair[1] in tensors for name in pair}
