"""Checkpoints with weights that hide nothing, written by the frameworks' own savers; a task of the reference worker.

A default initialisation hides faults: gains of one, biases of zero, layer scales of 1e-6, statistics that change
nothing. Here every parameter is drawn anew at a size that matters. Batch norms take their statistics from one
forward pass over noise, so that signals keep their size, and then move them a little, so that a mean or a variance
that went astray shows.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["AROUND", "save_pretrained", "surround", "write_weights"]

AROUND = {  # what else there is, by the place of the model in the whole
    "backbone.": {  # of a detector
        "neck.lateral_convs.0.conv.weight": (256, 64, 1, 1),
        "neck.lateral_convs.0.conv.bias": (256,),
        "bbox_head.fc_cls.weight": (81, 1024),
    },
    "visual.": {  # of a zero-shot classifier
        "token_embedding.weight": (49408, 512),
        "transformer.resblocks.0.ln_1.weight": (512,),
        "visual_proj.proj": (768, 512),
        "logit_scale": (),
    },
    "vision_backbone.": {"text_backbone.encoder.weight": (1,), "vision_projection": (768, 512), "logit_scale": ()},
}


def write_weights(job: Mapping[str, Any], find_runner: Callable[[str], Any]) -> dict[str, Any]:
    """Write a checkpoint of the job's model at `out`. Beside `runner` and `model` a job may have

    seed       0
    input      shape of the calibration batch, NCHW; [8, 3, 64, 64], or what a Keras model asks for
    prefix     where the model lies in a larger one, whose other parts are added
    known      an .npz of the tensors that are not random
    training   true adds what a training run leaves beside the weights: logs, schedules, weights without EMA
    """
    model = find_runner(job["runner"]).construct(job)
    if hasattr(model, "state_dict"):
        _write_torch(model, job)
    elif hasattr(model, "shapes"):
        _write_arrays(model, job)
    else:
        _write_keras(model, job, find_runner(job["runner"]))
    return {"file": job["out"]}


def surround(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """A state dict inside that of the whole."""
    import torch

    around = {name: torch.randn(shape) for name, shape in AROUND.get(prefix, {}).items()}
    return OrderedDict([*((prefix + name, value) for name, value in state.items()), *around.items()])


def _write_torch(model: Any, job: Mapping[str, Any]) -> None:
    import numpy as np
    import torch

    torch.manual_seed(job.get("seed", 0))
    with torch.no_grad():
        for module in model.modules():
            for name, value in module.named_parameters(recurse=False):
                value.copy_(_draw(name, value, "Embedding" in type(module).__name__))
        _calibrate(model, torch.randn(job.get("input", [8, 3, 64, 64])))
    state = surround(model.state_dict(), job.get("prefix", ""))
    if "known" in job:
        with np.load(job["known"], allow_pickle=False) as known:
            state.update({name: torch.from_numpy(known[name]) for name in known.files})
    if job["runner"].startswith("mm"):
        _save_mmlab(state, job)
    elif hasattr(model, "save_pretrained"):
        save_pretrained(model, job["out"])
    else:
        torch.save(state, job["out"])


def save_pretrained(model: Any, out: str) -> None:
    """A transformers model's weights in one file, whose tensors its own saver names as it likes."""
    with tempfile.TemporaryDirectory(dir=os.path.dirname(out)) as folder:
        model.save_pretrained(folder, max_shard_size="1TB")
        os.replace(os.path.join(folder, "model.safetensors"), out)


def _draw(name: str, value: Any, is_table: bool) -> Any:
    """A parameter's new values."""
    import torch

    if name.endswith("weight") and value.ndim > 1 and not is_table:
        return torch.randn_like(value) / value[0].numel() ** 0.5
    if name.endswith("bias"):
        return torch.randn_like(value) * 0.2
    if any(part in name for part in ("weight", "gamma", "scale", "temperature")) and not is_table:
        return torch.rand_like(value) + 0.5
    return torch.randn_like(value) * 0.5  # tokens, positions, tables


def _calibrate(model: Any, batch: Any) -> None:
    """Batch statistics of `batch`, then moved by a third of a deviation."""
    import torch
    from torch.nn.modules.batchnorm import _BatchNorm

    model.eval()
    norms: list[Any] = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return
    momenta = {norm: norm.momentum for norm in norms}
    for norm in norms:
        norm.train().reset_running_stats()
        norm.momentum = None  # the average of all batches, which are one
    model(batch)
    for norm, momentum in momenta.items():
        norm.eval().momentum = momentum
        norm.running_mean += norm.running_var.sqrt() * torch.randn_like(norm.running_mean) / 3
        norm.running_var *= torch.rand_like(norm.running_var) * 0.7 + 0.7


def _save_mmlab(state: Mapping[str, Any], job: Mapping[str, Any]) -> None:
    from mmengine.runner import save_checkpoint

    checkpoint = {"meta": _meta(job), "state_dict": state}
    if job.get("training"):
        checkpoint.update(_leftovers(state))
    save_checkpoint(checkpoint, job["out"])


def _meta(job: Mapping[str, Any]) -> dict[str, Any]:
    import mmengine
    from mmengine.config import Config

    return {
        "epoch": 12,
        "iter": 1200,
        "cfg": Config({"model": job["model"]}).pretty_text,
        "seed": job.get("seed", 0),
        "experiment_name": "random",
        "time": "20240101_000000",
        "mmengine_version": mmengine.__version__,
        "dataset_meta": {"classes": ("cat", "dog")},
    }


def _leftovers(state: Mapping[str, Any]) -> dict[str, Any]:
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


def _write_arrays(model: Any, job: Mapping[str, Any]) -> None:
    import numpy as np

    seed = job.get("seed", 0)
    batch = np.random.default_rng(seed).standard_normal(job.get("input", [8, 3, 64, 64]))
    model.write(job["out"], seed, batch.astype("float32"))


def _write_keras(model: Any, job: Mapping[str, Any], runner: Any) -> None:
    import keras
    import numpy as np

    rng = np.random.default_rng(job.get("seed", 0))
    for layer in model.layers:
        for variable in layer.weights:
            variable.assign(_draw_keras(rng, variable.name, variable.shape, type(layer).__name__))
        if hasattr(layer, "finalize_state"):
            layer.finalize_state()
    norms = [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]
    momenta = [(norm, norm.momentum) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0  # this batch alone
    _, channels, height, width = job.get("input") or [8, *np.roll(model.input_shape[1:], 1)]
    if norms:
        inner = runner.behind_preprocessing(model, model.output)
        inner(rng.standard_normal((8, height, width, channels)).astype("float32"), training=True)
    for norm, momentum in momenta:
        norm.momentum = momentum
        mean, variance = np.array(norm.moving_mean), np.array(norm.moving_variance)
        norm.moving_mean.assign(mean + np.sqrt(variance) * rng.standard_normal(mean.shape) / 3)
        norm.moving_variance.assign(variance * rng.uniform(0.7, 1.4, mean.shape))
    if job["out"].endswith(".weights.h5"):
        model.save_weights(job["out"])
    else:
        model.save(job["out"])


def _draw_keras(rng: Any, name: str, shape: tuple[int, ...], layer: str) -> Any:
    """A variable's new values, by its role."""
    if "kernel" in name:
        import numpy as np

        inputs = np.prod(shape[:2] if layer == "DepthwiseConv2D" or "depthwise" in name else shape[:-1])
        return rng.standard_normal(shape) / inputs**0.5
    if name in ("gamma", "variance", "moving_variance"):
        return rng.uniform(0.5, 1.5, shape)
    return rng.standard_normal(shape) * (0 if name == "count" else 0.2)
