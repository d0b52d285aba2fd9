"""Torch trees: what a torch pickle holds, as dicts whose leaves are lazy tensors and plain values.

Modules that were pickled whole, and TorchScript's, become their state dicts. Sharing and cycles, which a
pickle may have, cost no more than their size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from converters.errors import CheckpointError, DamagedCheckpoint, UnsafeCheckpoint
from converters.readers.files import SourceFile
from converters.readers.pickles import MAX_STEPS, Opaque, Symbol
from converters.readers.torch_storages import Record, Storage, View, why_no_tensor
from converters.tensors import LazyTensor

__all__ = ["build_tree"]

MAX_DEPTH = 200
MAX_NAME = 10_000  # characters


def build_tree(value: Any, file: SourceFile, find: Callable[[Storage, str], Record]) -> dict[str, Any]:
    """The tree of a pickle's value; no tensor's data is read.

    `find` gives a storage's record, and is told the name of the tensor that asks. What has no meaning stays
    Opaque. Raises CheckpointError.
    """
    tree = _Builder(file, find).convert(value, "", 0)
    if not isinstance(tree, dict):
        what = "a bare tensor" if isinstance(tree, LazyTensor) else f"a {getattr(tree, 'symbol', type(tree).__name__)}"
        raise CheckpointError(f"holds {what}, not a state dict", file=file.path, cure="save model.state_dict()")
    return tree


@dataclass
class _Builder:
    file: SourceFile
    find: Callable[[Storage, str], Record]
    done: dict[int, Any] = field(default_factory=dict)  # what became of each container, by id
    steps: int = 0

    def spend(self, depth: int) -> None:
        self.steps += 1
        if depth > MAX_DEPTH or self.steps > MAX_STEPS:
            raise UnsafeCheckpoint("its pickle is nested too deeply", file=self.file.path)

    def convert(self, value: Any, name: str, depth: int) -> Any:
        """`value` as a node of the tree; `name` is its key."""
        self.spend(depth)
        if isinstance(value, View):
            return value.open(name, self.find(value.storage, name))
        if isinstance(value, Storage):
            return Opaque(Symbol("torch", "UntypedStorage"), "is a bare storage, not a tensor")
        if isinstance(value, Symbol):
            return str(value)
        if not isinstance(value, dict | list | tuple | Opaque):
            return value
        if id(value) not in self.done:
            self.done[id(value)] = Opaque(Symbol("builtins", type(value).__name__), "contains itself")
            self.done[id(value)] = self.container(value, depth)
        return self.done[id(value)]

    def container(self, value: Any, depth: int) -> Any:
        if isinstance(value, dict):
            return self.mapping(value.items(), depth)
        if isinstance(value, Opaque):
            if value.items is not None:
                return self.mapping(value.items.items(), depth)
            if _members(value) is not None:
                return self.mapping(self.flatten(value, "", depth), depth)
            value.why = value.why or why_no_tensor(value.symbol)
            return value
        items = [self.convert(item, str(index), depth + 1) for index, item in enumerate(value)]
        holds_nodes = any(isinstance(item, dict | LazyTensor | Opaque) for item in items)
        return {str(index): item for index, item in enumerate(items)} if holds_nodes else items

    def mapping(self, items: Iterable[tuple[Any, Any]], depth: int) -> dict[str, Any]:
        node: dict[str, Any] = {}
        for key, value in items:
            name = str(key.symbol if isinstance(key, Opaque) else key)
            converted = self.convert(value, name, depth + 1)
            if name in node and LazyTensor in (type(converted), type(node[name])):
                raise DamagedCheckpoint("two tensors have this name", file=self.file.path, tensor=name)
            node[name] = converted
        return node

    def flatten(self, module: Opaque, prefix: str, depth: int) -> Iterator[tuple[str, Any]]:
        """The state dict of a module that was pickled whole, not converted yet."""
        if len(prefix) > MAX_NAME:
            raise UnsafeCheckpoint("its modules have names without end", file=self.file.path)
        for key, value in _members(module) or ():
            self.spend(depth)
            if isinstance(value, Opaque) and _members(value) is not None:
                yield from self.flatten(value, f"{prefix}{key}.", depth + 1)
            else:
                yield f"{prefix}{key}", value


def _members(module: Opaque) -> list[tuple[Any, Any]] | None:
    """The parameters, buffers and submodules of a module that was pickled whole; None if it is no module."""
    state = module.state
    if not isinstance(state, dict):
        return None
    if module.symbol.module.split(".")[0] == "__torch__":  # TorchScript: attributes lie side by side
        return [(key, value) for key, value in state.items() if isinstance(value, View | Opaque)]
    groups = [state.get(group) for group in ("_parameters", "_buffers", "_modules")]
    members = [item for group in groups if isinstance(group, dict) for item in group.items()]
    transient = state.get("_non_persistent_buffers_set") or ()
    if not all(isinstance(group, dict) for group in groups) or not isinstance(transient, list | tuple):
        return None
    return [(key, value) for key, value in members if value is not None and key not in transient]
