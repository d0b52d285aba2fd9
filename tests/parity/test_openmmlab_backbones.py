"""Every backbone of OpenMMLab's libraries, by names and shapes: it is of a family, or refused for a reason."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from converters.detection import find_plan
from converters.errors import NotExpressible
from converters.readers import Checkpoint
from converters.tensors import LazyTensor, TensorSpec
from converters.verifier.worker import run_task

TABLE = yaml.safe_load(Path(__file__).with_name("openmmlab_backbones.yaml").read_text("utf-8"))
AROUND = {
    "mmpretrain": {},
    "mmdet": {"neck.lateral_convs.0.conv.weight": [256, 64, 1, 1], "bbox_head.fc_cls.weight": [81, 1024]},
    "mmseg": {"decode_head.conv_seg.weight": [19, 512, 1, 1]},
}
ABSTRACT = {"CSPNet"}
UNINSTALLED = {"VPD"}  # wants a library that is not on the index


@pytest.mark.parametrize("library", TABLE)
def test_the_table_has_them_all(library: str) -> None:
    (folder,) = importlib.util.find_spec(library).submodule_search_locations
    tree = ast.parse(Path(folder, "models", "backbones", "__init__.py").read_text("utf-8"))
    (names,) = [ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign)]
    assert {_class(name) for name in TABLE[library]} == set(names) - ABSTRACT - UNINSTALLED


@pytest.mark.parametrize("library", TABLE)
def test_it_is_of_a_family_or_refused(library: str, tmp_path: Path) -> None:
    models = {name: {"type": _class(name), **_arguments(row)} for name, row in TABLE[library].items()}
    jobs = [{"runner": library, "model": model} for model in models.values()]
    job = {"task": "list_tensors", "runner": library, "models": jobs, "folder": str(tmp_path)}
    answers = zip(models, run_task(job)["models"], strict=True)
    found = {name: _outcome(library, models[name], answer) for name, answer in answers}
    wanted = {name: row.get("refused") or f"mmlab/{row['is']}" for name, row in TABLE[library].items()}
    assert {name: told for name, told in found.items() if wanted[name] not in told} == {}


def _class(name: str) -> str:
    """Of a row's name, behind which a comma and what is special may stand."""
    return name.partition(",")[0]


def _arguments(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in ("is", "refused")}


def _outcome(library: str, model: Mapping[str, Any], answer: Mapping[str, Any]) -> str:
    """The family of a whole model around that backbone, or why there is none."""
    tensors = {f"backbone.{name}": given for name, given in answer["tensors"].items()}
    tensors |= {name: [shape, "float32"] for name, shape in AROUND[library].items()}
    said = {"cfg": ", ".join(f"{key}={value!r}" for key, value in model.items())}
    specs = [TensorSpec(name, tuple(shape), dtype) for name, (shape, dtype) in tensors.items()]
    checkpoint = Checkpoint(Path(model["type"]), "names and shapes", {s.name: _unread(s) for s in specs}, metadata=said)
    try:
        return find_plan(checkpoint).mapping.name
    except NotExpressible as error:
        return str(error)


def _unread(spec: TensorSpec) -> LazyTensor:
    def read() -> memoryview:
        raise AssertionError(f"{spec.name}: a plan reads nothing")

    return LazyTensor(spec, read)
