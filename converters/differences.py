"""Differences between two checkpoints, or a checkpoint and a timm model: names, shapes, dtypes and values.

One pair of tensors is in memory at a time. Names are matched as they are; if none is on both sides, the leading
modules whose removal matches most names are taken off one side, and the difference says so. Against a timm model
names and shapes are compared, and no data is read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from converters.errors import TargetError
from converters.readers import Checkpoint, open_checkpoint
from converters.tensors import TensorSpec, to_torch

if TYPE_CHECKING:
    import torch

__all__ = ["Ailment", "Difference", "Distance", "Pair", "diff"]

_CHUNK = 1 << 20  # elements that are compared at once
_MEANS = {"running_var": "running_mean", "moving_variance": "moving_mean", "var": "mean"}  # leaves of batch norms
_GAINS = ("weight", "gamma", "scale")


@dataclass(frozen=True)
class Distance:
    """How far two tensors of one shape are apart; distances are over the elements that are finite on both sides."""

    elements: int  # that differ; NaN is equal to NaN
    max_abs: float
    relative_l2: float  # of the difference, to the first
    ulps: int | None  # the most; None where the dtypes differ or count nothing in between


@dataclass(frozen=True)
class Pair:
    """A tensor of both sides."""

    name: str
    other: str  # its name in the second
    first: TensorSpec
    second: TensorSpec
    distance: Distance | None = None  # None where the values are equal or were not compared

    @property
    def shapes_differ(self) -> bool:
        return self.first.shape != self.second.shape

    @property
    def dtypes_differ(self) -> bool:
        return self.first.dtype != self.second.dtype


@dataclass(frozen=True)
class Ailment:
    """What is wrong with a tensor whatever it is compared with; it makes no difference by itself."""

    side: str  # first or second
    name: str
    kind: str  # "NaN", "Inf", "variance of 0", "statistics of a new batch norm", "gain of 0 throughout"
    elements: int


@dataclass(frozen=True)
class Difference:
    """What two sides have in common, and what not."""

    first: str
    second: str
    against_model: bool  # names and shapes only
    prefixes: tuple[str, str]  # taken off, because no name was on both sides
    pairs: tuple[Pair, ...]
    missing: tuple[TensorSpec, ...]  # in the first only
    extra: tuple[TensorSpec, ...]  # in the second only
    ailments: tuple[Ailment, ...]

    @property
    def shapes(self) -> tuple[Pair, ...]:
        return tuple(pair for pair in self.pairs if pair.shapes_differ)

    @property
    def dtypes(self) -> tuple[Pair, ...]:
        return () if self.against_model else tuple(pair for pair in self.pairs if pair.dtypes_differ)

    @property
    def values(self) -> tuple[Pair, ...]:
        return tuple(pair for pair in self.pairs if pair.distance)

    @property
    def equal(self) -> bool:
        """Whether the second has the first's names, shapes, dtypes and values, or a model its names and shapes."""
        return not (self.missing or self.extra or self.shapes or self.dtypes or self.values)


