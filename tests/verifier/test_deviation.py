"""What timm computes only nearly: refused unless it is allowed, and then held to the bound that is declared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from converters.conversion import convert
from converters.errors import NotExpressible
from converters.mapping import find_mappings
from converters.reports.terminal import console, show_verdict
from converters.verifier import verify
from converters.verifier.mutants import run_mutants
from converters.verifier.recording import read_recording
from converters.verifier.subject import read_subject

MODEL = {
    "application": "MobileNetV2",
    "args": {"alpha": 0.35, "classes": 10, "input_shape": [64, 64, 3], "classifier_activation": None},
}
DEVIATION = """
deviation:
  - {where: "**.bn{k}", attribute: eps, source: 0.001, target: 1e-5, bound: 0.5, reason: timm's eps is fixed}
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory, write_checkpoint) -> Path:
    """A checkpoint, and a family that forgets the argument by which timm would have Keras's eps."""
    folder = tmp_path_factory.mktemp("deviation")
    write_checkpoint({"framework": "keras", "model": MODEL}, folder / "net.weights.h5")
    text = find_mappings()["keras/mobilenet_v2"].read_text("utf-8")
    assert text.count("  bn_eps: 0.001\n") == 1
    (folder / "near.yaml").write_text(text.replace("  bn_eps: 0.001\n", "") + DEVIATION, "utf-8")
    return folder


def test_it_is_refused_unless_it_is_allowed(work):
    how = {"family": str(work / "near.yaml"), "img_size": 64}
    with pytest.raises(NotExpressible) as caught:
        convert(work / "net.weights.h5", work / "out", **how)
    assert "which timm computes only nearly: timm's eps is fixed (within 0.5); pass --allow-dev" in str(caught.value)
    assert not (work / "out").exists()
    assert convert(work / "net.weights.h5", work / "out", **how, dry_run=True).record["deviation"]


@pytest.fixture(scope="module")
def verified(work):
    folder, source = work / "near", work / "net.weights.h5"
    convert(source, folder, family=str(work / "near.yaml"), img_size=64, allow_deviation=True)
    return verify(folder, source, keep=work / "recording.npz")


def test_it_is_held_to_its_bound_and_told(work, verified):
    record = json.loads((work / "near" / "conversion.json").read_text())
    assert (
        record["deviation"][0]["where"][:2] == ["bn1", "blocks.0.0.bn1"] and len(record["deviation"][0]["where"]) == 52
    )
    errors = [max(one.sample_errors) for one in verified.comparisons]
    assert verified.passed and 1e-5 < max(errors) < 0.5, str(verified)
    assert verified.warnings == ("deviation, within 0.5: timm's eps is fixed",)
    (finding,) = verified.audit
    assert str(finding) == "BatchNormAct2d eps 1e-05, source 0.001, 52 modules (declared: timm's eps is fixed)"
    assert verified.culprit is None
    with console.capture() as text:
        show_verdict(verified)
    assert "deviation, within 0.5" in text.get() and "declared: timm's eps is fixed" in text.get()
    assert verify_again(work, bound=1e-5).culprit == "bn1"


def test_mutants_are_judged_without_what_is_declared(work, verified):
    """With the source's eps in timm's modules nothing else is left, so that mutants need not exceed the bound."""
    recording, subject = read_recording(work / "recording.npz"), read_subject(work / "near")
    sharp = run_mutants(work / "near", recording, deviation=subject.deviation)
    (declared,) = subject.deviation
    blunt = run_mutants(work / "near", recording, deviation=[{**declared, "attribute": "unknown"}])
    assert sharp.passed and sharp.smallest_margin > 1e3
    assert blunt.smallest_margin < 10


def verify_again(work: Path, bound: float = 0.5, wrong: str | None = None):
    folder = shutil.copytree(work / "near", work / f"again{bound}{wrong}")
    record = json.loads((folder / "conversion.json").read_text())
    record["deviation"][0]["bound"] = bound
    (folder / "conversion.json").write_text(json.dumps(record))
    if wrong:
        tensors = load_file(folder / "model.safetensors")
        tensors[wrong] *= 10
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return verify(folder, work / "net.weights.h5", reference=str(work / "recording.npz"))


def test_another_fault_is_found_beside_it(work, verified):
    verdict = verify_again(work, wrong="blocks.3.1.conv_pw.weight")
    assert not verdict.passed and verdict.culprit == "blocks.3.1.conv_pw"
    with console.capture() as text:
        show_verdict(verdict)
    assert "conv_pw  differs by" in text.get() and "<- the fault" in text.get()
    assert "the fault is in blocks.3.1.conv_pw" in str(verdict)


def test_without_the_declaration_the_audit_names_the_cause(work, verified):
    verdict = verify_again(work, bound=1e-12)
    assert not verdict.passed and verdict.first_divergence.target == verdict.culprit == "bn1"
    document = json.loads(verdict.to_json())
    assert document["outcome"] == "failed" and document["culprit"] == "bn1"
    assert document["audit"][0]["source_value"] == 0.001 and len(document["audit"][0]["modules"]) == 52
    assert len(document["first_divergence"]["channels"]) == 16 and "channels" not in document["taps"][0]
