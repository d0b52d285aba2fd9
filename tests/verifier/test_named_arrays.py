"""The runners of models that are arrays by name: TensorFlow's graphs and Flax's modules, from anybody's code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters.readers import open_checkpoint
from converters.tensors import to_torch
from converters.verifier.worker import run_reference, run_task

GRAPH = """
import numpy as np
import tensorflow.compat.v1 as tf

def net(images, width, is_training):
    assert images.shape[0].value
    with tf.variable_scope("Net"), tf.variable_scope("Conv"):
        kernel = tf.get_variable("weights", (1, 1, 3, width), images.dtype)
        with tf.variable_scope("BatchNorm"):
            names = "gamma", "beta", "moving_mean", "moving_variance"
            one = lambda name: tf.get_variable(name, (width,), images.dtype, initializer=tf.zeros_initializer())
            gamma, beta, mean, variance = map(one, names)
        x = tf.nn.conv2d(images, kernel, 1, "SAME")
        how = {} if is_training else {"mean": mean, "variance": variance}
        x = tf.nn.fused_batch_norm(x, gamma, beta, epsilon=1e-3, is_training=is_training, **how)[0]
        return x, {"third": x * np.float32(1 / 3)}
"""
MODULE = """
import flax.linen as nn
import jax.numpy as jnp
from typing import Any

class Inner(nn.Module):
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        return nn.Dense(5, dtype=self.dtype)(x)

class Net(nn.Module):
    sizes: Any

    @nn.compact
    def __call__(self, x, train):
        assert not train and self.sizes.names == ("a", "b")
        x = Inner(name="first")(x)
        return x, {"pre": {"double": 2 * x}}
"""


@pytest.fixture
def answers(tmp_path: Path, monkeypatch):
    """What a reference of this code says of its own checkpoint, the checkpoint, and the probe."""

    def ask(code: str, runner: str, model: dict[str, Any], outputs: list[str], suffix: str):
        (tmp_path / "code_of_mine.py").write_text(code)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        source = tmp_path / f"source{suffix}"
        block = {"runner": runner, "model": {"module": "code_of_mine", **model}}
        run_task({"task": "write_weights", **block, "out": str(source), "input": [8, 3, 16, 16]})
        checkpoint = open_checkpoint(source)
        x = np.random.default_rng(0).standard_normal((2, 3, 4, 5)).astype(np.float32)
        files = [str(file.path) for file in checkpoint.files]
        where = {"file": str(source), "files": files, "wrappers": list(checkpoint.wrappers)}
        job = {**block, "outputs": {name: name for name in outputs}, "source": where}
        recording = run_reference({**job, "taps": {"inputs": [], "outputs": ["renamed"]}}, {"x": x})
        tensors = {name: to_torch(tensor.read(), tensor.spec).numpy() for name, tensor in checkpoint.tensors.items()}
        return recording, checkpoint, tensors, x.transpose(0, 2, 3, 1).astype(np.float64)

    return ask


def test_a_graph_of_tensorflow_1(answers):
    model = {"factory": "net", "args": {"width": 7}, "size": [16, 16, 3]}
    recording, checkpoint, tensors, x = answers(GRAPH, "tensorflow", model, ["0", "third"], ".ckpt")
    assert checkpoint.wrappers == ("ExponentialMovingAverage",)  # the raw ones are all 7
    norm = {name.rpartition("/")[2]: tensor.astype(np.float64) for name, tensor in tensors.items()}
    kernel = norm["weights"][0, 0]
    assert np.abs(kernel - 7).min() > 1
    x = (x @ kernel - norm["moving_mean"]) / np.sqrt(norm["moving_variance"] + 1e-3)
    right = norm["gamma"] * x + norm["beta"]
    found = recording.outputs["float64"]["x"]
    np.testing.assert_allclose(found["0"], right, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(found["third"], right / 3, rtol=1e-10, atol=1e-12)
    seen = np.random.default_rng(0).standard_normal([8, 3, 16, 16]).astype("float32").transpose(0, 2, 3, 1) @ kernel
    ratio = norm["moving_variance"] / seen.var((0, 1, 2))
    assert 0.69 < ratio.min() < ratio.max() < 1.41  # a batch's, and then moved


def test_a_module_of_flax(answers):
    args = {"sizes": {"names": ["a", "b"]}}
    model = {"factory": "Net", "args": args, "call": {"train": False}, "rename": {"first": "renamed"}}
    recording, _, tensors, x = answers(MODULE, "flax", model, ["0", "1/pre/double", "renamed"], ".npz")
    assert tensors.keys() == {"renamed/Dense_0/kernel", "renamed/Dense_0/bias"}
    right = x @ tensors["renamed/Dense_0/kernel"].astype(np.float64) + tensors["renamed/Dense_0/bias"]
    found = recording.outputs["float64"]["x"]
    for name, factor in (("0", 1), ("1/pre/double", 2), ("renamed", 1)):
        np.testing.assert_allclose(found[name], factor * right, rtol=1e-12)
