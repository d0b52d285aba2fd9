"""Orbax checkpoints: a folder of zarr arrays, in files of their own or together in an OCDBT database.

`_METADATA` lists the arrays (`tree_metadata`: the keys that lead to each) and says how they are stored; an array's
path is its keys joined by points. Where it is missing, as in old checkpoints, the paths are what there is to tell the
keys by. A manager's folder holds such folders by step and item (`1000/default`). The
arrays are read by tensorstore, which is told of this folder alone, and only when they are asked for.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

from converters.errors import CheckpointError, DamagedCheckpoint, UnsafeCheckpoint, printable
from converters.readers import Contents
from converters.readers.files import Seen, SourceFile
from converters.readers.jax.trees import arrange
from converters.readers.protobuf import Malformed
from converters.readers.strict_json import parse_json
from converters.readers.tensor_protos import check_shape
from converters.tensors import DTYPES, LazyTensor, TensorSpec

__all__ = ["FORMAT", "accepts", "read"]

FORMAT = "Orbax checkpoint"
METADATA, DATABASE, MARK = "_METADATA", "manifest.ocdbt", "_CHECKPOINT_METADATA"
HEADS = {".zarray": "zarr", "zarr.json": "zarr3"}  # the file that says what an array is: tensorstore's driver
PROCESS = "ocdbt.process_"  # begins the names of folders that hold one process's part of a database
UNLISTED = "without _METADATA, arrays are called by their paths: a point in a name cannot be told from a new one"
ARRAYS = ("jax.Array", "np.ndarray", "scalar")
MAX_METADATA = 64 << 20
MAX_FILES = 1 << 17
MAX_ARRAYS = 1 << 16
MOST_GROWTH, SMALL = 1024, 64 << 20  # times that an array may be larger than the folder, unless it is small
CONTEXT = {"cache_pool": {"total_bytes_limit": 0}, "data_copy_concurrency": {"limit": 1}}


def accepts(path: Path, head: bytes) -> bool:
    return path.is_dir() and bool(_items(path))


def read(path: Path) -> Contents:
    """Every array; see `trees` for what is taken off."""
    folder, *more = _items(path)
    if more:
        names = ", ".join(printable(str(item.relative_to(path)), 40) for item in (folder, *more[:4]))
        raise CheckpointError(f"holds {1 + len(more)} checkpoints ({names})", file=path, cure="name one of them")
    files = _files(folder)
    metadata = _read_metadata(folder / METADATA)
    is_database, size = (folder / DATABASE).is_file(), sum(file.size for file in files)
    if metadata is not None:
        store = _Store(folder, "zarr3" if metadata.get("use_zarr3") is True else "zarr", is_database, size)
        arrays, leaves = _list(metadata, folder / METADATA)
    else:
        store = _Store(folder, _driver(folder), is_database, size)
        arrays, leaves = {place.replace(".", "/"): place for place in store.places()}, {}
        if not arrays:
            problem = f"is an Orbax checkpoint without {METADATA} and without arrays"
            raise CheckpointError(problem, file=folder, cure="fetch the whole folder")
    found = arrange({**leaves, **store.open(arrays)})
    return Contents(
        tree=found.tree,
        files=files,
        integrity="CRC-32C of the database's index and of small arrays" if is_database else "none in format",
        wrappers=found.wrappers,
        set_aside=found.set_aside,
        notes=() if metadata is not None else (UNLISTED,),
    )


def _items(path: Path) -> list[Path]:
    """The folders of arrays that `path` is, or holds."""
    if (path / METADATA).is_file():
        return [path]
    if listed := [found.parent for depth in ("*", "*/*") for found in path.glob(f"{depth}/{METADATA}")]:
        return sorted(listed)
    if _holds_arrays(path):
        return [path]
    below = sorted(filter(_holds_arrays, [*path.glob("*"), *path.glob("*/*")]))
    return below or ([path] if (path / MARK).is_file() else [])


def _holds_arrays(path: Path) -> bool:
    """Whether a folder without metadata looks like Orbax's."""
    if not path.is_dir() or path.name.startswith(PROCESS) or path.parent.name.startswith(PROCESS):
        return False
    return (path / DATABASE).is_file() or any(any(path.glob(f"*/{head}")) for head in HEADS)


def _driver(folder: Path) -> str:
    return next((driver for head, driver in HEADS.items() if any(folder.glob(f"*/{head}"))), "zarr")


