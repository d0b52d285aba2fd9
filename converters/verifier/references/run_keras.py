"""Reference runner for Keras applications, and for saved models of the user's own.

`model` is {"application": NAME, "args": {...}, "input": LAYER}: a constructor of keras.applications and its
arguments. The model is built from that code and filled by its own `load_weights`, which reads no config. Or it is
{"file": PATH}, a whole saved model, whose config is executed, in Keras's safe mode, for a job with `trust` only;
without it an application stands in, if one is named too.
It runs in float64 on TensorFlow; other backends compute parts of it in float32 and offer that alone.

The probe goes in as NHWC; `input`, if given, is the layer whose output it takes the place of (the last one of
the preprocessing that some models hold). Outputs come as Keras lays them out: "0" is the model's own, "logits"
the same without a softmax behind it, any other name is a layer's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

__all__ = ["Modules", "build", "build_model", "construct"]

AT_ONCE = 512 << 20  # bytes of activations that are held together
DECLARED = {
    "epsilon": "eps",
    "kernel_size": "kernel_size",
    "strides": "stride",
    "padding": "padding",
    "dilation_rate": "dilation",
    "groups": "groups",
    "num_heads": "num_heads",
    "negative_slope": "negative_slope",
}


def build(job: Mapping[str, Any], precision: str) -> tuple[Any, dict[str, Any]]:
    """The application with the file's weights."""
    whole = "file" in job["model"] and (job.get("trust") or "application" not in job["model"])
    model = _saved(job, precision) if whole else build_model(job["model"], precision)
    import keras

    model.load_weights(job["source"]["file"])
    layer = job["model"].get("input")
    outputs = {name: _output(model, name) for name in job["outputs"]}
    entry = model.get_layer(layer).output if layer else model.input
    graph = keras.Model(entry, outputs)

    def run(x: np.ndarray) -> dict[str, np.ndarray]:
        return _ask(graph, x)

    run.modules = Modules(model, entry)  # type: ignore[attr-defined]
    return run, {"backend": keras.backend.backend()}


class Modules:
    """A model's layers; see torch_modules.py. An activation of four axes is given as NCHW."""

    def __init__(self, model: Any, entry: Any) -> None:
        self.entry, self.layers = entry, {layer.name: layer for layer in model.layers}

    def watch(
        self, x: np.ndarray, inputs: Iterable[str], outputs: Iterable[str], keep: Callable[[str, str, Any], None]
    ) -> None:
        """Run the model as often as its activations need to fit into memory, in the order of its layers."""
        import keras

        wanted = {"input": set(inputs), "output": set(outputs)}
        batches: list[dict[str, Any]] = [{}]
        size = 0
        for name, layer in self.layers.items():
            for kind in wanted:
                tensor = _first(getattr(layer, kind, None)) if name in wanted[kind] else None
                if tensor is not None:
                    size += len(x) * x.itemsize * int(np.prod([axis or 1 for axis in tensor.shape[1:]]))
                    if size > AT_ONCE and batches[-1]:
                        batches.append({})
                        size = 0
                    batches[-1][f"{kind} {name}"] = tensor
        for batch in filter(None, batches):
            for place, array in _ask(keras.Model(self.entry, batch), x).items():
                kind, _, name = place.partition(" ")
                keep(kind, name, array.transpose(0, 3, 1, 2) if array.ndim == 4 else array)

    def describe(self, names: Iterable[str]) -> dict[str, dict[str, Any]]:
        """What each of these layers declares, under torch's names."""
        found = {}
        for layer in (self.layers[name] for name in names if name in self.layers):
            values = {ours: getattr(layer, own, None) for own, ours in DECLARED.items()}
            plain = {name: _plain(value) for name, value in values.items() if value is not None}
            found[layer.name] = {"kind": type(layer).__name__, **plain}
        return found


def _ask(graph: Any, x: np.ndarray) -> dict[str, np.ndarray]:
    import keras

    given = graph(np.ascontiguousarray(x.transpose(0, 2, 3, 1)), training=False)
    return {name: keras.ops.convert_to_numpy(value) for name, value in given.items()}


def _first(tensors: Any) -> Any:
    """A layer's only tensor; one with several has none that stands for it."""
    return None if isinstance(tensors, (list, tuple, dict)) else tensors


def _plain(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return value[0] if len(set(value)) == 1 else list(value)
    return value


def _output(model: Any, name: str) -> Any:
    if name not in ("0", "logits"):
        return model.get_layer(name).output
    last = model.output._keras_history.operation
    if name == "logits" and type(last).__name__ == "Softmax":
        return last.input
    if name == "logits" and hasattr(last, "activation"):
        last.activation = None if last.activation is None else lambda x: x
    return model.output


def construct(job: Mapping[str, Any]) -> Any:
    """The application as its constructor leaves it."""
    return build_model(job["model"], "float32")


def build_model(config: Mapping[str, Any], precision: str) -> Any:
    """The application as its constructor leaves it."""
    keras = _keras(precision)
    return getattr(keras.applications, config["application"])(**{"weights": None, **config.get("args", {})})


def _saved(job: Mapping[str, Any], precision: str) -> Any:
    """The saved model in that precision, whatever it was saved in."""
    path = job["model"]["file"]
    if not job.get("trust"):
        raise PermissionError(f"the config in {os.path.basename(path)} would be executed; allow it with --trust")
    keras = _keras(precision)
    saved = keras.models.load_model(path, compile=False, safe_mode=True)
    config = saved.get_config()
    return type(saved).from_config(_with_dtype(config, precision)) if precision == "float64" else saved


def _with_dtype(config: Any, precision: str) -> Any:
    """A config of layers that compute in `precision`, whatever they did."""
    if isinstance(config, list):
        return [_with_dtype(item, precision) for item in config]
    if not isinstance(config, dict):
        return config
    return {
        key: precision
        if key == "dtype" and (isinstance(value, dict) or "float" in str(value))
        else _with_dtype(value, precision)
        for key, value in config.items()
    }


def _keras(precision: str) -> Any:
    """Keras on its backend, set to that precision."""
    if "KERAS_BACKEND" not in os.environ:
        os.environ["KERAS_BACKEND"] = _backend()
    import keras

    if precision == "float64" and keras.backend.backend() != "tensorflow":
        raise TypeError(f"Keras on {keras.backend.backend()} computes parts of it in float32")
    keras.utils.clear_session()  # layers are numbered by how many came before
    keras.config.set_floatx(precision)
    keras.config.set_dtype_policy(precision)
    return keras


def _backend() -> str:
    """TensorFlow where it can be imported. To look is to import, and torch cannot always come after it."""
    try:
        import tensorflow  # noqa: F401
    except ImportError:
        return "torch"
    return "tensorflow"
