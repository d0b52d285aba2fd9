"""Wrappers: what lies around a state dict in a checkpoint, taken off and reported.

A training script saves its weights under some name, beside an optimizer and a log, often twice (raw and
averaged), and with prefixes that only say how the model was run. `unwrap` finds the state dict. It never
guesses between two: it asks for `--key`. Prefixes that belong to a model (`backbone.`) are the mapping's
business.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from converters.errors import CheckpointError, UnsafeCheckpoint, printable
from converters.readers.pickles import Opaque
from converters.readers.wrappers.companions import annotate, separate, unpack
from converters.readers.wrappers.plain import Plain
from converters.readers.wrappers.prefixes import are_rivals, group_by_prefix, is_averaged, strip_prefixes
from converters.tensors import LazyTensor

__all__ = ["Unwrapped", "unwrap"]

RAW = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "module", "params", "weights")
ASIDE = {  # a word in a name: what such a thing is, whatever it holds
    **dict.fromkeys(("optim", "optimizer", "optimizers"), "optimizer state"),
    **dict.fromkeys(("sched", "scheduler", "schedulers"), "scheduler state"),
    **dict.fromkeys(("amp", "scaler"), "loss scaler state"),
    "rng": "random generator state",
    "metrics": "what metrics have counted",
}
ADAPTERS = frozenset({"lora_A", "lora_B", "lora_up", "lora_down"})
PACKED = frozenset({"_packed_params", "qweight", "qzeros", "SCB", "absmax"})
QUANTIZED = PACKED | {"zero_point"}
SETTINGS = frozenset({"_extra_state", "args", "cfg", "config", "hparams", "hyper_parameters", "meta", "opt"})
MAX_DEPTH = 8
BESIDE = "lies beside the state dict"
Reasons = Mapping[str, str]
NO_REASONS: Reasons = {}


@dataclass(frozen=True)
class Unwrapped:
    """A state dict, and what was taken off to get at it."""

    tensors: dict[str, LazyTensor]
    wrappers: tuple[str, ...] = ()  # outermost first
    set_aside: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def unwrap(tree: dict[str, Any], path: Path, *, key: str | None = None, ema: bool | None = None) -> Unwrapped:
    """The state dict in `tree`; see `open_checkpoint` for `key` and `ema`. Raises CheckpointError."""
    steps, prefix = _follow(tree, key or "")
    node = steps[-1][0][steps[-1][1]] if steps else tree
    unwrapper = _Unwrapper(path, ema, [name for name, value in node.items() if isinstance(value, dict)])
    unwrapper.met_average = any(is_averaged(name) for _, name in steps)
    found = unwrapper.open(node, len(steps), prefix)
    for parent, name in reversed(steps):
        found = unwrapper.wrap(parent, name, found)
    if ema and not unwrapper.met_average:
        raise CheckpointError("holds no averaged weights", file=path, cure="leave --ema out")
    tensors = {
        name: replace(tensor, spec=replace(tensor.spec, name=name)) if tensor.spec.name != name else tensor
        for name, tensor in found.tensors.items()
    }
    return replace(found, tensors=tensors)


class _Unwrapper:
    def __init__(self, path: Path, ema: bool | None, choices: list[str]) -> None:
        self.path, self.ema, self.met_average = path, ema, False
        self.choices = choices  # the dicts that a key could have named
        self.known: dict[int, bool] = {}  # by id of a dict: whether it holds tensors
        self.plain = Plain()

    def open(self, node: dict[str, Any], depth: int, prefix: str = "") -> Unwrapped:
        """The state dict that `node` is, or the one that it holds; of this, what has `prefix` before its names."""
        if depth > MAX_DEPTH:
            raise UnsafeCheckpoint(f"wraps its state dict more than {MAX_DEPTH} times", file=self.path)
        if {"state", "param_groups"} <= node.keys():
            raise CheckpointError("holds no weights, only optimizer state", file=self.path)
        nested = [name for name, value in node.items() if self.holds(value) and not _aside(name)]
        raw, averaged = [name for name in RAW if name in nested], [name for name in nested if is_averaged(name)]
        raw = raw or [name for name in nested if any(_is_copy(node[name], node[other]) for other in averaged)]
        loose = False
        if not raw and not averaged:
            loose = any(_is_tensor(value) and not _aside(name) for name, value in node.items())
            raw = [name for name in nested if not (loose and "." in name)]  # a dotted name is a module's
            if not raw:
                return self.state_dict(node, depth, prefix)
        if len(raw) > 1 or len(averaged) > 1 or loose:
            if prefix:
                raise self.no_choice(prefix)
            names = [printable(name, 40) for name in [*raw, *averaged][:10]]
            problem = f"holds several state dicts: {', '.join(names)}{' and loose tensors' * loose}"
            raise CheckpointError(problem, file=self.path, cure=f"choose one, as in --key {names[0]}")
        if not (raw and averaged):
            name = [*raw, *averaged][0]
            self.met_average |= bool(averaged)
            if averaged and self.ema is False:
                raise CheckpointError(
                    f"holds averaged weights only, in {name}", file=self.path, cure="leave --no-ema out"
                )
            return self.wrap(node, name, self.open(node[name], depth + 1, prefix))
        return self.choose(node, raw[0], averaged[0], depth, prefix)

    def choose(self, node: dict[str, Any], raw: str, averaged: str, depth: int, prefix: str) -> Unwrapped:
        """The averaged weights, unless the raw ones are asked for or are alone complete."""
        self.met_average, note = True, ""
        if averaged == "ema_state_dict" and _is_mmengine(node):
            raw, averaged, note = averaged, raw, ", which MMEngine's EMAHook exchanges when it saves"
        taken, left = (raw, averaged) if self.ema is False else (averaged, raw)
        found = self.open(node[taken], depth + 1, prefix)
        if self.ema is None:
            fallback = self.open(node[raw], depth + 1, prefix)
            if missing := fallback.tensors.keys() - found.tensors.keys():
                found, taken, left, note = fallback, raw, averaged, f" without {len(missing)} of the tensors"
        kind = "raw" if left == raw else "averaged"
        return self.wrap(node, taken, found, {left: f"{kind} weights{note}"})

    def wrap(self, parent: dict[str, Any], name: str, found: Unwrapped, reasons: Reasons = NO_REASONS) -> Unwrapped:
        """`found`, which was under `name` in `parent`, with what lay beside it there."""
        set_aside, metadata = self.sort_out({key: parent[key] for key in parent if key != name}, reasons)
        return replace(
            found,
            wrappers=(name, *found.wrappers),
            set_aside={**set_aside, **found.set_aside},
            metadata={**found.metadata, **metadata},
        )

    def state_dict(self, node: dict[str, Any], depth: int, prefix: str) -> Unwrapped:
        """A dict that holds tensors itself, its prefixes and its tensors' companions taken off."""
        node = unpack(node)
        tensors = {name: value for name, value in node.items() if isinstance(value, LazyTensor)}
        self.refuse_kin(node, bool(tensors))
        set_aside, metadata = self.sort_out({name: node[name] for name in node if name not in tensors})
        tensors, prefixes, counters = strip_prefixes(tensors)
        found = self.part(tensors, prefixes, depth + 1, prefix)
        if found is None:
            weights, marks, companions, has_averages = separate(tensors, averaged=self.ema is not False)
            self.met_average |= has_averages
            found = Unwrapped(weights, marks, companions, notes=annotate(weights))
        return replace(
            found,
            wrappers=(*prefixes, *found.wrappers),
            set_aside={**set_aside, **counters, **found.set_aside},
            metadata={**metadata, **found.metadata},
        )

    def part(self, tensors: dict[str, LazyTensor], prefixes: list[str], depth: int, asked: str) -> Unwrapped | None:
        """The tensors below the prefix that was asked for, or of one of two models; None if all are one model's."""
        prefix = asked
        for one in prefixes if asked else []:
            prefix = f"{prefix}.".removeprefix(one).removesuffix(".")
        parts = group_by_prefix(tensors, prefix)
        if not prefix:
            return self.open(parts, depth) if are_rivals(parts) else None
        if not isinstance(parts.get(prefix), dict):
            raise self.no_choice(asked, list(parts))
        return self.wrap(parts, prefix, self.open(parts[prefix], depth))

    def no_choice(self, asked: str, parts: Sequence[str] = ()) -> CheckpointError:
        """The error for a key that chooses nothing."""
        there = ", ".join(printable(name, 40) for name in [*self.choices, *parts][:20]) or "no dict"
        problem = f"has no {printable(asked)} to choose; it has: {there}"
        return CheckpointError(problem, file=self.path, cure="mend --key")

    def refuse_kin(self, node: dict[str, Any], holds_tensors: bool) -> None:
        """Raise for what resembles a state dict: quantized weights, an adapter, tensors in part, none at all."""
        is_dequantized = any(isinstance(value, LazyTensor) and value.lossy for value in node.values())
        for name, value in node.items():
            segments = set(name.split("."))
            if segments & QUANTIZED and not (is_dequantized and segments.isdisjoint(PACKED)):
                raise CheckpointError("is quantized", file=self.path, tensor=name, cure="convert the float model")
            if segments & ADAPTERS:
                cure = "merge it into its base model first"
                raise CheckpointError("is an adapter's, not a model's", file=self.path, tensor=name, cure=cure)
            is_setting = name.split(".")[-1] in SETTINGS
            if isinstance(value, Opaque) and not is_setting and (holds_tensors or value.why):
                problem = value.why or f"is no tensor but a {value.symbol}"
                raise CheckpointError(problem, file=self.path, tensor=name)
        if not holds_tensors:
            names = ", ".join(printable(name, 40) for name in list(node)[:10])
            kind = "optimizer state" if any(map(_aside, node)) else names or "nothing"
            raise CheckpointError(f"holds no weights, only {kind}", file=self.path)

    def sort_out(self, entries: dict[str, Any], reasons: Reasons = NO_REASONS) -> tuple[dict[str, str], dict[str, Any]]:
        """Entries that lie beside what is taken: those with tensors and why they are left, and the rest's values."""
        set_aside: dict[str, str] = {}
        metadata: dict[str, Any] = {}
        for name, value in entries.items():
            if self.holds(value):
                set_aside[f"{name}.**"] = reasons.get(name) or _aside(name) or BESIDE
            elif _is_tensor(value):
                set_aside[name] = _aside(name) or BESIDE
            else:
                metadata[name] = self.plain(value)
        return set_aside, metadata

    def holds(self, value: Any, depth: int = 0) -> bool:
        """Whether this is a dict with tensors in it, however deep."""
        if not isinstance(value, dict) or depth > MAX_DEPTH:
            return False
        if id(value) not in self.known:
            self.known[id(value)] = False
            self.known[id(value)] = any(_is_tensor(item) or self.holds(item, depth + 1) for item in value.values())
        return self.known[id(value)]


