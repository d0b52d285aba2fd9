"""Changes: other classes, channels, image, window or patch sizes than the source's own.

Lossless comes first. A plan is made with the sizes that the source has, which `own_sizes` reads off the shapes that
do not fit timm's defaults. Only what the user asks for beyond that is a change: `change` brings a closed plan to
another skeleton of the same architecture, and gives each tensor whose shape differs the normalizer of its role.
The role is read off timm's modules (their grids, windows and prefix tokens), never off a shape alone.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from converters import normalizers
from converters.errors import TargetError
from converters.folding import fold
from converters.ops import Op, Pipeline
from converters.plan import Change, Origin, Plan, Step
from converters.routes import Problem
from converters.target import Skeleton, build_skeleton, traits_of
from converters.tensors import TensorSpec, size_of

__all__ = ["SIZES", "Ways", "change", "own_sizes", "remove_classifier", "takes", "trained_windows"]

SIZES = ("num_classes", "in_chans", "img_size", "window_size", "patch_size")  # timm's arguments that change shapes
Shape = tuple[int, ...]
Size = tuple[int, int]


@dataclass(frozen=True)
class Ways:
    """How the changes are made, where there is more than one way."""

    resample: str = "timm"  # one of normalizers.WAYS
    classes: slice | tuple[int, ...] | None = None  # which of the source's classes are kept, in this order
    alpha: bool = False  # further input channels get no weight
    fold_normalization: bool = False  # put mean and std into the first convolution
    fold_batch_norms: bool = False  # put their scales into the convolutions before them
    bgr: bool | None = None  # whether the source takes BGR images; None: what the file says

    def __post_init__(self) -> None:
        if self.resample not in normalizers.WAYS:
            raise TargetError(f"no way to resample is called `{self.resample}`", cure=f"use {_or(normalizers.WAYS)}")


def own_sizes(skeleton: Skeleton, problems: Iterable[Problem]) -> dict[str, Any]:
    """The arguments with which the architecture would have the source's sizes; none where they are not the cause."""
    args: dict[str, Any] = {}
    for problem in problems:
        if problem.kind == "shape" and problem.spec.name not in skeleton.specs:
            continue  # of a source that may be dropped as timm's own buffer, which follows the sizes
        found = _own_size(skeleton, problem) if problem.kind == "shape" else None
        if found is None:
            return {}
        key, value = found
        args[key] = max(args.get(key, value), value)  # a last stage may have a smaller window than the others
    if "patch_size" in args:  # with other patches the grid is another one, too
        args.pop("img_size", None)
    return args


def change(plan: Plan, sizes: Mapping[str, Any], ways: Ways) -> Plan:
    """The plan for the same architecture with other sizes. Raises TargetError for a change that has no normalizer."""
    old = plan.skeleton
    wanted = dict(sizes)
    kept = _kept_classes(old, ways.classes)
    if kept is not None:
        wanted["num_classes"] = len(kept)
    trained = trained_windows(old, wanted)
    new = build_skeleton(old.architecture, {**old.args, **wanted, **trained})
    work = _Changing(old, new, ways, kept)
    steps = tuple(work.step(spec, one) for spec, one in _beside(new, plan))
    return replace(
        plan,
        skeleton=new,
        steps=steps,
        unchanged=old,
        changes=(
            *plan.changes,
            *work.told(),
            *[Change("other windows, with coordinates scaled as in training", inside=True)] * bool(trained),
        ),
    )


def remove_classifier(plan: Plan, source: Mapping[str, Any]) -> Plan:
    """A plan that was made without the classifier, as a change of the source's model, which has these arguments."""
    whole = plan.unchanged or plan.skeleton
    args = {**{key: value for key, value in whole.args.items() if key != "num_classes"}, **source}
    told = Change("the classifier was removed", inside=False)
    return replace(plan, unchanged=build_skeleton(whole.architecture, args), changes=(*plan.changes, told))


def _beside(new: Skeleton, plan: Plan) -> Iterator[tuple[TensorSpec, Step | None]]:
    """Every tensor of the new skeleton with the step that the plan has for it."""
    steps = {step.target.name: step for step in plan.steps}
    heads = _heads(new)
    if gone := [name for name in steps if name not in new.specs and name not in heads]:
        raise TargetError(f"with these sizes timm's {new.architecture} has no {gone[0]}", cure="change less")
    for name, spec in new.specs.items():
        if name not in steps and name not in heads:
            raise TargetError(f"with these sizes timm's {new.architecture} needs a {name}", cure="change less")
        yield spec, steps.get(name)