def _read_metadata(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    source = SourceFile(path)
    if source.size > MAX_METADATA:
        raise UnsafeCheckpoint(f"takes {source.size} bytes", file=source.path)
    return parse_json(bytes(source.read(0, source.size)), source.path, "it")


class _Unopened(SourceFile):
    """A file that tensorstore opens; there may be more of them than a process may hold open."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.close()

    def read(self, offset: int, nbytes: int, tensor: str | None = None, seen: Seen | None = None) -> memoryview:
        return SourceFile(self.path).read(offset, nbytes, tensor, seen)

    def sha256(self) -> str:
        return SourceFile(self.path).sha256()

    def check_unchanged(self) -> None:
        self._fd = os.open(self.path, os.O_RDONLY)
        super().check_unchanged()
        self.close()


def _files(folder: Path) -> tuple[SourceFile, ...]:
    """All files below the folder; links may not leave it."""
    files: list[SourceFile] = []
    for path in sorted(folder.rglob("*")):
        if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
            raise UnsafeCheckpoint("is a link that leaves the folder", file=path, cure="copy the file there")
        if len(files) == MAX_FILES:
            raise UnsafeCheckpoint(f"holds more than {MAX_FILES} files", file=folder)
        if not path.is_dir():
            files.append(_Unopened(path))
    return tuple(files)


def _list(metadata: dict[str, Any], path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Name -> path in the store of all arrays, and a sentence for what is none."""
    tree = metadata.get("tree_metadata")
    if not isinstance(tree, dict) or len(tree) > MAX_ARRAYS:
        raise DamagedCheckpoint("lists no arrays, or too many", file=path)
    arrays, others = {}, {}
    for entry in tree.values():
        try:
            keys = [str(key["key"]) for key in entry["key_metadata"]]
            kind, is_empty = entry["value_metadata"]["value_type"], entry["value_metadata"]["skip_deserialize"]
        except (KeyError, TypeError, IndexError) as error:
            raise DamagedCheckpoint("an entry of its tree_metadata makes no sense", file=path) from error
        name, place = "/".join(keys), ".".join(keys)
        if {"", ".", ".."} & set(place.split("/")) or "\\" in place or "\0" in place:
            raise UnsafeCheckpoint("its keys would leave the folder", file=path, tensor=name)
        if name in arrays:
            raise DamagedCheckpoint("is the name of two arrays", file=path, tensor=name)
        if kind in ARRAYS and not is_empty:
            arrays[name] = place
        elif not is_empty:
            others[name] = f"left out: it holds a {printable(str(kind), 40)}"
    return arrays, others


class _Store:
    """The arrays below a folder, as tensorstore sees them."""

    def __init__(self, folder: Path, driver: str, is_database: bool, size: int) -> None:
        self.folder, self.driver, self.is_database, self.size = folder, driver, is_database, size
        try:
            import tensorstore
        except ImportError as error:
            cure = "pip install tensorstore"
            raise CheckpointError("is an Orbax checkpoint, which needs tensorstore", file=folder, cure=cure) from error
        self.tensorstore = tensorstore
        self.context = tensorstore.Context(CONTEXT)

    def places(self) -> list[str]:
        """The paths of all arrays."""
        if self.is_database:
            opening = self.tensorstore.KvStore.open(self.kvstore(""), context=self.context)
            keys = [key.decode("utf-8", "backslashreplace") for key in self.result(self.result(opening).list())]
            if self.driver == "zarr" and any(key.endswith("/zarr.json") for key in keys):
                self.driver = "zarr3"
        else:
            keys = [f"{found.parent.name}/{found.name}" for head in HEADS for found in self.folder.glob(f"*/{head}")]
        if len(keys) > MAX_FILES:
            raise UnsafeCheckpoint(f"holds more than {MAX_FILES} keys", file=self.folder)
        places = {key.rpartition("/")[0] for key in keys if HEADS.get(key.rpartition("/")[2]) == self.driver}
        if stray := next((place for place in places if {"", ".", ".."} & set(place.split("/")) or "\\" in place), None):
            raise UnsafeCheckpoint("its keys would leave the folder", file=self.folder, tensor=stray)
        return sorted(places)

    def open(self, paths: dict[str, str]) -> dict[str, LazyTensor | str]:
        """The arrays at `paths`, by name, unread."""
        opening = {name: self.tensorstore.open(self.spec(path), context=self.context) for name, path in paths.items()}
        return {name: self.tensor(name, found) for name, found in opening.items()}

    def spec(self, path: str) -> dict[str, Any]:
        mode = {"open": True, "create": False, "fill_missing_data_reads": False}
        return {"driver": self.driver, "kvstore": self.kvstore(f"{path}/"), **mode}

    def kvstore(self, path: str) -> dict[str, Any]:
        root = f"{os.path.abspath(self.folder)}/"
        if not self.is_database:
            return {"driver": "file", "path": f"{root}{path}"}
        return {"driver": "ocdbt", "base": {"driver": "file", "path": root}, "path": path}

    def tensor(self, name: str, opening: Any) -> LazyTensor | str:
        array = self.result(opening, name)
        dtype = array.dtype.name
        if dtype not in DTYPES:
            return f"left out: it holds {dtype}"
        try:
            spec = TensorSpec(name, check_shape(array.shape), dtype)
        except Malformed as error:
            raise DamagedCheckpoint(str(error), file=self.folder, tensor=name) from error
        return LazyTensor(spec, partial(self.read, array, spec))

    def read(self, array: Any, spec: TensorSpec) -> memoryview:
        import numpy as np

        chunk = TensorSpec(spec.name, tuple(array.chunk_layout.read_chunk.shape or ()), spec.dtype)
        most = max(SMALL, MOST_GROWTH * self.size)
        if max(spec.nbytes, chunk.nbytes) > most:
            problem = f"its shape {spec.shape}, in chunks of {chunk.shape}, takes more than {most} bytes"
            raise UnsafeCheckpoint(problem, file=self.folder, tensor=spec.name)
        values = self.result(array.read(order="C"), spec.name)
        return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data

    def result(self, future: Any, name: str | None = None) -> Any:
        """What tensorstore was asked for."""
        try:
            return future.result()
        except (ValueError, OSError, KeyError, RuntimeError, NotImplementedError) as error:
            reason = printable(" ".join(str(error).split()), 300)
            raise DamagedCheckpoint(f"tensorstore refuses it: {reason}", file=self.folder, tensor=name) from error
