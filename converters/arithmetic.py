"""Arithmetic: what the ops that calculate do to tensors, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["CONSTANT", "CONSTANTS", "GATHERING"]

Tensors = list["torch.Tensor"]


def _sum(tensors: Tensors) -> Tensors:
    import torch

    return [torch.stack(tensors).sum(0)]


def _sub(tensors: Tensors) -> Tensors:
    import torch

    return [tensors[0] - torch.stack([torch.zeros_like(tensors[0]), *tensors[1:]]).sum(0)]


def _abs(tensors: Tensors) -> Tensors:
    return [tensor.abs() for tensor in tensors]


def _sqrt(tensors: Tensors) -> Tensors:
    return [tensor.sqrt() for tensor in tensors]


def _add(tensors: Tensors, constant: float) -> Tensors:
    return [tensor + constant for tensor in tensors]


def _scale(tensors: Tensors, constant: float) -> Tensors:
    return [tensor * constant for tensor in tensors]


def _std_eps(tensors: Tensors, source: float, target: float) -> Tensors:
    kernels = [tensor.flatten(1) for tensor in tensors]
    scales = [(target / (2 * source * k.std(1, correction=0) + source**2)) ** 0.5 for k in kernels]
    return [(k * scale[:, None]).reshape(t.shape) for k, scale, t in zip(kernels, scales, tensors, strict=True)]


GATHERING: dict[str, Callable[[Tensors], Tensors]] = {"abs": _abs, "sqrt": _sqrt, "sub": _sub, "sum": _sum}
CONSTANT: dict[str, Callable[..., Tensors]] = {"add": _add, "scale": _scale, "std_eps": _std_eps}
CONSTANTS = {"add": 1, "scale": 1, "std_eps": 2}  # how many each takes