def _follow(tree: dict[str, Any], key: str) -> tuple[list[tuple[dict[str, Any], str]], str]:
    """The dicts that a dotted path leads through, each with the name taken from it, and the rest of the path.

    Names may hold dots. What leads to no dict may be a prefix of tensors' names.
    """
    steps: list[tuple[dict[str, Any], str]] = []
    node = tree
    while key:
        dicts = [name for name, value in node.items() if isinstance(value, dict)]
        fitting = [name for name in dicts if name and f"{key}.".startswith(f"{name}.")]
        if not fitting:
            break
        name = max(fitting, key=len)
        steps.append((node, name))
        node, key = node[name], key[len(name) + 1 :]
    return steps, key


def _is_tensor(value: Any) -> bool:
    """Whether this is a tensor, or was one where it was saved."""
    return isinstance(value, LazyTensor) or (isinstance(value, Opaque) and value.why is not None)


def _is_copy(one: dict[str, Any], averaged: dict[str, Any]) -> bool:
    """Whether the same model's weights may be in both: all that are averaged are in the other."""
    return one is not averaged and averaged.keys() <= one.keys()


def _is_mmengine(node: dict[str, Any]) -> bool:
    meta = node.get("meta")
    return "message_hub" in node or (isinstance(meta, dict) and "mmengine_version" in meta)


def _aside(name: str) -> str | None:
    """What a thing of this name is, if it is no weights whatever it holds.

    >>> _aside("optimizer_states"), _aside("backbone")
    ('optimizer state', None)
    """
    return next((ASIDE[word] for word in re.split(r"[_.\W]", name.lower()) if word in ASIDE), None)
