"""The check of mappings, on small ones against timm itself; parity/test_zoo.py has those that ship."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from converters.cli import app
from converters.closing import ask, build
from converters.mapping import load_mapping
from converters.readers import open_checkpoint
from converters.verifier.worker import run_task

HEAD = """targets: {test_resnet: }
detect: ["layer1.{i}.bn1.weight"]
leaves: torch
rules:
  "{*}": "{*}"
"""
REFERENCE = """reference:
  runner: timm
  model: {architecture: test_resnet, args: {num_classes: $num_classes, in_chans: $in_chans}}
  outputs: {logits: "0"}
"""


@pytest.fixture
def mapping(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        (tmp_path / "family.yaml").write_text(text)
        return str(tmp_path / "family.yaml")

    return write


def check(*words: Any, code: int = 0) -> dict[str, Any]:
    """The document of a single mapping."""
    done = CliRunner().invoke(app, ["check", *map(str, words), "--json"])
    assert done.exit_code == code, done.output or done.exception
    (document,) = json.loads(done.stdout)
    assert document["exit_code"] == code
    return document


def outcomes(document: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [(case["target"], case["runner"], case["outcome"]) for case in document["cases"]]


def test_a_good_mapping(mapping) -> None:
    document = check(mapping(HEAD + REFERENCE), "--img-size", 64)
    assert outcomes(document) == [("test_resnet", "timm", "exact")] and document["findings"] == []
    (case,) = document["cases"]
    assert case["worst_error"] == 0 and case["smallest_margin"] > 1e3 and case["line"] == 6
    probes = {one["probe"] for one in case["verification"]["comparisons"]}
    assert probes == {"mixed", "odd"}  # test_resnet takes any size


def test_a_mapping_that_closes_and_is_wrong(mapping) -> None:
    rows = "  layer3.0.bn1: layer3.0.bn2\n  layer3.0.bn2: layer3.0.bn1\n"
    document = check(mapping(HEAD + rows + REFERENCE), "--img-size", 64, code=3)
    assert outcomes(document) == [("test_resnet", "timm", "failed")]
    (case,) = document["cases"]
    assert case["detail"].startswith("not the same function: logits on mixed: error ")
    assert "layer3.0" in case["detail"] and case["verification"]["mutants"] is None


def test_a_mapping_whose_reference_sees_too_little(mapping) -> None:
    document = check(mapping(HEAD + REFERENCE.replace('logits: "0"', 'features.0: "act1"')), "--img-size", 64, code=3)
    assert outcomes(document) == [("test_resnet", "timm", "unproven")]
    assert "mutants pass: " in document["cases"][0]["detail"]


def test_what_is_told_of_rows_and_targets(mapping) -> None:
    text = HEAD.replace("test_resnet: ", "test_resnet: , test_resnet9: , resnet18: ")
    rows = "  layer9: layer9\n  layer2.{i}: layer2.{i}\ndrop:\n  layer2.{j}: why\n  neck: why\n"
    document = check(mapping(text + rows + REFERENCE), "--no-parity", code=1)
    found = [(finding["line"], finding["severity"]) for finding in document["findings"]]
    assert found == [(1, "error"), (9, "error"), (6, "warning"), (9, "warning"), (10, "warning")]
    assert "test_resnet9" in document["findings"][0]["problem"]
    assert outcomes(document) == [("test_resnet", "timm", "open"), ("resnet18", "timm", "open")]
    assert "names have rows that tie" in document["cases"][0]["detail"]
    assert "line 9" in document["cases"][0]["detail"]


def test_a_reference_that_cannot_be_built(mapping) -> None:
    document = check(mapping(HEAD + REFERENCE.replace("architecture: test_resnet", "architecture: testnet")), code=1)
    (case,) = document["cases"]
    assert case["outcome"] == "not built" and "Unknown model (testnet)" in case["detail"]
    assert document["findings"][-1]["line"] == 6 and "answers for no target" in document["findings"][-1]["problem"]


def test_an_interpreter_without_the_framework(mapping, tmp_path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    done = CliRunner().invoke(app, ["check", mapping(HEAD + REFERENCE), "--python", str(python)])
    assert done.exit_code == 1 and "the timm reference exited with code 1" in str(done.exception)


ABSENT = f"""#!{sys.executable}
import runpy, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name == "mmdet":
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Absent())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_framework_that_is_not_installed(mapping, tmp_path) -> None:
    """The mapping is not at fault, but nothing is shown either; the other references are asked."""
    (tmp_path / "python").write_text(ABSENT)
    (tmp_path / "python").chmod(0o755)
    absent = "  - {runner: mmdet, model: {type: ResNet}, outputs: {features.1: '0'}}\n"
    one = mapping(HEAD + "reference:\n" + absent)
    document = check(one, "--python", tmp_path / "python", code=1)
    assert outcomes(document) == [("test_resnet", "mmdet", "not installed")]
    assert document["cases"][0]["detail"].endswith("has no module 'mmdet'")
    assert [finding["severity"] for finding in document["findings"]] == ["warning"] * 3
    present = REFERENCE.replace("reference:\n ", "  -").replace("\n  ", "\n    ")
    document = check(mapping(HEAD + "reference:\n" + present + absent), "--python", tmp_path / "python", "--no-parity")
    assert outcomes(document) == [("test_resnet", "timm", "closes")]


def test_the_table(mapping) -> None:
    done = CliRunner().invoke(app, ["check", mapping(HEAD + "  nothing: nothing\n" + REFERENCE), "--no-parity"])
    lines = done.stdout.splitlines()
    assert done.exit_code == 0 and lines[0].endswith(
        "family.yaml:6: warning rule `nothing` takes nothing from the references' checkpoints"
    )
    assert lines[2].split() == ["test_resnet", "timm", "7", "closes"]


def test_a_family_without_a_reference() -> None:
    assert outcomes(check("timm/native")) == [("any", "", "no reference")]


def test_the_listed_tensors_are_those_of_a_checkpoint(mapping, tmp_path: Path) -> None:
    question = next(ask(load_mapping(mapping(HEAD + REFERENCE)), [], 64))
    specs = build([question], tmp_path)[question]
    model = {key: question.block[key] for key in ("runner", "model")}
    run_task({"task": "write_weights", **model, "out": str(tmp_path / "source.pth"), "input": [2, *question.size]})
    assert specs == open_checkpoint(tmp_path / "source.pth").specs
