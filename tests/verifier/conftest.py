"""A ResNet-18 classifier that MMPretrain wrote, the folder it converts to, and the reference's recording."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from converters.verifier.probes import probes
from converters.verifier.worker import REFERENCES

CLASSIFIER = {
    "type": "ImageClassifier",
    "backbone": {"type": "ResNet", "depth": 18},
    "neck": {"type": "GlobalAveragePooling"},
    "head": {"type": "LinearClsHead", "num_classes": 10, "in_channels": 512},
}
BLOCK = {
    "runner": "mmpretrain",
    "model": CLASSIFIER,
    "outputs": {"logits": "0", "forward_features": "backbone.0", "features.4": "backbone.0"},
}


@pytest.fixture(scope="session")
def write_checkpoint() -> Callable[..., Path]:
    path = Path(__file__).parents[1] / "parity" / "random_checkpoints.py"
    spec = importlib.util.spec_from_file_location("random_checkpoints", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.write_checkpoint


@pytest.fixture(scope="session")
def emit() -> Callable[..., Path]:
    return write_folder


def write_folder(folder: Path, source: Path, reference: dict | None, num_classes: int = 10) -> Path:
    """What the converter would write for a ResNet-18, whose tensors keep their names but for the classifier's."""
    import timm
    import torch
    from safetensors.torch import save_file

    state = torch.load(source, weights_only=False)["state_dict"]
    names = {name: name.removeprefix("backbone.").removeprefix("head.") for name in state}
    wanted = timm.create_model("resnet18", num_classes=num_classes).state_dict()
    folder.mkdir()
    save_file(
        {names[n]: v for n, v in state.items() if names[n] in wanted}, folder / "model.safetensors", {"format": "pt"}
    )
    cfg = {"input_size": [3, 64, 64], "num_classes": num_classes, "first_conv": "conv1", "classifier": "fc"}
    config = {"architecture": "resnet18", "num_classes": num_classes, "pretrained_cfg": cfg}
    (folder / "config.json").write_text(json.dumps({**config, "model_args": {"num_classes": num_classes}}))
    sha256 = hashlib.sha256(source.read_bytes()).hexdigest()
    record = {"family": "mmlab/resnet", "source": {"name": source.name, "sha256": sha256}, "reference": reference}
    (folder / "conversion.json").write_text(json.dumps(record))
    return folder


@dataclass(frozen=True)
class Converted:
    model: dict
    source: Path
    folder: Path
    recording: Path


@pytest.fixture(scope="session")
def converted(tmp_path_factory, write_checkpoint) -> Converted:
    """The recording comes from a copy of the worker, run as on another machine."""
    work = tmp_path_factory.mktemp("classifier")
    source = write_checkpoint({"framework": "mmpretrain", "model": CLASSIFIER}, work / "resnet18.pth")
    job = work / "job"
    job.mkdir()
    (job / "job.json").write_text(json.dumps({**BLOCK, "source": {"file": str(source)}}))
    np.savez(job / "inputs.npz", **probes((3, 64, 64)))
    shutil.copytree(REFERENCES, work / "worker")
    subprocess.run([sys.executable, "-P", work / "worker", job], cwd=work, check=True, capture_output=True)
    return Converted(CLASSIFIER, source, write_folder(work / "folder", source, BLOCK), job / "recording.npz")


@pytest.fixture(scope="session")
def tapped(tmp_path_factory, converted) -> Converted:
    """The same checkpoint through the converter, and a recording that looks into the reference's modules."""
    from converters.conversion import convert

    work = tmp_path_factory.mktemp("tapped")
    record = convert(converted.source, work / "folder", img_size=64).record
    (work / "job").mkdir()
    taps = {"inputs": [row["from"] for row in record["modules"].values()]}
    taps["outputs"] = taps["inputs"]
    job = {**record["reference"], "source": {"file": str(converted.source)}, "taps": taps}
    (work / "job" / "job.json").write_text(json.dumps(job))
    np.savez(work / "job" / "inputs.npz", normal=probes((3, 64, 64))["normal"])
    subprocess.run([sys.executable, REFERENCES, work / "job"], check=True, capture_output=True)
    return Converted(CLASSIFIER, converted.source, work / "folder", work / "job" / "recording.npz")


@pytest.fixture
def folder(converted, tmp_path) -> Path:
    """A copy of the emitted folder to spoil."""
    return shutil.copytree(converted.folder, tmp_path / "folder", ignore=shutil.ignore_patterns("verification.json"))
