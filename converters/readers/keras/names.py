"""Names of Keras's variables: `layer/role`, with the layer's real name and Keras's own word for the variable.

    .h5            attributes `layer_names` and `weight_names` hold both
    .weights.h5    `layers/conv2d_1/vars/0`: the name is an attribute of `vars` (from Keras 3.6 on) or stands in the
                   model's config; `conv2d_1` only counts classes within a model. The role is the ordinal

Models within the model leave no trace in a name, unless two of their layers would be called the same; the parts of
a layer do (`attention/query/kernel`). Where no name is to be had, the path stands for it (`layers/conv2d_1`); where
an ordinal could be two roles (`gamma` or `beta` of three), or its class is not in `ROLES`, it stays `variable_0`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Protocol

from converters.errors import CheckpointError, DamagedCheckpoint
from converters.readers.keras.hdf5.messages import Attribute
from converters.readers.keras.hdf5.structures import Dataset

__all__ = [
    "METRICS",
    "OPTIMIZERS",
    "Groups",
    "Layer",
    "Variable",
    "is_vars",
    "list_layers",
    "name_legacy",
    "name_modern",
    "name_roles",
    "natural",
]

CONTAINERS = ("layers", "_layer_checkpoint_dependencies")  # where a model keeps its layers; the latter before Keras 3
OPTIMIZERS = ("optimizer", "optimizer_weights")
METRICS = "metrics"  # where Keras 2 keeps, beside a model's layers, what its metrics have counted
LONGEST_PATH = 512  # characters
TOP = "top_level_model_weights"  # where an older .h5 keeps what belongs to no layer
ATTENTION = {  # attributes of attention: the names of the layers there
    "query_dense": "query",
    "key_dense": "key",
    "value_dense": "value",
    "output_dense": "attention_output",
}
ROLES = {  # class, as paths spell it: its variables in the order in which Keras saves them
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "depthwise_conv1d", "depthwise_conv2d"), ("kernel", "bias")),
    **dict.fromkeys(("conv1d_transpose", "conv2d_transpose", "conv3d_transpose"), ("kernel", "bias")),
    **dict.fromkeys(("dense", "einsum_dense", *ATTENTION), ("kernel", "bias")),
    **dict.fromkeys(("separable_conv1d", "separable_conv2d"), ("depthwise_kernel", "pointwise_kernel", "bias")),
    **dict.fromkeys(("layer_normalization", "group_normalization"), ("gamma", "beta")),
    "batch_normalization": ("gamma", "beta", "moving_mean", "moving_variance"),
    "normalization": ("mean", "variance", "count"),
    "embedding": ("embeddings",),
    "layer_scale": ("gamma",),
    "p_re_lu": ("alpha",),
    "seed_generator": ("seed_generator_state",),
}
OPTIONAL = {"bias": "use_bias", "gamma": "scale", "beta": "center"}  # role: the setting that leaves it out
KERAS_1 = {"W": "kernel", "b": "bias"}


class Groups(Protocol):
    """An HDF5 file, or several, as far as names need them."""

    @property
    def groups(self) -> Mapping[str, Mapping[str, Attribute]]: ...

    @property
    def datasets(self) -> Mapping[str, Dataset]: ...

    def text(self, group: str, name: str) -> str | None: ...

    def texts(self, group: str, name: str) -> list[str] | None: ...


@dataclass(frozen=True)
class Layer:
    """An entry of a model's config."""

    path: str  # of its group in a .weights.h5
    name: str
    kind: str  # its class, as paths spell it
    settings: Mapping[str, Any]
    is_model: bool


@dataclass(frozen=True)
class Variable:
    """A dataset and the names that it may be given."""

    dataset: str
    owner: str  # tells layers apart whose names agree
    module: str
    full_module: str  # with the models that the layer lies in
    role: str


def list_layers(model: Any, prefix: str = "") -> Iterator[Layer]:
    """The layers of a model's config and of the models in it, in Keras's order."""
    settings = model.get("config") if isinstance(model, dict) else None
    entries = settings.get("layers") if isinstance(settings, dict) else settings  # old Sequential: a bare list
    counts: Counter[str] = Counter()
    for entry in entries if isinstance(entries, list) else ():
        if ".ops" in (entry.get("module") or ""):  # a function in the graph; Keras does not count it as a layer
            continue
        kind = _snake_case(entry["class_name"].rpartition(">")[2])
        path = f"{prefix}layers/{kind}" + (f"_{counts[kind]}" if counts[kind] else "")
        counts[kind] += 1
        if len(path) > LONGEST_PATH:
            raise ValueError(f"a layer whose path has {len(path)} characters")
        settings = entry["config"] if isinstance(entry["config"], dict) else {}
        inner = list(list_layers(entry, f"{path}/"))
        name = settings.get("name") or entry["name"]
        name.encode()  # raises on what is no text
        yield Layer(path, name, kind, settings, bool(inner))
        yield from inner


