"""Frozen graphs give back what their variables held, under the variables' names."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from converters.readers import open_checkpoint
from converters.readers.tensorflow import graph_def

GENERATOR = Path(__file__).with_name("graphs.py")
FORMS = ["of_references", "of_resources", "without_identities", "of_tensorflow_2", "of_every_field", "saved_model"]


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graphs")
    subprocess.run([sys.executable, GENERATOR, folder], check=True, timeout=300)
    return folder


def path_of(form: str, forms: Path) -> Path:
    return forms / form if form == "saved_model" else forms / f"{form}.pb"


@pytest.mark.parametrize("form", FORMS)
def test_a_graph_is_read_bit_for_bit(form: str, forms: Path) -> None:
    expected = json.loads((forms / "expected.json").read_text())
    assert set(expected) == set(FORMS)
    checkpoint = open_checkpoint(path_of(form, forms))
    found = {n: [t.spec.dtype, list(t.spec.shape), t.read().hex()] for n, t in sorted(checkpoint.tensors.items())}
    assert found == expected[form]


def test_a_checkpoint_says_what_it_is(forms: Path) -> None:
    checkpoint = open_checkpoint(forms / "of_resources.pb")
    assert checkpoint.format == "TensorFlow frozen graph"
    assert checkpoint.integrity == "none in format"
    assert str(checkpoint.writer).startswith("TensorFlow graph (producer version ")
    assert set(checkpoint.set_aside.values()) == {"integers, text and scalars of the graph"}
    assert open_checkpoint(forms / "saved_model").format == "TensorFlow SavedModel"


OTHERS = [b"", b"\n", b"\n\x05hello", b"\n\n\n\n{}", b"\n\x06\n\x01a\x12\x01", b"\n\x07\n\x01a\x12\x02+-", b"\x08\x01"]


@pytest.mark.parametrize("head", OTHERS)
def test_other_files_are_not_accepted(head: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.pb").write_bytes(head)
    assert not graph_def.accepts(tmp_path / "x.pb", head)


def test_a_constant_is_not_read_until_it_is_asked_for(forms: Path) -> None:
    path = forms / "of_resources.pb"
    tensors = graph_def.read(path).tree
    size = path.stat().st_size
    with open(path, "r+b") as file:  # what was found is where it was, whatever is there now
        file.write(bytes(size))
    assert not any(tensors["conv/kernel"].read())
