"""Preprocessing: what a checkpoint itself says of the images that its model takes.

OpenMMLab's checkpoints carry their configuration, a text in Python, which is parsed as data and never run:
`data_preprocessor` (or, before 2022, `img_norm_cfg`) has mean and standard deviation in units of 0 to 255, and
whether the channels of an image, which OpenCV reads as BGR, are turned to RGB. timm's images are always RGB, so
for a model of BGR images its first convolution is turned instead, and the constants with it. A classifier's
`test_pipeline` tells interpolation and crop.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from converters.errors import TargetError
from converters.ops import Op, Pipeline, Tensors
from converters.plan import Change, Origin, Plan, Step
from converters.target import traits_of

__all__ = ["Preprocessing", "fold_normalization", "read_preprocessing", "take_bgr"]

MOST = 1 << 20  # characters of a configuration
LONGEST = 64  # nested values


@dataclass(frozen=True)
class Preprocessing:
    """Constants in timm's form (mean and std in units of 0 to 1, RGB), and what else has to be known."""

    values: dict[str, Any] = field(default_factory=dict)
    bgr: bool = False  # whether the source's model takes BGR images


def read_preprocessing(metadata: Mapping[str, Any]) -> Preprocessing:
    """What the configuration in a checkpoint's metadata says; nothing where there is none that can be read."""
    found = Preprocessing()
    for text in _texts(metadata):
        settings = _settings(text)
        norm = _first(settings, "data_preprocessor", "img_norm_cfg")
        if isinstance(norm, dict):
            found = _normalisation(norm)
            pipeline = _first(settings, "test_pipeline")
            crop = _crop([one for one in pipeline if isinstance(one, dict)]) if isinstance(pipeline, list) else {}
            found = replace(found, values={**found.values, **crop})
    return found


def take_bgr(plan: Plan) -> Plan:
    """The plan for a source that takes BGR images: its first convolution takes the channels in the other order.

    Raises TargetError for one that takes pixels folded into channels.
    """
    traits = traits_of(plan.skeleton.architecture)
    stems = {f"{name}.weight" for name in traits.first_convs}
    turn = Pipeline.parse("flip 1")

    def turned(step: Step) -> Step:
        if step.target.name not in stems or step.origin.fill is not None:
            return step
        if step.target.shape[1:2] != (3,):
            raise TargetError(f"{step.target.name} takes no plain colours, and cannot be turned from BGR to RGB")
        return replace(step, origin=replace(step.origin, ops=step.origin.ops + turn))

    return replace(plan, steps=tuple(map(turned, plan.steps)), bgr=True)


def fold_normalization(plan: Plan) -> Plan:
    """The plan for images from 0 to 1: mean and standard deviation go into the first convolution.

    Raises TargetError where that would change the function: zeros around an image are not its mean.
    """
    model, (stem,) = plan.skeleton.model, traits_of(plan.skeleton.architecture).first_convs[:1] or ("",)
    steps = {step.target.name: step for step in plan.steps}
    weight, bias = steps.get(f"{stem}.weight"), steps.get(f"{stem}.bias")
    constants = [plan.preprocess.get(key, model.pretrained_cfg[key]) for key in ("mean", "std")]
    if any(isinstance(one, dict) for one in constants):
        raise TargetError("mean and std are tensors of the source, and cannot be folded", cure="convert it as it is")
    if weight is None or bias is None or bias.origin.fill is not None or weight.origin.parts + bias.origin.parts > 2:
        raise TargetError(f"{stem or 'the first convolution'} has no bias that could take the mean")
    own = model.get_submodule(stem)
    if type(own).__name__ != "Conv2d" or any(own.padding):  # others pad as they run
        raise TargetError(f"{stem} pads images with zeros, which would no longer be their mean")
    if any(len(one) != weight.target.shape[1] for one in constants):
        raise TargetError(f"{stem} has another number of channels than mean and std")
    mean, std = constants
    count = len(weight.origin.sources)

    def divided(tensors: Tensors, parts: int) -> Tensors:
        return [one.double().div(_column(std, one)).to(one.dtype) for one in tensors]

    def shifted(tensors: Tensors, parts: int) -> Tensors:
        (kernel,) = weight.origin.ops.run([one.double() for one in tensors[:count]])
        (shift,) = bias.origin.ops.run([one.double() for one in tensors[count:]])
        moved = kernel * _column(mean, kernel) / _column(std, kernel)
        return [(shift - moved.sum((1, 2, 3))).to(tensors[0].dtype)]

    told = f"mean {mean} and std {std} folded into {stem}"
    ops = weight.origin.ops + Pipeline((Op(f"divide by std {std}", divided, None),))
    steps[weight.target.name] = replace(weight, origin=replace(weight.origin, ops=ops))
    sources = (*weight.origin.sources, *bias.origin.sources)
    both = Origin(sources, Pipeline((Op(told, shifted, None),)), bias.origin.rule)
    steps[bias.target.name] = replace(bias, origin=both)
    plain = {"mean": [0.0] * len(mean), "std": [1.0] * len(std)}
    return replace(
        plan,
        steps=tuple(steps.values()),
        preprocess={**plan.preprocess, **plain},
        changes=(*plan.changes, Change(told, inside=True)),
    )


