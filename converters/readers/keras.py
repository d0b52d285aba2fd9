"""Keras checkpoints: `.weights.h5`, `.keras`, and the older `.h5` of weights or of a whole model.

A tensor is called `layer/role`: the layer's real name, and Keras's own word for the variable (`kernel`, `gamma`,
`moving_mean`). The forms differ in where these stand:

    .h5            attributes `layer_names` and `weight_names` hold both
    .weights.h5    `layers/conv2d_1/vars/0`: the name is an attribute of `vars` (from Keras 3.6 on), the role is the
                   ordinal; `conv2d_1` counts classes within a model and is not the layer's name
    .keras         a zip archive of a `.weights.h5` and of the model's config.json, which has the names too

Models within the model leave no trace in a name, unless two of their layers would be called the same; the parts of
a layer do (`attention/query/kernel`). Where no name is to be had, the path stands for it (`layers/conv2d_1`); where
an ordinal could be two roles (`gamma` or `beta` of three), or its class is not in `ROLES`, it stays `variable_0`.
The config is read as text: nothing in it is built.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.errors import CheckpointError, DamagedCheckpoint, UnknownFormat, UnsafeCheckpoint
from converters.readers import Contents
from converters.readers.files import SourceFile
from converters.readers.hdf5 import SIGNATURE, Hdf5, faults, open_hdf5
from converters.readers.keras_archive import CONFIG, METADATA, is_archive, open_archive

__all__ = ["FORMAT", "accepts", "name_roles", "read"]

FORMAT = "Keras"
MOST_TEXT = 8 << 20  # bytes of a config
CONTAINERS = ("layers", "_layer_checkpoint_dependencies")  # where a model keeps its layers; the latter before Keras 3
OPTIMIZERS = ("optimizer", "optimizer_weights")

ROLES = {  # class, as paths spell it: its variables in the order in which Keras saves them
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "depthwise_conv1d", "depthwise_conv2d"), ("kernel", "bias")),
    **dict.fromkeys(("conv1d_transpose", "conv2d_transpose", "conv3d_transpose"), ("kernel", "bias")),
    **dict.fromkeys(("dense", "einsum_dense"), ("kernel", "bias")),
    **dict.fromkeys(("query_dense", "key_dense", "value_dense", "output_dense"), ("kernel", "bias")),  # of attention
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


def accepts(path: Path, head: bytes) -> bool:
    return head.startswith(SIGNATURE) or (head.startswith(b"PK\x03\x04") and is_archive(path))


def read(path: Path) -> Contents:
    source = SourceFile(path)
    metadata: dict[str, Any] = {}
    if bytes(source.read(0, min(len(SIGNATURE), source.size))) == SIGNATURE:
        hdf5 = open_hdf5(source, path)
        integrity = "Fletcher-32 of every chunk" if hdf5.is_checksummed else "none in format"
    else:
        archive = open_archive(source)
        hdf5, integrity = open_hdf5(archive.weights, path), "CRC-32 of the archive"
        metadata["config"] = _parse(archive.config, CONFIG, path)
        metadata["keras_version"] = _parse(archive.metadata, METADATA, path).get("keras_version")

    root = "model_weights" if "model_weights" in hdf5.groups else ""
    for key in ("keras_version", "backend"):
        metadata.setdefault(key, hdf5.text("", key) or hdf5.text(root, key))
    if config := hdf5.text("", "model_config"):
        metadata["config"] = _parse(config, "model_config", path)
    with faults(path, "config"):
        layers = list(_list_layers(metadata.get("config")))

    if hdf5.texts(root, "layer_names") is not None:
        variables = list(_name_legacy(hdf5, root, layers))
    elif any(group.endswith("vars") for group in hdf5.groups):
        variables = list(_name_modern(hdf5, layers))
    else:
        raise UnknownFormat("is HDF5, but holds no Keras weights", file=path)

    tree = {key: value for key, value in metadata.items() if value is not None}
    version = tree.get("keras_version")
    return Contents(
        {**_build_tree(hdf5, variables, tree), **tree}, (source,), integrity, f"Keras {version}" if version else None
    )


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
    readings = (
        [
            [role for role in roles if role not in absent]
            for absent in itertools.combinations(optional, len(roles) - count)
        ]
        if 0 <= len(roles) - count <= len(optional)
        else []
    )
    return [
        readings[0][i] if readings and len({reading[i] for reading in readings}) == 1 else f"variable_{i}"
        for i in range(count)
    ]


def _parse(text: str | bytes, member: str, file: Path) -> dict[str, Any]:
    if len(text) > MOST_TEXT:
        raise UnsafeCheckpoint(f"is more than {MOST_TEXT >> 20} MB of text", file=file, tensor=member)
    with faults(file, member):
        parsed = json.loads(text)
    if not isinstance(parsed, dict):
        raise DamagedCheckpoint("is no JSON object", file=file, tensor=member)
    return parsed


def _list_layers(model: Any, prefix: str = "") -> Iterator[Layer]:
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
        settings = entry["config"] if isinstance(entry["config"], dict) else {}
        inner = list(_list_layers(entry, f"{path}/"))
        yield Layer(path, settings.get("name") or entry["name"], kind, settings, bool(inner))
        yield from inner


def _snake_case(name: str) -> str:
    """A class's name as Keras spells it in paths.

    >>> _snake_case("SeparableConv2D"), _snake_case("PReLU")
    ('separable_conv2d', 'p_re_lu')
    """
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", name))
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()


def _name_modern(hdf5: Hdf5, layers: list[Layer]) -> Iterator[Variable]:
    """The variables of a .weights.h5: every dataset in a group called `vars`."""
    holders: dict[str, list[str]] = {}
    for dataset in hdf5.datasets:
        group, _, _ = dataset.rpartition("/")
        if group.split("/")[-1] == "vars" and dataset.split("/")[0] not in OPTIMIZERS:
            holders.setdefault(group, []).append(dataset)
    settings = {layer.path: layer.settings for layer in layers}
    known = {_layer_path(group): hdf5.text(group, "name") for group in hdf5.groups if group.split("/")[-1] == "vars"}
    from_config = not any(known.values())
    if from_config:
        known = {layer.path: layer.name for layer in layers}

    for group in sorted(holders, key=_natural):
        path = _layer_path(group)
        module, full = _spell(path, known, from_config, hdf5.file)
        datasets = sorted(holders[group], key=_natural)
        kind = re.sub(r"_\d+$", "", path.split("/")[-1])
        keys = [dataset.rpartition("/")[2] for dataset in datasets]
        roles = name_roles(kind, len(keys), settings.get(path)) if all(map(str.isdecimal, keys)) else keys
        for dataset, role in zip(datasets, roles, strict=True):
            if role == "kernel" and "int" in hdf5.datasets[dataset].dtype:
                raise CheckpointError(
                    "is quantized", file=hdf5.file, tensor=f"{module}/kernel", cure="save the model that it was made of"
                )
            yield Variable(dataset, path, module, full, role)


def _layer_path(group: str) -> str:
    """The path of the layer that a `vars` group belongs to, as Keras spells it now, on any system."""
    path = group.replace("\\", "/").removesuffix("vars").rstrip("/")
    return "/".join("layers" if part in CONTAINERS else part for part in path.split("/")) if path else ""


def _spell(path: str, known: Mapping[str, str | None], from_config: bool, file: Path) -> tuple[str, str]:
    """A layer's module, without and with the models that it lies in."""
    if not known:
        return path, path
    module: list[str] = []
    full: list[str] = []
    parts = path.split("/") if path else []
    for i, part in enumerate(parts):
        here = "/".join(parts[: i + 1])
        if part in CONTAINERS:
            module.clear()  # what came before was a model
        elif here not in known and from_config and i and parts[i - 1] in CONTAINERS:
            raise DamagedCheckpoint("has no layer in the model's config", file=file, tensor=here)
        elif here in known or from_config:  # the config does not name the parts of a layer; their group does
            module.append(known.get(here) or part)
            full.append(module[-1])
    return "/".join(module), "/".join(full)


