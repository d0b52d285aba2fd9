"""Tensors as every floor passes them on: a spec beside raw bytes, with no framework imported.

Readers hand out `LazyTensor`s, the emitter writes their bytes; only a step that has an op to run turns
them into torch tensors in between.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["DTYPES", "LazyTensor", "TensorSpec", "from_torch", "size_of", "to_torch"]

DTYPES: dict[str, tuple[str, int]] = {  # torch's name: safetensors' code, bytes an element
    "float64": ("F64", 8),
    "float32": ("F32", 4),
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "float8_e4m3fn": ("F8_E4M3", 1),
    "float8_e5m2": ("F8_E5M2", 1),
    "complex64": ("C64", 8),
    "int64": ("I64", 8),
    "int32": ("I32", 4),
    "int16": ("I16", 2),
    "int8": ("I8", 1),
    "uint64": ("U64", 8),
    "uint32": ("U32", 4),
    "uint16": ("U16", 2),
    "uint8": ("U8", 1),
    "bool": ("BOOL", 1),
}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What is known of a tensor before a byte of it is read.

    >>> TensorSpec("norm.weight", (768,), "float16").nbytes
    1536
    """

    name: str
    shape: tuple[int, ...]
    dtype: str  # a key of DTYPES

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPES[self.dtype][1]

    @property
    def kind(self) -> str:
        """What the dtype holds: a cast between two of a kind may round, between kinds it means something else."""
        return next(kind for kind in ("float", "int", "complex", "bool") if kind in self.dtype)


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A spec and the way to its bytes.

    `read()` returns exactly `spec.nbytes` bytes, C-contiguous and little-endian, in writable memory that
    nobody else holds. It raises CheckpointError when the file is damaged there.

    Where these bytes stand in a file as they are, `copy(file descriptor, offset)` copies them there without
    bringing them into memory. It leaves checksums to `Checkpoint.sha256`, which reads every byte anyway.
    """

    spec: TensorSpec
    read: Callable[[], memoryview]
    copy: Callable[[int, int], None] | None = None
    lossy: str = ""  # what its values went through before: "dequantized from qint8"


def size_of(shape: Iterable[int]) -> str:
    """A shape as it is told.

    >>> size_of((2, 3)), size_of(())
    ('2x3', 'scalar')
    """
    return "x".join(map(str, shape)) or "scalar"


def to_torch(raw: memoryview, spec: TensorSpec) -> torch.Tensor:
    """The bytes of `spec` as a torch tensor that shares their memory."""
    import torch

    dtype = getattr(torch, spec.dtype)
    if not spec.numel:
        return torch.empty(spec.shape, dtype=dtype)
    return torch.frombuffer(raw, dtype=dtype).reshape(spec.shape)


def from_torch(tensor: torch.Tensor) -> memoryview:
    """The C-contiguous bytes of a CPU tensor; they share its memory where it is contiguous already."""
    import torch

    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
