"""Reference runner for TensorFlow 1 code, which builds a graph and names its variables: slim's nets, TPU models.

`model` is {"module": NAME, "factory": NAME, "args": {...}, "scope": NAME, "scope_args": {...}, "training": ARGUMENT,
"size": [height, width, channels]}. FACTORY(images, **args), or of a class FACTORY(**args)(images), adds the model to a
graph and gives its logits, alone or before a table of endpoints; an argument {"attribute": NAME} is what the module
has by that name. `scope` is a function of the module that gives the arg_scope to call it in. `training` is the
argument, where either is given it, that says whether batch norms take statistics ("is_training"). A checkpoint is what
a Saver wrote, by its prefix.
Outputs: "0" or "logits", or the name of an endpoint; of one pixel each, as a vector.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import re
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import numpy as np
from named_arrays import NamedArrays

__all__ = ["TensorFlowGraph", "build", "construct"]

AVERAGE = "ExponentialMovingAverage"
SIZE = (64, 64, 3)
FUSED = re.compile(r"FusedBatchNorm(V[23])?")
STATISTICS = ("moving_mean", "moving_variance")


def build(job: Mapping[str, Any], precision: str) -> tuple[Any, dict[str, Any]]:
    """The graph with the file's variables."""
    tf = _tensorflow()
    model = TensorFlowGraph(job["model"], precision)
    reader = tf.train.load_checkpoint(job["source"]["file"])
    ending = f"/{AVERAGE}" if AVERAGE in job["source"].get("wrappers", ()) else ""
    stored = reader.get_variable_to_shape_map()
    names = {name: name + ending if name + ending in stored else name for name in model.shapes}
    arrays = {name: reader.get_tensor(own) for name, own in names.items()}

    def run(x: np.ndarray) -> dict[str, np.ndarray]:
        return model.run(arrays, x, job["outputs"])

    return run, {}


def construct(job: Mapping[str, Any]) -> TensorFlowGraph:
    """The graph, with shapes in place of variables."""
    return TensorFlowGraph(job["model"], "float32")


