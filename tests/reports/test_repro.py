from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from converters.cli import main as command_line
from converters.demo import CHECKPOINT, RECORDING
from converters.errors import ConverterError, OutputError
from converters.reports.replay import main as replay
from converters.reports.repro import write_repro
from converters.verifier import verify
from converters.verifier.recording import read_recording
from converters.verifier.target import run_target

OUTPUTS = ("logits", "forward_features", "pre_logits", "features.2")


@pytest.fixture
def spoiled(folder) -> Path:
    """The demo with two channels exchanged."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["conv_stem.weight"][[0, 1]] = tensors["conv_stem.weight"][[1, 0]]
    path.unlink()
    save_file(tensors, path, {"format": "pt"})
    return folder


@pytest.fixture
def few(tmp_path) -> Path:
    """The demo's recording of four images."""
    with np.load(RECORDING) as arrays:
        np.savez(tmp_path / "few.npz", **{name: a if name == "about" else a[:4] for name, a in arrays.items()})
    return tmp_path / "few.npz"


@pytest.fixture
def timmport(monkeypatch, capsys) -> Callable[..., tuple[int, str]]:
    """Runs the command; its exit code and what it prints."""

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["timmport", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            command_line()
        return ended.value.code, capsys.readouterr().out

    return run


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_a_failure_can_be_repeated_elsewhere(spoiled, few, timmport, tmp_path, monkeypatch, precision):
    with np.load(few) as arrays:
        np.savez(few, **{name: a for name, a in arrays.items() if not name.startswith("float") or precision in name})
    monkeypatch.chdir(tmp_path)
    reports = ("--html", "report.html", "--junit", "junit.xml", "--repro", "repro")
    code, said = timmport("verify", spoiled, "--source", CHECKPOINT, "--reference", few, *reports)
    reason = re.search("error [^ ]+ where [^ ]+ is allowed .sample [0-9]+.", said)[0]
    assert code == 3 and "<h1" in Path("report.html").read_text("utf-8")
    assert ElementTree.parse("junit.xml").find("testsuite").get("failures") == "2"
    shutil.rmtree(spoiled)
    few.unlink()
    elsewhere = Path("repro").rename(tmp_path / "another place")
    command = [sys.executable, "-I", elsewhere / "replay.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", check=False)
    assert done.stdout == f"FAILED  logits on digits in {precision}: {reason}\n"
    assert (done.returncode, done.stderr) == (1, "")
    (line,) = re.findall("^timmport .*", (elsewhere / "README.md").read_text("utf-8"), re.M)
    monkeypatch.chdir(elsewhere)
    shutil.copyfile(CHECKPOINT, CHECKPOINT.name)
    code, said = timmport(*shlex.split(line)[1:])
    assert code == 3 and reason in said


def test_a_folder_that_is_there_is_told_before_anything_is_run(folder, timmport):
    assert timmport("verify", folder, "--source", "absent.h5", "--repro", folder)[0] == 2


def test_every_kind_of_output(folder, tmp_path, capsys):
    """A recording of the target's own answers, one of them changed afterwards."""
    inputs = {"noise": torch.randn(3, 1, 32, 32, generator=torch.manual_seed(0)).numpy()}
    answers = run_target(folder, inputs, OUTPUTS)["float64"]["noise"]
    answers["features.2"][1, 0, 0, 0] += 1e-3
    about = {"recording": 1, "source": {"sha256": hashlib.sha256(CHECKPOINT.read_bytes()).hexdigest()}}
    maps = answers["forward_features"].transpose(0, 2, 3, 1)
    about["ops"] = {"forward_features": "b h w c -> b c h w"}
    recording = tmp_path / "recording.npz"
    arrays = {f"float64.noise.{name}": array for name, array in {**answers, "forward_features": maps}.items()}
    np.savez(recording, about=np.array(json.dumps(about)), **{"input.noise": inputs["noise"]}, **arrays)
    verdict = verify(folder, CHECKPOINT, reference=str(recording))
    write_repro(folder, recording, tmp_path / "repro")
    assert len(verdict.comparisons) == 4 and replay(tmp_path / "repro", []) == 1
    said = capsys.readouterr().out.splitlines()
    for one, line in zip(verdict.comparisons, said, strict=True):
        mark = "passed" if one.passed else "FAILED"
        assert line.startswith(f"{mark}  {one.output} on noise in float64: error ")
    assert sum(line.startswith("FAILED") for line in said) == 1
    assert replay(tmp_path / "repro", ["logits", "pre_logits"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((4, 9)), "its shape is (4, 9) in the reference and (4, 10) in the target"),
        (np.full((4, 10), np.nan), "one side gives NaN or Inf"),
        (None, "the reference has no such output"),
    ],
)
def test_outputs_that_cannot_be_compared(folder, few, tmp_path, capsys, array, words):
    write_repro(folder, few, tmp_path / "repro")
    with np.load(tmp_path / "repro" / "recording.npz") as arrays:
        kept = {name: a for name, a in arrays.items() if name != "float64.digits.logits"}
    more = {} if array is None else {"float64.digits.logits": array}
    np.savez(tmp_path / "repro" / "recording.npz", **kept, **more)
    assert replay(tmp_path / "repro", []) == 1
    assert capsys.readouterr().out == f"FAILED  logits on digits in float64: {words}\n"


