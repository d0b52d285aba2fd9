"""Reference runner for code of the user's own, which is run because they name it.

`model` is {"module": PATH.py or a module's name, "factory": NAME, "args": {...}}. FACTORY(**args) gives a
torch.nn.Module, which the checkpoint's state dict must fill; or, if its first parameter is called `path`,
FACTORY(path, **args) reads the checkpoint itself and gives a module, or any callable from an NCHW array to an
array, or to a list, tuple or dict of arrays. Outputs: see torch_models.py; of a callable, by position and key.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["build", "construct"]


def build(job: Mapping[str, Any], precision: str) -> tuple[Any, dict[str, Any]]:
    """What the factory gives, filled with the checkpoint's weights where it has not done so itself."""
    factory, args = _factory(job["model"]), job["model"].get("args", {})
    reads = next(iter(inspect.signature(factory).parameters), None) == "path"
    model = factory(job["source"]["file"], **args) if reads else factory(**args)
    if hasattr(model, "state_dict"):
        import torch
        from torch_models import answering, filled

        if not reads:
            return filled(model, job, precision)
        return answering(model.to(getattr(torch, precision)), job["outputs"]), {}
    if not (reads and callable(model)):
        raise TypeError(f"the factory gives a {type(model).__name__}, which is no torch.nn.Module; see run_python.py")

    def run(x: np.ndarray) -> dict[str, np.ndarray]:
        given = model(x)
        named = given if isinstance(given, Mapping) else {}
        parts = list(named.values()) or (given if isinstance(given, (list, tuple)) else [given])
        found = {**dict(enumerate(parts)), **named}
        return {str(name): np.asarray(value) for name, value in found.items()}

    return run, {}


def construct(job: Mapping[str, Any]) -> Any:
    """What a factory that does not read the checkpoint gives."""
    return _factory(job["model"])(**job["model"].get("args", {}))


def _factory(model: Mapping[str, Any]) -> Any:
    name = model["module"]
    if name.endswith(".py"):
        path = os.path.abspath(name)
        sys.path.append(os.path.dirname(path))  # the modules beside it
        name = os.path.splitext(os.path.basename(path))[0]
        spec: Any = importlib.util.spec_from_file_location(name, path)
        found: Any = importlib.util.module_from_spec(spec)
        sys.modules[name] = found
        spec.loader.exec_module(found)
    else:
        found = importlib.import_module(name)
    for part in model["factory"].split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise ValueError(f"{model['module']} has no {model['factory']} to call")
    return found
