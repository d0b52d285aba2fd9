"""One Keras model in every form that its users save it in: the same weights, and the same function."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from converters.conversion import convert
from converters.verifier import verify

FORMS = ("model.weights.h5", "model.keras", "model.h5", "exported", "model.ckpt")
WRITE = """
import sys
import keras, numpy, tensorflow
keras.layers.Conv2D(1, 1)
model = keras.applications.MobileNetV3Small(
    weights=None, minimalistic=True, classes=7, input_shape=(64, 64, 3), classifier_activation=None
)
rng = numpy.random.default_rng(0)
for weight in model.weights:
    inputs = numpy.prod(weight.shape[:-1])
    noise = rng.standard_normal(weight.shape) / inputs**0.5
    weight.assign(noise if len(weight.shape) > 1 else rng.uniform(0.5, 1.5, weight.shape))
model.save_weights(sys.argv[1] + "/model.weights.h5")
model.save(sys.argv[1] + "/model.keras")
model.save(sys.argv[1] + "/model.h5")
model.export(sys.argv[1] + "/exported", verbose=False)
tensorflow.train.Checkpoint(model=model).write(sys.argv[1] + "/model.ckpt")
"""


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("forms")
    subprocess.run([sys.executable, "-c", WRITE, folder], check=True, capture_output=True)
    for form in FORMS:
        convert(folder / form, folder / f"{form}.out", img_size=64)
    return folder


@pytest.mark.parametrize("form", FORMS[1:])
def test_every_form_holds_the_same_weights(converted: Path, form: str) -> None:
    first, other = (load_file(converted / f"{name}.out" / "model.safetensors") for name in (FORMS[0], form))
    assert first.keys() == other.keys() and all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("form", FORMS[3:])
def test_the_reference_is_filled_from_what_tensorflow_wrote(converted: Path, form: str) -> None:
    verdict = verify(converted / f"{form}.out", converted / form, taps=False)
    assert verdict.passed and verdict.precision == "float64", str(verdict)
