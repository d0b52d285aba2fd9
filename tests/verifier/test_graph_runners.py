"""ONNX graphs, SavedModels, frozen graphs and whole Keras models, each written by its own framework."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from converters.conversion import convert
from converters.errors import ReferenceFailed
from converters.verifier import verify
from converters.verifier.probes import probes
from converters.verifier.recording import Recording
from converters.verifier.worker import run_reference

PROBES = {"normal": probes((3, 64, 64))["normal"]}

WRITE = """
import sys
import keras
import tensorflow as tf
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

folder = sys.argv[1]
args = {"alpha": 0.35, "classes": 10, "input_shape": (64, 64, 3), "weights": None}
model = keras.applications.MobileNetV2(**args, classifier_activation="softmax")
model.load_weights(f"{folder}/net.weights.h5")
model.save(f"{folder}/net.keras")
linear = keras.applications.MobileNetV2(**args, classifier_activation=None)
linear.set_weights(model.get_weights())
linear.export(f"{folder}/saved", verbose=False)
function = tf.function(linear, jit_compile=False).get_concrete_function(tf.TensorSpec([None, 64, 64, 3]))
frozen = convert_variables_to_constants_v2(function)
print(frozen.outputs[0].name)
with open(f"{folder}/frozen.pb", "wb") as file:
    file.write(frozen.graph.as_graph_def().SerializeToString())
"""


@pytest.fixture(scope="module")
def mobilenet(write_checkpoint, tmp_path_factory) -> tuple[Path, str]:
    """A folder with one Keras model in every form and what it converts to, and the frozen graph's last tensor."""
    folder = tmp_path_factory.mktemp("mobilenet")
    args = {"alpha": 0.35, "classes": 10, "input_shape": [64, 64, 3], "classifier_activation": None}
    spec = {"framework": "keras", "model": {"application": "MobileNetV2", "args": args}}
    write_checkpoint(spec, folder / "net.weights.h5")
    done = subprocess.run([sys.executable, "-c", WRITE, folder], check=True, capture_output=True, text=True)
    convert(folder / "net.weights.h5", folder / "out", img_size=64)
    return folder, done.stdout.split()[-1]


def compared(folder: Path, reference: str, **how):
    return verify(folder / "out", folder / "net.weights.h5", reference=reference, taps=False, **how)


@pytest.mark.parametrize("reference", ["savedmodel:{}/saved", "savedmodel:{}/frozen.pb"])
def test_graphs_of_tensorflow_confirm_a_conversion(mobilenet, reference):
    folder, last = mobilenet
    outputs = [] if reference.endswith("saved") else [f"logits={last}"]
    verdict = compared(folder, reference.format(folder), outputs=outputs, trust=True)
    assert verdict.passed and verdict.precision == "float32", str(verdict)
    assert "no float64: TypeError: a graph has the precision that it was saved in" in verdict.warnings
    files = verdict.reference["weights"]["files"]
    assert ("saved_model.pb" in files) if reference.endswith("saved") else files == ["frozen.pb"]


def test_a_whole_keras_model_confirms_a_conversion_in_float64(mobilenet):
    """It ends in a softmax, which the logits are taken before."""
    verdict = compared(mobilenet[0], f"keras:{mobilenet[0] / 'net.keras'}", trust=True)
    assert verdict.passed and verdict.precision == "float64" and not verdict.warnings, str(verdict)
    assert verdict.reference["model"]["file"] == "net.keras"


def test_without_trust_the_mappings_application_stands_in(mobilenet):
    folder, _ = mobilenet
    verdict = compared(folder, f"keras:{folder / 'net.keras'}", outputs=["logits=0"])  # which has no softmax
    assert verdict.passed, str(verdict)


