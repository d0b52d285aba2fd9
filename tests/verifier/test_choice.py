from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from converters.errors import CheckpointError, ReferenceFailed
from converters.verifier.choice import REFERENCES, make_job, open_source, parse_reference, read_outputs
from converters.verifier.subject import Subject, read_subject
from converters.verifier.worker import REFERENCES as FOLDER

BLOCK = {"runner": "mmdet", "model": {"type": "Net", "depth": 18}, "outputs": {"features.4": "3"}}
KERAS = {"runner": "keras", "model": {"application": "MobileNetV2", "args": {"alpha": 0.5}}, "outputs": {"logits": "0"}}
SUBJECT = Subject(Path("folder"), "mmlab/net", "0" * 64, BLOCK, (3, 64, 96), num_classes=10)
FEATURES = replace(SUBJECT, num_classes=0)
GREY = replace(SUBJECT, input_size=(1, 8, 8))
BY_KERAS = replace(SUBJECT, reference=KERAS)
NONE = replace(SUBJECT, reference=None)


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("config.py", "net.keras", "net.onnx", "graph.pb"):
        Path(name).touch()
    Path("vit").mkdir()


LOGITS, MAPS, LAST = {"logits": "0"}, {"forward_features": "0"}, {"forward_features": "0 | b h w c -> b c h w"}
TOP = {"classes": 10, "classifier_activation": None}
INPUT = {"input_shape": [64, 96, 3], "weights": None}


@pytest.mark.parametrize(
    ("text", "subject", "args", "model", "outputs"),
    [
        ("auto", SUBJECT, {}, BLOCK["model"], BLOCK["outputs"]),
        ("torchvision:net", SUBJECT, {"width": 2}, {"name": "net", "args": {"num_classes": 10, "width": 2}}, LOGITS),
        ("torchvision:net", FEATURES, {}, {"name": "net", "args": {}}, MAPS),
        ("timm:net", FEATURES, {}, {"architecture": "net", "args": {"num_classes": 0}}, MAPS),
        ("timm:net", GREY, {}, {"architecture": "net", "args": {"num_classes": 10, "in_chans": 1}}, LOGITS),
        ("transformers:vit", SUBJECT, {}, {"folder": "{here}/vit"}, LOGITS),
        ("onnx:net.onnx", SUBJECT, {"layout": "nhwc"}, {"file": "{here}/net.onnx", "layout": "nhwc"}, LOGITS),
        ("savedmodel:graph.pb", FEATURES, {}, {"path": "{here}/graph.pb"}, LAST),
        (
            "python:net.py:a.b",
            SUBJECT,
            {"n": 1},
            {"module": "{here}/net.py", "factory": "a.b", "args": {"n": 1}},
            LOGITS,
        ),
        ("python:zoo.net:make", SUBJECT, {}, {"module": "zoo.net", "factory": "make", "args": {}}, LOGITS),
        ("keras:Net", SUBJECT, {}, {"application": "Net", "args": {**INPUT, **TOP}}, {"logits": "logits"}),
        ("keras:Net", FEATURES, {}, {"application": "Net", "args": {**INPUT, "include_top": False}}, LAST),
        ("keras:net.keras", SUBJECT, {"input": "a"}, {"file": "{here}/net.keras", "input": "a"}, {"logits": "logits"}),
        ("keras:net.keras", BY_KERAS, {}, {**KERAS["model"], "file": "{here}/net.keras"}, {"logits": "logits"}),
    ],
)
def test_a_reference_becomes_a_job(text, subject, args, model, outputs, tmp_path):
    placed = {
        key: value.replace("{here}", str(tmp_path)) if isinstance(value, str) else value for key, value in model.items()
    }
    runner = text.partition(":")[0].replace("auto", "mmdet")
    assert parse_reference(text, subject, (), args) == {"runner": runner, "model": placed, "outputs": outputs}


@pytest.mark.parametrize(
    ("runner", "subject", "outputs"), [("mmseg", SUBJECT, BLOCK["outputs"]), ("mmdet", NONE, LOGITS)]
)
def test_a_config_file_answers_for_any_mapping(runner, subject, outputs, tmp_path):
    job = parse_reference(f"{runner}:config.py", subject)
    assert job == {"runner": runner, "model": None, "config": str(tmp_path / "config.py"), "outputs": outputs}