def _name_legacy(hdf5: Hdf5, root: str, layers: list[Layer]) -> Iterator[Variable]:
    """The variables of an older .h5, layer by layer as its attributes list them."""
    by_name = {layer.name: layer for layer in layers}
    top = "top_level_model_weights"
    listed = dict.fromkeys(hdf5.texts(root, "layer_names") or ())
    for layer in [*listed, *([top] if f"{root}/{top}".lstrip("/") in hdf5.groups and top not in listed else [])]:
        group = f"{root}/{layer}".lstrip("/")
        if group not in hdf5.groups:
            raise DamagedCheckpoint("is listed in layer_names and is not there", file=hdf5.file, tensor=layer)
        modules: dict[str, list[tuple[str, str]]] = {}
        for weight in dict.fromkeys(hdf5.texts(group, "weight_names") or ()):
            dataset = f"{group}/{weight}"
            if dataset not in hdf5.datasets:
                raise DamagedCheckpoint("is listed in weight_names and is not there", file=hdf5.file, tensor=dataset)
            module, _, role = weight.removesuffix(":0").rpartition("/")
            if not module:
                role = KERAS_1.get(re.sub(r"_\d+$", "", role).removeprefix(f"{layer}_"), role)
            modules.setdefault(module, []).append((dataset, role))
        for module, weights in modules.items():
            short = full = _legacy_module(layer, module, alone=len(modules) == 1 and layer != top)
            if layer in by_name and by_name[layer].is_model:
                short, full = _strip_models(module, by_name), f"{layer}/{module}"
            elif short == module != layer:
                full = f"{layer}/{module}"
            roles = _mend_roles([role for _, role in weights], by_name.get(short))
            for (dataset, _), role in zip(weights, roles, strict=True):
                yield Variable(dataset, f"{layer}//{module}", short, full, role)


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


def _build_tree(hdf5: Hdf5, variables: list[Variable], reserved: Mapping[str, Any]) -> dict[str, Any]:
    """Every dataset as a tensor: the variables, the optimizer's state apart, and the rest by path."""
    owners = Counter(module for module, _ in {(variable.module, variable.owner) for variable in variables})
    named = [
        (v.dataset, "/".join(filter(None, (v.module if owners[v.module] == 1 else v.full_module, v.role))))
        for v in variables
    ]
    rest = sorted(hdf5.datasets.keys() - {dataset for dataset, _ in named}, key=_natural)
    tree: dict[str, Any] = {}
    optimizer: dict[str, Any] = {}
    for dataset, name in [*named, *((dataset, dataset) for dataset in rest)]:
        first, _, below = dataset.partition("/")
        into, name = (optimizer, below) if first in OPTIMIZERS and below else (tree, name)
        if name in into or (into is tree and name in {*reserved, "optimizer"}):
            raise DamagedCheckpoint("stands twice", file=hdf5.file, tensor=name)
        into[name] = hdf5.tensor(dataset, name)
    return {**tree, "optimizer": optimizer} if optimizer else tree


def _natural(path: str) -> list[tuple[int, str]]:
    """A sort key that puts conv2d_2 before conv2d_10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path)]
