"""Reference runner for Flax modules (linen), from any importable code.

`model` is {"module": NAME, "factory": NAME, "args": {...}, "call": {...}, "input": [height, width, channels],
"rename": {...}}. FACTORY(**args) gives the module, which is called with an NHWC array and the keywords of `call`; a
table within a table of `args` is read as `args.patches.size` too, as a ConfigDict is. `rename` says how the files
call a segment of the module's own names ("LayerNorm_1": "LayerNorm_2"). A checkpoint is an npz or msgpack whose
parameters are the module's, all of them below one prefix or none.
Outputs: "0", "1", ... are what the module gives, in order, with the keys within it behind a slash ("1/pre_logits");
any other name is that of a module inside, in the files' own words, with dots ("Transformer").

Whatever the module says of its own precision, it computes in the one that is asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from named_arrays import NamedArrays, unprefixed

__all__ = ["FlaxModel", "Modules", "Table", "build", "construct"]

DECLARED = {"epsilon": "eps", "kernel_size": "kernel_size", "strides": "stride", "num_heads": "num_heads"}
SIZE = (64, 64, 3)


def build(job: Mapping[str, Any], precision: str) -> tuple[Any, dict[str, Any]]:
    """The module with the file's parameters."""
    model = construct(job)
    found = unprefixed(_load(job["source"]["file"]), model.shapes)
    tree = model.tree({name: array.astype(precision) for name, array in found.items()})

    def run(x: np.ndarray) -> dict[str, np.ndarray]:
        inside: dict[str, Any] = {}

        def note(kind: str, name: str, value: Any) -> None:
            if kind == "output" and name in job["outputs"]:
                inside.setdefault(name, _flat(value)["0"])

        given = _flat(model.apply(tree, x.transpose(0, 2, 3, 1), note))
        return {name: np.asarray(value) for name, value in {**inside, **given}.items() if name in job["outputs"]}

    run.modules = Modules(model, tree)  # type: ignore[attr-defined]
    return run, {}


def construct(job: Mapping[str, Any]) -> FlaxModel:
    """The module, with shapes in place of parameters."""
    return FlaxModel(job["model"])


class FlaxModel(NamedArrays):
    """A module and the arrays that its files hold."""

    def __init__(self, model: Mapping[str, Any]) -> None:
        import jax

        jax.config.update("jax_enable_x64", True)
        found: Any = importlib.import_module(model["module"])
        for part in model["factory"].split("."):
            found = getattr(found, part)
        self.module = found(**{key: _table(value) for key, value in model.get("args", {}).items()})
        self.call, self.rename = model.get("call", {}), model.get("rename", {})
        image = jax.ShapeDtypeStruct((1, *model.get("input", SIZE)), "float32")
        tree = jax.eval_shape(lambda key, x: self.module.init(key, x, **self.call), jax.random.PRNGKey(0), image)
        leaves = jax.tree_util.tree_flatten_with_path(tree["params"])[0]
        self.places = {self._name(path): [key.key for key in path] for path, _ in leaves}
        self.shapes = {self._name(path): tuple(leaf.shape) for path, leaf in leaves}

    def tree(self, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """The module's variables, of arrays by the names of its files."""
        params: dict[str, Any] = {}
        for name, path in self.places.items():
            node = params
            for key in path[:-1]:
                node = node.setdefault(key, {})
            node[path[-1]] = arrays[name]
        return {"params": params}

    def apply(self, tree: Any, x: np.ndarray, watch: Callable[[str, str, Any], None] | None = None) -> Any:
        """What the module gives, in the precision of `x`; each call within goes to `watch`."""
        import flax.linen as nn

        def intercept(function: Any, args: Any, kwargs: Any, context: Any) -> Any:
            module = context.module
            for field, value in list(vars(module).items()):
                if value is not None and getattr(value, "__name__", value) == "float32":
                    object.__setattr__(module, field, x.dtype.name)
            given = function(*args, **kwargs)
            if watch and context.method_name == "__call__":
                name = ".".join(self.rename.get(part, part) for part in module.path)
                watch("input", name, args[0] if args else None)
                watch("output", name, given)
            return given

        with nn.intercept_methods(intercept):
            return self.module.apply(tree, x, **self.call)

    def save(self, arrays: Mapping[str, np.ndarray], path: str) -> None:
        with open(path, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    def _name(self, path: Any) -> str:
        return "/".join(self.rename.get(key.key, key.key) for key in path)


class Modules:
    """A module's submodules; see torch_modules.py. An activation of four axes is given as NCHW."""

    def __init__(self, model: FlaxModel, tree: Any) -> None:
        self.model, self.tree = model, tree
        self.declared: dict[str, dict[str, Any]] = {}

    def watch(
        self, x: np.ndarray, inputs: Iterable[str], outputs: Iterable[str], keep: Callable[[str, str, Any], None]
    ) -> None:
        """Run the model once; of a module that is called again it is the first call's."""
        wanted = {"input": set(inputs), "output": set(outputs)}

        def once(kind: str, name: str, value: Any) -> None:
            if name in wanted[kind] and hasattr(value, "ndim"):
                wanted[kind].remove(name)
                array = np.asarray(value)
                keep(kind, name, array.transpose(0, 3, 1, 2) if array.ndim == 4 else array)

        self.model.apply(self.tree, x.transpose(0, 2, 3, 1), once)

    def describe(self, names: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Nothing: what a linen module declares is known while it runs only."""
        return {}


def _load(path: str) -> dict[str, np.ndarray]:
    with open(path, "rb") as file:
        is_zip = file.read(2) == b"PK"
    if is_zip:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    from flax.serialization import msgpack_restore

    with open(path, "rb") as file:
        tree = msgpack_restore(file.read())
    return {name: np.asarray(value) for name, value in _flat(tree).items() if value is not None}


def _flat(tree: Any, name: str = "") -> dict[str, Any]:
    """Leaves of lists, tuples and tables by their keys, with slashes between them; what is no tree is "0"."""
    if isinstance(tree, Mapping) or (isinstance(tree, (list, tuple)) and not hasattr(tree, "_fields")):
        items = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
        return {
            key: leaf for at, node in items for key, leaf in _flat(node, f"{name}/{at}" if name else f"{at}").items()
        }
    return {name or "0": tree}


def _table(value: Any) -> Any:
    if isinstance(value, dict):
        return Table({key: _table(inner) for key, inner in value.items()})
    return tuple(map(_table, value)) if isinstance(value, list) else value


class Table:
    """A table whose entries are attributes too; no dict, which linen would freeze into one without attributes."""

    def __init__(self, entries: Mapping[str, Any]) -> None:
        self.__dict__.update(entries)

    def keys(self) -> Iterable[str]:
        return vars(self).keys()

    def __getitem__(self, key: str) -> Any:
        return vars(self)[key]

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Table) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(repr(sorted(vars(self).items(), key=str)))