@dataclass
class _Changing:
    """A change while it is made."""

    old: Skeleton
    new: Skeleton
    ways: Ways
    kept: tuple[int, ...] | None

    def __post_init__(self) -> None:
        self.made: dict[str, list[str]] = {}  # by the text of its op: the tensors that it changed

    def step(self, spec: TensorSpec, step: Step | None) -> Step:
        """The step of a tensor of the new skeleton, from the plan's own."""
        if step is None:
            self.made.setdefault(f"{spec.shape[0]} new classes, zeros", []).append(spec.name)
            return Step(spec, Origin(fill=0))
        chosen = self.kept is not None and spec.name in _heads(self.old)
        if step.target.shape == spec.shape and not chosen:
            return step
        target = TensorSpec(spec.name, spec.shape, step.target.dtype)
        if step.origin.fill is not None:
            return Step(target, step.origin)
        op = self.normalizer(spec, step.target.shape)
        if op is None or step.origin.parts > 1:
            shapes = f"{size_of(step.target.shape)} to {size_of(spec.shape)}"
            raise TargetError(f"nothing brings timm's {spec.name} from {shapes}", cure="change less")
        self.made.setdefault(op.text, []).append(spec.name)
        return Step(target, replace(step.origin, ops=step.origin.ops + Pipeline((op,))))

    def normalizer(self, spec: TensorSpec, shape: Shape) -> Op | None:
        """What a tensor of the old shape needs, by its role."""
        name, way = spec.name, self.ways.resample
        if name in _heads(self.old):
            return normalizers.rows(self.kept) if self.kept is not None else normalizers.zeros(spec.shape[0])
        if name in _stems(self.old) and shape[2:] == spec.shape[2:] and len(shape) == 4:
            traits = traits_of(self.old.architecture)
            before, after = (one.args.get("in_chans", traits.in_chans) for one in (self.old, self.new))
            return normalizers.channels(before, after, alpha=self.ways.alpha and after > before)
        sizes = _grid_sizes(self.old, name, shape), _grid_sizes(self.new, name, spec.shape)
        return _resampler(name, shape, spec.shape, sizes, way)

    def told(self) -> Iterator[Change]:
        """What was changed, for a person: the op and its tensors, folded."""
        for text, names in self.made.items():
            folded = ", ".join(name for name, _ in fold(names))
            head = _heads(self.old).issuperset(names)
            yield Change(
                f"{text}: {folded}", inside=not head, classes=(self.kept or ()) if head else (), tensors=tuple(names)
            )


def _resampler(name: str, old: Shape, new: Shape, sizes: tuple[Size | None, Size | None], way: str) -> Op | None:
    before, after = sizes
    if before is None or after is None:
        return None
    leaf = name.rpartition(".")[2]
    if leaf == "weight" and old[:2] == new[:2]:
        return normalizers.patches(before, after, way)
    if leaf == "relative_position_bias_table":
        return normalizers.table(before, after, old[0] - _cells(before), way)
    if leaf == "attention_biases":
        return normalizers.offsets(before, after, way)
    if len(old) == 3:
        return normalizers.positions(before, after, old[1] - math.prod(before), way)
    return normalizers.position_map(before, after, features_last=old[3] == new[3], way=way)


def _grid_sizes(skeleton: Skeleton, name: str, shape: Shape) -> Size | None:
    """The patch, grid or window that a tensor of the skeleton is laid out by; None for any other tensor."""
    module, _, leaf = name.rpartition(".")
    owner = skeleton.model.get_submodule(module)
    if leaf == "weight" and name in _stems(skeleton) and len(shape) == 4:
        return shape[2], shape[3]
    if leaf == "relative_position_bias_table" and len(shape) == 2:
        size = _pair(getattr(owner, "window_size", None))
        return size if size and shape[0] - _cells(size) in (0, 3) else None
    if leaf == "attention_biases" and len(shape) == 2:
        return _square(shape[1])
    embed = getattr(owner, "patch_embed", None)
    if leaf != "pos_embed" or embed is None:
        return None
    if len(shape) == 4:
        return (shape[1], shape[2]) if _pair(getattr(embed, "grid_size", None)) == shape[1:3] else (shape[2], shape[3])
    return _pair(getattr(embed, "grid_size", None)) if len(shape) == 3 else None