def _column(values: Any, kernel: Any) -> Any:
    return kernel.new_tensor(values).reshape(1, -1, 1, 1)


def _normalisation(norm: dict[str, Any]) -> Preprocessing:
    rgb = norm.get("to_rgb", norm.get("bgr_to_rgb", False))
    values = {}
    for key in ("mean", "std"):
        given = norm.get(key)
        if isinstance(given, list) and given and all(isinstance(v, (int, float)) for v in given):
            scaled = [round(v / 255, 6) for v in given]
            values[key] = scaled if rgb else scaled[::-1]
    return Preprocessing(values, bgr=bool(values) and not rgb) if len(values) == 2 else Preprocessing()


def _crop(pipeline: list[dict[str, Any]]) -> dict[str, Any]:
    """Interpolation and crop of a pipeline that resizes the shorter edge and takes the middle.

    >>> _crop([{"type": "ResizeEdge", "scale": 256}, {"type": "CenterCrop", "crop_size": 224}])
    {'crop_pct': 0.875, 'interpolation': 'bilinear'}
    """
    edge, crop, interpolation = None, None, "bilinear"
    for step in pipeline:
        if step.get("type") == "CenterCrop":
            crop = step.get("crop_size")
        elif step.get("type") in ("ResizeEdge", "Resize"):
            edge = step.get("scale", step.get("size"))
            interpolation = step.get("interpolation", interpolation)
    edge, crop = (one[0] if isinstance(one, list) and one else one for one in (edge, crop))
    if not (isinstance(edge, int) and isinstance(crop, int) and 0 < crop <= edge and isinstance(interpolation, str)):
        return {}
    return {"crop_pct": round(crop / edge, 4), "interpolation": interpolation}


def _texts(value: Any, depth: int = 0) -> Iterator[str]:
    """Every text that may be a configuration."""
    if isinstance(value, str) and "=" in value and len(value) <= MOST:
        yield value
    elif isinstance(value, Mapping) and depth < 4:
        for inner in value.values():
            yield from _texts(inner, depth + 1)


def _settings(text: str) -> dict[str, Any]:
    """The assignments of a Python text whose values are data.

    >>> _settings("norm = dict(mean=[1, -2.5], to_rgb=True)\\nmodel = dict(type=f(), norm=norm)")
    {'norm': {'mean': [1, -2.5], 'to_rgb': True}, 'model': {'type': None, 'norm': {'mean': [1, -2.5], 'to_rgb': True}}}
    """
    try:
        body = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
    settings: dict[str, Any] = {}
    for node in body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            settings[node.targets[0].id] = _value(node.value, settings)
    return settings


def _value(node: ast.expr, known: Mapping[str, Any], depth: int = 0) -> Any:
    """A literal, or a call of `dict`; None stands for anything else."""
    if depth > LONGEST:
        return None
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(inner, known, depth + 1) for inner in node.elts]
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        return {k.value: _value(v, known, depth + 1) for k, v in pairs if isinstance(k, ast.Constant)}
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        return {word.arg: _value(word.value, known, depth + 1) for word in node.keywords if word.arg}
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        inner = _value(node.operand, known, depth + 1)
        return -inner if isinstance(inner, (int, float)) else None
    return None


def _first(settings: Any, *keys: str, depth: int = 0) -> Any:
    """The value of the first of these keys, wherever it stands."""
    if isinstance(settings, dict) and depth < LONGEST:
        for key in keys:
            if settings.get(key) is not None:
                return settings[key]
        for inner in settings.values():
            found = _first(inner, *keys, depth=depth + 1)
            if found is not None:
                return found
    return None
