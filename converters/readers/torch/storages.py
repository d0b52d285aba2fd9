"""Torch storages: what torch's pickles say of tensors, and how their bytes are found in a file.

Both torch formats share this. A storage is one run of bytes in the file (a `Record`); a tensor is a `View` of
one, by offset, shape and strides. Sizes and offsets are in elements where not said to be in bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from converters.errors import DamagedCheckpoint, UnsafeCheckpoint, printable
from converters.readers.pickles import Opaque, Symbol
from converters.readers.records import Record
from converters.tensors import DTYPES, LazyTensor, TensorSpec

__all__ = ["Storage", "View", "are_sizes", "gather", "resolve"]

MAX_EXPANDED = 1 << 20  # bytes that an expanded view (stride 0) may take when its storage holds fewer

STORAGES: dict[str, tuple[str, int]] = {  # class: dtype, bytes an element
    "DoubleStorage": ("float64", 8),
    "FloatStorage": ("float32", 4),
    "HalfStorage": ("float16", 2),
    "BFloat16Storage": ("bfloat16", 2),
    "LongStorage": ("int64", 8),
    "IntStorage": ("int32", 4),
    "ShortStorage": ("int16", 2),
    "CharStorage": ("int8", 1),
    "ByteStorage": ("uint8", 1),
    "BoolStorage": ("bool", 1),
    "ComplexFloatStorage": ("complex64", 8),
    "ComplexDoubleStorage": ("complex128", 16),
    "QInt8Storage": ("qint8", 1),
    "QUInt8Storage": ("quint8", 1),
    "QInt32Storage": ("qint32", 4),
    "QUInt4x2Storage": ("quint4x2", 1),
    "QUInt2x4Storage": ("quint2x4", 1),
    "UntypedStorage": ("uint8", 1),
}


@dataclass(frozen=True, slots=True)
class Storage:
    """What a persistent id says of a storage."""

    key: str
    dtype: str
    itemsize: int
    numel: int
    part: tuple[int, int]  # first element and number of those that tensors may use; legacy files name views

    @property
    def nbytes(self) -> int:
        return self.numel * self.itemsize


@dataclass(frozen=True, slots=True)
class View:
    """A tensor as its rebuild function was told of it; nothing is checked yet."""

    storage: Storage
    dtype: str
    offset: Any
    shape: Any
    strides: Any

    def open(self, name: str, record: Record) -> LazyTensor | Opaque:
        """The lazy tensor; raises CheckpointError where the view and its storage contradict each other."""
        fault = partial(DamagedCheckpoint, file=record.file.path, tensor=name)
        if self.dtype not in DTYPES:
            return Opaque(Symbol("torch", self.dtype), f"is of dtype {printable(self.dtype)}, which is not converted")
        if record.nbytes != self.storage.nbytes:
            raise fault(f"its storage takes {self.storage.nbytes} bytes, but the file has {record.nbytes}")
        offset, shape, strides = self.offset, self.shape, self.strides
        if not (are_sizes([offset]) and are_sizes(shape) and are_sizes(strides) and len(shape) == len(strides)):
            raise fault("its offset, shape or strides make no sense")
        spec = TensorSpec(name, tuple(shape), self.dtype)
        if not spec.numel:
            return LazyTensor(spec, lambda: memoryview(bytearray()))
        itemsize = DTYPES[self.dtype][1]
        span = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + 1
        first, length = (part * self.storage.itemsize for part in self.storage.part)
        if (offset + span) * itemsize > length:
            raise fault("reaches beyond its storage")
        if spec.nbytes > max(length, MAX_EXPANDED):
            raise UnsafeCheckpoint(
                f"is an expanded view: {length} bytes would become {spec.nbytes}",
                file=record.file.path,
                tensor=name,
                cure="save it with .contiguous()",
            )
        start, nbytes = first + offset * itemsize, span * itemsize
        read = partial(record.read, start, nbytes, name)
        if not _is_contiguous(shape, strides):
            return LazyTensor(spec, partial(gather, read, spec.shape, tuple(strides), itemsize))
        if record.crc is not None:
            record.file.expect(record.offset, record.nbytes, record.crc, name)
        return LazyTensor(spec, read, partial(record.file.copy, record.offset + start, nbytes, name))


def resolve(name: Any) -> Any:
    """The object of a persistent id: a Storage, or the class of a module that was pickled whole."""
    kind, *details = name
    if kind == "module":
        return details[0]
    symbol, key, _location, numel, *view = details
    _, first, count = view[0] if view and view[0] is not None else (None, 0, numel)
    known = kind == "storage" and symbol.module in ("torch", "torch.cuda", "torch.storage")
    if not (known and isinstance(key, str) and are_sizes([first, count, numel]) and first + count <= numel):
        raise ValueError
    return Storage(key, *STORAGES[symbol.name], numel, (first, count))


def are_sizes(values: Any) -> bool:
    """Whether these are at most 64 integers that torch could hold."""
    return (
        isinstance(values, tuple | list)
        and len(values) <= 64
        and all(type(value) is int and 0 <= value < 1 << 63 for value in values)
    )


def _is_contiguous(shape: Sequence[int], strides: Sequence[int]) -> bool:
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def gather(
    read: Callable[[], memoryview], shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int
) -> memoryview:
    """A strided view's elements in C order."""
    import numpy as np

    flat = np.frombuffer(read(), dtype=f"u{itemsize}")
    view = np.lib.stride_tricks.as_strided(flat, shape, [stride * itemsize for stride in strides])
    return view.copy(order="C").reshape(-1).view(np.uint8).data