class TensorFlowGraph(NamedArrays):
    """What a factory adds to a graph."""

    def __init__(self, model: Mapping[str, Any], precision: str) -> None:
        self.model, self.precision = model, precision
        self.sessions: dict[Any, Any] = {}  # by the shape of an input
        _, _, _, variables = self._graph((1, *model.get("size", SIZE)), training=False)
        self.shapes = {name: tuple(variable.shape.as_list()) for name, variable in variables.items()}

    def run(self, arrays: Mapping[str, np.ndarray], x: np.ndarray, outputs: Any) -> dict[str, np.ndarray]:
        """The outputs of a batch, NCHW."""
        x = x.transpose(0, 2, 3, 1)
        if x.shape not in self.sessions:
            graph, images, given, variables = self._graph(x.shape, training=False)
            self.sessions[x.shape] = self._session(graph, variables, arrays), images, given
        session, images, given = self.sessions[x.shape]
        logits, endpoints = given if isinstance(given, tuple) else (given, {})
        wanted = {name: {"0": logits, "logits": logits, **endpoints}[name] for name in outputs}
        found = session.run(wanted, {images: x})
        return {name: a.reshape(a.shape[0], -1) if a.shape[1:-1] == (1, 1) else a for name, a in found.items()}

    def statistics(self, arrays: Mapping[str, np.ndarray], batch: np.ndarray) -> dict[str, np.ndarray]:
        """What every batch norm sees while the graph trains."""
        batch = batch.transpose(0, 2, 3, 1)
        graph, images, _, variables = self._graph(batch.shape, training=True)
        variables = {name: one for name, one in variables.items() if name in arrays}  # without a head of training alone
        wanted = {}
        for operation in graph.get_operations():
            if FUSED.fullmatch(operation.type):
                owners = {_variable(tensor).rpartition("/")[0] for tensor in operation.inputs[1:3]}
                for output, name in enumerate(STATISTICS, 1):
                    there = [f"{owner}/{name}" for owner in owners if f"{owner}/{name}" in variables]
                    wanted.update(dict.fromkeys(there, operation.outputs[output]))
        session = self._session(graph, variables, arrays)
        found: dict[str, np.ndarray] = session.run(wanted, {images: batch})
        return found

    def save(self, arrays: Mapping[str, np.ndarray], path: str) -> None:
        """As training leaves them: averages, which are the weights, beside raw ones, slots and a counter."""
        tf = _tensorflow()
        with tf.Graph().as_default(), tf.compat.v1.Session() as session:
            found: dict[str, Any] = {}
            for name, array in arrays.items():
                kinds = {"": np.full_like(array, 7), AVERAGE: array, "RMSProp": np.ones_like(array)}
                found.update({f"{name}/{kind}".rstrip("/"): value for kind, value in kinds.items()})
            found["global_step"] = np.int64(350)
            given = {name: tf.compat.v1.placeholder(value.dtype, value.shape) for name, value in found.items()}
            named = {name: tf.compat.v1.Variable(one, name=name, use_resource=False) for name, one in given.items()}
            initializer = tf.compat.v1.global_variables_initializer()
            session.run(initializer, {one: found[name] for name, one in given.items()})
            tf.compat.v1.train.Saver(named).save(session, path, write_meta_graph=False, write_state=False)

    def _graph(self, shape: Any, training: bool) -> Any:
        """A graph for a batch of this shape, its input, what the factory gives, and the variables by their names."""
        tf = _tensorflow()
        module: Any = importlib.import_module(self.model["module"])
        args, scope_args = dict(self.model.get("args", {})), dict(self.model.get("scope_args", {}))
        args = {key: _named(value, module) for key, value in args.items()}
        switch = self.model.get("training", "is_training")
        for table in (args, scope_args):
            table.update({switch: training} if switch in table else {})
        factory = getattr(module, self.model["factory"])
        graph = tf.Graph()
        with graph.as_default(), _in_precision(module, self.precision):
            tf.compat.v1.set_random_seed(0)
            tf.compat.v1.train.create_global_step()  # before any scope of the model's
            images = tf.compat.v1.placeholder(self.precision, shape)
            if "scope" in self.model:
                import tf_slim

                with tf_slim.arg_scope(getattr(module, self.model["scope"])(**scope_args)):
                    given = factory(images, **args)
            elif inspect.isclass(factory):
                model: Any = factory(**args)
                given = model(images, **{switch: training})
            else:
                given = factory(images, **{**args, switch: training})
            variables = {v.op.name: v for v in tf.compat.v1.global_variables() if v.op.name != "global_step"}
        return graph, images, given, variables

    def _session(self, graph: Any, variables: Any, arrays: Mapping[str, np.ndarray]) -> Any:
        train = _tensorflow().compat.v1.train
        with graph.as_default():
            session = _tensorflow().compat.v1.Session(graph=graph)
            session.run(train.get_global_step().initializer)
        values = {variable.initial_value: arrays[name] for name, variable in variables.items()}
        session.run([variable.initializer for variable in variables.values()], values)
        return session


def _tensorflow() -> Any:
    """TensorFlow as its first version, whose layers are those of tf_keras, in a place where it no longer looks."""
    os.environ["TF_USE_LEGACY_KERAS"] = "1"
    import tensorflow as tf

    tf.compat.v1.disable_v2_behavior()
    try:
        layers: Any = importlib.import_module("tf_keras.src.legacy_tf_layers")
    except ImportError:
        return tf  # older than that
    for name in ("base", "convolutional", "core", "normalization", "pooling"):
        sys.modules["tf_keras.legacy_tf_layers." + name] = importlib.import_module(layers.__name__ + "." + name)
    sys.modules["tf_keras.legacy_tf_layers"] = layers
    return tf


def _named(value: Any, module: Any) -> Any:
    """An argument; {"attribute": NAME} is what the module has by that name."""
    return getattr(module, value["attribute"]) if isinstance(value, dict) and value.keys() == {"attribute"} else value


@contextlib.contextmanager
def _in_precision(module: Any, precision: str) -> Iterator[None]:
    """In float64 so is, for the while, what its code has in float32: np.float32, and the fused kernel of a norm."""
    if precision == "float32":
        yield
        return
    tf = _tensorflow()
    numpy = types.SimpleNamespace(**{**vars(np), "float32": np.float64})

    def normalize(x: Any, scale: Any, offset: Any, mean: Any, variance: Any, epsilon: float, **_settings: Any) -> Any:
        return tf.nn.batch_normalization(x, mean, variance, offset, scale, epsilon), mean, variance

    with contextlib.ExitStack() as patched:
        if hasattr(module, "np"):
            patched.enter_context(mock.patch.object(module, "np", numpy))
        patched.enter_context(mock.patch.object(tf.compat.v1.nn, "fused_batch_norm", normalize))
        yield


def _variable(tensor: Any) -> str:
    """The name of the variable that a tensor is read from, or of a constant."""
    operation = tensor.op
    while operation.inputs:
        operation = operation.inputs[0].op
    return str(operation.name)