def _own_size(skeleton: Skeleton, problem: Problem) -> tuple[str, Any] | None:
    """The argument that would give a tensor the shape that the source has, and its value."""
    name, here, there = problem.spec.name, problem.spec.shape, problem.shape
    size = _grid_sizes(skeleton, name, here)
    if size is None or len(here) != len(there):
        return None
    leaf = name.rpartition(".")[2]
    if leaf == "weight":
        return ("patch_size", there[2]) if here[:2] == there[:2] and there[2] == there[3] else None
    if leaf == "attention_biases":
        return None  # of one of several maps
    if leaf == "relative_position_bias_table":
        side = _square(there[0] - (here[0] - _cells(size)))
        if side is None or side[0] % 2 == 0 or here[1] != there[1]:
            return None
        window = (side[0] + 1) // 2
        if not takes(skeleton, "window_size"):
            return _image(skeleton, (window, window))
        if skeleton.args.get("window_size") != window:
            return "window_size", window
        image = _pair(getattr(getattr(skeleton.model, "patch_embed", None), "img_size", None))  # its map is smaller
        return ("img_size", image[0] * window // size[0]) if image and image[0] == image[1] else None
    if len(here) == 3:
        grid = _square(there[1] - (here[1] - math.prod(size))) if here[2] == there[2] else None
    else:
        grid = (there[1], there[2]) if here[3] == there[3] else (there[2], there[3])
    return _image(skeleton, grid) if grid else None


def _image(skeleton: Skeleton, grid: Size) -> tuple[str, Any] | None:
    """The image size that gives a grid of patches."""
    patch = _pair(getattr(getattr(skeleton.model, "patch_embed", None), "patch_size", None))
    if patch is None:
        return None
    size = grid[0] * patch[0], grid[1] * patch[1]
    return "img_size", size[0] if size[0] == size[1] else list(size)


def trained_windows(old: Skeleton, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The argument for models that scale coordinates by the windows of their training: those of the old skeleton."""
    key = "pretrained_window_sizes"
    if key in old.args or not {"window_size", "img_size"} & wanted.keys() or not takes(old, key):
        return {}
    windows: dict[str, int] = {}  # by stage
    for name, module in old.model.named_modules():
        trained = getattr(module, "pretrained_window_size", None)
        if trained is not None:  # (0, 0) stands for its own
            windows.setdefault(name.partition(".blocks.")[0], trained[0] or module.window_size[0])
    return {key: list(windows.values())}


def _kept_classes(skeleton: Skeleton, classes: slice | tuple[int, ...] | None) -> tuple[int, ...] | None:
    if classes is None:
        return None
    count = skeleton.model.num_classes
    kept = tuple(range(count)[classes]) if isinstance(classes, slice) else classes
    if not kept or not all(0 <= index < count for index in kept):
        wrong = next((index for index in kept if not 0 <= index < count), "none")
        raise TargetError(f"the source has {count} classes, and {wrong} is none of them", cure="count from 0")
    return kept


def _heads(skeleton: Skeleton) -> frozenset[str]:
    names = traits_of(skeleton.architecture).classifiers
    return frozenset(f"{name}.{leaf}" for name in names for leaf in ("weight", "bias"))


def _stems(skeleton: Skeleton) -> frozenset[str]:
    return frozenset(f"{name}.weight" for name in traits_of(skeleton.architecture).first_convs)


def takes(skeleton: Skeleton, argument: str) -> bool:
    """Whether timm's model has an argument of this name."""
    return argument in inspect.signature(type(skeleton.model).__init__).parameters


def _pair(value: Any) -> Size | None:
    if isinstance(value, int):
        return value, value
    return (value[0], value[1]) if isinstance(value, (tuple, list)) and len(value) == 2 else None


def _square(count: int) -> Size | None:
    side = math.isqrt(max(count, 0))
    return (side, side) if side and side * side == count else None


def _cells(window: Size) -> int:
    return (2 * window[0] - 1) * (2 * window[1] - 1)


def _or(words: Iterable[str]) -> str:
    return " or ".join(words)
