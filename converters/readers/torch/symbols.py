"""Torch symbols: what the calls that torch's pickles name would make.

None is looked up or called. A tensor becomes a View, or Quantized; what can be none here keeps the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from converters.readers.pickles import Opaque, Symbol
from converters.readers.torch.quantized import Quantized, rebuild_quantized
from converters.readers.torch.storages import Storage, View

__all__ = ["MEANINGS", "why_no_tensor"]


def why_no_tensor(symbol: Symbol) -> str | None:
    """The reason why what `symbol` makes is no tensor here; None if it would not be one anywhere."""
    if symbol.module.startswith("torch.distributed"):
        return "is one process's part of a distributed tensor; gather the full state dict and save that"
    if ".quantized." in symbol.module:
        return "is a quantized layer with its weights packed; convert the float model"
    return REASONS.get(symbol.name) if symbol.module.startswith("torch.") else None


REASONS = {
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


def _rebuild_subclass(function: Any, kind: Any, arguments: Any, _state: Any = None) -> View | Quantized | Opaque:
    if not isinstance(kind, Symbol):
        raise TypeError
    rebuild = TENSORS.get(function)
    return rebuild(*arguments) if rebuild else Opaque(kind, why_no_tensor(kind) or f"is a {kind}, not a plain tensor")


TENSORS: dict[Symbol, Callable[..., View | Quantized | Opaque]] = {
    Symbol("torch._utils", "_rebuild_tensor"): _rebuild_typed,
    Symbol("torch._utils", "_rebuild_tensor_v2"): _rebuild_typed,
    Symbol("torch._utils", "_rebuild_tensor_v3"): _rebuild_untyped,
    Symbol("torch._utils", "_rebuild_qtensor"): rebuild_quantized,
}
MEANINGS: dict[Symbol, Callable[..., Any]] = {
    **TENSORS,
    Symbol("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    Symbol("torch._utils", "_rebuild_parameter_with_state"): lambda data, *_: data,
    Symbol("torch._tensor", "_rebuild_from_type_v2"): _rebuild_subclass,
    Symbol("torch", "Size"): lambda shape=(): tuple(shape),
    Symbol("torch", "device"): lambda kind, *_: kind,
}