def diff(
    first: str | os.PathLike[str],
    second: str | os.PathLike[str],
    *,
    keys: tuple[str | None, str | None] = (None, None),
    ema: bool | None = None,
    args: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Difference:
    """Compare a checkpoint with another, or with a timm model by its name, built with `args`.

    `keys` say where each side's state dict lies in its file; see `open_checkpoint` for these and for `ema`.
    `progress` is told the bytes compared and in all. Raises CheckpointError, or TargetError over `args`.
    """
    one = open_checkpoint(first, key=keys[0], ema=ema)
    other = _model_specs(second, dict(args or {}))
    if other is not None:
        found = _Comparison(one.specs, other)
        return found.difference(str(first), str(second), against_model=True)
    if args:
        raise TargetError(f"{os.fspath(second)} is no timm model, so that it takes no arguments")
    two = open_checkpoint(second, key=keys[1], ema=ema)
    found = _Comparison(one.specs, two.specs)
    pairs, ailments = found.compare(one, two, progress or (lambda done, total: None))
    return found.difference(str(first), str(second), pairs=pairs, ailments=ailments)


def _model_specs(name: str | os.PathLike[str], args: dict[str, Any]) -> dict[str, TensorSpec] | None:
    """A timm model's tensors, or None where this is no model's name; a path that is there is never taken for one."""
    if not isinstance(name, str) or "/" in name or os.path.exists(name):
        return None
    from converters.target import build_skeleton, is_known

    return build_skeleton(name, args).specs if is_known(name) else None


class _Comparison:
    def __init__(self, first: Mapping[str, TensorSpec], second: Mapping[str, TensorSpec]) -> None:
        self.first, self.second = first, second
        self.prefixes = _prefixes(first, second)
        theirs = {name.removeprefix(self.prefixes[1]): name for name in second}
        self.common = {name: theirs[bare] for name in first if (bare := name.removeprefix(self.prefixes[0])) in theirs}

    def difference(
        self,
        first: str,
        second: str,
        *,
        against_model: bool = False,
        pairs: Iterable[Pair] | None = None,
        ailments: Iterable[Ailment] = (),
    ) -> Difference:
        if pairs is None:
            pairs = [Pair(a, b, self.first[a], self.second[b]) for a, b in self.common.items()]
        there = set(self.common.values())
        missing = tuple(spec for name, spec in self.first.items() if name not in self.common)
        extra = tuple(spec for name, spec in self.second.items() if name not in there)
        return Difference(first, second, against_model, self.prefixes, tuple(pairs), missing, extra, tuple(ailments))

    def compare(
        self, one: Checkpoint, two: Checkpoint, progress: Callable[[int, int], None]
    ) -> tuple[list[Pair], list[Ailment]]:
        """Every pair with its distance, and the ailments of both sides, each tensor being read once."""
        total = sum(spec.nbytes for side in (self.first, self.second) for spec in side.values())
        done, wards = 0, (_Ward("first"), _Ward("second"))

        def load(checkpoint: Checkpoint, name: str, ward: _Ward) -> torch.Tensor:
            nonlocal done
            lazy = checkpoint.tensors[name]
            tensor = to_torch(lazy.read(), lazy.spec).reshape(-1)
            ward.examine(lazy.spec, tensor)
            done += lazy.spec.nbytes
            progress(done, total)
            return tensor

        def measure(pair: Pair) -> Pair:
            ours, theirs = load(one, pair.name, wards[0]), load(two, pair.other, wards[1])
            return pair if pair.shapes_differ else replace(pair, distance=_distance(ours, theirs))

        pairs = [measure(Pair(a, b, self.first[a], self.second[b])) for a, b in self.common.items()]
        there = set(self.common.values())
        for checkpoint, ward, known in ((one, wards[0], self.common.keys()), (two, wards[1], there)):
            for name in checkpoint.tensors:
                if name not in known:
                    load(checkpoint, name, ward)
        return pairs, [*wards[0].ailments(), *wards[1].ailments()]


def _prefixes(first: Iterable[str], second: Iterable[str]) -> tuple[str, str]:
    """What to take off either side's names so that some match: nothing if some do already.

    >>> _prefixes(["backbone.a.w", "backbone.b.w", "head.w"], ["a.w", "b.w"])
    ('backbone.', '')
    """
    ours, theirs = set(first), set(second)
    if ours & theirs:
        return "", ""
    ways = [(len(theirs & _below(prefix, ours)), -len(prefix), (prefix, "")) for prefix in _leading(ours)]
    ways += [(len(ours & _below(prefix, theirs)), -len(prefix), ("", prefix)) for prefix in _leading(theirs)]
    matches, _, prefixes = max(ways, default=(0, 0, ("", "")))
    return prefixes if matches else ("", "")


def _leading(names: set[str]) -> list[str]:
    """The first segment of the names, and the first two."""
    parts = [name.split(".") for name in names]
    return sorted({".".join(part[:depth]) + "." for part in parts for depth in (1, 2) if len(part) > depth})


def _below(prefix: str, names: set[str]) -> set[str]:
    return {name.removeprefix(prefix) for name in names if name.startswith(prefix)}


@dataclass(frozen=True)
class _Vector:
    """A tensor of one axis, which may be a batch norm's."""

    elements: int
    zeros: int
    constant: float | None  # its one value, if it has one


class _Ward:
    """What is wrong with one side's tensors, gathered while they pass."""

    def __init__(self, side: str) -> None:
        self.side, self.found, self.vectors = side, list[Ailment](), dict[str, _Vector]()

    def examine(self, spec: TensorSpec, tensor: torch.Tensor) -> None:
        nans = infinities = zeros = 0
        for chunk in _chunks(tensor):
            values = _wide(chunk)
            if not values.is_floating_point():
                return
            nans += int(values.isnan().sum())
            infinities += int(values.isinf().sum())
            zeros += int((values == 0).sum())
        self._tell(spec.name, "NaN", nans)
        self._tell(spec.name, "Inf", infinities)
        if len(spec.shape) == 1 and spec.numel:
            constant = float(tensor[0]) if bool((tensor == tensor[0]).all()) else None
            self.vectors[spec.name] = _Vector(spec.numel, zeros, constant)

    def _tell(self, name: str, kind: str, elements: int) -> None:
        if elements:
            self.found.append(Ailment(self.side, name, kind, elements))

    def ailments(self) -> list[Ailment]:
        """All of them, those of whole batch norms last."""
        for name, variance in self.vectors.items():
            cut = max(name.rfind("."), name.rfind("/")) + 1
            module, leaf = name[:cut], name[cut:]
            mean = self.vectors.get(module + _MEANS.get(leaf, ""))
            if leaf not in _MEANS or mean is None:
                continue
            self._tell(name, "variance of 0", variance.zeros)
            if (mean.constant, variance.constant) == (0, 1):
                self._tell(name, "statistics of a new batch norm", variance.elements)
            for gain in (module + leaf for leaf in _GAINS):
                if gain in self.vectors and self.vectors[gain].constant == 0:
                    self._tell(gain, "gain of 0 throughout", self.vectors[gain].elements)
        return self.found


def _chunks(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    return iter(tensor.split(_CHUNK) if tensor.numel() else ())


def _wide(values: torch.Tensor) -> torch.Tensor:
    """Values in a dtype that every operation takes: float64, or int64 for whole numbers."""
    import torch

    if values.is_complex():
        values = torch.view_as_real(values).reshape(-1)
    return values.to(torch.float64 if values.is_floating_point() else torch.int64)


def _distance(first: torch.Tensor, second: torch.Tensor) -> Distance | None:
    """How far they are apart; None if nowhere. A chunk at a time."""
    elements, largest, squares, norm = 0, 0.0, 0.0, 0.0
    ulps: int | None = 0 if first.dtype == second.dtype and first.is_floating_point() else None
    for one, other in zip(_chunks(first), _chunks(second), strict=True):
        a, b = _wide(one), _wide(other)
        unlike = (a != b) & ~((a != a) & (b != b))
        if not bool(unlike.any()):
            norm += float(a.double().nan_to_num(0.0, 0.0, 0.0).square().sum())
            continue
        elements += int(unlike.sum())
        a, b = a.double(), b.double()
        finite = a.isfinite() & b.isfinite()
        gap = (a - b)[finite].abs()
        largest = max(largest, float(gap.max()) if gap.numel() else 0.0)
        squares += float(gap.square().sum())
        norm += float(a[finite].square().sum())
        if ulps is not None and gap.numel():
            ulps = max(ulps, int((_steps(one)[finite] - _steps(other)[finite]).abs().max()))
    if not elements:
        return None
    return Distance(elements, largest, (squares / norm) ** 0.5 if norm else float(squares > 0), ulps)


def _steps(values: torch.Tensor) -> torch.Tensor:
    """Floats as whole numbers, of which neighbours are one apart; -0 and 0 are one number."""
    import torch

    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    bits = values.view(whole).to(torch.int64)
    lowest = -(1 << 8 * values.element_size() - 1)
    return torch.where(bits < 0, lowest - bits, bits)
