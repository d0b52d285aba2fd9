"""The modules of a torch model, watched while it runs: what enters, what leaves, and what they declare.

Both sides use it: the reference worker on the source framework's model, its host on timm's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

__all__ = ["Modules", "describe", "first_tensor"]

DECLARED = (
    *("eps", "kernel_size", "stride", "padding", "dilation", "groups", "num_heads", "scale"),
    *("negative_slope", "approximate", "ceil_mode", "count_include_pad"),
)
SYNONYMS = {"GELUTanh": ("GELU", {"approximate": "tanh"}), "PytorchGELUTanh": ("GELU", {"approximate": "tanh"})}


class Modules:
    """A model's modules by the names that its checkpoints use; `run(x)` runs the model.

    Where the model that is run holds what the checkpoint is of (a classifier its `backbone`), that name may
    stand before them.
    """

    def __init__(self, model: torch.nn.Module, run: Callable[[Any], Any]) -> None:
        self.run, self.own = run, dict(model.named_modules())
        ends: dict[str, list[torch.nn.Module]] = {}
        for name, module in self.own.items():
            ends.setdefault(name.partition(".")[2], []).append(module)
        self.inside = {end: modules[0] for end, modules in ends.items() if len(modules) == 1}

    def find(self, name: str) -> Any:
        return self.own[name] if name in self.own else self.inside.get(name)

    def watch(
        self, x: Any, inputs: Iterable[str], outputs: Iterable[str], keep: Callable[[str, str, Any], None]
    ) -> None:
        """Run the model and hand each module's first tensor to `keep("input" or "output", name, array)`.

        Of a module that is called more than once it is the first call's. Arrays are the model's own memory, to be
        used at once.
        """
        seen = set()

        def once(kind: str, name: str, value: Any) -> None:
            if (kind, name) not in seen:
                seen.add((kind, name))
                if isinstance(value, torch.Tensor) and value.is_floating_point():
                    keep(kind, name, value.detach().numpy())

        handles = []
        for name, module in [(name, self.find(name)) for name in inputs]:
            if module is not None:
                handles.append(
                    module.register_forward_pre_hook(
                        lambda _module, args, name=name: once("input", name, args[0] if args else None)
                    )
                )
        for name, module in [(name, self.find(name)) for name in outputs]:
            if module is not None:
                handles.append(
                    module.register_forward_hook(
                        lambda _module, _args, given, name=name: once("output", name, first_tensor(given))
                    )
                )
        try:
            self.run(x)
        finally:
            for handle in handles:
                handle.remove()

    def describe(self, names: Iterable[str]) -> dict[str, dict[str, Any]]:
        """What each of these modules declares."""
        modules = {name: self.find(name) for name in names}
        named = set(map(id, modules.values()))
        return {name: describe(module, named) for name, module in modules.items() if module is not None}


def describe(module: torch.nn.Module, named: Iterable[int] = ()) -> dict[str, Any]:
    """A module's class and plain attributes; those of what it holds without tensors and without a name of its own.

    `named` are the ids of modules that speak for themselves.
    """
    declared: dict[str, Any] = {}
    for child in _bare(module, set(named)):
        kind, attributes = _own(child)
        for key, value in attributes.items():
            key = f"{kind} {key}"
            declared[key] = value if declared.get(key, value) == value else None  # they differ: no one answer
    declared = {key: value for key, value in declared.items() if value is not None}
    kind, attributes = _own(module)
    return {"kind": kind, **attributes, **declared}


def first_tensor(value: Any) -> Any:
    """The first tensor in what a module gave, or None."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        found = (first_tensor(part) for part in value)
        return next((part for part in found if part is not None), None)
    return value if isinstance(value, torch.Tensor) else None


def _bare(module: torch.nn.Module, named: set[int]) -> Iterable[torch.nn.Module]:
    """The leaves below that have no tensors, but for those below modules in `named`."""
    for child in module.children():
        if id(child) in named:
            continue
        if list(child.children()):
            yield from _bare(child, named)
        elif not list(child.parameters()) + list(child.buffers()):
            yield child


def _own(module: torch.nn.Module) -> tuple[str, dict[str, Any]]:
    kind = type(module).__name__
    values = {name: getattr(module, name, None) for name in DECLARED}
    plain = {name: _plain(value) for name, value in values.items()}
    kind, more = SYNONYMS.get(kind, (kind, {}))
    return kind, {**{name: value for name, value in plain.items() if value is not None}, **more}


def _plain(value: Any) -> Any:
    """A value as JSON has it, or None; of several that are alike, one."""
    if isinstance(value, (tuple, list)):
        parts = [_plain(part) for part in value]
        return None if None in parts or not parts else parts[0] if len(set(map(str, parts))) == 1 else parts
    return value if isinstance(value, (bool, int, float, str)) else None
