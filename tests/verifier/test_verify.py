from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from converters.errors import CheckpointError, ConverterError, ReferenceFailed, TargetError
from converters.verifier import verify
from converters.verifier.recording import read_recording


def spoil(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})


def rewrite(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def record(path: Path, source: Path, about: dict, **arrays) -> Path:
    sha256 = hashlib.sha256(source.read_bytes()).hexdigest()
    about = {"recording": 1, "source": {"file": source.name, "sha256": sha256}, **about}
    np.savez(path, about=np.array(json.dumps(about)), **arrays)
    return path


def test_faithful_weights_pass_in_float64(converted):
    steps = []
    verdict = verify(converted.folder, converted.source, progress=steps.append)
    assert verdict.passed and verdict.precision == "float64" and not verdict.warnings, str(verdict)
    assert {(c.output, c.probe) for c in verdict.comparisons} == {
        (output, probe) for output in ("logits", "forward_features", "features.4") for probe in ("normal", "ramp")
    }
    assert max(max(c.sample_errors) for c in verdict.comparisons) < 1e-13
    written = json.loads((converted.folder / "verification.json").read_text())
    assert written["verification"] == 1 and written["passed"] and written["reference"]["framework"]["mmpretrain"]
    assert written["target"]["weights_sha256"] == hashlib.sha256(
        (converted.folder / "model.safetensors").read_bytes()
    ).hexdigest()
    assert steps == ["checking the source", "running the reference", "running the target", "comparing"]


def swap_channels(tensors):
    tensors["layer1.0.conv1.weight"][[0, 1]] = tensors["layer1.0.conv1.weight"][[1, 0]]


def transpose_kernel(tensors):
    tensors["layer3.1.conv2.weight"] = tensors["layer3.1.conv2.weight"].mT


def transpose_channels(tensors):
    tensors["layer4.1.conv2.weight"] = tensors["layer4.1.conv2.weight"].transpose(0, 1)


def drop_bias(tensors):
    tensors["fc.bias"].zero_()


def swap_statistics(tensors):
    tensors["layer2.0.bn1.running_mean"] = tensors["layer2.0.bn2.running_mean"].clone()


def shift_eps(tensors):
    tensors["layer4.1.bn2.running_var"] += 99e-5


@pytest.mark.parametrize(
    "mutant", [swap_channels, transpose_kernel, transpose_channels, drop_bias, swap_statistics, shift_eps]
)
@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_mutants_fail(converted, folder, tmp_path, mutant, precision):
    path = converted.recording
    if precision == "float32":
        arrays = {name: array for name, array in np.load(path).items() if not name.startswith("float64")}
        path = tmp_path / "recording.npz"
        np.savez(path, **arrays)
    assert verify(folder, converted.source, reference=str(path)).passed
    spoil(folder, mutant)
    verdict = verify(folder, converted.source, reference=str(path))
    assert not verdict.passed and verdict.precision == precision
    assert not json.loads((folder / "verification.json").read_text())["passed"]
