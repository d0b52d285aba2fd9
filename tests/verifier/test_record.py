"""Recordings made apart from a verification: here, by another interpreter, and by a copied worker."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from converters.cli import app
from converters.errors import CheckpointError, ConverterError, OutputError, ReferenceFailed
from converters.verifier import verify
from converters.verifier.record import record, write_worker
from converters.verifier.recording import read_recording
from converters.verifier.subject import read_subject

ZOO = """
import timm

def make(num_classes=10):
    return timm.create_model("resnet18", num_classes=num_classes)
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A ResNet-18 of somebody's own code, `zoo.py`, and what it converts to."""
    import timm

    from converters.conversion import convert

    folder = tmp_path_factory.mktemp("zoo")
    (folder / "zoo.py").write_text(ZOO)
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=10)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if "bn" in name and value.is_floating_point():
                value.uniform_(0.5, 1.5)
    torch.save({"net": model.state_dict()}, folder / "net.pth")
    convert(folder / "net.pth", folder / "out", target="resnet18", img_size=64)
    return folder


@pytest.fixture(scope="module")
def worker(home) -> Path:
    write_worker(read_subject(home / "out"), home / "net.pth", home / "worker", reference="python:zoo.py:make")
    return home / "worker"


ALONE = f"""#!{sys.executable} -I
import runpy, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "converters":
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Absent())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_copied_worker_records_on_another_machine(home, worker, tmp_path):
    """Elsewhere: another folder, another name of the checkpoint, isolated Python, and no `converters` to import."""
    shutil.copytree(worker, tmp_path / "job")
    shutil.copy(home / "zoo.py", tmp_path / "zoo.py")
    shutil.copy(home / "net.pth", tmp_path / "renamed.bin")
    (tmp_path / "python").write_text(ALONE)
    (tmp_path / "python").chmod(0o755)
    command = ["./python", "job/references.pyz", "job", "renamed.bin"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    recording = read_recording(tmp_path / "job" / "recording.npz")
    assert recording.about["source"]["file"] == "renamed.bin" and recording.about["model"]["module"] == "zoo.py"
    verdict = verify(home / "out", home / "net.pth", reference=str(tmp_path / "job" / "recording.npz"))
    assert verdict.passed and verdict.precision == "float64" and verdict.taps, str(verdict)


def test_a_copied_worker_finds_the_checkpoint_beside_its_job(home, worker, tmp_path):
    shutil.copytree(worker, tmp_path / "job")
    command = [sys.executable, "-I", tmp_path / "job" / "references.pyz", tmp_path / "job"]
    failed = subprocess.run(command, cwd=home, capture_output=True, text=True, check=False)
    assert failed.returncode == 1 and re.fullmatch(r"FileNotFoundError: .*net\.pth'\n", failed.stderr)
    assert not list((tmp_path / "job").glob("recording*"))
    shutil.copy(home / "net.pth", tmp_path / "job")
    subprocess.run(command, cwd=home, check=True, capture_output=True)
    assert read_recording(tmp_path / "job" / "recording.npz").outputs.keys() == {"float64", "float32"}


def test_a_worker_holds_its_program_and_no_more(worker):
    assert {path.name for path in worker.iterdir()} == {"references.pyz", "job.json", "inputs.npz"}
    with zipfile.ZipFile(worker / "references.pyz") as archive:
        names = archive.namelist()
        assert {"__main__.py", "run_python.py"} <= set(names) and all(name.endswith(".py") for name in names)
    job = json.loads((worker / "job.json").read_text())
    assert job["source"] == {"file": "net.pth", "files": ["net.pth"], "wrappers": ["net"], "chosen": False}
    assert not re.search(r'"/', json.dumps(job))


def test_another_interpreter(home, tmp_path):
    """A virtual environment that has what this one has, and `zoo` besides."""
    venv.create(tmp_path / "venv", with_pip=False)
    library = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    (library / "these.pth").write_text(sysconfig.get_path("purelib"))
    shutil.copy(home / "zoo.py", library)
    subject, how = read_subject(home / "out"), {"reference": "python:zoo:make"}
    with pytest.raises(ReferenceFailed, match="has no module 'zoo'; name an interpreter that has it with --python"):
        record(subject, home / "net.pth", tmp_path / "a.npz", **how)
    python = str(tmp_path / "venv" / "bin" / "python")
    about = record(subject, home / "net.pth", tmp_path / "a.npz", **how, python=python).about
    assert about["notes"] == [] and about["framework"]["torch"]
    environment = about["environment"]
    assert environment["OMP_NUM_THREADS"] == "1" and environment["torch.threads"] == 1
    assert environment["PYTHONHASHSEED"] == "0" and environment["torch.tf32"] is False
    assert environment["TF_ENABLE_ONEDNN_OPTS"] == "0" and environment["machine"]
    assert str(tmp_path) not in json.dumps(about)
    again = record(subject, home / "net.pth", tmp_path / "b.npz", **how, python=python)
    first = read_recording(tmp_path / "a.npz")
    for precision, probes in first.outputs.items():
        for probe, answers in probes.items():
            np.testing.assert_array_equal(answers["logits"], again.outputs[precision][probe]["logits"])


def test_what_cannot_be_recorded_leaves_nothing(home, tmp_path):
    subject, source = read_subject(home / "out"), home / "net.pth"
    torch.save({"net": {"weight": torch.zeros(1)}}, tmp_path / "other.pth")
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    how = {"reference": f"python:{home / 'zoo.py'}:make"}
    refused(ReferenceFailed, "names no reference; name one", record, subject, source, tmp_path / "a.npz")
    refused(CheckpointError, "is not what was converted", record, subject, tmp_path / "other.pth", tmp_path / "a.npz")
    absent = {"reference": f"python:{home / 'zoo.py'}:absent"}
    refused(ReferenceFailed, "has no absent to call", record, subject, source, tmp_path / "a.npz", **absent)
    refused(OutputError, "cannot be written: ", write_worker, subject, source, tmp_path / "file" / "w", **how)
    refused(OutputError, "is there already; choose another name", write_worker, subject, source, home / "out", **how)
    assert sorted(tmp_path.rglob("*")) == before


def refused(kind: type[ConverterError], words: str, do, *given, **how) -> None:
    with pytest.raises(kind) as caught:
        do(*given, **how)
    assert words in str(caught.value) and "\n" not in str(caught.value), str(caught.value)


def command(*words, code: int = 0):
    done = CliRunner().invoke(app, ["record", *map(str, words)])
    assert done.exit_code == code, done.output or done.exception
    return done.output


def test_the_command(home, tmp_path):
    """Without a conversion its plan is made anew; the recording then serves the conversion all the same."""
    source, out = home / "net.pth", tmp_path / "r.npz"
    how = ["--to", "resnet18", "--img-size", 64, "--reference", f"python:{home / 'zoo.py'}:make"]
    document = json.loads(command(source, *how, "--reference-arg", "num_classes=10", "-o", out, "--json"))
    assert document["recording"] == 1 and document["path"] == str(out)
    assert document["model"] == {"module": "zoo.py", "factory": "make", "args": {"num_classes": 10}}
    assert verify(home / "out", source, reference=str(out)).passed
    refused(ReferenceFailed, "says itself", verify, home / "out", source, reference=str(out), outputs=["logits=1"])
    text = command(source, "--conversion", home / "out", *how[-2:], "--worker", tmp_path / "w")
    assert "references.pyz" in text and (tmp_path / "w" / "job.json").is_file()
    command(source, *how, code=2)
    command(source, *how, "-o", out, "--worker", tmp_path / "w", code=2)
