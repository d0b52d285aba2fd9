"""Torch trees: what a pickle holds, as dicts whose leaves are lazy tensors and plain values.

Modules that were pickled whole, and TorchScript's, become their state dicts. Sharing and cycles, which a
pickle may have, cost no more than their size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from converters.errors import CheckpointError, DamagedCheckpoint, UnsafeCheckpoint, printable
from converters.readers.pickles import Opaque, Symbol
from converters.readers.records import Record
from converters.readers.torch.quantized import Quantized
from converters.readers.torch.storages import Storage, View
from converters.readers.torch.symbols import why_no_tensor
from converters.tensors import LazyTensor

__all__ = ["build_tree", "open_tensor", "written_by"]

MAX_DEPTH = 200
MAX_MEMBERS = 1_000_000  # parameters, buffers and submodules of one file, counted as often as they are shared
MAX_NAME = 10_000  # characters
SCRIPT_LISTS = "torch.jit._pickle"
SCRIPT_PACKED = Symbol("__torch__.torch.classes.quantized", "LinearPackedParamsBase")
GROUPS = ("_parameters", "_buffers", "_modules")
WRITERS = {  # key in a checkpoint, or in its `meta`: who wrote it
    "pytorch-lightning_version": "PyTorch Lightning",
    "mmengine_version": "MMEngine",
    "mmcv_version": "MMCV",
}
Members = list[tuple[Any, Any]]
OpenLeaf = Callable[[Any, str], Any]


def build_tree(value: Any, file: Path, open_leaf: OpenLeaf) -> dict[str, Any]:
    """The tree of a pickle's value; no tensor's data is read.

    `open_leaf` is given every value and its name, and makes the lazy tensor of one that is a tensor; None says
    that it is none. What has no meaning stays Opaque. Raises CheckpointError.
    """
    tree = _Builder(file, open_leaf).convert(value, "", 0)
    if not isinstance(tree, dict):
        what = "a bare tensor" if isinstance(tree, LazyTensor) else f"a {getattr(tree, 'symbol', type(tree).__name__)}"
        raise CheckpointError(f"holds {what}, not a state dict", file=file, cure="save model.state_dict()")
    return tree


def open_tensor(find: Callable[[Storage, str], Record]) -> OpenLeaf:
    """What opens torch's own tensors; `find` gives a storage's record, and is told the name of who asks."""

    def open_leaf(value: Any, name: str) -> Any:
        if isinstance(value, View):
            return value.open(name, find(value.storage, name))
        return value.open(name, find) if isinstance(value, Quantized) else None

    return open_leaf


def written_by(tree: dict[str, Any]) -> str | None:
    """The training framework that left its version beside the weights.

    >>> written_by({"state_dict": {}, "pytorch-lightning_version": "2.5.1"})
    'PyTorch Lightning 2.5.1'
    """
    meta = tree.get("meta")
    beside = {**meta, **tree} if isinstance(meta, dict) else tree
    found = [(name, beside[key]) for key, name in WRITERS.items() if isinstance(beside.get(key), str)]
    return f"{found[0][0]} {printable(found[0][1], 40)}" if found else None


@dataclass
class _Builder:
    file: Path
    open_leaf: OpenLeaf
    done: dict[int, Any] = field(default_factory=dict)  # what became of each container, by id
    members: dict[int, Members | None] = field(default_factory=dict)  # of each module, by id
    visited: int = 0  # members

    def convert(self, value: Any, name: str, depth: int) -> Any:
        """`value` as a node of the tree; `name` is its key."""
        if depth > MAX_DEPTH:
            raise UnsafeCheckpoint("its pickle is nested too deeply", file=self.file)
        if (leaf := self.open_leaf(value, name)) is not None:
            return leaf
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
            if value.symbol == SCRIPT_PACKED and isinstance(value.state, tuple):
                return self.container(value.state, depth)
            if (members := self.members_of(value)) is not None:
                return self.mapping(self.flatten(members, "", depth), depth)
            value.why = value.why or why_no_tensor(value.symbol)
            return value
        items = [self.convert(item, str(index), depth + 1) for index, item in enumerate(value)]
        is_plain = not any(isinstance(item, dict | LazyTensor) or getattr(item, "why", None) for item in items)
        return items if is_plain else {str(index): item for index, item in enumerate(items)}

    def mapping(self, items: Iterable[tuple[Any, Any]], depth: int) -> dict[str, Any]:
        node: dict[str, Any] = {}
        for key, value in items:
            name = str(key.symbol if isinstance(key, Opaque) else key)
            converted = self.convert(value, name, depth + 1)
            if name in node and LazyTensor in (type(converted), type(node[name])):
                raise DamagedCheckpoint("two tensors have this name", file=self.file, tensor=name)
            node[name] = converted
        return node

    def members_of(self, value: Any) -> Members | None:
        """The parameters, buffers and submodules of a module that was pickled whole; None if it is no module."""
        if id(value) not in self.members:
            self.members[id(value)] = _members(value) if isinstance(value, Opaque) else None
        return self.members[id(value)]

    def flatten(self, members: Members, prefix: str, depth: int) -> Iterator[tuple[str, Any]]:
        """The state dict of a module that was pickled whole, not converted yet; a shared submodule comes twice."""
        self.visited += 1 + len(members)
        if depth > MAX_DEPTH or self.visited > MAX_MEMBERS or len(prefix) > MAX_NAME:
            raise UnsafeCheckpoint("its modules are nested too deeply", file=self.file)
        for key, value in members:
            if (below := self.members_of(value)) is None:
                yield f"{prefix}{key}", value
            else:
                yield from self.flatten(below, f"{prefix}{key}.", depth + 1)


def _members(module: Opaque) -> Members | None:
    state = module.state
    if not isinstance(state, dict):
        return None
    if module.symbol.module.split(".")[0] == "__torch__":  # TorchScript: tensors and modules among lists and numbers
        members = [(key, value) for key, value in state.items() if isinstance(value, View | Quantized | Opaque)]
        return [item for item in members if not (isinstance(item[1], Opaque) and item[1].symbol.module == SCRIPT_LISTS)]
    groups = [group for name in GROUPS if isinstance(group := state.get(name), dict)]
    if len(groups) < len(GROUPS):
        return None
    names = state.get("_non_persistent_buffers_set")
    transient = {name for name in names if isinstance(name, str)} if isinstance(names, list) else set()
    members = [item for group in groups for item in group.items()]
    return [(key, value) for key, value in members if value is not None and key not in transient]
