"""Checkpoints of real frameworks with weights that hide nothing, written by the frameworks' own savers.

    write_checkpoint({"framework": "mmdet", "model": {"type": "ResNet", "depth": 18}}, path)

runs this file in a process of its own, because frameworks clash. The keys of a spec:

    framework   mmdet, mmpretrain, mmseg or keras
    model       what the reference runner of that name builds
    seed        0
    input       shape of the calibration batch, NCHW; [8, 3, 64, 64], or what a Keras model asks for
    wrap        "detector" puts the model under `backbone.`, beside a neck and a head
    training    true adds what a training run leaves beside the weights: logs, schedules, weights without EMA

A default initialisation hides faults: gains of one, biases of zero, layer scales of 1e-6, statistics that
change nothing. Here every parameter is drawn anew at a size that matters. Batch norms take their statistics
from one forward pass over noise, so that signals keep their size, and then move them a little, so that a mean
or a variance that went astray shows.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter, OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["write_checkpoint"]

REFERENCES = Path(__file__).parents[2] / "converters" / "verifier" / "references"
QUIET = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "3"}


def write_checkpoint(spec: Mapping[str, Any], out: Path, python: str = sys.executable) -> Path:
    """Write the checkpoint at `out`, whose suffix chooses Keras's form: .weights.h5, .keras or .h5."""
    command = [python, __file__, json.dumps({**spec, "out": str(out)})]
    done = subprocess.run(command, env={**os.environ, **QUIET}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"no checkpoint was written: {done.stderr.strip()[-2000:]}")
    return out


def write_mmlab(spec: Mapping[str, Any]) -> None:
    import torch
    from mmengine.runner import save_checkpoint
    from run_mmlab import build_model

    torch.manual_seed(spec.get("seed", 0))
    model = build_model(spec["framework"], spec["model"])
    with torch.no_grad():
        for module in model.modules():
            for name, value in module.named_parameters(recurse=False):
                value.copy_(draw(name, value, "Embedding" in type(module).__name__))
        calibrate(model, torch.randn(spec.get("input", [8, 3, 64, 64])))
    state = model.state_dict()
    if spec.get("wrap") == "detector":
        state = OrderedDict((f"backbone.{name}", value) for name, value in state.items())
        state["neck.lateral_convs.0.conv.weight"] = torch.randn(256, 64, 1, 1)
        state["neck.lateral_convs.0.conv.bias"] = torch.randn(256)
        state["bbox_head.fc_cls.weight"] = torch.randn(81, 1024)
    checkpoint = {"meta": meta(spec), "state_dict": state}
    if spec.get("training"):
        checkpoint.update(leftovers(state))
    save_checkpoint(checkpoint, spec["out"])


def draw(name: str, value: Any, is_table: bool) -> Any:
    """A parameter's new values."""
    import torch

    if name.endswith("weight") and value.ndim > 1 and not is_table:
        return torch.randn_like(value) / value[0].numel() ** 0.5
    if name.endswith("bias"):
        return torch.randn_like(value) * 0.2
    if any(part in name for part in ("weight", "gamma", "scale", "temperature")) and not is_table:
        return torch.rand_like(value) + 0.5
    return torch.randn_like(value) * 0.5  # tokens, positions, tables


def calibrate(model: Any, batch: Any) -> None:
    """Batch statistics of `batch`, then moved by a third of a deviation."""
    import torch
    from torch.nn.modules.batchnorm import _BatchNorm

    model.eval()
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().reset_running_stats()
        norm.momentum = None  # the average of all batches, which are one
    model(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval().momentum = momentum
        norm.running_mean += norm.running_var.sqrt() * torch.randn_like(norm.running_mean) / 3
        norm.running_var *= torch.rand_like(norm.running_var) * 0.7 + 0.7


def meta(spec: Mapping[str, Any]) -> dict[str, Any]:
    import mmengine
    from mmengine.config import Config

    return {
        "epoch": 12,
        "iter": 1200,
        "cfg": Config({"model": spec["model"]}).pretty_text,
        "seed": spec.get("seed", 0),
        "experiment_name": "random",
        "time": "20240101_000000",
        "mmengine_version": mmengine.__version__,
        "dataset_meta": {"classes": ("cat", "dog")},
    }


def leftovers(state: Mapping[str, Any]) -> dict[str, Any]:
    """What mmengine's Runner saves beside the weights. With EMA the averaged weights are the ones in `state_dict`."""
    import numpy as np
    from mmengine.logging import HistoryBuffer

    return {
        "message_hub": {
            "log_scalars": {"train/loss": HistoryBuffer([0.5, 0.25], [1, 1])},
            "runtime_info": {"iter": 1200, "loss": np.float64(0.25)},
            "resumed_keys": {},
        },
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        "param_schedulers": [{"milestones": Counter({8: 1, 11: 1})}],
        "ema_state_dict": {f"module.{name}": value + 7 for name, value in state.items()},
    }


def write_keras(spec: Mapping[str, Any]) -> None:
    from run_keras import build_model

    import keras  # isort: skip  (after its backend is chosen)
    import numpy as np

    rng = np.random.default_rng(spec.get("seed", 0))
    model = build_model(spec["model"], "float32")
    for layer in model.layers:
        for variable in layer.weights:
            variable.assign(draw_keras(rng, variable.name, variable.shape, type(layer).__name__))
        if hasattr(layer, "finalize_state"):
            layer.finalize_state()
    norms = [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0  # this batch alone
    _, channels, height, width = spec.get("input") or [8, *np.roll(model.input_shape[1:], 1)]
    model(rng.standard_normal((8, height, width, channels)).astype("float32"), training=True)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        mean, variance = np.array(norm.moving_mean), np.array(norm.moving_variance)
        norm.moving_mean.assign(mean + np.sqrt(variance) * rng.standard_normal(mean.shape) / 3)
        norm.moving_variance.assign(variance * rng.uniform(0.7, 1.4, mean.shape))
    if spec["out"].endswith(".weights.h5"):
        model.save_weights(spec["out"])
    else:
        model.save(spec["out"])


def draw_keras(rng: Any, name: str, shape: tuple[int, ...], layer: str) -> Any:
    """A variable's new values, by its role."""
    import math

    if "kernel" in name:
        inputs = math.prod(shape[:2] if layer == "DepthwiseConv2D" or "depthwise" in name else shape[:-1])
        return rng.standard_normal(shape) / inputs**0.5
    if name in ("gamma", "variance", "moving_variance"):
        return rng.uniform(0.5, 1.5, shape)
    return rng.standard_normal(shape) * (0 if name == "count" else 0.2)


if __name__ == "__main__":
    sys.path.insert(0, str(REFERENCES))
    request = json.loads(sys.argv[1])
    (write_keras if request["framework"] == "keras" else write_mmlab)(request)
