"""Reference runner for Keras applications.

`model` is {"application": NAME, "args": {...}, "input": LAYER}: a constructor of keras.applications and its
arguments. The model is built from that code and filled by its own `load_weights`, which reads no config. It runs
in float64 on TensorFlow; other backends compute parts of it in float32 and offer that alone.

The probe goes in as NHWC; `input`, if given, is the layer whose output it takes the place of (the last one of
the preprocessing that some models hold). Outputs come as Keras lays them out: "0" is the model's own, any
other name is a layer's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["build", "build_model"]


def build(job: Mapping[str, Any], precision: str) -> tuple[Any, dict[str, Any]]:
    """The application with the file's weights."""
    model = build_model(job["model"], precision)
    import keras

    model.load_weights(job["source"]["file"])
    layer = job["model"].get("input")
    outputs = {name: model.output if name == "0" else model.get_layer(name).output for name in job["outputs"]}
    graph = keras.Model(model.get_layer(layer).output if layer else model.input, outputs)

    def run(x: np.ndarray) -> dict[str, np.ndarray]:
        given = graph(np.ascontiguousarray(x.transpose(0, 2, 3, 1)), training=False)
        return {name: keras.ops.convert_to_numpy(value) for name, value in given.items()}

    return run, {"backend": keras.backend.backend()}


def build_model(config: Mapping[str, Any], precision: str) -> Any:
    """The application as its constructor leaves it."""
    if "KERAS_BACKEND" not in os.environ:
        os.environ["KERAS_BACKEND"] = _backend()
    import keras

    if precision == "float64" and keras.backend.backend() != "tensorflow":
        raise TypeError(f"Keras on {keras.backend.backend()} computes parts of it in float32")
    keras.utils.clear_session()  # layers are numbered by how many came before
    keras.config.set_floatx(precision)
    keras.config.set_dtype_policy(precision)
    return getattr(keras.applications, config["application"])(**{"weights": None, **config.get("args", {})})


def _backend() -> str:
    """TensorFlow where it can be imported. To look is to import, and torch cannot always come after it."""
    try:
        import tensorflow  # noqa: F401
    except ImportError:
        return "torch"
    return "tensorflow"
