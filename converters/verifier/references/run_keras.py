"""Reference runner for Keras applications, and for saved models of the user's own.

`model` is {"application": NAME, "args": {...}, "rename": {...}}: a constructor of keras.applications, its arguments,
and how another release calls its layers, as patterns of `re` and what stands in their place. The model is built from
that code and filled by its own `load_weights`, which reads no config, or by TensorFlow's `read`. Or it is
{"file": PATH}, a whole saved model, whose config is executed, in Keras's safe mode, for a job with `trust` only;
without it an application stands in, if one is named too.
It runs in float64 on TensorFlow; other backends compute parts of it in float32 and offer that alone.

The probe goes in as NHWC, behind the preprocessing that some models begin with. Outputs come as Keras lays them
out: "0" is the model's own, "logits" the same without a softmax behind it, any other name is a layer's, and `NAME>`
that of the layer behind it, which may have no name to count on. A tap is what a layer gives before its own
activation, if it holds one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from functools import lru_cache, partial, wraps
from typing import Any

import numpy as np

__all__ = ["Modules", "behind_preprocessing", "build", "build_model", "construct"]

PREPROCESSING = ("Normalization", "Rescaling")  # layers
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
    path = job["source"]["file"]
    weights = None if path.endswith((".keras", ".h5", ".hdf5")) else _restored(job["model"], path)
    whole = "file" in job["model"] and (job.get("trust") or "application" not in job["model"])
    model = _saved(job, precision) if whole else build_model(job["model"], precision)
    import keras

    if weights is None:
        model.load_weights(path)
    else:
        model.set_weights(weights)
    outputs = {name: _output(model, name) for name in job["outputs"]}
    graph = behind_preprocessing(model, outputs)

    def run(x: np.ndarray) -> dict[str, np.ndarray]:
        return _ask(graph, x)

    run.modules = Modules(model, run)  # type: ignore[attr-defined]
    return run, {"backend": keras.backend.backend()}


class Modules:
    """A model's layers, their names with dots; see torch_modules.py. An activation of four axes is given as NCHW."""

    def __init__(self, model: Any, run: Callable[[np.ndarray], Any]) -> None:
        self.model, self.run, self.layers = model, run, {_dotted(layer.name): layer for layer in _layers(model)}

    def find(self, name: str) -> Any:
        """The layer of that name, or None."""
        return _behind(self.model, name[:-1]) if name.endswith(">") else self.layers.get(name)

    def watch(
        self, x: np.ndarray, inputs: Iterable[str], outputs: Iterable[str], keep: Callable[[str, str, Any], None]
    ) -> None:
        """Run the model; of a layer that is called more than once the first call counts."""
        import keras

        seen = set()

        def once(name: str, kind: str, value: Any) -> None:
            if (kind, name) not in seen and hasattr(value, "shape"):
                seen.add((kind, name))
                array = keras.ops.convert_to_numpy(value)
                keep(kind, name, array.transpose(0, 3, 1, 2) if array.ndim == 4 else array)

        watched: list[tuple[Any, str, Any]] = []
        try:
            for name in dict.fromkeys((*inputs, *outputs)):
                kinds = [kind for kind, asked in (("input", inputs), ("output", outputs)) if name in asked]
                for one in _watched(self.find(name), kinds, partial(once, name)):
                    watched.append(one)
                    object.__setattr__(*one)
            self.run(x)
        finally:
            for layer, attribute, function in reversed(watched):
                object.__setattr__(layer, attribute, function.__wrapped__)

    def describe(self, names: Iterable[str]) -> dict[str, dict[str, Any]]:
        """What each of these layers declares, under torch's names."""
        found = {}
        for name, layer in ((name, self.layers[name]) for name in names if name in self.layers):
            values = {ours: getattr(layer, own, None) for own, ours in DECLARED.items()}
            plain = {ours: _plain(value) for ours, value in values.items() if value is not None}
            found[name] = {"kind": type(layer).__name__, **plain}
        return found


def _ask(graph: Any, x: np.ndarray) -> dict[str, np.ndarray]:
    import keras

    given = graph(np.ascontiguousarray(x.transpose(0, 2, 3, 1)), training=False)
    return {name: keras.ops.convert_to_numpy(value) for name, value in given.items()}


def behind_preprocessing(model: Any, outputs: Any) -> Any:
    """The model of these outputs, from the first layer on that is no preprocessing."""
    import keras

    entry = model.input
    for layer in model.layers:
        if type(layer).__name__ in PREPROCESSING and layer.input is entry:
            entry = layer.output
    return keras.Model(entry, outputs)


