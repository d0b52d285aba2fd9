"""Reference runner for OpenMMLab: MMDetection, MMPretrain and MMSegmentation.

`model` is a config dict, which the library's own registry builds; `config` is a config file of the user's. A
detector or a segmentor is reduced to its backbone. torch.load reads the checkpoint in its safe mode, and the
checkpoint must fill the whole model; what it holds besides (a neck, a head) is listed.

Outputs: "0", "1", ... are what the model gives, in order: a classifier its logits, a backbone its feature maps.
Those of a classifier's backbone are "backbone.0", "backbone.1", ...; see torch_models.py.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch_models import answering, fill, mend, read_state

__all__ = ["build", "build_model", "construct"]

PLACES = {  # of the backbone in a whole model: in its config, and in the names of its tensors
    "backbone": ["backbone."],
    "image_encoder": ["image_encoder.0."],
    "vision_backbone": ["visual.", "vision_backbone."],
}


def build(job: Mapping[str, Any], precision: str) -> tuple[Any, dict[str, Any]]:
    """The model with the checkpoint's weights, in eval mode."""
    model = build_model(job["runner"], job.get("model") or _config(job["config"]))
    model.to(getattr(torch, precision))
    facts = fill(model, read_state(job, "state_dict"), [prefix for prefixes in PLACES.values() for prefix in prefixes])
    mend(model, job.get("mend", {}))
    call = functools.partial(model, mode="tensor") if hasattr(model, "backbone") else None
    return answering(model, job["outputs"], call), facts


def construct(job: Mapping[str, Any]) -> torch.nn.Module:
    """The model with whatever weights it starts from."""
    return build_model(job["runner"], job["model"])


def build_model(scope: str, config: Mapping[str, Any]) -> torch.nn.Module:
    """A model from its config dict, by the registry of `scope`, with whatever weights it starts from."""
    if not str(config["type"]).endswith("ImageClassifier"):
        inner = next((config[part] for part in PLACES if part in config), config)
        config = inner[0] if isinstance(inner, list) else inner
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
