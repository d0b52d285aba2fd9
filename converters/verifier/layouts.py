"""How activations of paired modules lie on either side: axes as the mapping's `taps:` say, channels as its ops do.

A pair's layout turns timm's activation into the reference's, if it has the rank that the layout takes; others lie
alike. The way back needs timm's shape, as it splits what was merged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from converters.ops import Pipeline
from converters.verifier.taps import Pair

if TYPE_CHECKING:
    import torch

__all__ = ["as_source", "as_timm", "channel_axis", "reordered"]


def as_source(pair: Pair, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of timm's as the reference lays it out. Raises OpError."""
    (laid,) = _layout(pair, tensor.ndim).run([tensor])
    return laid


def as_timm(pair: Pair, tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A tensor of the reference's as timm lays out `like`. Raises OpError."""
    (laid,) = _layout(pair, like.ndim).invert([tuple(like.shape)]).run([tensor])
    return laid


def channel_axis(pair: Pair, tensor: torch.Tensor) -> int:
    """The axis of timm's that the layout calls `c`; without a layout the second of four, and the last of others."""
    layout = _layout(pair, tensor.ndim)
    axes = layout.ops[0].text.split("->")[0].split() if layout.ops else []
    if "c" in axes and len(axes) == tensor.ndim:
        return axes.index("c")
    return 1 if tensor.ndim == 4 else tensor.ndim - 1


def reordered(tensor: torch.Tensor, pair: Pair, module: Any, kind: str) -> torch.Tensor:
    """The reference's "input" or "output" of timm's `module` with the channels in timm's order."""
    order = _order(pair, module, kind)
    if order is None:
        return tensor
    second = "2d" in type(module).__name__  # of these alone, channels are not the last axis
    return tensor.index_select(1 if second else tensor.ndim - 1, order)


def _layout(pair: Pair, rank: int) -> Pipeline:
    ops = Pipeline.parse(pair.layout)
    return ops if ops.ops and ops.ops[0].rank in (None, rank) else Pipeline()


def _order(pair: Pair, module: Any, kind: str) -> torch.Tensor | None:
    """Which channel comes where, read off the weight: its rows give the outputs, its columns take the inputs."""
    import torch

    shape = getattr(getattr(module, "weight", None), "shape", ())
    if not pair.order or not shape:
        return None
    axis = 1 if kind == "input" and len(shape) > 1 and shape[1] > 1 else 0
    numbers = torch.arange(shape[axis]).reshape([-1 if a == axis else 1 for a in range(len(shape))]).expand(shape)
    (moved,) = Pipeline.parse(pair.order).run([numbers])
    order = moved.movedim(axis, 0).reshape(shape[axis], -1)
    return order[:, 0] if bool((order == order[:, :1]).all()) else None  # or it is no order of channels
