"""HDF5 files, walked and vetted before any tensor is read.

The HDF5 library follows links, external storage and virtual datasets into other files, allocates whatever shape a
file declares, and inflates a chunk for as long as its bytes last. So `open_hdf5` takes every link itself, once, and
refuses what would leave the file or outgrow it; only what is left can be asked for.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.errors import CheckpointError, DamagedCheckpoint, UnsafeCheckpoint, printable
from converters.readers.files import SourceFile
from converters.tensors import DTYPES, LazyTensor, TensorSpec

if TYPE_CHECKING:
    import h5py

__all__ = ["SIGNATURE", "Hdf5", "Window", "faults", "open_hdf5"]

SIGNATURE = b"\x89HDF\r\n\x1a\n"
FLOOR = 64 << 20  # bytes that a file may declare however little it stores
EXPANSION = 1100  # beyond that, declared bytes for one stored byte; deflate reaches 1032
MOST_CHUNKS = 1 << 20
LONGEST_PATH = 4096  # characters; bounds the depth of groups too
GZIP, SHUFFLE, FLETCHER32 = 1, 2, 3  # HDF5's numbers of the filters that are read
PIECE = 8 << 20
FAULTS = (  # what h5py, zipfile and json raise on damaged input
    *(OSError, EOFError, RuntimeError, LookupError, ValueError, TypeError, AttributeError, ArithmeticError),
    *(zipfile.BadZipFile, zlib.error, struct.error),
)


@dataclass(frozen=True)
class Hdf5:
    """A vetted file: its groups and datasets by path, without a leading slash; the root is ""."""

    file: Path
    groups: dict[str, h5py.Group]
    datasets: dict[str, h5py.Dataset]
    check: Callable[[], None]  # run before a tensor is read: a checksum of the whole, where there is one

    def text(self, group: str, name: str) -> str | None:
        """The group's attribute `name` if it is a string."""
        value = self._attribute(group, name)
        return value if isinstance(value, str) else None

    def texts(self, group: str, name: str) -> list[str] | None:
        """The group's attribute `name` if it is a list of strings, joined from `name0`, `name1`, ... where Keras
        split it; None where there is neither."""
        attributes = self.groups[group].attrs
        if name in attributes:
            parts = [name]
        else:
            parts = [f"{name}{i}" for i in range(len(attributes)) if f"{name}{i}" in attributes]
        values = [self._attribute(group, part) for part in parts]
        if not all(isinstance(value, list) for value in values):
            raise DamagedCheckpoint(f"its attribute {name} is no list", file=self.file, tensor=group)
        return [text for value in values for text in value] if parts else None

    def tensor(self, path: str, name: str) -> LazyTensor:
        """The dataset at `path`, to be called `name`."""
        dataset = self.datasets[path]
        return LazyTensor(TensorSpec(name, dataset.shape, _dtype_of(dataset) or ""), lambda: self._read(dataset, name))

    @property
    def is_checksummed(self) -> bool:
        return bool(self.datasets) and all(dataset.fletcher32 for dataset in self.datasets.values())

    def _attribute(self, group: str, name: str) -> Any:
        with faults(self.file, f"{group}@{name}"):
            attributes = self.groups[group].attrs
            if name not in attributes:
                return None
            stored = attributes.get_id(name)
            if math.prod(stored.shape) * stored.get_type().get_size() > PIECE:
                raise UnsafeCheckpoint(f"its attribute {name} is too large", file=self.file, tensor=group)
            value = attributes[name]
            if getattr(value, "shape", ()) == ():
                return _decoded(value)
            return [_decoded(item) for item in value.reshape(-1)]

    def _read(self, dataset: h5py.Dataset, name: str) -> memoryview:
        import numpy as np

        self.check()
        with faults(self.file, name):
            array = np.empty(dataset.shape, dataset.dtype.newbyteorder("<"))
            if array.size:
                if GZIP in _filters_of(dataset):
                    _check_chunks(dataset, self.file, name)
                dataset.read_direct(array)
        return memoryview(array.reshape(-1).view(np.uint8))


