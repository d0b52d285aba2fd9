"""Reference runner for timm itself, in the release that the interpreter has.

`model` is {"architecture": NAME, "args": {...}}, as timm.create_model takes them. The state dict must fill the
model and hold nothing else: what `pretrained=True` would rename is not renamed. Outputs: see torch_models.py.
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
    import timm

    return timm.create_model(job["model"]["architecture"], pretrained=False, **job["model"].get("args", {}))
