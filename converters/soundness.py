"""Soundness: values that no trained model has.

A training that diverged leaves NaN, infinity or a variance below zero, and a damaged file may hold them. Whatever
computes with them gives NaN, so that they are told before a model is.
"""

from __future__ import annotations

import os

from converters.tensors import TensorSpec

__all__ = ["find_fault"]

AT_ONCE = 1 << 15  # elements: they stay in the cache of a core, and torch leaves them to one thread


def find_fault(file: int, start: int, spec: TensorSpec, above: float | None = None) -> str | None:
    """What is wrong with the tensor that stands there in an open file; `above`: which every value has to exceed.

    Raises OSError.
    """
    import torch

    dtype = getattr(torch, spec.dtype)
    if not (dtype.is_floating_point and dtype.itemsize > 1) or not spec.numel:
        return None
    place, end, smallest = start, start + spec.nbytes, float("inf")
    buffer = bytearray(min(AT_ONCE * dtype.itemsize, spec.nbytes))
    while place < end:
        count = os.preadv(file, [memoryview(buffer)[: end - place]], place)
        if not count:
            return "is not there"
        low, high = map(float, torch.aminmax(torch.frombuffer(buffer, dtype=dtype, count=count // dtype.itemsize)))
        if low != low:
            return "holds NaN"
        if float("inf") in (-low, high):
            return "holds infinity"
        smallest, place = min(smallest, low), place + count
    if above is not None and smallest <= above:
        return f"is a variance, and holds {smallest:g}"
    return None
