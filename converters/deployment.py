"""Deployment: weights of blocks whose branches timm fuses into one convolution, for models that only infer.

Such a block (RepVGG's, MobileOne's, FastViT's) has a function of timm's own that fuses it. Here it runs block by
block, in float64, and the results are rounded once. They are the weights of
`timm.utils.reparameterize_model(timm.create_model(...))`, which takes them by `load_state_dict`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from converters.calculations import constant
from converters.errors import TargetError
from converters.ops import Op, Pipeline, Tensors
from converters.plan import Change, Origin, Plan, Step
from converters.tensors import TensorSpec

if TYPE_CHECKING:
    import torch

__all__ = ["fuse_branches"]


def fuse_branches(plan: Plan) -> Plan:
    """The plan with every such block fused. Raises TargetError for a model that has none."""
    steps = {step.target.name: step for step in plan.steps}
    fused: list[Step] = []
    names = []
    for name, block in _blocks(plan.skeleton.model):
        inside = [steps.pop(f"{name}.{leaf}") for leaf in block.state_dict()]
        fused += _fused(name, block, inside)
        names.append(name)
    if not names:
        raise TargetError(f"timm's {plan.skeleton.architecture} has no branches to fuse", cure="convert it as it is")
    told = f"{len(names)} blocks were fused; load the weights into timm.utils.reparameterize_model(model)"
    changes = (*plan.changes, Change(told, inside=True))
    return replace(plan, steps=(*steps.values(), *fused), unchanged=plan.unchanged or plan.skeleton, changes=changes)


def _blocks(module: torch.nn.Module, name: str = "") -> Iterator[tuple[str, torch.nn.Module]]:
    """The outermost blocks that timm fuses, as its `reparameterize_model` finds them."""
    for child_name, child in module.named_children():
        path = f"{name}.{child_name}" if name else child_name
        if any(hasattr(child, way) for way in ("fuse", "reparameterize", "switch_to_deploy")):
            yield path, child
        else:
            yield from _blocks(child, path)


def _fused(name: str, block: torch.nn.Module, inside: Sequence[Step]) -> list[Step]:
    """The steps of a fused block, from those of its branches."""
    sources = [step.origin.sources for step in inside]
    after = {leaf: tensor.shape for leaf, tensor in _fuse(copy.deepcopy(block)).state_dict().items()}
    dtype = next(step.target.dtype for step in inside if "float" in step.target.dtype)

    def run(tensors: Tensors, parts: int) -> Tensors:
        given = iter(tensors)
        state = {step.target.name.removeprefix(f"{name}."): _computed(step, given) for step in inside}
        whole = copy.deepcopy(block).to_empty(device="cpu").double()
        whole.load_state_dict(state)
        result = _fuse(whole.eval()).state_dict()
        return [result[leaf].to(tensors[0].dtype) for leaf in after]

    op = Op(f"fuse the branches of {name}", run, None)
    flat = tuple(source for one in sources for source in one)
    rule = next((step.origin.rule for step in inside if step.origin.rule), None)
    origin = Origin(flat, Pipeline((op,)), rule, parts=len(after))
    return [
        Step(TensorSpec(f"{name}.{leaf}", tuple(shape), dtype), origin, part)
        for part, (leaf, shape) in enumerate(after.items())
    ]


def _computed(step: Step, given: Iterator[torch.Tensor]) -> torch.Tensor:
    """The tensor of a step, from as many of the given ones as it has sources."""
    origin = step.origin
    if origin.fill is not None:
        return constant(origin.fill, step.target.shape, "float64")
    tensors = [next(given).double() for _ in origin.sources]
    return origin.ops.run(tensors, origin.parts)[step.part]


def _fuse(block: torch.nn.Module) -> torch.nn.Module:
    import torch
    from timm.utils import reparameterize_model

    whole = torch.nn.Sequential(block)
    with torch.device(next(block.parameters()).device):
        reparameterize_model(whole, inplace=True)
    return whole[0]
