"""Dropped sources whose values are known: zeros, or what timm computes for itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from converters.errors import CheckpointError
from converters.plan import Plan
from converters.readers import Checkpoint
from converters.target import compute_buffers
from converters.tensors import to_torch

if TYPE_CHECKING:
    import torch

__all__ = ["check_dropped", "known_values"]

CLOSE = 1e-5  # sums in another order


def known_values(plan: Plan, checkpoint: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    """The sources that may be dropped only with these values, and the values."""
    import torch

    held = {name: drop for name, drop in plan.drops.items() if drop.zeros or drop.buffer}
    own = plan.unchanged or plan.skeleton  # the user may have asked for other sizes
    buffers = compute_buffers(own) if any(drop.buffer for drop in held.values()) else {}
    for name, drop in held.items():
        match = drop.pattern.match(plan.mapping.stripped(name))
        if drop.buffer and match:
            (place,) = drop.buffer.render(match.captures)
            yield name, drop.ops.run([buffers[place]], len(drop.pattern.choices) or 1)[match.choice]
        elif drop.zeros:
            yield name, torch.zeros(checkpoint.specs[name].shape)


def check_dropped(plan: Plan, checkpoint: Checkpoint) -> None:
    """Raises CheckpointError for a source that would have to be another to be dropped."""
    for name, known in known_values(plan, checkpoint):
        drop, tensor = plan.drops[name], checkpoint.tensors[name]
        values = to_torch(tensor.read(), tensor.spec)
        if drop.zeros and values.count_nonzero():
            reason = f"is not zero, and can be dropped only as zeros: {drop.reason}"
            raise CheckpointError(reason, file=checkpoint.path, tensor=name)
        if drop.buffer and not values.double().allclose(known.double(), rtol=0, atol=CLOSE):
            own = plan.unchanged or plan.skeleton
            reason = f"is not what {own.architecture} computes for itself: {drop.reason}"
            cure = "name another model with --to, or arguments of this one with --arg"
            raise CheckpointError(reason, file=checkpoint.path, tensor=name, cure=cure)
