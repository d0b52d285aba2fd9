"""What Keras writes, in all its forms, is read back bit for bit and under the layers' own names."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from converters.errors import CheckpointError, UnknownFormat
from converters.readers import open_checkpoint
from converters.readers.keras import checkpoint as keras
from converters.tensors import LazyTensor

GENERATOR = Path(__file__).with_name("forms.py")
DEMO = Path(keras.__file__).parents[2] / "demo"


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("forms")
    subprocess.run([sys.executable, GENERATOR, folder], check=True, timeout=300, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def expected(forms: Path) -> dict[str, dict[str, Any]]:
    return json.loads((forms / "expected.json").read_text())


def tensors(path: Path) -> dict[str, Any]:
    tree = keras.read(path).tree
    found = {name: leaf for name, leaf in tree.items() if isinstance(leaf, LazyTensor)}
    assert all(leaf.spec.name == name for name, leaf in found.items())
    return {n: [leaf.spec.dtype, list(leaf.spec.shape), leaf.read().hex()] for n, leaf in found.items()}


CRC, NONE = "CRC-32 of the archive", "none in format"
VARIABLE = {"batch_normalization_2/beta": "batch_normalization_2/variable_0", "no_beta/gamma": "no_beta/variable_0"}
STEM = {
    name: f"stem/{name}"
    for name in ("inner/kernel", "inner/bias", "layer_normalization/gamma", "layer_normalization/beta")
}
FORMS = [  # file, integrity, writer, names that differ because the form does not say enough
    ("zoo.keras", CRC, "Keras 3.", {}),
    ("zoo.nameless.keras", CRC, "Keras 3.", {}),
    ("zoo.deflated.keras", CRC, "Keras 3.", {}),
    ("zoo.h5", NONE, "Keras 3.", {}),
    ("zoo.legacy.h5", NONE, "Keras 3.", STEM),
    ("zoo.weights.h5", NONE, "None", VARIABLE),
    ("zoo.weights.json", NONE, "None", VARIABLE),
    *((f"trained.{end}", CRC if end == "keras" else NONE, "Keras 3.", {}) for end in ("keras", "h5", "legacy.h5")),
    ("trained.weights.h5", NONE, "None", {}),
]


@pytest.mark.parametrize("form, integrity, writer, renamed", FORMS, ids=[form[0] for form in FORMS])
def test_a_form_is_read_bit_for_bit(
    form: str, integrity: str, writer: str, renamed: dict[str, str], forms: Path, expected: dict[str, dict[str, Any]]
) -> None:
    path = forms / form
    assert keras.accepts(path, path.read_bytes()[:4096])
    contents = keras.read(path)
    assert contents.integrity == integrity
    assert str(contents.writer).startswith(writer)
    wanted = {renamed.get(name, name): value for name, value in expected[form.partition(".")[0]].items()}
    assert tensors(path) == wanted


def test_a_file_without_names_is_read_by_path(forms: Path, expected: dict[str, dict[str, Any]]) -> None:
    found = tensors(forms / "zoo.nameless.weights.h5")
    assert found["layers/conv2d_10/kernel"] == expected["zoo"]["conv2d_11/kernel"]
    assert found["layers/functional/layers/batch_normalization/gamma"] == expected["zoo"]["right/shared/gamma"]
    assert len(found) == len(expected["zoo"])


@pytest.mark.parametrize("form", ["trained.keras", "trained.h5", "trained.weights.h5", "trained.weights.json"])
def test_the_optimizer_is_set_aside(form: str, forms: Path, expected: dict[str, dict[str, Any]]) -> None:
    checkpoint = open_checkpoint(forms / form)
    assert checkpoint.format == "Keras"
    assert checkpoint.tensors.keys() == expected["trained"].keys()
    assert checkpoint.set_aside == {"optimizer.**": "optimizer state"}


def test_the_config_is_plain_metadata(forms: Path) -> None:
    for form in ("zoo.keras", "zoo.h5"):
        tree = keras.read(forms / form).tree
        assert tree["config"]["class_name"] == "Functional"
        assert tree["keras_version"].startswith("3.")


KERAS_2: dict[str, dict[str, list[str]]] = {  # case: layer -> names of its weights, as files of Keras 1 and 2 have them
    "suffix": {"conv1": ["conv1/kernel:0", "conv1/bias:0"]},
    "second in its session": {"conv1": ["conv1_1/kernel:0"]},
    "scoped": {"bn": ["model/bn/gamma:0", "model/bn/moving_mean:0"]},
    "depthwise": {"dw": ["dw/depthwise_kernel:0", "dw/bias:0"]},
    "separable": {"sep": ["sep/depthwise_kernel:0", "sep/pointwise_kernel:0"]},
    "slashes": {"block/dw/BatchNorm": ["block/dw/BatchNorm/gamma:0"], "block/dw": ["block/dw/depthwise_kernel:0"]},
    "nested model": {"backbone": ["conv/kernel:0", "bn/gamma:0"]},
    "nested twins": {"left": ["conv/kernel:0", "a/kernel:0"], "right": ["conv/kernel:0", "b/kernel:0"]},
    "attention": {"mha": ["mha/query/kernel:0", "mha/key/kernel:0"]},
    "unnamed": {"scale": ["variable_17"]},
    "keras 1": {"block1_conv1": ["block1_conv1_W_1:0", "block1_conv1_b_1:0"]},
    "no layer": {"top_level_model_weights": ["model/token:0"]},
}
NAMES = {
    "suffix": ["conv1/kernel", "conv1/bias"],
    "second in its session": ["conv1/kernel"],
    "scoped": ["bn/gamma", "bn/moving_mean"],
    "depthwise": ["dw/kernel", "dw/bias"],
    "separable": ["sep/depthwise_kernel", "sep/pointwise_kernel"],
    "slashes": ["block/dw/BatchNorm/gamma", "block/dw/kernel"],
    "nested model": ["conv/kernel", "bn/gamma"],
    "nested twins": ["left/conv/kernel", "a/kernel", "right/conv/kernel", "b/kernel"],
    "attention": ["mha/query/kernel", "mha/key/kernel"],
    "unnamed": ["scale/variable_0"],
    "keras 1": ["block1_conv1/kernel", "block1_conv1/bias"],
    "no layer": ["model/token"],
}


@pytest.mark.parametrize("case", KERAS_2)
def test_older_spellings_come_out_as_todays(case: str, tmp_path: Path) -> None:
    path, weights = tmp_path / "old.h5", KERAS_2[case]
    with h5py.File(path, "w") as file:
        names = [name.encode() for name in weights]
        file.attrs["layer_names0"], file.attrs["layer_names1"] = names[:1], np.array(names[1:], "S")
        file.attrs["keras_version"] = b"2.2.4"
        for i, (layer, listed) in enumerate(weights.items()):
            group = file.require_group(layer)
            group.attrs["weight_names"] = [name.encode() for name in listed]
            for j, name in enumerate(listed):
                group[name] = np.full(2, 10 * i + j, "f4")
    found = tensors(path)
    assert list(found) == NAMES[case]
    values = [np.frombuffer(bytes.fromhex(data), "f4")[0] for _, _, data in found.values()]
    assert values == [10 * i + j for i, listed in enumerate(weights.values()) for j in range(len(listed))]
    assert keras.read(path).writer == "Keras 2.2.4"


def test_what_is_not_of_keras_says_so(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["temperature"] = np.zeros(3)
    with pytest.raises(UnknownFormat, match="holds no Keras weights"):
        keras.read(tmp_path / "other.h5")
    assert not keras.accepts(tmp_path, b"")
    assert not keras.accepts(tmp_path / "other.h5", b"PK\x03\x04")


def test_what_keras_2_counts_beside_layers_is_set_aside(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "old.weights.h5", "w") as file:
        for place in ("layers/dense/vars/0", "metrics/mean/vars/0", "metrics/mean/vars/1", "optimizer/vars/0"):
            file[place] = np.zeros((2, 2), "f4")
    found = open_checkpoint(tmp_path / "old.weights.h5")
    assert list(found.tensors) == ["layers/dense/kernel"]
    assert found.set_aside == {"optimizer.**": "optimizer state", "metrics.**": "what metrics have counted"}


def test_what_no_layer_lists_is_not_lost(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "more.h5", "w") as file:
        file.attrs["layer_names"] = np.array([], "S1")
        file["notes/temperature"] = np.zeros(3)
    assert list(tensors(tmp_path / "more.h5")) == ["notes/temperature"]


def test_a_quantized_kernel_is_called_that(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "q.weights.h5", "w") as file:
        file["layers/dense/vars/0"] = np.zeros((2, 2), "i1")
        file["layers/dense/vars/1"] = np.zeros(2, "f4")
    with pytest.raises(CheckpointError, match=r"q\.weights\.h5: layers/dense/kernel: is quantized"):
        keras.read(tmp_path / "q.weights.h5")


def test_the_demo_is_what_its_recording_says() -> None:
    recording = np.load(DEMO / "digits.recording.npz", allow_pickle=False)
    about = json.loads(str(recording["about"]))
    path = DEMO / about["source"]["file"]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == about["source"]["sha256"]
    logits, labels = recording["float64.digits.logits"], recording["labels.digits"]
    assert recording["input.digits"].shape == (len(labels), 1, 32, 32)
    assert (logits.argmax(1) == labels).mean() > 0.96
    assert np.abs(logits - recording["float32.digits.logits"]).max() < 2e-6 * np.abs(logits).max()

    found = keras.read(path).tree
    with h5py.File(path) as file:
        assert bytes(found["predictions/kernel"].read()) == file["layers/dense/vars/0"][()].tobytes()
    assert len(found) == 262
    assert {"bn_Conv1/gamma", "block_1_depthwise/kernel", "block_16_project_BN/moving_variance"} <= found.keys()