def _dotted(name: str) -> str:
    return name.replace("/", ".")


def _layers(model: Any) -> Iterator[Any]:
    """The layers, and those of models among them."""
    for layer in model.layers:
        yield layer
        yield from _layers(layer) if hasattr(layer, "layers") else ()


def _behind(model: Any, name: str) -> Any:
    """The first layer that takes what the layer of that name gives, and nothing else."""
    given = next((layer.output for layer in model.layers if _dotted(layer.name) == _dotted(name)), None)
    takers = (layer for layer in model.layers if given is not None and getattr(layer, "input", None) is given)
    return next(takers, None)


def _watched(layer: Any, kinds: list[str], once: Callable[[str, Any], None]) -> Iterator[tuple[Any, str, Any]]:
    """The functions of the layer that are to be replaced, by ones that tell what they are given and give."""
    if layer is None:
        return
    holds_activation = bool(layer.weights) and callable(getattr(layer, "activation", None))

    @wraps(layer.call)
    def call(*args: Any, **kwargs: Any) -> Any:
        if "input" in kinds and args:
            once("input", args[0])
        given = call.__wrapped__(*args, **kwargs)
        if "output" in kinds and not holds_activation:
            once("output", given)
        return given

    yield layer, "call", call
    if holds_activation and "output" in kinds:

        @wraps(layer.activation)
        def activate(x: Any) -> Any:
            once("output", x)
            return activate.__wrapped__(x)

        yield layer, "activation", activate


def _plain(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return value[0] if len(set(value)) == 1 else list(value)
    return value


def _output(model: Any, name: str) -> Any:
    if name.endswith(">"):
        return _behind(model, name[:-1]).output
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
    """The application as its constructor leaves it, with the names that are asked for."""
    keras = _keras(precision)
    model = getattr(keras.applications, config["application"])(**{"weights": None, **config.get("args", {})})
    for layer in model.layers if "rename" in config else ():
        for pattern, name in config["rename"].items():
            layer.name = re.sub(pattern, name, layer.name)
        object.__setattr__(layer, "_open_name_scope", nullcontext)  # which takes no `/`, as older releases did
    return model


def _restored(config: Mapping[str, Any], path: str) -> list[np.ndarray]:
    """The application's weights from an object-based checkpoint of TensorFlow's, or from an exported SavedModel."""
    model = build_model(config, "float32")
    import tensorflow as tf

    folder = os.path.dirname(path) if os.path.basename(path) == "saved_model.pb" else path
    prefix = os.path.join(folder, "variables", "variables") if os.path.isdir(folder) else path
    for ending in re.findall(r"\.(?:index|data-[0-9]+-of-[0-9]+)$", prefix):
        prefix = prefix[: -len(ending)]
    places = [key.split("/") for key in tf.train.load_checkpoint(prefix).get_variable_to_shape_map()]
    roots = {place[0]: model for place in places if place[1:2] == ["_operations"]}
    if ["variables", "0"] in [place[:2] for place in places]:
        roots = {"variables": model.variables}
    checkpoint = tf.train.Checkpoint(**roots) if roots else tf.train.Checkpoint(model)
    checkpoint.read(prefix).assert_existing_objects_matched().expect_partial()
    return model.get_weights()


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
    if keras.backend.backend() == "tensorflow":
        _set_up_tensorflow()
    keras.utils.clear_session()  # layers are numbered by how many came before
    keras.config.set_floatx(precision)
    keras.config.set_dtype_policy(precision)
    return keras


@lru_cache(maxsize=1)
def _set_up_tensorflow() -> None:
    """For exactness: Python's numbers become float64 at once, and not by way of float32, as its GELU has it.

    For speed: functions run as they are; XLA would compile each convolution in groups, time and again.
    """
    import tensorflow as tf
    from tensorflow.python.ops import math_ops

    cast = math_ops.cast
    math_ops.cast = lambda x, *args, **kwargs: cast(np.float64(x) if isinstance(x, float) else x, *args, **kwargs)
    tf.config.run_functions_eagerly(True)


def _backend() -> str:
    """TensorFlow where it can be imported. To look is to import, and torch cannot always come after it."""
    try:
        import tensorflow  # noqa: F401
    except ImportError:
        return "torch"
    return "tensorflow"
