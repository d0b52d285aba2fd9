"""PyTorch distributed checkpoints: folders that `torch.distributed.checkpoint.save` writes, for FSDP and others.

`.metadata` is a pickle: it tells every tensor's shape and dtype, the chunks that it is cut into, and for each
chunk the file, offset and length at which a small archive of torch.save holds it. A tensor is put together when
it is read. Objects that are not tensors are left out.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.errors import CheckpointError, DamagedCheckpoint, UnsafeCheckpoint, printable
from converters.readers import Contents, pickles
from converters.readers.files import SourceFile, Window
from converters.readers.folders import find_beside
from converters.readers.pickles import Opaque, Symbol
from converters.readers.torch.storages import View, are_sizes
from converters.readers.torch.symbols import MEANINGS
from converters.readers.torch.zip_file import Pickled
from converters.readers.zip_archive import ZipArchive
from converters.tensors import DTYPES, LazyTensor, TensorSpec

__all__ = ["FORMAT", "accepts", "read"]

FORMAT = "PyTorch distributed checkpoint"
INTEGRITY = "CRC-32 of every chunk that was saved with one"
METADATA = ".metadata"
MAX_DEPTH = 64
MAX_COMPARISONS = 4_000_000  # of chunks with each other
AGAIN = "fetch the folder again"


def accepts(path: Path, head: bytes) -> bool:
    """Whether this is such a folder, or a file of one."""
    if path.is_dir():
        return (path / METADATA).is_file()
    return path.name == METADATA or path.suffix == ".distcp"


def read(path: Path) -> Contents:
    index = path / METADATA if path.is_dir() else path.with_name(METADATA)
    return _Folder(SourceFile(index)).read()


@dataclass(frozen=True)
class _Chunk:
    """A box of a tensor's elements, and where it is stored."""

    begin: tuple[int, ...]
    end: tuple[int, ...]
    window: Window

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(end - begin for begin, end in zip(self.begin, self.end, strict=True))

    def overlaps(self, other: _Chunk) -> bool:
        return all(
            max(a, c) < min(b, d) for a, b, c, d in zip(self.begin, self.end, other.begin, other.end, strict=True)
        )


