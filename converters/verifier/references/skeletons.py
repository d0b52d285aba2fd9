"""The tensors of many models; a task of the reference worker.

So that one start of a framework answers for a whole family, a job lists its models, and one that cannot be built
costs the others nothing.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

from random_weights import save_pretrained, surround

__all__ = ["list_tensors"]


def list_tensors(job: Mapping[str, Any], find_runner: Callable[[str], Any]) -> dict[str, Any]:
    """For each of `models` ({"runner", "model", "prefix"}) what a checkpoint of it holds, or
    {"error": one line, "missing": whether it is for want of the framework}.

    That is {"tensors": {name: [shape, dtype]}} where names are the model's own, and {"file": path} of a
    checkpoint in the job's `folder` where the framework's saver makes them.
    """
    os.environ.setdefault("KERAS_BACKEND", "numpy")  # nothing is computed, and it builds a model in a tenth of the time
    found: list[dict[str, Any]] = []
    missing: dict[str, Exception] = {}
    for number, model in enumerate(job["models"]):
        try:
            if model["runner"] in missing:
                raise missing[model["runner"]]
            found.append(_list(find_runner(model["runner"]), model, os.path.join(job["folder"], str(number))))
        except ModuleNotFoundError as error:
            missing[model["runner"]] = error  # nor will the next
            found.append({"error": f"{sys.executable} has no module {error.name!r}", "missing": True})
        except Exception as error:
            line = " ".join(f"{type(error).__name__}: {error}".split())
            found.append({"error": line[:500], "missing": False})
    return {"models": found}


def _list(runner: Any, job: Mapping[str, Any], path: str) -> dict[str, Any]:
    try:
        with _without_memory():
            model = runner.construct(job)
    except Exception:  # some constructors compute with what they fill
        model = runner.construct(job)
    if hasattr(model, "shapes"):
        return {"tensors": {name: [list(shape), "float32"] for name, shape in model.shapes.items()}}
    if hasattr(model, "save_pretrained"):
        model = model.to_empty(device="cpu")
        save_pretrained(model, path)
        return {"file": path}
    if not hasattr(model, "state_dict"):
        with _without_values():
            model.save_weights(path + ".weights.h5")
        return {"file": path + ".weights.h5"}
    state = surround(model.state_dict(), job.get("prefix", ""))
    return {"tensors": {name: [list(v.shape), str(v.dtype).replace("torch.", "")] for name, v in state.items()}}


@contextlib.contextmanager
def _without_memory() -> Iterator[None]:
    """torch's uninitialised tensors, which parameters are made of, take no memory and no time to fill."""
    torch: Any = sys.modules.get("torch")  # never to be imported beside another framework
    if torch is None:
        yield
        return
    from torch.overrides import TorchFunctionMode

    class WithoutMemory(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if func is torch.empty:
                kwargs = {**kwargs, "device": "meta"}
            return func(*args, **kwargs)

    with WithoutMemory():
        yield


@contextlib.contextmanager
def _without_values() -> Iterator[None]:
    """Datasets of HDF5 files get their room and no values: a file of holes, which takes no disk and no time."""
    import h5py

    create, holes = h5py.Group.create_dataset, h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    holes.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    holes.set_fill_time(h5py.h5d.FILL_TIME_NEVER)

    def create_empty(group: Any, name: str, shape: Any = None, dtype: Any = None, data: Any = None, **how: Any) -> Any:
        if getattr(data, "ndim", 0):
            return create(group, name, shape=data.shape, dtype=data.dtype, dcpl=holes, **how)
        return create(group, name, shape=shape, dtype=dtype, data=data, **how)

    with mock.patch.object(h5py.Group, "create_dataset", create_empty):
        yield
