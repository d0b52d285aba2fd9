"""Torch storages: what torch's pickles say of tensors, and how their bytes are found in a file.

Both torch formats share this. A storage is one run of bytes in the file (a `Record`); a tensor is a `View` of
one, by offset, shape and strides. Sizes and offsets are in elements where not said to be in bytes.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from converters.errors import DamagedCheckpoint, UnsafeCheckpoint, printable
from converters.readers.files import CHUNK, SourceFile
from converters.readers.pickles import Opaque, Symbol
from converters.tensors import DTYPES, LazyTensor, TensorSpec

__all__ = ["MEANINGS", "Record", "Storage", "View", "resolve", "why_no_tensor"]

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


@dataclass(slots=True)
class Record:
    """The bytes of one storage in the file, with their CRC-32 where the file has it."""

    file: SourceFile
    offset: int
    nbytes: int
    crc: int | None = None
    checked: bool = False

    def read(self, start: int, nbytes: int, tensor: str) -> memoryview:
        """Part of the record; the CRC-32, which is the whole record's, is checked before any part is given out."""
        raw = self.file.read(self.offset + start, nbytes, tensor)
        if self.crc is not None and nbytes == self.nbytes:
            self._compare(zlib.crc32(raw), tensor)
        elif self.crc is not None and not self.checked:
            crc = 0
            for at in range(0, self.nbytes, CHUNK):
                crc = zlib.crc32(self.file.read(self.offset + at, min(CHUNK, self.nbytes - at), tensor), crc)
            self._compare(crc, tensor)
            self.checked = True
        return raw

    def _compare(self, crc: int, tensor: str) -> None:
        if crc != self.crc:
            raise DamagedCheckpoint("its CRC-32 differs", file=self.file.path, tensor=tensor, cure="fetch it again")


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
        if not (_are_sizes([offset]) and _are_sizes(shape) and _are_sizes(strides) and len(shape) == len(strides)):
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
        read = partial(record.read, first + offset * itemsize, span * itemsize, name)
        if not _is_contiguous(shape, strides):
            read = partial(_gather, read, spec.shape, tuple(strides), itemsize)
        return LazyTensor(spec, read)


def resolve(name: Any) -> Any:
    """The object of a persistent id: a Storage, or the class of a module that was pickled whole."""
    kind, *details = name
    if kind == "module":
        return details[0]
    symbol, key, _location, numel, *view = details
    _, first, count = view[0] if view and view[0] is not None else (None, 0, numel)
    known = kind == "storage" and symbol.module in ("torch", "torch.cuda", "torch.storage")
    if not (known and isinstance(key, str) and _are_sizes([first, count, numel]) and first + count <= numel):
        raise ValueError
    return Storage(key, *STORAGES[symbol.name], numel, (first, count))


def why_no_tensor(symbol: Symbol) -> str | None:
    """The reason why what `symbol` makes is no tensor here; None if it would not be one anywhere."""
    if symbol.module.startswith("torch.distributed"):
        return "is one process's part of a distributed tensor; gather the full state dict and save that"
    return REASONS.get(symbol.name) if symbol.module.startswith("torch.") else None


REASONS = {
    "_rebuild_qtensor": "is quantized; dequantize it and save again",
    "_rebuild_sparse_tensor": "is sparse; save it with .to_dense()",
    "_rebuild_nested_tensor": "is a nested tensor; save its parts",
    "_rebuild_meta_tensor_no_storage": "has no data: it was saved from the meta device",
    "_rebuild_device_tensor_from_numpy": "was saved on an accelerator; save it from the CPU",
    "_rebuild_xla_tensor": "was saved on an accelerator; save it from the CPU",
    "UninitializedParameter": "was never initialized",
}


def _rebuild_typed(
    storage: Any, offset: Any, shape: Any, strides: Any, _grad: Any = None, _hooks: Any = None, bits: Any = None
) -> View | Opaque:
    if not isinstance(storage, Storage):
        return Opaque(Symbol("torch", "Tensor"), "was pickled without torch.save")
    return _rebuild_untyped(storage, offset, shape, strides, _grad, _hooks, Symbol("torch", storage.dtype), bits)


def _rebuild_untyped(
    storage: Any, offset: Any, shape: Any, strides: Any, _grad: Any, _hooks: Any, dtype: Any, bits: Any = None
) -> View | Opaque:
    if not isinstance(storage, Storage) or not isinstance(dtype, Symbol):
        raise TypeError
    if bits:
        return Opaque(Symbol("torch", "Tensor"), "is conjugated or negated lazily; save it with .resolve_conj()")
    return View(storage, dtype.name, offset, shape, strides)


def _rebuild_subclass(function: Any, kind: Any, arguments: Any, _state: Any = None) -> View | Opaque:
    if not isinstance(kind, Symbol):
        raise TypeError
    rebuild = TENSORS.get(function)
    return rebuild(*arguments) if rebuild else Opaque(kind, why_no_tensor(kind) or f"is a {kind}, not a plain tensor")


TENSORS: dict[Symbol, Callable[..., View | Opaque]] = {
    Symbol("torch._utils", "_rebuild_tensor"): _rebuild_typed,
    Symbol("torch._utils", "_rebuild_tensor_v2"): _rebuild_typed,
    Symbol("torch._utils", "_rebuild_tensor_v3"): _rebuild_untyped,
}
MEANINGS: dict[Symbol, Callable[..., Any]] = {
    **TENSORS,
    Symbol("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    Symbol("torch._utils", "_rebuild_parameter_with_state"): lambda data, *_: data,
    Symbol("torch._tensor", "_rebuild_from_type_v2"): _rebuild_subclass,
    Symbol("torch", "Size"): lambda shape=(): tuple(shape),
    Symbol("torch", "device"): lambda kind, *_: kind,
}


def _are_sizes(values: Any) -> bool:
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


def _gather(
    read: Callable[[], memoryview], shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int
) -> memoryview:
    """A strided view's elements in C order."""
    import numpy as np

    flat = np.frombuffer(read(), dtype=f"u{itemsize}")
    view = np.lib.stride_tricks.as_strided(flat, shape, [stride * itemsize for stride in strides])
    return view.copy(order="C").reshape(-1).view(np.uint8).data
