"""Sharded Keras weights: the index and its shards must agree."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from converters.errors import CheckpointError
from converters.readers import open_checkpoint

FIRST, SECOND = "m_00000.weights.h5", "m_00001.weights.h5"
SHARDS = {FIRST: {"layers/conv2d/vars/0": (2, 3), "layers/dense/vars/0": (4,)}, SECOND: {"layers/dense/vars/1": (5,)}}
WEIGHT_MAP: dict[str, Any] = {"/layers/conv2d/vars": FIRST, "/layers/dense/vars": [FIRST, SECOND]}


@pytest.fixture
def index(tmp_path: Path) -> Callable[..., Path]:
    for name, datasets in SHARDS.items():
        with h5py.File(tmp_path / name, "w") as file:
            for number, (path, shape) in enumerate(datasets.items()):
                file[path] = np.full(shape, number, "f4")

    def write(weight_map: Any = WEIGHT_MAP, total_size: Any = 60.0) -> Path:
        path = tmp_path / "m.weights.json"
        path.write_text(json.dumps({"metadata": {"total_size": total_size}, "weight_map": weight_map}))
        return path

    return write


def test_shards_are_read_as_one(index: Callable[..., Path], tmp_path: Path) -> None:
    found = open_checkpoint(index().rename(tmp_path / "renamed"))
    assert list(found.tensors) == ["layers/conv2d/kernel", "layers/dense/kernel", "layers/dense/bias"]
    assert [bytes(tensor.read())[::4] for tensor in found.tensors.values()] == [bytes(6), bytes(4), bytes(5)]
    assert [file.path.name for file in found.files] == ["renamed", FIRST, SECOND]


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "a shard is missing": ({"weight_map": WEIGHT_MAP | {"/x/vars": "m_00002.weights.h5"}}, "which is missing"),
    "a name that leaves": ({"weight_map": WEIGHT_MAP | {"/x/vars": "../m.weights.h5"}}, "which is no file beside it"),
    "a name that is none": ({"weight_map": WEIGHT_MAP | {"/x/vars": [7]}}, "what is no file's name"),
    "no map": ({"weight_map": {}}, "has no weight_map"),
    "not where it says": ({"weight_map": WEIGHT_MAP | {"/layers/conv2d/vars": SECOND}}, "the weight_map has it not"),
    "not there": ({"weight_map": WEIGHT_MAP | {"/layers/conv2d_1/vars": FIRST}}, "layers/conv2d_1/vars: is not in"),
    "another size": ({"total_size": 61}, "its total_size is 61, but its variables take 60 bytes"),
}


@pytest.mark.parametrize(("change", "problem"), FAULTS.values(), ids=FAULTS)
def test_an_index_that_contradicts_its_shards(change: dict[str, Any], problem: str, index: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match=problem):
        open_checkpoint(index(**change))


def test_a_variable_in_two_shards(index: Callable[..., Path], tmp_path: Path) -> None:
    with h5py.File(tmp_path / SECOND, "r+") as file:
        file["layers/conv2d/vars/0"] = np.zeros((2, 3), "f4")
    with pytest.raises(CheckpointError, match="layers/conv2d/vars/0: is in two shards"):
        open_checkpoint(index())