def name_modern(hdf5: Groups, layers: list[Layer]) -> Iterator[Variable]:
    """The variables of a .weights.h5: every dataset in a group called `vars`."""
    holders: dict[str, list[str]] = {}
    for dataset in sorted(hdf5.datasets, key=natural):
        group = dataset.rpartition("/")[0]
        if is_vars(group) and dataset.split("/")[0] not in (*OPTIMIZERS, METRICS):
            holders.setdefault(group, []).append(dataset)
    settings = {layer.path: layer.settings for layer in layers}
    known = {_layer_path(group): hdf5.text(group, "name") for group in hdf5.groups if is_vars(group)}
    listed = None
    if not any(known.values()):
        known = {layer.path: layer.name for layer in layers}
        listed = {path.rpartition("/")[0] for path in known}

    for group, datasets in holders.items():
        path = _layer_path(group)
        module, full = _spell(path, known, listed) if known else (path, path)
        kind = re.sub(r"_\d+$", "", path.split("/")[-1])
        keys = [dataset.rpartition("/")[2] for dataset in datasets]
        roles = name_roles(kind, len(keys), settings.get(path)) if all(map(str.isdecimal, keys)) else keys
        for dataset, role in zip(datasets, roles, strict=True):
            if role == "kernel" and "int" in hdf5.datasets[dataset].dtype:
                cure = "save the model that it was made of"
                raise CheckpointError("is quantized", tensor=f"{module}/{role}", cure=cure)
            yield Variable(dataset, path, module, full, role)


def is_vars(group: str) -> bool:
    """Whether a .weights.h5 keeps a layer's variables in this group."""
    return group.split("/")[-1] == "vars"


def _layer_path(group: str) -> str:
    """The path of the layer that a `vars` group belongs to, with the separators and words of today's Keras.

    >>> _layer_path("_layer_checkpoint_dependencies\\\\dense/vars")
    'layers/dense'
    """
    parts = group.replace("\\", "/").split("/")[:-1]
    return "/".join("layers" if part in CONTAINERS else part for part in parts)


def _spell(path: str, known: Mapping[str, str | None], listed: set[str] | None) -> tuple[str, str]:
    """A layer's module, without and with the models that it lies in.

    `known` are the names of paths; `listed` the containers that a config lists, where the names are from one.

    >>> known = {"layers/functional": "backbone", "layers/functional/layers/conv2d": "stem"}
    >>> _spell("layers/functional/layers/conv2d", known, None)
    ('stem', 'backbone/stem')
    """
    module: list[str] = []
    full: list[str] = []
    parts = path.split("/") if path else []
    for i, part in enumerate(parts):
        parent, here = "/".join(parts[:i]), "/".join(parts[: i + 1])
        if part in CONTAINERS and (listed is None or here in listed):
            module.clear()  # what came before was a model
        elif here in known or listed is not None:
            if here not in known and parent in (listed or ()):
                raise DamagedCheckpoint("has no layer in the model's config", tensor=here)
            module.append(known.get(here) or ATTENTION.get(part, part))  # a config does not name parts of a layer
            full.append(module[-1])
    return "/".join(module), "/".join(full)


def name_legacy(hdf5: Groups, root: str, layers: list[Layer]) -> Iterator[Variable]:
    """The variables of an older .h5, whose layers are members of the group `root`, as its attributes list them."""
    by_name = {layer.name: layer for layer in layers}
    listed = dict.fromkeys(hdf5.texts(root, "layer_names") or ())
    if _join(root, TOP) in hdf5.groups:
        listed[TOP] = None
    for layer in listed:
        if _join(root, layer) in hdf5.datasets:  # a shard of Transformers lists its variables
            module, _, role = layer.removesuffix(":0").rpartition("/")
            yield Variable(_join(root, layer), module, module, module, role)
            continue
        modules = _weights(hdf5, _join(root, layer), layer)
        is_model = layer in by_name and by_name[layer].is_model
        for module, weights in modules.items():
            if is_model:
                short = _strip_models(module, by_name)
            else:
                short = _legacy_module(layer, module, alone=len(modules) == 1 and layer != TOP)
            full = short if f"{short}/".startswith(f"{layer}/") else _join(layer, module)
            roles = _mend_roles(list(weights.values()), by_name.get(short))
            for dataset, role in zip(weights, roles, strict=True):
                yield Variable(dataset, f"{layer}//{module}", short, full, role)


