"""Deployment: weights for models that only infer, computed in float64 and rounded once.

Blocks with branches (RepVGG's, MobileOne's, FastViT's) have a function of timm's own that fuses them; here it runs
block by block. The results are the weights of `timm.utils.reparameterize_model(timm.create_model(...))`, which takes
them by `load_state_dict`. A batch norm behind a convolution is a scale and a shift: `fold_batch_norms` puts the scale
into the convolution, so that the norm, which timm's model keeps, only adds.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from converters.calculations import constant
from converters.errors import TargetError
from converters.ops import Op, Pipeline, Tensors
from converters.plan import Change, Origin, Plan, Step
from converters.target import Skeleton
from converters.tensors import TensorSpec

if TYPE_CHECKING:
    import torch

__all__ = ["fold_batch_norms", "fuse_branches"]


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


def fold_batch_norms(plan: Plan) -> Plan:
    """The plan with the scale of every batch norm in the convolution before it, where nothing else takes its output.

    Raises TargetError for a model that has no such pair.
    """
    steps = {step.target.name: step for step in plan.steps}
    pairs = _pairs(plan.skeleton)
    for convolution, norm in pairs:
        steps |= {step.target.name: step for step in _scaled(plan.skeleton.model, convolution, norm, steps)}
    if not pairs:
        problem = f"timm's {plan.skeleton.architecture} has no batch norm right behind a convolution"
        raise TargetError(problem, cure="convert it as it is")
    told = Change(f"{len(pairs)} batch norms were folded into the convolutions before them", inside=True)
    drops = plan.drops_without(steps.values(), "folded")
    return replace(plan, steps=tuple(steps.values()), drops=drops, changes=(*plan.changes, told))


def _pairs(skeleton: Skeleton) -> list[tuple[str, str]]:
    """Each convolution whose output goes to a batch norm and nowhere else, with that norm, as a forward pass has it."""
    calls = _calls(skeleton)
    users: dict[int, list[int]] = {}
    for index, (_, given, _) in enumerate(calls):
        for tensor in given:
            users.setdefault(id(tensor), []).append(index)
    names = {id(tensor): name.rpartition(".")[0] for name, tensor in skeleton.model.state_dict(keep_vars=True).items()}
    found = []
    for op, given, result in calls:
        then = users.get(id(result), [])
        if op != "convolution" or len(then) != 1 or len(users[id(given[1])]) != 1:
            continue
        user, others, _ = calls[then[0]]
        if "batch_norm" in user and len(others) == 5 and len(users[id(others[1])]) == 1:
            convolution, norm = names.get(id(given[1])), names.get(id(others[1]))
            if convolution and norm and not getattr(skeleton.model.get_submodule(convolution), "transposed", True):
                found.append((convolution, norm))
    return found


def _calls(skeleton: Skeleton) -> list[tuple[str, list[torch.Tensor], Any]]:
    """The operations of a forward pass: name, the tensors that it is given, and its result."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    calls = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            flat = [x for one in args for x in (one if isinstance(one, (list, tuple)) else [one])]
            calls.append((func.__name__.partition(".")[0], [x for x in flat if isinstance(x, torch.Tensor)], result))
            return result

    size = skeleton.model.pretrained_cfg["input_size"]
    with torch.no_grad(), Watching():
        skeleton.model(torch.empty(1, skeleton.args.get("in_chans", size[0]), *size[1:], device="meta"))
    return calls


def _scaled(model: torch.nn.Module, convolution: str, norm: str, steps: Mapping[str, Step]) -> Iterator[Step]:
    """The steps of a convolution that scales and of a norm that only adds."""
    import torch

    eps = float(model.get_submodule(norm).eps)  # type: ignore[arg-type]
    inside = [steps[f"{norm}.{leaf}"] for leaf in ("weight", "bias", "running_mean", "running_var")]
    kernels = [step for leaf in ("weight", "bias") if (step := steps.get(f"{convolution}.{leaf}"))]

    def run(tensors: Tensors, parts: int) -> Tensors:
        given = iter(tensors)
        gamma, beta, mean, variance = (_computed(step, given) for step in inside)
        scale = gamma / torch.sqrt(variance + eps)
        scaled = [_computed(step, given) for step in kernels]
        return [beta - mean * scale, *(one * scale.reshape(-1, *[1] * (one.dim() - 1)) for one in scaled)]

    sources = tuple(source for step in (*inside, *kernels) for source in step.origin.sources)
    op = Op(f"fold {norm} into {convolution}", run, None)
    origin = Origin(sources, Pipeline((op,)), kernels[0].origin.rule, parts=1 + len(kernels))
    yield from (Step(step.target, origin, part) for part, step in enumerate((inside[1], *kernels)))
    for step, value in ((inside[0], 1.0), (inside[2], 0.0), (inside[3], 1 - eps)):
        yield Step(step.target, Origin(fill=value))


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
    import torch

    origin = step.origin
    if origin.fill is not None:
        return constant(origin.fill, step.target.shape, torch.float64)
    tensors = [next(given).double() for _ in origin.sources]
    return origin.ops.run(tensors, origin.parts)[step.part]


def _fuse(block: torch.nn.Module) -> torch.nn.Module:
    import torch
    from timm.utils import reparameterize_model

    whole = torch.nn.Sequential(block)
    with torch.device(next(block.parameters()).device):
        reparameterize_model(whole, inplace=True)
    return whole[0]
