"""Calculations: the ops that compute elements, on float64 tensors, and what fills those that no source has."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["FORMULAS", "add", "constant", "difference", "magnitude", "root", "scale", "standardize", "std_eps", "total"]

Tensors = list["torch.Tensor"]


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


def standardize(tensors: Tensors, eps: float) -> Tensors:
    """Kernels (out, ...) without their mean, over the root of their variance + `eps`."""
    kernels = [tensor.flatten(1) for tensor in tensors]
    scales = [(k.var(1, correction=0, keepdim=True) + eps).sqrt() for k in kernels]
    return [
        ((k - k.mean(1, keepdim=True)) / scale).reshape(t.shape)
        for k, scale, t in zip(kernels, scales, tensors, strict=True)
    ]


def std_eps(tensors: Tensors, source: float, target: float) -> Tensors:
    """Kernels (out, ...) scaled so that to divide by the root of their variance + `target` is to divide them, as they
    came, by their standard deviation + `source`."""
    kernels = [tensor.flatten(1) for tensor in tensors]
    scales = [(target / (2 * source * k.std(1, correction=0) + source**2)) ** 0.5 for k in kernels]
    return [(k * scale[:, None]).reshape(t.shape) for k, scale, t in zip(kernels, scales, tensors, strict=True)]


def constant(value: int | float | str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of one value, or in float64 what a formula of FORMULAS gives for its shape. Raises ValueError."""
    import torch

    return FORMULAS[value](shape) if isinstance(value, str) else torch.full(shape, value, dtype=dtype)


def _sincos2d(shape: tuple[int, ...]) -> torch.Tensor:
    """Fixed positions of a square grid (1, rows x columns, width): sin x, cos x, sin y, cos y, as MoCo v3 has them.

    >>> constant("sincos2d", (1, 4, 8), None)[0, :, 0].tolist() == [0, math.sin(1), 0, math.sin(1)]
    True
    """
    import torch

    _, count, width = shape
    side, bands = math.isqrt(count), width // 4
    if side * side != count or bands * 4 != width or bands < 2:
        raise ValueError(f"sincos2d wants a square grid and a width in fours, not {count} places and {width}")
    places = torch.arange(count, dtype=torch.float64)
    angles = 10000.0 ** -(torch.arange(bands, dtype=torch.float64) / (bands - 1))
    x, y = (places % side)[:, None] * angles, (places // side)[:, None] * angles
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], 1)[None]


def _identity(shape: tuple[int, ...]) -> torch.Tensor:
    """A matrix or a kernel (channels, channels, ...) that gives every channel as it came.

    >>> constant("identity", (2, 2, 3), None).tolist()
    [[[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]], [[0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]]
    """
    import torch

    if len(shape) < 2 or shape[0] != shape[1]:
        raise ValueError(f"identity wants as many inputs as outputs, not the shape {shape}")
    kernel, middle = torch.zeros(shape, dtype=torch.float64), [size // 2 for size in shape[2:]]
    for channel in range(shape[0]):
        kernel[(channel, channel, *middle)] = 1
    return kernel


FORMULAS: dict[str, Callable[[tuple[int, ...]], torch.Tensor]] = {"identity": _identity, "sincos2d": _sincos2d}
