"""Sharded Keras weights: `x.weights.json` says which of `x_00000.weights.h5`, ... hold each layer's variables.

`weight_map` leads from a group of variables (`/layers/conv2d/vars`) to the name of a file, or of several where a
layer lies across two; `metadata.total_size` is how many bytes all variables take.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from converters.errors import DamagedCheckpoint, UnsafeCheckpoint, printable
from converters.readers.files import SourceFile
from converters.readers.folders import find_beside
from converters.readers.keras.hdf5 import Hdf5, open_hdf5
from converters.readers.keras.hdf5.messages import Attribute
from converters.readers.keras.hdf5.structures import Dataset
from converters.readers.keras.names import is_vars
from converters.readers.strict_json import parse_json
from converters.tensors import LazyTensor

__all__ = ["Shards", "is_index", "open_shards"]

MAX_INDEX, MAX_SHARDS = 64 << 20, 4096
CURE = "are its shards of one version?"


@dataclass(frozen=True)
class Shards:
    """Several HDF5 files with the face of one."""

    file: Path  # the index
    sources: tuple[SourceFile, ...]
    parts: tuple[Hdf5, ...]

    @cached_property
    def groups(self) -> dict[str, dict[str, Attribute]]:
        return {path: group for part in self.parts for path, group in part.groups.items()}

    @cached_property
    def datasets(self) -> dict[str, Dataset]:
        return {path: dataset for part in self.parts for path, dataset in part.datasets.items()}

    def text(self, group: str, name: str) -> str | None:
        texts = (part.text(group, name) for part in self.parts if group in part.groups)
        return next((text for text in texts if text is not None), None)

    def texts(self, group: str, name: str) -> list[str] | None:
        texts = (part.texts(group, name) for part in self.parts if group in part.groups)
        return next((text for text in texts if text is not None), None)

    def tensor(self, path: str, name: str) -> LazyTensor:
        return next(part for part in self.parts if path in part.datasets).tensor(path, name)

    @property
    def is_checksummed(self) -> bool:
        return all(part.is_checksummed for part in self.parts)


def is_index(path: Path, head: bytes) -> bool:
    """Whether this is the JSON that names the shards."""
    return head.lstrip()[:1] == b"{" and (path.name.endswith(".weights.json") or b'.weights.h5"' in head)


def open_shards(source: SourceFile) -> Shards:
    """All shards that an index names: every variable is in the one that it says. Raises CheckpointError."""
    path = source.path
    if source.size > MAX_INDEX:
        raise UnsafeCheckpoint(f"takes more than {MAX_INDEX >> 20} MB", file=path)
    index = parse_json(bytes(source.read(0, source.size)), path, "it")
    places, metadata = index.get("weight_map"), index.get("metadata") or {}
    if not isinstance(places, dict) or not places or not isinstance(metadata, dict):
        raise DamagedCheckpoint("has no weight_map", file=path, cure="fetch it again")
    holders = {group.strip("/"): [place] if isinstance(place, str) else place for group, place in places.items()}
    if not all(isinstance(names, list) and all(isinstance(one, str) for one in names) for names in holders.values()):
        raise DamagedCheckpoint("its weight_map holds what is no file's name", file=path, cure="fetch it again")
    names = sorted({name for names in holders.values() for name in names})
    if len(names) > MAX_SHARDS:
        raise UnsafeCheckpoint(f"names more than {MAX_SHARDS} shards", file=path)
    sources = tuple(SourceFile(find_beside(path, name)) for name in names)
    parts = tuple(open_hdf5(one, one.path) for one in sources)
    _check_map(holders, dict(zip(names, parts, strict=True)), path)
    _check_size(metadata.get("total_size"), parts, path)
    return Shards(path, (source, *sources), parts)


def _check_map(holders: dict[str, list[str]], parts: dict[str, Hdf5], path: Path) -> None:
    seen: dict[str, str] = {}
    found: dict[str, set[str]] = {}
    for name, part in parts.items():
        for dataset in part.datasets:
            group = dataset.rpartition("/")[0]
            if dataset in seen:
                problem = f"is in two shards: {printable(seen[dataset], 80)}, {printable(name, 80)}"
                raise DamagedCheckpoint(problem, file=path, tensor=dataset)
            if is_vars(group) and name not in holders.get(group, ()):
                problem = f"is in {printable(name, 80)}, where the weight_map has it not"
                raise DamagedCheckpoint(problem, file=path, tensor=dataset, cure=CURE)
            seen[dataset] = name
            found.setdefault(group, set()).add(name)
    for group, names in holders.items():
        if missing := sorted(set(names) - found.get(group, set())):
            raise DamagedCheckpoint(f"is not in {printable(missing[0], 80)}", file=path, tensor=group, cure=CURE)


def _check_size(total: Any, parts: tuple[Hdf5, ...], path: Path) -> None:
    """Keras counts a boolean as one bit, so that only sizes without any can be compared."""
    datasets = [dataset for part in parts for dataset in part.datasets.values()]
    nbytes = sum(dataset.nbytes for dataset in datasets)
    if total not in (None, nbytes) and not any(dataset.dtype == "bool" for dataset in datasets):
        problem = f"its total_size is {printable(str(total), 40)}, but its variables take {nbytes} bytes"
        raise DamagedCheckpoint(problem, file=path, cure=CURE)