def test_the_mappings_own_arguments_can_be_changed():
    job = parse_reference("auto", BY_KERAS, ["logits=top"], {"alpha": 1.0})
    assert job["model"]["args"] == {"alpha": 1.0} and job["outputs"] == {"logits": "top"}
    assert KERAS["model"]["args"] == {"alpha": 0.5}


def test_what_the_mapping_says_of_its_reference_holds_for_another_of_that_framework():
    block = {**BLOCK, "input": "flip 1", "any_size": True}
    job = parse_reference("mmseg:config.py", replace(SUBJECT, reference=block))
    assert (job["input"], job["any_size"], job["outputs"]) == ("flip 1", True, BLOCK["outputs"])
    assert "input" not in parse_reference("torchvision:net", replace(SUBJECT, reference=block))


def test_paths_of_another_machine_stay_as_they_are():
    job = parse_reference("python:net.py:make", SUBJECT, elsewhere=True)
    assert job["model"]["module"] == "net.py"
    assert parse_reference("onnx:absent.onnx", SUBJECT, elsewhere=True)["model"] == {"file": "absent.onnx"}


@pytest.mark.parametrize(
    ("text", "subject", "outputs", "words"),
    [
        ("auto", NONE, [], "the family mmlab/net names no reference; name one with --reference"),
        ("paddle:net", SUBJECT, [], "paddle:net is no reference; give one of auto, mmdet:CONFIG.py,"),
        ("torchvision", SUBJECT, [], "torchvision is no reference; give one of"),
        ("torchvision:", SUBJECT, [], "torchvision: is no reference; give one of"),
        ("python:net.py", SUBJECT, [], "python:MODULE:FACTORY, RECORDING.npz"),
        ("x\x1b[31m:y", SUBJECT, [], "x\\x1b[31m:y is no reference"),
        ("onnx:absent.onnx", SUBJECT, [], "absent.onnx: is not there; write onnx:FILE"),
        ("mmdet:absent.py", SUBJECT, [], "absent.py: is not there; write mmdet:CONFIG.py"),
        ("keras:absent.keras", SUBJECT, [], "absent.keras: is not there"),
        ("timm:net", SUBJECT, ["scores=0"], "--output scores=0 says of no output which it is; write logits=0"),
        ("timm:net", SUBJECT, ["logits"], "--output logits says of no output"),
        ("timm:net", SUBJECT, ["logits= | b c -> c b"], "says of no output"),
        ("timm:net", SUBJECT, ["logits=0 | flop"], "--output logits=0 | flop: `flop` is no op"),
    ],
)
def test_what_cannot_be_a_job_is_one_line(text, subject, outputs, words):
    with pytest.raises(ReferenceFailed) as caught:
        parse_reference(text, subject, outputs)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_every_runner_can_be_chosen():
    """The worker's table, read without running it."""
    text = (FOLDER / "__main__.py").read_text()
    scope: dict = {}
    exec(text[text.index("RUNNERS = {") : text.index("TASKS = ")], scope)
    assert scope["RUNNERS"].keys() == REFERENCES.keys()
    assert all((FOLDER / f"{module}.py").is_file() for module in scope["RUNNERS"].values())


def test_outputs_keep_their_order():
    assert list(read_outputs(["pre_logits=1", "logits=0"])) == ["pre_logits", "logits"]


def test_a_job_is_of_the_state_dict_that_was_chosen(tmp_path):
    """What --key or --no-ema chose stands in conversion.json, and opens the checkpoint again."""
    import torch
    from timm import create_model

    from converters.conversion import convert

    raw = create_model("resnet18", num_classes=0).state_dict()
    other = {name: value + 1 for name, value in raw.items()}
    torch.save({"student": raw, "teacher": {"module": other}}, tmp_path / "two.pth")
    for key, wrappers in (("student", ["student"]), ("teacher", ["teacher", "module"])):
        convert(tmp_path / "two.pth", tmp_path / key, target="resnet18", key=key)
        subject = read_subject(tmp_path / key)
        job = make_job({"runner": "timm"}, subject, open_source(subject, tmp_path / "two.pth"), trust=False)
        assert subject.key == key and job["source"]["wrappers"] == wrappers and job["source"]["chosen"]
    with pytest.raises(CheckpointError, match="holds several state dicts"):
        open_source(replace(subject, key=None), tmp_path / "two.pth")