def _weights(hdf5: Groups, group: str, layer: str) -> dict[str, dict[str, str]]:
    """A layer's datasets and their roles, by the module in their names."""
    if group not in hdf5.groups:
        raise DamagedCheckpoint("is listed in layer_names and is not there", tensor=layer)
    modules: dict[str, dict[str, str]] = {}
    for weight in hdf5.texts(group, "weight_names") or ():
        dataset = f"{group}/{weight}"
        if dataset not in hdf5.datasets:
            raise DamagedCheckpoint("is listed in weight_names and is not there", tensor=dataset)
        module, _, role = weight.removesuffix(":0").rpartition("/")
        if not module:  # Keras 1: conv1_W_1
            role = KERAS_1.get(re.sub(r"_\d+$", "", role).removeprefix(f"{layer}_"), role)
        modules.setdefault(module, {})[dataset] = role
    return modules


def _legacy_module(layer: str, module: str, alone: bool) -> str:
    """A layer's module from the scope in which its variables were made.

    >>> _legacy_module("attention", "model/attention/query", alone=False)  # a part of the layer
    'attention/query'
    >>> _legacy_module("conv1", "conv1_1", alone=True)  # renamed, or made a second time in one session
    'conv1'
    >>> _legacy_module("backbone", "conv1", alone=False)  # a model within the model
    'conv1'
    """
    at = f"/{module}/".find(f"/{layer}/")
    if at >= 0:
        return module[at:]
    return layer if alone else module


def _strip_models(module: str, layers: Mapping[str, Layer]) -> str:
    parts = module.split("/")
    while len(parts) > 1 and parts[0] in layers and layers[parts[0]].is_model:
        parts = parts[1:]
    return "/".join(parts)


def _mend_roles(roles: list[str], layer: Layer | None) -> list[str]:
    """Roles in Keras 3's words, and without the numbers of a session in variables that nobody named.

    >>> _mend_roles(["depthwise_kernel", "bias"], None), _mend_roles(["variable_17"], None)
    (['kernel', 'bias'], ['variable_0'])
    """
    if "pointwise_kernel" not in roles:
        roles = ["kernel" if role == "depthwise_kernel" else role for role in roles]
    if all(re.fullmatch(r"variable(_\d+)?", role) for role in roles):
        return name_roles(layer.kind if layer else "", len(roles), layer.settings if layer else None)
    return roles


def name_roles(kind: str, count: int, settings: Mapping[str, Any] | None = None) -> list[str]:
    """The roles of a layer's `count` variables, in order; `variable_i` for one that could be two.

    >>> name_roles("batch_normalization", 4)
    ['gamma', 'beta', 'moving_mean', 'moving_variance']
    >>> name_roles("batch_normalization", 3)
    ['variable_0', 'moving_mean', 'moving_variance']
    >>> name_roles("batch_normalization", 3, {"scale": False})
    ['beta', 'moving_mean', 'moving_variance']
    """
    settings = settings or {}
    roles = [role for role in ROLES.get(kind, ()) if settings.get(OPTIONAL.get(role, ""), True)]
    optional = [role for role in roles if role in OPTIONAL]
    spare = len(roles) - count
    readings = [
        [role for role in roles if role not in absent]
        for absent in (combinations(optional, spare) if spare >= 0 else ())
    ]
    candidates = [set(column) for column in zip(*readings, strict=True)] or [set()] * count
    return [roles.pop() if len(roles) == 1 else f"variable_{i}" for i, roles in enumerate(candidates)]


def _snake_case(name: str) -> str:
    """A class's name as Keras spells it in paths.

    >>> _snake_case("SeparableConv2D"), _snake_case("PReLU")
    ('separable_conv2d', 'p_re_lu')
    """
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", name))
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()


def _join(*parts: str) -> str:
    return "/".join(filter(None, parts))


def natural(path: str) -> list[tuple[int, str]]:
    """A sort key that puts conv2d_2 before conv2d_10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path)]
