"""HDF5 files, of the kind that Keras writes: groups, attributes of text, and datasets of numbers.

This is no binding to the HDF5 library: one flipped bit can make that hang or crash, and it follows links, external
storage and virtual datasets into other files. Here everything is read by position from the one file, and whatever
would leave it, or declares more than it holds, is refused.
"""

from __future__ import annotations

import itertools
import math
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from converters.errors import ConverterError, DamagedCheckpoint, UnsafeCheckpoint, printable
from converters.readers.keras.hdf5 import messages
from converters.readers.keras.hdf5.chunks import join_chunks
from converters.readers.keras.hdf5.messages import FLETCHER32, UNDEFINED, Attribute
from converters.readers.keras.hdf5.structures import (
    ATTRIBUTE,
    LAYOUT,
    LONGEST_PATH,
    SIGNATURE,
    Dataset,
    Parser,
    Stretch,
)
from converters.tensors import LazyTensor, TensorSpec

__all__ = ["SIGNATURE", "Hdf5", "Stretch", "faults", "open_hdf5"]


@dataclass(frozen=True)
class Hdf5:
    """An open file: groups and datasets by path, without a leading slash; the root is ""."""

    file: Path
    groups: dict[str, dict[str, Attribute]]
    datasets: dict[str, Dataset]
    _parser: Parser = field(repr=False)

    def text(self, group: str, name: str) -> str | None:
        """The string that a group's attribute is; None where there is none."""
        attribute = self.groups[group].get(name)
        found = self.texts(group, name) if attribute and attribute.shape == () else None
        return found[0] if found else None

    def texts(self, group: str, name: str) -> list[str] | None:
        """The strings that a group's attribute holds, or `name0`, `name1`, ... where Keras had to split it."""
        attributes = self.groups[group]
        split = itertools.takewhile(attributes.__contains__, (f"{name}{i}" for i in itertools.count()))
        parts = [name] if name in attributes else list(split)
        with faults(self.file, f"{group}@{name}"):
            return [text for part in parts for text in self._parser.texts(attributes[part])] if parts else None

    def tensor(self, path: str, name: str) -> LazyTensor:
        """The dataset at `path`, called `name`."""
        dataset = self.datasets[path]
        return LazyTensor(TensorSpec(name, dataset.shape, dataset.dtype), lambda: self._read(dataset, name))

    @property
    def is_checksummed(self) -> bool:
        """Whether every byte of every dataset is under a checksum."""
        return all(
            any(
                one.id == FLETCHER32 and not any(chunk.mask >> i & 1 for chunk in dataset.chunks)
                for i, one in enumerate(dataset.filters)
            )
            for dataset in self.datasets.values()
        )

    def _read(self, dataset: Dataset, name: str) -> memoryview:
        stretch = self._parser.stretch
        with faults(self.file, name):
            if not dataset.nbytes:
                return memoryview(bytearray())
            if not dataset.chunk_shape:
                return stretch.read(dataset.address, dataset.nbytes, name)
            itemsize = dataset.nbytes // math.prod(dataset.shape)
            chunks, read = dataset.chunks, lambda address, nbytes: stretch.read(address, nbytes, name)
            return join_chunks(chunks, read, dataset.filters, dataset.shape, dataset.chunk_shape, itemsize)


@contextmanager
def faults(file: Path, tensor: str | None = None) -> Iterator[None]:
    """Turn what malformed bytes raise into CheckpointError; one that names no file gets the names."""
    try:
        yield
    except ConverterError as error:
        if error.file is not None:
            raise
        raise type(error)(error.problem, file=file, tensor=error.tensor or tensor, cure=error.cure) from error
    except (MemoryError, RecursionError) as error:
        raise UnsafeCheckpoint("is too large or too deeply nested to be read", file=file, tensor=tensor) from error
    except (
        *(ArithmeticError, AttributeError, EOFError, LookupError, RuntimeError, TypeError, ValueError),
        *(struct.error, zipfile.BadZipFile, zlib.error),
    ) as error:
        why = printable(str(error).strip().partition("\n")[0]) or type(error).__name__
        raise DamagedCheckpoint(f"is malformed: {why}", file=file, tensor=tensor, cure="fetch it again") from error


def open_hdf5(stretch: Stretch, file: Path) -> Hdf5:
    """Find every group and dataset; `file` is what errors name. Raises CheckpointError."""
    parser = Parser(stretch)
    groups: dict[str, dict[str, Attribute]] = {}
    datasets: dict[str, Dataset] = {}
    with faults(file):
        pending = [("", parser.root())]
    seen, paths = {pending[0][1]}, {""}
    while pending:
        path, address = pending.pop()
        with faults(file, path or None):
            header = list(parser.messages(address))
            if any(kind == LAYOUT for kind, _, _ in header):
                datasets[path] = parser.dataset(header)
                continue
            groups[path] = dict(messages.parse_attribute(body) for kind, _, body in header if kind == ATTRIBUTE)
            for name, child in parser.links(header):
                here = f"{path}/{name}" if path else name
                if child == UNDEFINED:
                    raise UnsafeCheckpoint("is a link that leads elsewhere", file=file, tensor=here)
                if child in seen:
                    raise UnsafeCheckpoint("stands in the file a second time", file=file, tensor=here)
                if len(here) > LONGEST_PATH or here in paths or not name or "/" in name:
                    raise UnsafeCheckpoint("has a name that is too long, or not its own", file=file, tensor=here)
                parser.charge(len(here))
                seen.add(child)
                paths.add(here)
                pending.append((here, child))
    return Hdf5(file, groups, datasets, parser)
