"""A stand-in for Big Transfer's ResNet, in linen: the function of the paper, under the names of its files.

Weights are standardised with 1e-10, group norms have 32 groups and 1e-5, and the stem's pool sees zeros around it.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

__all__ = ["ResNet"]


class Convolution(nn.Module):
    """A convolution whose kernel has mean 0 and variance 1 for each output, padded alike on all sides."""

    features: int
    size: int = 1
    stride: int = 1

    @nn.compact
    def __call__(self, x):
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        kernel = (kernel - kernel.mean((0, 1, 2))) / jnp.sqrt(kernel.var((0, 1, 2)) + 1e-10)
        pad = [(self.size // 2,) * 2] * 2
        return nn.Conv(self.features, shape[:2], self.stride, pad, use_bias=False).apply(
            {"params": {"kernel": kernel}}, x
        )


class Norm(nn.Module):
    @nn.compact
    def __call__(self, x):
        gamma, beta = (self.param(name, nn.initializers.ones, x.shape[-1:]) for name in ("gamma", "beta"))
        groups = x.reshape(*x.shape[:-1], 32, -1)
        mean, variance = (f(groups, axis=(1, 2, 4), keepdims=True) for f in (jnp.mean, jnp.var))
        return ((groups - mean) / jnp.sqrt(variance + 1e-5)).reshape(x.shape) * gamma + beta


class Part(nn.Module):
    """A norm and a convolution; `project` gives the shortcut, where the unit has one of its own."""

    features: int
    size: int = 1
    stride: int = 1
    project: tuple[int, int] | None = None

    @nn.compact
    def __call__(self, x):
        y = nn.relu(Norm(name="group_norm")(x))
        shortcut = x
        if self.project:
            shortcut = Projection(*self.project, name="proj")(y)
        return Convolution(self.features, self.size, self.stride, name="standardized_conv2d")(y), shortcut


class Projection(nn.Module):
    features: int
    stride: int

    @nn.compact
    def __call__(self, x):
        return Convolution(self.features, 1, self.stride, name="standardized_conv2d")(x)


class Unit(nn.Module):
    features: int
    stride: int

    @nn.compact
    def __call__(self, x):
        wide = 4 * self.features
        project = (wide, self.stride) if self.stride > 1 or x.shape[-1] != wide else None
        y, shortcut = Part(self.features, project=project, name="a")(x)
        y, _ = Part(self.features, 3, self.stride, name="b")(y)
        y, _ = Part(wide, name="c")(y)
        return y + shortcut


class Block(nn.Module):
    units: int
    features: int
    stride: int

    @nn.compact
    def __call__(self, x):
        for number in range(self.units):
            x = Unit(self.features, 1 if number else self.stride, name=f"unit{number + 1:02d}")(x)
        return x


class Root(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x):
        x = Convolution(self.features, 7, 2, name="standardized_conv2d")(x)
        x = jnp.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
        return nn.max_pool(x, (3, 3), (2, 2), "VALID")


class Head(nn.Module):
    classes: int

    @nn.compact
    def __call__(self, x):
        return nn.Conv(self.classes, (1, 1), name="conv2d")(x)


class Body(nn.Module):
    classes: int
    units: tuple[int, ...]
    width: int

    @nn.compact
    def __call__(self, x):
        x = Root(self.width, name="root_block")(x)
        for number, units in enumerate(self.units):
            x = Block(units, self.width << number, 2 if number else 1, name=f"block{number + 1}")(x)
        x = nn.relu(Norm(name="group_norm")(x)).mean((1, 2), keepdims=True)
        return Head(self.classes, name="head")(x)[:, 0, 0] if self.classes else x[:, 0, 0]


class ResNet(nn.Module):
    num_classes: int
    units: tuple[int, ...]
    width_factor: int = 1

    @nn.compact
    def __call__(self, x):
        return Body(self.num_classes, self.units, 64 * self.width_factor, name="resnet")(x)