def test_nothing_tells_of_this_machine(folder, tmp_path, change):
    found = json.loads((folder / "verification.json").read_text("utf-8"))
    paths = [f"{folder}/x.py", f"no float64: ImportError in '{sys.executable}'", "/home/somebody/a/config.py"]
    reference = {**found["reference"], "config": paths[0], "notes": paths}
    change(folder, reference=reference, warnings=paths)
    recording = tmp_path / "recording.npz"
    with np.load(RECORDING) as arrays:
        about = {**json.loads(str(arrays["about"])), "model": paths[2], "notes": paths}
        np.savez(recording, **{**arrays, "about": np.array(json.dumps(about))})
    write_repro(folder, recording, tmp_path / "repro")
    with np.load(tmp_path / "repro" / "recording.npz") as arrays:
        texts = [str(arrays["about"])]
    names = {path.name for path in (tmp_path / "repro").iterdir()}
    documents = {"config.json", "conversion.json", "verification.json", "README.md", "mapping.yaml", "replay.py"}
    assert names == documents | {"model.safetensors", "recording.npz"}
    texts += [(tmp_path / "repro" / name).read_text("utf-8") for name in documents]
    for text in texts:
        assert not [place for place in (tempfile.gettempdir(), sys.prefix, "/home") if place in text]
    assert "config.py" in texts[0] and "x.py" in "".join(texts)


def test_taps_come_along(folder, tmp_path):
    recording = tmp_path / "recording.npz"
    with np.load(RECORDING) as arrays:
        taps = {"probe": "digits", "inputs": {"Conv1": 0}, "outputs": {"Conv1": 1}}
        about = {**json.loads(str(arrays["about"])), "taps": taps, "modules": {"Conv1": {"stride": 2}}}
        np.savez(recording, **{**arrays, "about": np.array(json.dumps(about)), "tap.0": np.eye(2), "tap.1": np.eye(3)})
    write_repro(folder, recording, tmp_path / "repro")
    copy = read_recording(tmp_path / "repro" / "recording.npz")
    assert copy.modules == {"Conv1": {"stride": 2}} and copy.taps.outputs == {"Conv1": 1}
    assert (copy.taps.read(1) == np.eye(3)).all()


def test_the_weights_are_not_copied_where_they_can_be_shared(folder, tmp_path):
    write_repro(folder, RECORDING, tmp_path / "repro")
    assert (tmp_path / "repro" / "model.safetensors").samefile(folder / "model.safetensors")
    mapping = (tmp_path / "repro" / "mapping.yaml").read_bytes()
    record = json.loads((folder / "conversion.json").read_text("utf-8"))
    assert hashlib.sha256(mapping).hexdigest() == record["family_sha256"]


@pytest.mark.parametrize("family", ["absent", "timm/native", "../../keras"])
def test_another_mapping_is_left_out(folder, tmp_path, change, family):
    change(folder, "conversion.json", family=family)
    write_repro(folder, RECORDING, tmp_path / "repro")
    assert not (tmp_path / "repro" / "mapping.yaml").exists()
    assert "`mapping.yaml`" not in (tmp_path / "repro" / "README.md").read_text("utf-8")


def test_rounded_weights_are_told_of(folder, tmp_path, change):
    change(folder, "conversion.json", dtype="float16")
    write_repro(folder, RECORDING, tmp_path / "repro")
    assert "rounded to float16" in (tmp_path / "repro" / "README.md").read_text("utf-8")


def test_names_do_not_become_markup_or_commands(folder, tmp_path, change):
    name = "`x`; rm -rf $HOME #\n<b>\x1b[31m|"
    record = json.loads((folder / "conversion.json").read_text("utf-8"))
    change(folder, "conversion.json", source={**record["source"], "name": name}, family=name)
    write_repro(folder, RECORDING, tmp_path / "repro")
    text = (tmp_path / "repro" / "README.md").read_text("utf-8")
    (command,) = re.findall("^timmport .*", text, re.M)
    assert command == r"""timmport verify . --source '`x`; rm -rf $HOME #\n<b>\x1b[31m|' --reference recording.npz"""
    assert text.count("<b>") == 1 and text.count("\x1b") == 0


def test_what_cannot_be_written(folder, tmp_path):
    with pytest.raises(OutputError, match="is there already"):
        write_repro(folder, RECORDING, folder)
    (tmp_path / "x.npz").write_bytes(b"")
    with pytest.raises(ConverterError, match="is not a recording"):
        write_repro(folder, tmp_path / "x.npz", tmp_path / "repro")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConverterError):
        write_repro(folder, RECORDING, tmp_path / "repro")
    assert not (tmp_path / "repro").exists()
