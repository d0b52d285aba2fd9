"""Features: weights under the names of a `features_only=True` model, for those who wrap one themselves.

timm's wrappers take a model apart: one renames its stages (`layers.0` is `layers_0`), another puts it behind
`model.`, and both leave out what no feature needs. Which name is which is read off timm's own wrapper.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from converters.errors import TargetError
from converters.plan import Change, Plan
from converters.target import build_skeleton

__all__ = ["only_features"]


def only_features(plan: Plan) -> Plan:
    """The plan with the names of timm's wrapper. Raises TargetError for a model that has none."""
    skeleton = plan.skeleton
    args = {key: value for key, value in skeleton.args.items() if key not in ("num_classes", "global_pool")}
    wrapper = build_skeleton(skeleton.architecture, {**args, "features_only": True})
    steps = {step.target.name: step for step in plan.steps}
    found = {name: _own_name(name, steps) for name in wrapper.specs}
    if missing := [
        name for name, own in found.items() if own is None or steps[own].target.shape != wrapper.specs[name].shape
    ]:
        raise TargetError(f"timm's features of {skeleton.architecture} have a {missing[0]}, which its model has not")
    kept = tuple(
        replace(steps[own], target=replace(steps[own].target, name=name)) for name, own in found.items() if own
    )
    told = Change("the names are those of a features_only model; load them with load_state_dict", inside=True)
    return replace(
        plan,
        steps=kept,
        drops=plan.drops_without(kept, "no feature needs it"),
        unchanged=plan.unchanged or skeleton,
        changes=(*plan.changes, told),
    )


def _own_name(name: str, names: Iterable[str]) -> str | None:
    """The model's name of a wrapper's tensor.

    >>> _own_name("layers_0.blocks.0.norm1.bias", ["layers.0.blocks.0.norm1.bias", "norm.bias"])
    'layers.0.blocks.0.norm1.bias'
    >>> _own_name("model.norm.bias", ["norm.bias"]), _own_name("stem_conv.weight", ["stem.weight"])
    ('norm.bias', None)
    """
    forms = [one for one in names if name in (one, f"model.{one}", *_flattened(one))]
    return forms[0] if len(forms) == 1 else None


def _flattened(name: str) -> list[str]:
    segments = name.split(".")
    return [".".join(["_".join(segments[:count]), *segments[count:]]) for count in (2, 3)]
