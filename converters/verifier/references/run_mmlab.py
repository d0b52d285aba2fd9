"""Reference runner for OpenMMLab: MMDetection, MMPretrain and MMSegmentation.

`model` is a config dict, which the library's own registry builds; `config` is a config file of the user's. A
detector or a segmentor is reduced to its backbone. torch.load reads the checkpoint in its safe mode, and the
checkpoint must fill the whole model; what it holds besides (a neck, a head) is listed.

Outputs: "0", "1", ... are what the model gives, in order: a classifier its logits, a backbone its feature maps.
Those of a classifier's backbone are "backbone.0", "backbone.1", ...
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import pickle
import re
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import numpy as np
import torch

__all__ = ["build", "build_model"]

INERT = (  # what training logs and arguments leave in a checkpoint; objects that do nothing stand in for them
    "mmengine.logging.history_buffer.HistoryBuffer",
    "builtins.getattr",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy.ndarray",
    "numpy.dtype",
    "argparse.Namespace",
    "pathlib.PosixPath",
)


def build(job: Mapping[str, Any], precision: str) -> tuple[Any, dict[str, Any]]:
    """The model with the checkpoint's weights, in eval mode."""
    model = build_model(job["runner"], job.get("model") or _config(job["config"]))
    model.to(getattr(torch, precision)).eval()
    facts = _fill(model, _state_dict(job["source"]["file"], trust=job.get("trust", False)))
    backbone: Any = getattr(model, "backbone", None)
    mode = {"mode": "tensor"} if backbone is not None else {}
    inside: dict[str, np.ndarray] = {}
    if backbone is not None:
        backbone.register_forward_hook(lambda _module, _inputs, given: inside.update(_flat(given, "backbone.")))

    def run(x: np.ndarray) -> dict[str, np.ndarray]:
        with torch.no_grad():
            return {**_flat(model(torch.from_numpy(x), **mode)), **inside}

    return run, facts


def build_model(scope: str, config: Mapping[str, Any]) -> torch.nn.Module:
    """A model from its config dict, by the registry of `scope`, with whatever weights it starts from."""
    if "backbone" in config and not str(config["type"]).endswith("ImageClassifier"):
        config = config["backbone"]
    with _compatible():
        importlib.import_module(f"{scope}.models")
        from mmengine.registry import MODELS, init_default_scope

        init_default_scope(scope)
        return MODELS.build(dict(config))


def _config(path: str) -> Mapping[str, Any]:
    from mmengine.config import Config

    return Config.fromfile(path).model


@contextlib.contextmanager
def _compatible() -> Iterator[None]:
    """Lets the libraries be imported beside releases that they do not know."""
    import mmcv

    if "mmcv._ext" not in sys.modules and importlib.util.find_spec("mmcv._ext") is None:  # mmcv-lite
        stub = types.ModuleType("mmcv._ext")
        stub.__getattr__ = _missing_op  # type: ignore[method-assign]
        sys.modules["mmcv._ext"] = stub
    with contextlib.ExitStack() as changes:
        # MMDetection and MMSegmentation assert a release below 2.2
        changes.enter_context(mock.patch.object(mmcv, "__version__", min(mmcv.__version__, "2.1.0")))
        if importlib.util.find_spec("importlib_metadata"):
            import importlib_metadata  # which MMPretrain asks whether it may import its multimodal models

            changes.enter_context(mock.patch.object(importlib_metadata, "distribution", _all_but_transformers))
        yield


def _all_but_transformers(name: str) -> Any:
    """The distribution, unless it is one that MMPretrain knows only in old releases."""
    import importlib_metadata

    if name == "transformers":
        raise importlib_metadata.PackageNotFoundError(name)
    return importlib_metadata.Distribution.from_name(name)


def _missing_op(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)

    def op(*_args: Any, **_kwargs: Any) -> None:
        raise RuntimeError(f"the model runs mmcv's compiled op {name}, which mmcv-lite lacks; install mmcv")

    return op


class _Inert:
    def __init__(self, *_args: Any, **_kwargs: Any) -> None: ...

    def __setstate__(self, _state: Any) -> None: ...


def _state_dict(path: str, trust: bool) -> dict[str, torch.Tensor]:
    """The checkpoint's state dict, found as mmengine finds it, without `module.`."""
    parts = [name.rpartition(".") for name in INERT]
    stubs: list[Any] = [type(member, (_Inert,), {"__module__": module}) for module, _, member in parts]
    allow = getattr(torch.serialization, "safe_globals", contextlib.nullcontext)  # torch has it from 2.5 on
    try:
        with allow(stubs):
            checkpoint = torch.load(path, map_location="cpu", weights_only=not trust)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        what = f", which would call {name[1]}" if name else ""
        raise ValueError(f"torch.load's safe mode refuses the checkpoint{what}") from error
    state = checkpoint.get("state_dict", checkpoint)
    tensors = ((name, value) for name, value in state.items() if isinstance(value, torch.Tensor))
    return OrderedDict((name[7:] if name.startswith("module.") else name, value) for name, value in tensors)


def _fill(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Load the weights, which may lie under `backbone.`. Raises ValueError if the model is not filled."""
    own = model.state_dict()
    prefix = max(["", "backbone."], key=lambda prefix: sum(prefix + name in state for name in own))
    missing, unexpected = model.load_state_dict(
        OrderedDict((name[len(prefix) :], value) for name, value in state.items() if name.startswith(prefix)),
        strict=False,
    )
    missing = [name for name in missing if own[name].is_floating_point()]  # counters and index tables fill themselves
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise ValueError(f"the checkpoint does not fill the model: it lacks {', '.join(missing[:5])}{more}")
    outside = [name for name in state if not name.startswith(prefix)]
    return {"prefix": prefix, "unexpected": sorted(outside + [prefix + name for name in unexpected])}


def _flat(given: Any, prefix: str = "") -> dict[str, np.ndarray]:
    """A tensor, or nested tuples of them, named by position."""
    flat: dict[str, np.ndarray] = {}
    for number, part in enumerate([given] if isinstance(given, torch.Tensor) else given):
        if isinstance(part, torch.Tensor):
            flat[f"{prefix}{number}"] = part.numpy().copy()  # the layers behind may work in place
        else:
            flat.update(_flat(part, f"{prefix}{number}."))
    return flat
