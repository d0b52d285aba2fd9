"""Calculations: the ops that compute elements, on float64 tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["add", "constant", "difference", "magnitude", "root", "scale", "std_eps", "total"]

Tensors = list["torch.Tensor"]


def constant(value: int | float | str, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    """A tensor of one value; an `identity` of shape (channels, channels, ...) has ones in the middle of its kernels.

    >>> constant("identity", (2, 2, 3), "float32").tolist()
    [[[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]], [[0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]]
    """
    import torch

    if not isinstance(value, str):
        return torch.full(shape, value, dtype=getattr(torch, dtype))
    tensor = torch.zeros(shape, dtype=getattr(torch, dtype))
    middle = [size // 2 for size in shape[2:]]
    for channel in range(shape[0]):
        tensor[(channel, channel, *middle)] = 1
    return tensor


def total(tensors: Tensors) -> Tensors:
    """The sum of all."""
    import torch

    return [torch.stack(tensors).sum(0)]


def difference(tensors: Tensors) -> Tensors:
    """The first without the others."""
    import torch

    return [tensors[0] - torch.stack([torch.zeros_like(tensors[0]), *tensors[1:]]).sum(0)]


def magnitude(tensors: Tensors) -> Tensors:
    """Absolute values."""
    return [tensor.abs() for tensor in tensors]


def root(tensors: Tensors) -> Tensors:
    """Square roots."""
    return [tensor.sqrt() for tensor in tensors]


def add(tensors: Tensors, constant: float) -> Tensors:
    """A constant more."""
    return [tensor + constant for tensor in tensors]


def scale(tensors: Tensors, constant: float) -> Tensors:
    """A constant times as much."""
    return [tensor * constant for tensor in tensors]


def std_eps(tensors: Tensors, source: float, target: float) -> Tensors:
    """Kernels (out, ...) scaled so that to divide by the root of their variance + `target` is to divide them, as they
    came, by their standard deviation + `source`."""
    kernels = [tensor.flatten(1) for tensor in tensors]
    scales = [(target / (2 * source * k.std(1, correction=0) + source**2)) ** 0.5 for k in kernels]
    return [(k * scale[:, None]).reshape(t.shape) for k, scale, t in zip(kernels, scales, tensors, strict=True)]
