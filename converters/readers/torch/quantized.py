"""Quantized tensors of torch: integers with a scale and a zero point, one for all or one for each channel.

They are read as the float32 that `Tensor.dequantize` gives, bit for bit, and are marked as lossy: they are no
longer the weights that were trained.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from converters.errors import DamagedCheckpoint
from converters.readers.pickles import Opaque, Symbol
from converters.readers.records import Record
from converters.readers.torch.storages import Storage, View
from converters.tensors import LazyTensor, TensorSpec

__all__ = ["Quantized", "rebuild_quantized"]

INTEGERS = {"qint8": "int8", "quint8": "uint8"}
PER_TENSOR, PER_CHANNEL = Symbol("torch", "per_tensor_affine"), Symbol("torch", "per_channel_affine")


@dataclass(frozen=True, slots=True)
class Quantized:
    """A quantized tensor as its rebuild function was told of it: (integers - zero_point) * scale."""

    integers: View
    scale: Any  # a number, or float64 and int64 views of one element for each index of the axis
    zero_point: Any
    axis: Any  # None where one scale is all

    def open(self, name: str, find: Callable[[Storage, str], Record]) -> LazyTensor | Opaque:
        """The lazy tensor in float32; raises CheckpointError where the parts contradict each other."""
        dtype = INTEGERS[self.integers.dtype]
        record = find(self.integers.storage, name)
        integers = replace(self.integers, dtype=dtype).open(name, record)
        parts = [part.open(name, find(part.storage, name)) for part in (self.scale, self.zero_point) if _is_view(part)]
        if [part.spec.dtype for part in parts if isinstance(part, LazyTensor)] not in ([], ["float64", "int64"]):
            why = "is quantized with zero points that are no integers; dequantize it and save again"
            return Opaque(Symbol("torch", "Tensor"), why)
        assert isinstance(integers, LazyTensor)
        spec = TensorSpec(name, integers.spec.shape, "float32")
        if parts and not self._fits(parts, spec.shape):
            raise DamagedCheckpoint("its scales do not fit its shape", file=record.file.path, tensor=name)
        read = partial(self._dequantize, integers, parts, spec)
        return LazyTensor(spec, read, lossy=f"dequantized from {self.integers.dtype}")

    def _fits(self, parts: list[Any], shape: tuple[int, ...]) -> bool:
        is_axis = type(self.axis) is int and 0 <= self.axis < len(shape)
        return is_axis and all(part.spec.shape == (shape[self.axis],) for part in parts)

    def _dequantize(self, integers: LazyTensor, parts: list[LazyTensor], spec: TensorSpec) -> memoryview:
        import numpy as np

        scale, zero_point = self.scale, self.zero_point
        values = np.frombuffer(integers.read(), integers.spec.dtype).reshape(spec.shape).astype(np.int64)
        if parts:  # torch multiplies in float64 here, in float32 below
            along = [-1 if axis == self.axis else 1 for axis in range(len(spec.shape))]
            scale = np.frombuffer(parts[0].read(), np.float64).reshape(along)
            zero_point = np.frombuffer(parts[1].read(), np.int64).reshape(along)
            floats = ((values - zero_point) * scale).astype(np.float32)
        else:
            floats = (values - zero_point).astype(np.float32) * np.float32(scale)
        return np.ascontiguousarray(floats).reshape(-1).view(np.uint8).data


def rebuild_quantized(
    storage: Any, offset: Any, shape: Any, strides: Any, quantizer: Any, _grad: Any = None, _hooks: Any = None
) -> Quantized | Opaque:
    """What torch's `_rebuild_qtensor` would make. Raises TypeError or ValueError for what makes no sense."""
    if not isinstance(storage, Storage):
        raise TypeError
    integers = View(storage, storage.dtype, offset, shape, strides)
    scheme, scale, zero_point, *axis = quantizer
    if storage.dtype in INTEGERS:
        is_number = type(scale) in (int, float) and type(zero_point) is int and abs(zero_point) < 1 << 31
        if scheme == PER_TENSOR and not axis and is_number:
            return Quantized(integers, scale, zero_point, None)
        if scheme == PER_CHANNEL and len(axis) == 1 and _is_view(scale) and _is_view(zero_point):
            return Quantized(integers, scale, zero_point, axis[0])
    what = f"{storage.dtype} and {scheme}" if isinstance(scheme, Symbol) else storage.dtype
    return Opaque(Symbol("torch", "Tensor"), f"is quantized with {what}; dequantize it and save again")


def _is_view(part: Any) -> bool:
    return isinstance(part, View)