HIDING = f"""#!{sys.executable}
import runpy, sys
from importlib.machinery import PathFinder

find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *where: None if name == "tensorflow" else find(name, *where)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_keras_without_tensorflow_runs_on_torch(mobilenet, tmp_path):
    folder, _ = mobilenet
    (tmp_path / "python").write_text(HIDING)
    (tmp_path / "python").chmod(0o755)
    verdict = compared(folder, "auto", python=str(tmp_path / "python"))
    assert verdict.passed and verdict.precision == "float32", str(verdict)
    assert verdict.reference["backend"] == "torch" and "tensorflow" not in verdict.reference["framework"]
    assert "no float64: TypeError: Keras on torch computes parts of it in float32" in verdict.warnings


def ask(source: Path, runner: str, model: dict, output: str = "0", trust: bool = False) -> Recording:
    job = {"runner": runner, "model": model, "outputs": {"logits": output}, "source": {"file": str(source)}}
    return run_reference({**job, "trust": trust}, PROBES)


@pytest.mark.parametrize(
    ("runner", "model", "trust", "words"),
    [
        ("savedmodel", {"path": "saved"}, False, "saved is a graph, which would be run; allow it with --trust"),
        ("savedmodel", {"path": "frozen.pb"}, False, "frozen.pb is a graph, which would be run; allow it with --trust"),
        ("keras", {"file": "net.keras"}, False, "the config in net.keras would be executed; allow it with --trust"),
        (
            "savedmodel",
            {"path": "saved", "signature": "x"},
            True,
            "has no signature 'x'; it has serve, serving_default",
        ),
        ("savedmodel", {"path": "net.keras"}, True, "the savedmodel reference: DecodeError: "),
    ],
)
def test_nothing_is_run_without_trust(mobilenet, runner, model, trust, words):
    folder, _ = mobilenet
    model = {key: str(folder / value) if key in ("path", "file") else value for key, value in model.items()}
    with pytest.raises(ReferenceFailed) as caught:
        ask(folder / "net.weights.h5", runner, model, trust=trust)
    assert words in str(caught.value) and "\n" not in str(caught.value), str(caught.value)


class Reading(torch.nn.Module):
    """A classifier that takes NHWC and gives two outputs."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        maps = self.model.forward_features(x.permute(0, 3, 1, 2))
        return maps, self.model.forward_head(maps)


@pytest.fixture(scope="module")
def resnet(tmp_path_factory) -> Path:
    """A timm ResNet-18's weights, what they convert to, and two exports of it."""
    import timm

    folder = tmp_path_factory.mktemp("onnx")
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=10).eval()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if "bn" in name and value.is_floating_point():
                value.uniform_(0.5, 1.5)
    torch.save(model.state_dict(), folder / "net.pth")
    convert(folder / "net.pth", folder / "out", target="resnet18", img_size=64)
    x = torch.zeros(2, 3, 64, 64)
    names = {"input_names": ["image"], "dynamo": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the newer exporter takes ten times as long
        torch.onnx.export(model, (x,), folder / "net.onnx", output_names=["logits"], **names)
        last = (x.permute(0, 2, 3, 1),)
        torch.onnx.export(Reading(model).eval(), last, folder / "last.onnx", output_names=["maps", "scores"], **names)
    return folder


@pytest.mark.parametrize(
    ("file", "args", "outputs"),
    [("net.onnx", {}, []), ("last.onnx", {"layout": "nhwc"}, ["logits=1", "forward_features=maps"])],
)
def test_onnx_confirms_a_conversion(resnet, file, args, outputs):
    how = {"reference": f"onnx:{resnet / file}", "args": args, "outputs": outputs, "taps": False}
    verdict = verify(resnet / "out", resnet / "net.pth", **how)
    assert verdict.passed and verdict.precision == "float32", str(verdict)
    assert "no float64: TypeError: an ONNX graph has the precision that it was exported in" in verdict.warnings
    assert {one.output for one in verdict.comparisons} == {"logits", *(name.split("=")[0] for name in outputs)}
    assert verdict.reference["weights"]["files"] == [file] and verdict.reference["framework"]["onnxruntime"]


def test_onnx_of_other_weights_fails(resnet, tmp_path):
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(resnet / "net.onnx")
    weight = max(graph.graph.initializer, key=lambda one: len(one.raw_data))
    array = numpy_helper.to_array(weight).copy()
    array[[0, 1]] = array[[1, 0]]
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    onnx.save(graph, tmp_path / "other.onnx")
    how = {"reference": f"onnx:{tmp_path / 'other.onnx'}", "taps": False}
    assert not verify(resnet / "out", resnet / "net.pth", **how).passed


@pytest.mark.parametrize(
    ("file", "words"),
    [("net.pth", "the onnx reference: InvalidProtobuf: "), ("last.onnx", "InvalidArgument: ")],
)
def test_graphs_that_cannot_be_run(resnet, file, words):
    with pytest.raises(ReferenceFailed) as caught:
        ask(resnet / "net.pth", "onnx", {"file": str(resnet / file)})
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_outputs_that_a_graph_lacks(resnet):
    with pytest.raises(ReferenceFailed, match="the model has no output 'scores'; it has 0, logits"):
        ask(resnet / "net.pth", "onnx", {"file": str(resnet / "net.onnx")}, "scores")


def test_a_graph_may_be_the_checkpoint_itself(resnet):
    recording = ask(resnet / "net.onnx", "onnx", {})
    assert recording.about["source"]["sha256"] == recording.about["weights"]["sha256"]
    assert np.isfinite(recording.outputs["float32"]["normal"]["logits"]).all()