class Window(io.RawIOBase):
    """A part of a source file as a stream, for libraries that read streams."""

    def __init__(self, source: SourceFile, start: int = 0, size: int | None = None) -> None:
        self._source, self._start, self._at = source, start, 0
        self.size = source.size - start if size is None else size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + (0, self._at, self.size)[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        wanted = max(0, min(len(view), self.size - self._at))
        for done in range(0, wanted, PIECE):
            piece = self._source.read(self._start + self._at + done, min(PIECE, wanted - done))
            view[done : done + len(piece)] = piece
        self._at += wanted
        return wanted


def open_hdf5(
    stream: io.RawIOBase | io.BytesIO, size: int, file: Path, check: Callable[[], None] = lambda: None
) -> Hdf5:
    """Walk the `size` bytes of HDF5 in `stream`; `file` is what errors name. Raises CheckpointError."""
    try:
        import h5py
    except ImportError as error:
        raise CheckpointError("is HDF5, and h5py is not installed", file=file, cure="pip install h5py") from error

    with faults(file):
        root = h5py.File(stream, "r")
        groups, datasets, addresses = {"": root["/"]}, {}, {_address(root)}
        pending, declared, chunks = [""], 0, 0
        while pending:
            parent = pending.pop()
            for name in groups[parent]:
                path = f"{parent}/{name}" if parent else name
                child = _follow(groups[parent], name, path, file, addresses)
                if isinstance(child, h5py.Group):
                    groups[path] = child
                    pending.append(path)
                    continue
                datasets[path] = child
                _vet(child, size, file, path)
                declared += child.size * child.dtype.itemsize
                chunks += _count_chunks(child)
        if declared > max(FLOOR, EXPANSION * size) or chunks > MOST_CHUNKS:
            raise UnsafeCheckpoint(
                f"declares {declared} bytes in {chunks} chunks, which its {size} cannot hold", file=file
            )
    return Hdf5(file, groups, datasets, check)


@contextmanager
def faults(file: Path, tensor: str | None = None) -> Iterator[None]:
    """Turn what the libraries raise on bad input into CheckpointError."""
    try:
        yield
    except MemoryError as error:
        raise UnsafeCheckpoint("needs more memory than there is", file=file, tensor=tensor) from error
    except RecursionError as error:
        raise UnsafeCheckpoint("is nested too deeply", file=file, tensor=tensor) from error
    except FAULTS as error:
        why = printable(str(error).strip().partition("\n")[0]) or type(error).__name__
        raise DamagedCheckpoint(f"cannot be read: {why}", file=file, tensor=tensor) from error


def _follow(group: h5py.Group, name: str, path: str, file: Path, addresses: set[int]) -> Any:
    """The group or dataset that a hard link leads to."""
    import h5py

    if len(path) > LONGEST_PATH:
        raise UnsafeCheckpoint("its groups are nested too deeply", file=file, tensor=path)
    if not _is_utf8(path):
        raise DamagedCheckpoint("its name is not UTF-8", file=file, tensor=path)
    link = group.get(name, getlink=True)
    if not isinstance(link, h5py.HardLink):
        raise UnsafeCheckpoint(f"is a link that leads elsewhere ({type(link).__name__})", file=file, tensor=path)
    child = group[name]
    if not isinstance(child, (h5py.Group, h5py.Dataset)):
        raise CheckpointError("is neither a group nor a dataset", file=file, tensor=path)
    if _address(child) in addresses:
        raise UnsafeCheckpoint("stands in the file a second time (a cycle of links)", file=file, tensor=path)
    addresses.add(_address(child))
    return child


def _vet(dataset: h5py.Dataset, size: int, file: Path, path: str) -> None:
    """Refuse a dataset that would leave the file, outgrow it, or is no tensor."""
    if dataset.is_virtual:  # asked first: a virtual dataset opens its sources to learn its shape
        raise UnsafeCheckpoint("takes its values from other files (a virtual dataset)", file=file, tensor=path)
    if dataset.external:
        raise UnsafeCheckpoint("keeps its values in another file (external storage)", file=file, tensor=path)
    if dataset.shape is None or _dtype_of(dataset) is None:
        kind = "nothing" if dataset.shape is None else printable(str(dataset.dtype))
        raise CheckpointError(f"holds {kind}, which is no tensor", file=file, tensor=path)
    filters = _filters_of(dataset)
    if len(set(filters)) < len(filters) or not {GZIP, SHUFFLE, FLETCHER32}.issuperset(filters):
        raise CheckpointError(
            f"is stored with HDF5 filters {filters}, not all known", file=file, tensor=path, cure="h5repack -f NONE"
        )
    elements = max(dataset.size, math.prod(dataset.chunks or ()))
    declared, stored = elements * dataset.dtype.itemsize, min(dataset.id.get_storage_size(), size)
    if declared > max(FLOOR, EXPANSION * stored):
        raise UnsafeCheckpoint(f"declares {declared} bytes and stores {stored}", file=file, tensor=path)


def _check_chunks(dataset: h5py.Dataset, file: Path, name: str) -> None:
    """Refuse a compressed chunk that inflates to more than a chunk: the library would let it grow."""
    most = math.prod(dataset.chunks) * dataset.dtype.itemsize + 4  # and a checksum
    for corner in product(*(range(0, n, step) for n, step in zip(dataset.shape, dataset.chunks, strict=True))):
        try:
            raw = dataset.id.read_direct_chunk(corner)[1]
        except (OSError, RuntimeError, ValueError):
            continue  # never written: it holds the fill value; or damaged, and the read that follows says so
        try:
            inflated = zlib.decompressobj().decompress(raw, most + 1)
        except zlib.error:
            continue
        if len(inflated) > most:
            raise UnsafeCheckpoint(f"a chunk of {most} bytes inflates to more", file=file, tensor=name)


def _count_chunks(dataset: h5py.Dataset) -> int:
    if not dataset.chunks:
        return 1
    return math.prod(-(-n // step) for n, step in zip(dataset.shape, dataset.chunks, strict=True))


def _filters_of(dataset: h5py.Dataset) -> list[int]:
    properties = dataset.id.get_create_plist()
    return [properties.get_filter(i)[0] for i in range(properties.get_nfilters())]


def _dtype_of(dataset: h5py.Dataset) -> str | None:
    """A key of DTYPES; None for what is no tensor: text, references, records."""
    import numpy as np

    if dataset.dtype == np.dtype("V2"):  # how Keras stores bfloat16; not every form says so in an attribute
        return "bfloat16"
    return dataset.dtype.name if dataset.dtype.kind in "biufc" and dataset.dtype.name in DTYPES else None


def _address(item: Any) -> int:
    import h5py

    return int(h5py.h5o.get_info(item.id).addr)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _decoded(value: Any) -> Any:
    """An attribute's value as a plain one."""
    if isinstance(value, bytes):
        return value.decode()
    return value.item() if hasattr(value, "item") else value
