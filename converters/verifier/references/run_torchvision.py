"""Reference runner for torchvision.

`model` is {"name": NAME, "args": {...}}: a constructor's name, as torchvision.models.get_model takes it, and its
arguments. The state dict must fill the model and hold nothing else. Outputs: see torch_models.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch_models import filled

__all__ = ["build", "construct"]


def build(job: Mapping[str, Any], precision: str) -> tuple[Any, dict[str, Any]]:
    """The model with the checkpoint's weights."""
    return filled(construct(job), job, precision)


def construct(job: Mapping[str, Any]) -> torch.nn.Module:
    """The model as its constructor leaves it."""
    from torchvision import models

    name, args = job["model"]["name"], {"weights": None, **job["model"].get("args", {})}
    if hasattr(models, "get_model"):
        return models.get_model(name, **args)
    args.pop("weights")  # torchvision below 0.13
    return getattr(models, name)(**args)
