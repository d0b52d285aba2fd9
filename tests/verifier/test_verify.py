from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
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


def record(path: Path, source: Path, about: dict | None = None, **arrays) -> str:
    sha256 = hashlib.sha256(source.read_bytes()).hexdigest()
    about = {"recording": 1, "source": {"file": source.name, "sha256": sha256}, **(about or {})}
    np.savez(path, about=np.array(json.dumps(about)), **arrays)
    return str(path)


def test_faithful_weights_pass_in_float64(converted):
    steps = []
    verdict = verify(converted.folder, converted.source, progress=steps.append)
    assert verdict.passed and verdict.precision == "float64" and not verdict.warnings, str(verdict)
    assert {(c.output, c.probe) for c in verdict.comparisons} == {
        (output, probe)
        for output in ("logits", "forward_features", "features.4")
        for probe in ("normal", "ramp", "picture")
    }
    assert max(max(c.sample_errors) for c in verdict.comparisons) < 1e-13
    written = json.loads((converted.folder / "verification.json").read_text())
    assert written["verification"] == 1 and written["passed"] and written["reference"]["framework"]["mmpretrain"]
    assert (
        written["target"]["weights_sha256"]
        == hashlib.sha256((converted.folder / "model.safetensors").read_bytes()).hexdigest()
    )
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
def test_mutants_fail(converted, float32_recording, folder, mutant, precision):
    spoil(folder, mutant)
    recording = converted.recording if precision == "float64" else float32_recording
    verdict = verify(folder, converted.source, reference=str(recording))
    assert not verdict.passed and verdict.precision == precision
    assert not json.loads((folder / "verification.json").read_text())["passed"]


@pytest.fixture
def float32_recording(converted, tmp_path) -> Path:
    with np.load(converted.recording) as archive:
        arrays = {name: array for name, array in archive.items() if not name.startswith("float64")}
    np.savez(tmp_path / "float32.npz", **arrays)
    return tmp_path / "float32.npz"


def test_faithful_weights_pass_in_float32(converted, float32_recording, folder):
    verdict = verify(folder, converted.source, reference=str(float32_recording))
    assert verdict.passed and verdict.precision == "float32", str(verdict)


def test_a_detectors_backbone_by_a_config_file(write_checkpoint, emit, tmp_path):
    model = {"type": "ResNet", "depth": 18}
    spec = {"framework": "mmdet", "model": model, "wrap": "detector", "training": True}
    source = write_checkpoint(spec, tmp_path / "detector.pth")
    outputs = {f"features.{k + 1}": str(k) for k in range(4)}
    folder = emit(tmp_path / "folder", source, {"runner": "mmdet", "model": {}, "outputs": outputs}, num_classes=0)
    config = tmp_path / "config.py"
    config.write_text("model = dict(type='FasterRCNN', backbone=dict(type='ResNet', depth=18))")
    verdict = verify(folder, source, reference=f"mmdet:{config}")
    assert verdict.passed and verdict.precision == "float64" and len(verdict.comparisons) == 12, str(verdict)
    assert verdict.reference["prefix"] == "backbone." and len(verdict.reference["unexpected"]) == 3


def test_a_recording_by_another_hand(converted, folder, tmp_path):
    theirs = read_recording(converted.recording)
    logits = theirs.outputs["float64"]["normal"]["logits"]
    arrays = {"input.x": theirs.inputs["normal"], "float64.x.logits": logits, "labels.x": logits.argmax(1)}
    verdict = verify(folder, converted.source, reference=record(tmp_path / "mine.npz", converted.source, **arrays))
    (comparison,) = verdict.comparisons
    assert verdict.passed and comparison.information["accuracy"] == 1.0
    arrays["float64.x.head"] = logits
    verdict = verify(folder, converted.source, reference=record(tmp_path / "mine.npz", converted.source, **arrays))
    assert "head on x: the target has no such output" in str(verdict)


@pytest.mark.parametrize(
    ("flip", "layout", "result"),
    [
        ("flip 1", "b h w c -> b c h w", True),
        ("", "b h w c -> b c h w", False),
        ("flip 1", "b h w c -> b c w h", False),
        ("flip 1", "", "its shape is (2, 2, 2, 512) in the reference and (2, 512, 2, 2) in the target"),
    ],
)
def test_ops_between_the_reference_and_timm(converted, folder, tmp_path, flip, layout, result):
    """A reference whose images have their channels reversed and whose maps are NHWC."""
    theirs = read_recording(converted.recording)
    maps = theirs.outputs["float64"]["ramp"]["features.4"].transpose(0, 2, 3, 1)
    arrays = {"input.ramp": theirs.inputs["ramp"][:, ::-1], "float64.ramp.features.4": maps}
    about = {"input": flip, "ops": {"features.4": layout}}
    path = record(tmp_path / "hand.npz", converted.source, about, **arrays)
    verdict = verify(folder, converted.source, reference=path)
    assert verdict.passed is (result is True)
    assert isinstance(result, bool) or result in str(verdict)


@pytest.mark.parametrize(
    ("file", "changes", "kind", "words"),
    [
        ("conversion.json", {"source": {"sha256": "0" * 64}}, CheckpointError, "is not what was converted"),
        ("conversion.json", {"source": {}}, CheckpointError, "lacks what a verification needs"),
        ("conversion.json", {"reference": None}, ReferenceFailed, "the family mmlab/resnet names no reference"),
        ("conversion.json", {"reference": {"runner": "mmdet"}}, CheckpointError, "outputs of its reference"),
        ("config.json", {"architecture": "resnet50"}, TargetError, "timm cannot load it in float32: RuntimeError"),
        ("config.json", {"pretrained_cfg": {}}, CheckpointError, "lacks what a verification needs"),
    ],
)  # fmt: skip
def test_a_folder_that_is_not_as_convert_wrote_it(converted, folder, file, changes, kind, words):
    rewrite(folder / file, **changes)
    reference = str(converted.recording) if kind is TargetError else None
    refused(kind, words, folder, converted.source, reference)


def test_arguments_that_cannot_be_used(converted, folder, tmp_path):
    other = tmp_path / "other.pth"
    torch.save({"state_dict": {"weight": torch.zeros(1)}}, other)
    arrays = {"input.x": np.zeros((1, 3, 64, 64), np.float32), "float32.x.logits": np.zeros((1, 10), np.float32)}
    foreign = record(tmp_path / "foreign.npz", other, **arrays)
    refused(CheckpointError, "is not what was converted", folder, other, None)
    refused(ReferenceFailed, "another checkpoint than the one", folder, converted.source, foreign)
    refused(ReferenceFailed, "paddle:model is no reference", folder, converted.source, "paddle:model")
    refused(ReferenceFailed, "absent.py: is not there", folder, converted.source, "mmdet:absent.py")
    refused(CheckpointError, "conversion.json: cannot be read: no such file", tmp_path, converted.source, None)


def refused(kind: type[ConverterError], words: str, folder: Path, source: Path, reference: str | None) -> None:
    with pytest.raises(kind) as caught:
        verify(folder, source, reference=reference)
    assert words in str(caught.value) and "\n" not in str(caught.value), str(caught.value)
    assert not (folder / "verification.json").exists()
