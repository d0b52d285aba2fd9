"""Prefixes: what the names of one flat state dict begin with, where it says how a model was run or which one it is."""

from __future__ import annotations

import re
from typing import Any

from converters.tensors import LazyTensor

__all__ = ["are_rivals", "group_by_prefix", "is_averaged", "strip_prefixes"]

PREFIX = "module."  # DataParallel, DistributedDataParallel, AveragedModel
SEGMENT = "_orig_mod"  # torch.compile, around whichever submodule it was given
COUNTERS = frozenset({"n_averaged", "steps", "num_updates", "decay"})  # stand beside `module.` names
MAX_PREFIXES = 8
AVERAGED = frozenset({"ema", "averaged", "average", "avg", "swa", "polyak"})  # words in the names of averaged weights
FOLLOWERS = {  # a part's name: that of its moving average, in self-supervised training
    "student": "teacher",
    "encoder_q": "encoder_k",
    "base_encoder": "momentum_encoder",
    "online_encoder": "target_encoder",
    "online_network": "target_network",
    "online_net": "target_net",
    "online_model": "ema_model",
}
FOLLOWER_FORMS = ("momentum_{}", "{}_momentum", "ema_{}", "{}_ema", "target_{}", "teacher_{}")


def strip_prefixes(tensors: dict[str, LazyTensor]) -> tuple[dict[str, LazyTensor], list[str], dict[str, str]]:
    """The tensors without the prefixes that all of them have, the prefixes, and the counters set aside."""
    prefixes: list[str] = []
    counters: dict[str, str] = {}
    for _ in range(MAX_PREFIXES):
        own = [name for name in tensors if not name.startswith(PREFIX)]
        if len(own) < len(tensors) and COUNTERS.issuperset(own):
            counters |= dict.fromkeys(own, "averaging counter")
            tensors = {name.removeprefix(PREFIX): tensors[name] for name in tensors if name not in counters}
            prefixes.append(PREFIX)
            continue
        bare = {".".join(part for part in name.split(".") if part != SEGMENT): name for name in tensors}
        if bare.keys() == tensors.keys() or len(bare) < len(tensors):
            break
        tensors = {name: tensors[wrapped] for name, wrapped in bare.items()}
        prefixes.append(f"{SEGMENT}.")
    return tensors, prefixes, counters


def group_by_prefix(tensors: dict[str, LazyTensor], prefix: str = "") -> dict[str, Any]:
    """Tensors as dicts by the first segment of their names; those below `prefix` are in one of their own."""
    parts: dict[str, Any] = {}
    for name, tensor in tensors.items():
        first, dot, rest = name.partition(".")
        if prefix and name.startswith(f"{prefix}."):
            parts.setdefault(prefix, {})[name[len(prefix) + 1 :]] = tensor
        elif dot and rest:
            parts.setdefault(first, {})[rest] = tensor
        else:
            parts[name] = tensor
    return parts


def is_averaged(name: str) -> bool:
    """Whether weights of this name are averages of those that training steps made.

    >>> [name for name in ("model_ema", "swa_model", "params-ema", "schema", "ema.0.conv") if is_averaged(name)]
    ['model_ema', 'swa_model', 'params-ema']
    """
    return "." not in name and not AVERAGED.isdisjoint(re.split(r"[_\W]", name.lower()))


def are_rivals(parts: dict[str, Any]) -> bool:
    """Whether two of these dicts are the same model: one is trained, the other follows it.

    >>> are_rivals({"encoder_q": {"w": 0}, "encoder_k": {"w": 1}}), are_rivals({"stem": {"w": 0}, "head": {"w": 1}})
    (True, False)
    """
    dicts = {name for name, value in parts.items() if isinstance(value, dict)}
    for name in dicts:
        followers = {FOLLOWERS.get(name, name), *(form.format(name) for form in FOLLOWER_FORMS)}
        if any(parts[name].keys() & parts[other].keys() for other in (followers & dicts) - {name}):
            return True
    return False
