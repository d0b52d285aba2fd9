"""What stands beside the weights: the card, the names of classes, constants that the source keeps as tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from converters import convert
from converters.card import note_verification
from converters.changes import Ways

NAMES = ["cat", "dog", "cow", "hen"]


def saved(path: Path, more: dict[str, torch.Tensor] | None = None, **meta: Any) -> Path:
    model = timm.create_model("resnet18", num_classes=4)
    torch.save({"arch": "resnet18", "state_dict": {**model.state_dict(), **(more or {})}, "meta": meta}, path)
    return path


@pytest.mark.parametrize(
    ("meta", "kept", "names"),
    [
        ({"CLASSES": NAMES}, None, NAMES),
        ({"dataset_meta": {"classes": NAMES}}, slice(1, None), NAMES[1:]),
        ({"dataset_meta": {"classes": NAMES}}, (3, 0), ["hen", "cat"]),
        ({"id2label": {"3": "hen", "0": "cat", "2": "cow", "1": "dog"}}, None, NAMES),
        ({"CLASSES": NAMES[:3]}, None, None),
        ({"CLASSES": [1, 2, 3, 4]}, None, None),
        ({}, None, None),
    ],
)
def test_names_of_classes_are_carried(meta: Any, kept: Any, names: Any, tmp_path: Path) -> None:
    convert(saved(tmp_path / "source.pth", **meta), tmp_path / "out", ways=Ways(classes=kept))
    assert json.loads((tmp_path / "out" / "config.json").read_text()).get("label_names") == names
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert model.pretrained_cfg.get("label_names") == names


def test_names_of_a_new_classifier_are_not_the_old_ones(tmp_path: Path) -> None:
    convert(saved(tmp_path / "source.pth", CLASSES=NAMES), tmp_path / "out", args={"num_classes": 2})
    assert "label_names" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_the_card_has_the_users_license_and_the_verdict(tmp_path: Path) -> None:
    convert(saved(tmp_path / "source.pth"), tmp_path / "out", license="apache-2.0")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "\nlicense: apache-2.0\n" in card and "| verified | not yet |" in card
    assert json.loads((tmp_path / "out" / "config.json").read_text())["pretrained_cfg"]["license"] == "apache-2.0"
    note_verification(tmp_path / "out", "passed | whole")
    assert "| verified | passed / whole |" in (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "README.md").read_text().count("|") == card.count("|")


@pytest.mark.parametrize(
    ("variance", "std"), [([0.25, 1.0, 4.0], [0.5, 1.0, 2.0]), ([0.229, 0.224, 0.225], [0.229, 0.224, 0.225])]
)
def test_constants_may_be_tensors_of_the_source(family: Any, tmp_path: Path, variance: Any, std: Any) -> None:
    mapping = family(
        "rules: {'{*}': '{*}'}\ndrop: {norm: kept in config.json}\npreprocess:\n"
        "  mean: {source: norm.none, default: [0.1, 0.2, 0.3]}\n"
        "  std: {source: norm.variance, ops: sqrt, unless: [0.229, 0.224, 0.225], default: [1, 1, 1]}\n"
    )
    source = saved(tmp_path / "source.pth", {"norm.variance": torch.tensor(variance)})
    convert(source, tmp_path / "out", family=str(mapping.path))
    config = json.loads((tmp_path / "out" / "config.json").read_text())["pretrained_cfg"]
    assert (config["mean"], config["std"]) == ([0.1, 0.2, 0.3], std)