class _Folder:
    def __init__(self, index: SourceFile) -> None:
        self.index, self.path = index, index.path
        self.files: dict[str, SourceFile] = {}
        self.comparisons = 0

    def read(self) -> Contents:
        if self.index.size > pickles.MAX_BYTES:
            raise UnsafeCheckpoint(f"takes more than {pickles.MAX_BYTES:,} bytes", file=self.path)
        stream = io.BytesIO(self.index.read(0, self.index.size))
        value = pickles.load(stream, self.path, MEANINGS, _resolve)
        try:
            tree = self.tree(value)
        except (TypeError, ValueError, LookupError, AttributeError) as error:
            raise DamagedCheckpoint("its pickle makes no sense", file=self.path, cure=AGAIN) from error
        return Contents(tree, (self.index, *self.files.values()), INTEGRITY)

    def tree(self, metadata: Any) -> dict[str, Any]:
        """What the checkpoint holds, nested as its state dict was. Raises TypeError and its like for nonsense."""
        if metadata.symbol != Symbol("torch.distributed.checkpoint.metadata", "Metadata"):
            raise TypeError
        fields = metadata.state
        places = {}
        for key, info in fields["storage_data"].items():
            offset = key.state.get("offset")
            places[key.state["fqn"], None if offset is None else tuple(offset)] = info.state
        nested = fields.get("planner_data") or {}
        tree: dict[str, Any] = {}
        for name, entry in fields["state_dict_metadata"].items():
            if not isinstance(name, str):
                raise TypeError
            steps = [str(step) for step in nested.get(name) or (name,)]
            if len(steps) > MAX_DEPTH:
                raise ValueError
            node = tree
            for step in steps[:-1]:
                node = node.setdefault(step, {})
            if not isinstance(node, dict) or steps[-1] in node:
                raise DamagedCheckpoint("has the place of another", file=self.path, tensor=name)
            is_tensor = entry.symbol.name == "TensorStorageMetadata"
            node[steps[-1]] = self.tensor(name, entry.state, places) if is_tensor else "left out: a pickled object"
        return tree

    def tensor(self, name: str, fields: dict[str, Any], places: dict[Any, Any]) -> LazyTensor | Opaque:
        properties, shape = fields["properties"].state, fields["size"]
        dtype = properties[0] if isinstance(properties, tuple) else properties["dtype"]
        if not are_sizes(shape) or not isinstance(dtype, Symbol):
            raise TypeError
        if dtype.name not in DTYPES:
            return Opaque(dtype, f"is of dtype {printable(dtype.name)}, which is not converted")
        spec = TensorSpec(name, shape, dtype.name)
        chunks = []
        for entry in fields["chunks"]:
            begin, sizes = entry.state["offsets"], entry.state["sizes"]
            if not (are_sizes(begin) and are_sizes(sizes) and len(begin) == len(sizes) == len(shape)):
                raise TypeError
            if math.prod(sizes):  # a process may hold no element
                end = tuple(map(sum, zip(begin, sizes, strict=True)))
                chunks.append(_Chunk(begin, end, self.window(name, begin, places)))
        self.check_cover(spec, chunks)
        return LazyTensor(spec, lambda: _assemble(spec, chunks))

    def window(self, name: str, begin: tuple[int, ...], places: dict[Any, Any]) -> Window:
        """Where a chunk is stored."""
        info = places.get((name, begin)) or places.get((name, None))
        if info is None:
            raise DamagedCheckpoint(f"its chunk at {begin} is not stored", file=self.path, tensor=name, cure=AGAIN)
        if info.get("transform_descriptors"):
            cure = "save it without extensions"
            raise CheckpointError("is compressed or otherwise transformed", file=self.path, tensor=name, cure=cure)
        file, offset, length = info["relative_path"], info["offset"], info["length"]
        if not are_sizes([offset, length]):
            raise TypeError
        if file not in self.files:
            self.files[file] = SourceFile(find_beside(self.path, file))
        return Window(self.files[file], offset, length)

    def check_cover(self, spec: TensorSpec, chunks: list[_Chunk]) -> None:
        """Raise unless every element is in exactly one chunk."""
        fault = DamagedCheckpoint("its chunks do not tile it", file=self.path, tensor=spec.name, cure=AGAIN)
        if sum(math.prod(chunk.shape) for chunk in chunks) != spec.numel:
            raise fault
        if spec.nbytes > sum(file.size for file in self.files.values()):
            raise DamagedCheckpoint("takes more than there is", file=self.path, tensor=spec.name, cure=AGAIN)
        live: list[_Chunk] = []  # those that reach the row where the next begins
        for chunk in sorted(chunks, key=lambda chunk: chunk.begin):
            live = [one for one in live if one.end[:1] > chunk.begin[:1]]
            self.comparisons += len(live)
            if self.comparisons > MAX_COMPARISONS:
                raise UnsafeCheckpoint("is cut into too many chunks", file=self.path, tensor=spec.name)
            if any(size > most for size, most in zip(chunk.end, spec.shape, strict=True)) or any(
                map(chunk.overlaps, live)
            ):
                raise fault
            live.append(chunk)


def _resolve(name: Any) -> Any:
    raise ValueError("a persistent id, which this pickle has no use for")


def _assemble(spec: TensorSpec, chunks: Sequence[_Chunk]) -> memoryview:
    """A tensor's bytes, from its chunks'."""
    if len(chunks) == 1:
        return _read_chunk(spec, chunks[0])
    import numpy as np

    itemsize = DTYPES[spec.dtype][1]
    whole = np.empty(spec.shape, f"u{itemsize}")
    for chunk in chunks:
        box = tuple(slice(begin, end) for begin, end in zip(chunk.begin, chunk.end, strict=True))
        whole[box] = np.frombuffer(_read_chunk(spec, chunk), whole.dtype).reshape(chunk.shape)
    return whole.reshape(-1).view(np.uint8).data


def _read_chunk(spec: TensorSpec, chunk: _Chunk) -> memoryview:
    pickled = Pickled(ZipArchive.open(chunk.window))
    view = pickled.value
    if not isinstance(view, View) or view.dtype != spec.dtype or view.shape != chunk.shape:
        problem = f"its chunk at {chunk.begin} is not what .metadata says"
        raise DamagedCheckpoint(problem, file=chunk.window.path, tensor=spec.name, cure=AGAIN)
    tensor = view.open(spec.name, pickled.find(view.storage, spec.name))
    assert isinstance(tensor, LazyTensor)
    return tensor.read()
