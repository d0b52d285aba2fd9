"""Normalizers: ops that change what a tensor holds, for a size, channels or classes that the user asked for.

Each calculates in float64 and rounds once, and each but `rows` that keeps every row is lossy: none is used unless
the user asks, or timm has no room for the source's own size. Their texts stand in the plan and in conversion.json.

Where timm resamples, these are timm's formulas: the pseudo-inverse of FlexiViT (Beyer et al. 2022) for patches,
antialiased bicubic interpolation for positions, and BEiT's geometric grid for tables of relative positions.
`plain` is bicubic or bilinear interpolation without antialiasing, as many source repositories have it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from converters.ops import Op, Tensors
from converters.tensors import size_of

if TYPE_CHECKING:
    import torch

__all__ = [
    "WAYS",
    "channels",
    "offsets",
    "patches",
    "position_map",
    "positions",
    "rows",
    "table",
    "zeros",
]

Size = tuple[int, int]  # height and width
WAYS = ("timm", "bicubic", "bilinear")  # how to resample


def patches(old: Size, new: Size, way: str) -> Op:
    """A patch embedding (out, in, height, width) for patches of another size."""
    if way != "timm":
        return _op(f"interpolate patches {size_of(old)} -> {size_of(new)}, {way}", lambda t: _interpolate(t, new, way))

    def resample(tensor: torch.Tensor) -> torch.Tensor:
        import torch

        basis = torch.eye(old[0] * old[1], dtype=torch.float64).reshape(-1, 1, *old)
        matrix = _interpolate(basis, new, way).reshape(old[0] * old[1], -1).T  # how a patch's pixels are resized
        return (tensor.flatten(2) @ torch.linalg.pinv(matrix)).reshape(*tensor.shape[:2], *new)

    return _op(f"resample patches {size_of(old)} -> {size_of(new)}, pseudo-inverse of bicubic", resample)


def positions(old: Size, new: Size, prefix: int, way: str) -> Op:
    """Position embeddings (1, prefix tokens + height * width, features) for another grid; the prefix stays."""

    def resample(tensor: torch.Tensor) -> torch.Tensor:
        import torch

        grid = tensor[:, prefix:].reshape(1, *old, -1).permute(0, 3, 1, 2)
        tokens = _interpolate(grid, new, way).flatten(2).transpose(1, 2)
        return torch.cat([tensor[:, :prefix], tokens], dim=1)

    behind = f" behind {prefix} prefix tokens" if prefix else ""
    return _op(f"resample positions {size_of(old)} -> {size_of(new)}{behind}, {_name(way)}", resample)


def position_map(old: Size, new: Size, features_last: bool, way: str) -> Op:
    """Position embeddings that are a map, (1, height, width, features) or (1, features, height, width)."""

    def resample(tensor: torch.Tensor) -> torch.Tensor:
        if not features_last:
            return _interpolate(tensor, new, way)
        return _interpolate(tensor.permute(0, 3, 1, 2), new, way).permute(0, 2, 3, 1)

    return _op(f"resample positions {size_of(old)} -> {size_of(new)}, {_name(way)}", resample)


def table(old: Size, new: Size, extra: int, way: str) -> Op:
    """Relative position biases for windows of another size: (rows, heads), whose last `extra` rows are of tokens."""
    (old_h, old_w), (new_h, new_w) = ((2 * size[0] - 1, 2 * size[1] - 1) for size in (old, new))

    def resample(tensor: torch.Tensor) -> torch.Tensor:
        import torch

        tokens = tensor[tensor.shape[0] - extra :]
        grid = tensor[: tensor.shape[0] - extra].T.reshape(-1, old_h, old_w)
        if way == "timm":
            grid = _geometric(old_h, new_h) @ grid @ _geometric(old_w, new_w).T
        else:
            grid = _interpolate(grid[None], (new_h, new_w), way)[0]
        return torch.cat([grid.flatten(1).T, tokens])

    name = "geometric grid" if way == "timm" else way
    return _op(f"resample biases of windows {size_of(old)} -> {size_of(new)}, {name}", resample)


def offsets(old: Size, new: Size, way: str) -> Op:
    """Attention biases by absolute offset, (heads, height * width), for another grid."""

    def resample(tensor: torch.Tensor) -> torch.Tensor:
        return _interpolate(tensor.reshape(1, -1, *old), new, way).reshape(tensor.shape[0], -1)

    return _op(f"resample biases of offsets {size_of(old)} -> {size_of(new)}, {_name(way)}", resample)


def channels(old: int, new: int, alpha: bool = False) -> Op:
    """The first convolution (out, pixels * old, height, width) for images of `new` channels.

    One channel is the sum of all, several are the old ones in turn, scaled by old / new, as in timm. `alpha`
    leaves the old channels as they are and gives the new ones no weight.
    """

    def adapt(tensor: torch.Tensor) -> torch.Tensor:
        import torch

        grouped = tensor.reshape(tensor.shape[0], -1, old, *tensor.shape[2:])  # a stem may fold pixels into channels
        if alpha:
            more = grouped.new_zeros(*grouped.shape[:2], new - old, *grouped.shape[3:])
            grouped = torch.cat([grouped, more], dim=2)
        elif new == 1:
            grouped = grouped.sum(dim=2, keepdim=True)
        else:
            grouped = grouped[:, :, [i % old for i in range(new)]] * (old / new)
        return grouped.flatten(1, 2)

    how = "no weight for the new" if alpha else "sum" if new == 1 else f"repeated, times {old}/{new}"
    return _op(f"channels {old} -> {new}, {how}", adapt)


def rows(indices: Sequence[int]) -> Op:
    """A classifier's weight or bias for these of its classes, in this order."""
    first, last = indices[0], indices[-1]
    listed = f"{first}..{last}" if list(indices) == list(range(first, last + 1)) else f"{len(indices)} of a list"
    return _op(f"classes {listed}", lambda tensor: tensor[list(indices)])


