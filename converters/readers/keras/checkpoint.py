"""Keras checkpoints: `.weights.h5`, in shards too, `.keras` archives, and the older `.h5` of weights or a model.

Tensors are called `layer/role`, whatever the form (see `names`). The model's config is read as text: nothing
in it is built.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters.errors import DamagedCheckpoint, UnknownFormat, UnsafeCheckpoint, printable
from converters.readers import Contents
from converters.readers.files import SourceFile
from converters.readers.keras.archive import CONFIG, METADATA, is_archive, open_archive
from converters.readers.keras.hdf5 import SIGNATURE, Hdf5, faults, open_hdf5
from converters.readers.keras.names import (
    METRICS,
    OPTIMIZERS,
    Variable,
    is_vars,
    list_layers,
    name_legacy,
    name_modern,
    natural,
)
from converters.readers.keras.shards import Shards, is_index, open_shards

__all__ = ["FORMAT", "accepts", "read"]

FORMAT = "Keras"
MOST_TEXT = 8 << 20  # bytes of a config


def accepts(path: Path, head: bytes) -> bool:
    return head.startswith(SIGNATURE) or (head.startswith(b"PK\x03\x04") and is_archive(path)) or is_index(path, head)


def read(path: Path) -> Contents:
    source = SourceFile(path)
    metadata: dict[str, Any] = {}
    files: tuple[SourceFile, ...] = (source,)
    hdf5: Hdf5 | Shards
    head = bytes(source.read(0, min(len(SIGNATURE), source.size)))
    if head.startswith(b"PK"):
        archive = open_archive(source)
        hdf5 = open_hdf5(archive.weights, path)
        metadata["config"] = _parse(archive.config, CONFIG, path)
        metadata["keras_version"] = _parse(archive.metadata, METADATA, path).get("keras_version")
    elif head == SIGNATURE:
        hdf5 = open_hdf5(source, path)
    else:
        hdf5 = open_shards(source)
        files = hdf5.sources
    own = "Fletcher-32 of every chunk" if hdf5.is_checksummed else "none in format"
    integrity = "CRC-32 of the archive" if head.startswith(b"PK") else own

    root = "model_weights" if "model_weights" in hdf5.groups else ""
    for key in ("keras_version", "backend"):
        metadata[key] = metadata.get(key) or hdf5.text("", key) or hdf5.text(root, key)
    if config := hdf5.text("", "model_config"):
        metadata["config"] = _parse(config, "model_config", path)
    metadata = {key: value for key, value in metadata.items() if value is not None}

    with faults(path, "config"):
        layers = list(list_layers(metadata.get("config")))
    with faults(path):
        if hdf5.texts(root, "layer_names") is not None:
            variables = list(name_legacy(hdf5, root, layers))
        elif any(map(is_vars, hdf5.groups)):
            variables = list(name_modern(hdf5, layers))
        else:
            raise UnknownFormat("is HDF5, but holds no Keras weights")

    version = metadata.get("keras_version")
    writer = f"Keras {printable(version, 40)}" if isinstance(version, str) else None
    return Contents({**_build_tree(hdf5, variables, metadata), **metadata}, files, integrity, writer)


def _parse(text: str | bytes, member: str, file: Path) -> dict[str, Any]:
    if len(text) > MOST_TEXT:
        raise UnsafeCheckpoint(f"is more than {MOST_TEXT >> 20} MB of text", file=file, tensor=member)
    with faults(file, member):
        parsed = json.loads(text)
    if not isinstance(parsed, dict):
        raise DamagedCheckpoint("is no JSON object", file=file, tensor=member)
    return parsed


def _build_tree(hdf5: Hdf5 | Shards, variables: list[Variable], reserved: Mapping[str, Any]) -> dict[str, Any]:
    """Every dataset as a tensor: the variables, the optimizer's state and metrics apart, and the rest by path."""
    owners = Counter(module for module, _ in {(variable.module, variable.owner) for variable in variables})
    named = [
        (v.dataset, "/".join(filter(None, (v.module if owners[v.module] == 1 else v.full_module, v.role))))
        for v in variables
    ]
    rest = sorted(hdf5.datasets.keys() - {dataset for dataset, _ in named}, key=natural)
    tree: dict[str, Any] = {}
    optimizer: dict[str, Any] = {}
    metrics: dict[str, Any] = {}
    for dataset, name in [*named, *((dataset, dataset) for dataset in rest)]:
        first, _, below = dataset.partition("/")
        into = optimizer if first in OPTIMIZERS else metrics if first == METRICS and "/vars/" in below else tree
        into, name = (into, below) if into is not tree and below else (tree, name)
        if name in into or (into is tree and name in {*reserved, "optimizer", METRICS}):
            raise DamagedCheckpoint("stands twice", file=hdf5.file, tensor=name)
        into[name] = hdf5.tensor(dataset, name)
    apart = {"optimizer": optimizer, METRICS: metrics}
    return {**tree, **{name: held for name, held in apart.items() if held}}
