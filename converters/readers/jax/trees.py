"""JAX trees: what a training state holds, by names such as `params/Dense_0/kernel`.

Flax keeps a model's variables in collections of like modules (`params`, `batch_stats`), and a training state keeps
them beside an optimizer, or within it. `arrange` gives every variable the name that its module has in the model.
Averaged weights go with the averaged states of their modules, or where there are none with those of the raw ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from converters.readers.wrappers.prefixes import is_averaged
from converters.tensors import LazyTensor

__all__ = ["Arranged", "arrange"]

WEIGHTS = ("params", "target")  # the latter is what an optimizer of old Flax optimizes
STATES = ("batch_stats", "model_state")  # of the weights' modules; the latter may hold the former
OPTIMIZERS = ("opt", "optimizer")
WRAPPERS = (*WEIGHTS, "state", "train_state", "model", "default")
ASIDE = {
    **dict.fromkeys((*OPTIMIZERS, "opt_state", "optimizer_state"), "optimizer state"),
    **dict.fromkeys(("step", "global_step"), "step counter"),
    **dict.fromkeys(("rng", "rngs", "dropout_rng"), "random generator state"),
    "extra": "counters and times of the training",
}
VALUE = "/value"  # follows every name in a state of flax.nnx
MAX_WRAPPERS = 8

Tensors = dict[str, LazyTensor]


@dataclass(frozen=True)
class Arranged:
    tree: dict[str, Any]
    wrappers: tuple[str, ...]  # outermost first
    set_aside: dict[str, str]


def arrange(leaves: Mapping[str, Any]) -> Arranged:
    """The leaves under their modules' names; where there are averaged weights too, each kind in a dict of its own."""
    tensors = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, LazyTensor)}
    values = {name: leaf for name, leaf in leaves.items() if name not in tensors}
    wrappers: list[str] = []
    set_aside: dict[str, str] = {}
    if tensors and all(name.endswith(VALUE) for name in tensors):
        tensors = {name.removesuffix(VALUE): tensor for name, tensor in tensors.items()}
        wrappers.append(VALUE)
    for _ in range(MAX_WRAPPERS):
        parts = _split(tensors)
        wrappers += _take_targets(parts)
        weights = [top for top in WEIGHTS if top in parts]
        aside = {**ASIDE, "state": ASIDE["opt"]} if weights == ["target"] else ASIDE
        for top in [top for top in parts if weights and top in aside]:
            set_aside[top if "" in parts[top] else f"{top}/**"] = aside[top]
            del parts[top]
        states = [top for top in STATES if top in parts]
        averaged = [top for top in parts if weights and is_averaged(top)]
        averaged_states = [top for top in averaged if any(state in top for state in STATES)]
        if len(weights) == 1 and parts.keys() == {*weights, *averaged, *states}:
            taken = {weights[0]: states}
            taken |= {top: averaged_states or states for top in averaged if top not in averaged_states}
            merged = {top: _merge(*(parts[one] for one in (top, *of))) for top, of in taken.items()}
            if None not in merged.values():
                parts = {top: found for top, found in merged.items() if found is not None}
            if averaged:
                return Arranged({**values, **parts}, tuple(wrappers), set_aside)
        top = next(iter(parts), "")
        if len(parts) > 1 or top not in WRAPPERS or "" in parts[top]:
            tensors = _join(parts)
            break
        tensors = parts[top]
        wrappers.append(" + ".join([top, *states]))
    for name in [name for name in tensors if "rngs" in name.split("/")]:
        set_aside["**/rngs/**"] = ASIDE["rngs"]
        del tensors[name]
    return Arranged({**values, **tensors}, tuple(wrappers), set_aside)


def _take_targets(parts: dict[str, Tensors]) -> Iterator[str]:
    """Put beside an optimizer what it optimizes, if it holds that; yield its name."""
    for optimizer in OPTIMIZERS:
        held = _split(parts.get(optimizer, {}))
        if "target" in held and "target" not in parts:
            parts["target"] = held.pop("target")
            parts[optimizer] = _join(held)
            if not held:
                del parts[optimizer]
            yield optimizer


def _merge(weights: Tensors, *states: Tensors) -> Tensors | None:
    """The weights and the states of their modules; None if two would have one name."""
    if not states:
        return weights
    inner = _split(weights)
    merged = inner["params"] if inner.keys() == {"params"} and "" not in inner["params"] else weights
    for state in states:
        bare = {name.removeprefix("batch_stats/"): tensor for name, tensor in state.items()}
        if "" in bare or bare.keys() & merged.keys():
            return None
        merged = merged | bare
    return merged


def _split(tensors: Tensors) -> dict[str, Tensors]:
    """The tensors by the first segment of their names, each by the rest of its name."""
    parts: dict[str, Tensors] = {}
    for name, tensor in tensors.items():
        top, _, rest = name.partition("/")
        parts.setdefault(top, {})[rest] = tensor
    return parts


def _join(parts: dict[str, Tensors]) -> Tensors:
    return {f"{top}/{rest}" if rest else top: tensor for top, rests in parts.items() for rest, tensor in rests.items()}
