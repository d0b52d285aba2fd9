"""The runners, each with its real framework."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from converters.errors import ReferenceFailed
from converters.verifier.probes import probes
from converters.verifier.recording import Recording, read_recording
from converters.verifier.worker import REFERENCES, run_reference

MOBILENET = {
    "application": "MobileNetV2",
    "args": {"alpha": 0.35, "classes": 10, "input_shape": [64, 64, 3], "classifier_activation": None},
}
PROBES = probes((3, 64, 64))


def ask(source: Path, runner: str, model: dict, outputs: dict, inputs: dict = PROBES) -> Recording:
    job = {"runner": runner, "model": model, "outputs": outputs, "source": {"file": str(source)}}
    return run_reference(job, inputs)


def distance(one: Recording, other: Recording, precision: str, output: str) -> float:
    a, b = (recording.outputs[precision]["normal"][output] for recording in (one, other))
    return float(np.abs(a - b).max() / np.abs(b).max())


@pytest.fixture(scope="module")
def mobilenet(write_checkpoint, tmp_path_factory) -> Path:
    return write_checkpoint(
        {"framework": "keras", "model": MOBILENET}, tmp_path_factory.mktemp("keras") / "net.weights.h5"
    )


def test_keras_on_tensorflow_and_on_torch(mobilenet, monkeypatch):
    outputs = {"logits": "0", "forward_features": "out_relu | b h w c -> b c h w"}
    on_tensorflow = ask(mobilenet, "keras", MOBILENET, outputs)
    assert on_tensorflow.about["notes"] == [] and on_tensorflow.about["backend"] == "tensorflow"
    assert on_tensorflow.outputs["float64"]["ramp"]["forward_features"].shape == (2, 1280, 2, 2)
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    on_torch = ask(mobilenet, "keras", MOBILENET, outputs)
    assert list(on_torch.outputs) == ["float32"]
    assert on_torch.about["notes"] == ["no float64: TypeError: Keras on torch computes parts of it in float32"]
    assert distance(on_torch, on_tensorflow, "float32", "logits") < 1e-5
    assert "tensorflow" not in on_torch.about["framework"]


def test_keras_taps(mobilenet, tmp_path):
    """What leaves one layer is what enters the next."""
    names = ["Conv1", "bn_Conv1", "block_3_expand", "block_3_expand_BN", "block_16_project", "Conv_1", "predictions"]
    job = {"runner": "keras", "model": MOBILENET, "outputs": {"logits": "0"}, "source": {"file": str(mobilenet)}}
    job["taps"] = {"inputs": [*names, "absent"], "outputs": [*names, "Conv1_relu", "block_16_project_BN"]}
    (tmp_path / "job.json").write_text(json.dumps(job))
    np.savez(tmp_path / "inputs.npz", normal=PROBES["normal"])
    subprocess.run([sys.executable, REFERENCES, tmp_path], check=True, capture_output=True)
    recording = read_recording(tmp_path / "recording.npz")
    taps = recording.taps
    assert list(taps.inputs) == names and set(taps.outputs) == {*names, "Conv1_relu", "block_16_project_BN"}
    assert (
        taps.inputs["bn_Conv1"] == taps.outputs["Conv1"]
        and taps.inputs["Conv_1"] == taps.outputs["block_16_project_BN"]
    )
    np.testing.assert_array_equal(taps.read(taps.inputs["Conv1"]), PROBES["normal"].astype(np.float64))
    assert taps.read(taps.outputs["block_3_expand"]).shape == (2, 48, 16, 16)
    logits = recording.outputs["float64"]["normal"]["logits"]
    np.testing.assert_array_equal(taps.read(taps.outputs["predictions"]), logits)
    assert recording.modules["bn_Conv1"] == {"kind": "BatchNormalization", "eps": 0.001}
    assert recording.modules["Conv1"]["padding"] == "same" and recording.modules["Conv1"]["stride"] == 2


def test_keras_weights_of_another_model(mobilenet):
    model = {**MOBILENET, "args": {**MOBILENET["args"], "classes": 11}}
    with pytest.raises(ReferenceFailed, match="the keras reference: ValueError: "):
        ask(mobilenet, "keras", model, {"logits": "0"})


def test_keras_probes_enter_behind_the_preprocessing_and_taps_before_activations(write_checkpoint, tmp_path):
    arguments = {"weights": None, "include_top": False, "input_shape": [32, 32, 3]}
    model = {"application": "EfficientNetB0", "args": arguments}
    source = write_checkpoint({"framework": "keras", "model": model}, tmp_path / "net.weights.h5")
    job = {"runner": "keras", "model": model, "outputs": {"features": "0"}, "source": {"file": str(source)}}
    names = ["stem_conv_pad", "block1a_se_reduce", "block1a_se_expand"]
    job["taps"] = {"inputs": names, "outputs": names}
    taps = run_reference(job, inside := probes((3, 32, 32)), keep=tmp_path / "taps.npz").taps
    np.testing.assert_array_equal(taps.read(taps.inputs[names[0]]), inside["normal"].astype(np.float64))
    reduced, expanded = (taps.read(taps.outputs[name]) for name in names[1:])
    np.testing.assert_allclose(taps.read(taps.inputs[names[2]]), reduced / (1 + np.exp(-reduced)), rtol=1e-14)
    assert expanded.min() < 0  # no sigmoid yet


def test_mmlab_beside_a_transformers_that_it_does_not_know(converted, tmp_path, monkeypatch):
    """MMPretrain imports its multimodal models, and fails, as soon as it finds transformers installed."""
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text("raise ImportError('too new')")
    information = tmp_path / "transformers-5.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 5.0\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    again = ask(converted.source, "mmpretrain", converted.model, {"logits": "0"})
    assert distance(again, read_recording(converted.recording), "float64", "logits") == 0


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda state: state.pop("backbone.bn1.running_var"), "it lacks backbone.bn1.running_var"),
        (
            lambda state: state.update({"head.fc.bias": Exploding()}),
            "refuses the checkpoint, which would call posix.system",
        ),
    ],
)
def test_mmlab_checkpoints_that_do_not_fill_the_model(converted, tmp_path, spoil, words):
    checkpoint = torch.load(converted.source, weights_only=False)
    spoil(checkpoint["state_dict"])
    torch.save(checkpoint, tmp_path / "spoilt.pth")
    with pytest.raises(ReferenceFailed) as caught:
        ask(tmp_path / "spoilt.pth", "mmpretrain", converted.model, {"logits": "0"})
    assert words in str(caught.value)


class Exploding:
    def __reduce__(self):
        return os.system, ("true",)