def zeros(count: int) -> Op:
    """A classifier's weight or bias for other classes: zeros, to be trained."""
    return _op(f"{count} new classes, zeros", lambda tensor: tensor.new_zeros(count, *tensor.shape[1:]))


def _op(text: str, function: Callable[[torch.Tensor], torch.Tensor]) -> Op:
    def run(tensors: Tensors, parts: int) -> Tensors:
        return [function(tensor.double()).to(tensor.dtype) for tensor in tensors]

    return Op(text, run, None)


def _interpolate(maps: torch.Tensor, size: Size, way: str) -> torch.Tensor:
    """(images, features, height, width) at another size."""
    from torch.nn.functional import interpolate

    mode = "bicubic" if way == "timm" else way
    return interpolate(maps, size=size, mode=mode, antialias=way == "timm", align_corners=False)


def _geometric(old: int, new: int) -> torch.Tensor:
    """The matrix (new, old) that interpolates linearly from `old` points, whose distances grow by a ratio from the
    middle outwards so that they cover the `new` ones, to these, which are evenly spaced."""
    import torch

    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        reach = (1 - ratio ** (old // 2)) / (1 - ratio)
        low, high = (low, ratio) if reach > new // 2 else (ratio, high)
    half = [sum(ratio**k for k in range(i + 1)) for i in range(old // 2)]
    points = torch.tensor([*(-x for x in reversed(half)), 0.0, *half], dtype=torch.float64)
    wanted = torch.arange(new, dtype=torch.float64) - new // 2
    right = torch.bucketize(wanted, points).clamp(1, old - 1)
    share = ((wanted - points[right - 1]) / (points[right] - points[right - 1])).clamp(0, 1)
    matrix = torch.zeros(new, old, dtype=torch.float64)
    matrix[torch.arange(new), right - 1] = 1 - share
    matrix[torch.arange(new), right] = share
    return matrix


def _name(way: str) -> str:
    return "antialiased bicubic" if way == "timm" else way
