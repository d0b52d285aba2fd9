"""What TensorFlow writes, in all its forms, is read back bit for bit and under the variables' own names."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from converters.errors import CheckpointError, UnknownFormat, UnsafeCheckpoint
from converters.readers import open_checkpoint
from converters.readers.tensorflow import checkpoint as tensorflow
from converters.readers.tensorflow import saved_model
from converters.tensors import LazyTensor

write = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("bundle_writer.py"))))
GENERATOR = Path(__file__).with_name("forms.py")
FORMS = [
    *("saver", "sharded", "partitioned", "quarters", "dtypes", "many", "others", "module", "slots"),
    *("keras_plain", "keras_trained", "keras_repeated", "saved_model", "saved_model_repeated"),
    *("first", "first_sharded", "saved_module", "saved_module_bare", "saved_model_of_names"),
]


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("forms")
    subprocess.run([sys.executable, GENERATOR, folder], check=True, timeout=300)
    return folder


@pytest.fixture(scope="module")
def expected(forms: Path) -> dict[str, Any]:
    return json.loads((forms / "expected.json").read_text())


def tensors(path: Path) -> dict[str, Any]:
    tree = reader_of(path).read(path).tree
    found = {name: leaf for name, leaf in sorted(tree.items()) if isinstance(leaf, LazyTensor)}
    assert all(leaf.spec.name == name for name, leaf in found.items())
    return {n: [leaf.spec.dtype, list(leaf.spec.shape), leaf.read().hex()] for n, leaf in found.items()}


def reader_of(path: Path) -> Any:
    head = path.read_bytes()[:4096] if path.is_file() else b""
    return next(reader for reader in (saved_model, tensorflow) if reader.accepts(path, head))


def test_the_table_is_complete(expected: dict[str, Any]) -> None:
    assert set(FORMS) == set(expected)


@pytest.mark.parametrize("form", FORMS)
def test_a_form_is_read_bit_for_bit(form: str, forms: Path, expected: dict[str, Any]) -> None:
    assert reader_of(forms / form) == (saved_model if form.startswith("saved") else tensorflow)
    assert tensors(forms / form) == expected[form]


def test_shadows_slots_and_the_step_keep_their_names(forms: Path) -> None:
    kernel = "net-b0/stem/conv2d/kernel"
    twins = {kernel + suffix for suffix in ("", "/ExponentialMovingAverage", "/RMSProp", "/RMSProp_1")}
    assert tensors(forms / "saver").keys() > twins | {"global_step"}


@pytest.mark.parametrize("name", ["", "ckpt-2", "ckpt-2.index", "ckpt-2.data-00000-of-00001", "checkpoint"])
def test_a_checkpoint_goes_by_several_paths(name: str, forms: Path, expected: dict[str, Any]) -> None:
    path = forms / "module" / name
    assert tensors(path) == expected["module"]


FIRST = ["", "model.ckpt-7", "model.ckpt-7-00000-of-00002", "model.ckpt-7-00001-of-00002", "checkpoint"]


@pytest.mark.parametrize("name", FIRST)
def test_so_does_one_of_several_tables(name: str, forms: Path, expected: dict[str, Any]) -> None:
    checkpoint = open_checkpoint(forms / "first_sharded" / name)
    assert {n: tensor.read().hex() for n, tensor in checkpoint.tensors.items()} == {
        n: raw for n, (_, _, raw) in expected["first_sharded"].items()
    }
    assert len(checkpoint.files) == 2
    assert checkpoint.integrity == "CRC-32C of every block"


@pytest.mark.parametrize("name", ["", "saved_model.pb"])
def test_a_saved_model_goes_by_its_folder_and_by_its_graph(name: str, forms: Path, expected: dict[str, Any]) -> None:
    path = forms / "saved_module" / name
    assert tensors(path) == expected["saved_module"]
    checkpoint = open_checkpoint(path)
    assert checkpoint.format == "TensorFlow SavedModel"
    assert str(checkpoint.writer).startswith("TensorFlow 2.")
    assert checkpoint.files[0].path.name == "saved_model.pb"


def test_metrics_are_set_aside(tmp_path: Path) -> None:
    node = write.message((2, write.message((1, b"V"), (2, b"total"), (3, b"keras_api/metrics/0/total"))))
    text = write.message((1, node))
    length = len(text).to_bytes(4, "little")
    stored = write.masked(length).to_bytes(4, "little")
    data = write.varint(len(text)) + stored + text
    rows = {
        b"": write.header(),
        b"_CHECKPOINTABLE_OBJECT_GRAPH": write.entry(data, dtype=7, crc=write.masked(length + stored + text)),
        b"keras_api/metrics/0/total": write.entry(bytes(4), offset=len(data)),
        b"w": write.entry(bytes(4), offset=len(data) + 4),
    }
    checkpoint = open_checkpoint(write.bundle(tmp_path / "m", rows, data + bytes(8)))
    assert list(checkpoint.tensors) == ["w"]
    assert checkpoint.set_aside == {"keras_api/**": "what metrics have counted"}


def test_a_graph_beside_a_bundle_stands_for_the_bundle(forms: Path, expected: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(forms / "module", tmp_path / "m")
    (tmp_path / "m" / "ckpt-2.meta").write_bytes(b"\n")
    assert tensors(tmp_path / "m" / "ckpt-2.meta") == expected["module"]


def test_a_prefix_opens_as_a_state_dict(forms: Path) -> None:
    checkpoint = open_checkpoint(forms / "saver" / "model.ckpt-7")
    assert checkpoint.format == "TensorFlow checkpoint"
    assert set(checkpoint.tensors) == {"net-b0/stem/conv2d/kernel", "net-b0/stem/tpu_batch_normalization/gamma"}


def test_a_folder_without_a_checkpoint_is_called_that(tmp_path: Path) -> None:
    with pytest.raises(UnknownFormat, match="is a folder without a checkpoint"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["x.npz", "model.index", "folder", "absent"])
def test_other_files_are_not_accepted(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for other in ("x.npz", "model.index"):
        (tmp_path / other).write_bytes(b"PK\3\4" * 20)
    assert not tensorflow.accepts(tmp_path / name, b"PK\3\4" * 20)


def test_data_without_an_index_say_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "m.data-00000-of-00001").write_bytes(bytes(64))
    with pytest.raises(CheckpointError, match=r"m\.index: does not exist"):
        open_checkpoint(tmp_path / "m.data-00000-of-00001")


def test_what_holds_no_numbers_is_text_or_a_sentence(forms: Path) -> None:
    tree = tensorflow.read(forms / "others").tree
    assert tree["text"] == "größe"
    assert tree["texts"] == ["a", "", "b" * 300, "\\xff"]
    assert {tree[name] for name in ("long_text", "complex128", "variant")} == {
        "left out: it holds text",
        "left out: it holds complex128",
        "left out: it holds a variant",
    }


def test_contents_say_who_wrote_them_and_where(forms: Path) -> None:
    contents = tensorflow.read(forms / "sharded")
    assert [file.path.name for file in contents.files] == [
        "model.ckpt-7.index",
        "model.ckpt-7.data-00000-of-00002",
        "model.ckpt-7.data-00001-of-00002",
    ]
    assert contents.integrity == "CRC-32C of every tensor"
    assert contents.writer == "TensorFlow bundle (producer version 1)"


def test_what_is_read_is_the_readers_to_keep(forms: Path) -> None:
    whole = tensorflow.read(forms / "partitioned").tree["rows/kernel"]
    once, again = whole.read(), whole.read()
    once[:4] = b"\xff\xff\xff\xff"
    assert again[:4] != once[:4]


STATES = {
    "../elsewhere/ckpt": (UnsafeCheckpoint, "lies outside its folder"),
    "/elsewhere/ckpt": (UnsafeCheckpoint, "lies outside its folder"),
    "link/ckpt": (UnsafeCheckpoint, "lies outside its folder"),
    "ckpt-9": (CheckpointError, "of which there is no index"),
    "": (UnsafeCheckpoint, "lies outside its folder"),
    "a\\000b": (UnsafeCheckpoint, "lies outside its folder"),
    "\\377": (CheckpointError, "not UTF-8"),
    "\\x1b[31m": (CheckpointError, r"\\x1b"),
    "x" * 5000: (CheckpointError, "of which there is no index"),
}


@pytest.mark.parametrize("named", STATES, ids=range(len(STATES)))
def test_the_checkpoint_file_names_what_lies_beside_it(named: str, forms: Path, tmp_path: Path) -> None:
    shutil.copytree(forms / "module", tmp_path / "elsewhere")
    shutil.copytree(forms / "module", tmp_path / "here")
    os.symlink(tmp_path / "elsewhere", tmp_path / "here" / "link")
    (tmp_path / "here" / "checkpoint").write_text(f'model_checkpoint_path: "{named}"\n')
    error, words = STATES[named]
    with pytest.raises(error, match=words) as caught:
        tensorflow.read(tmp_path / "here")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("named", ["ckpt-1", "./ckpt-1", "\\143kpt-1", "{folder}/ckpt-1"])
def test_the_checkpoint_file_may_name_an_older_one(named: str, forms: Path, tmp_path: Path) -> None:
    shutil.copytree(forms / "module", tmp_path / "here")
    state = tmp_path / "here" / "checkpoint"
    state.write_text(f'model_checkpoint_path: "{named.format(folder=state.parent)}"\n')
    assert tensors(state)["net/bare"] == ["int32", [2], "0100000002000000"]


def test_several_checkpoints_and_no_word_of_the_latest(forms: Path, tmp_path: Path) -> None:
    for file in (forms / "module").glob("ckpt-*"):
        shutil.copy(file, tmp_path)
    with pytest.raises(CheckpointError, match=r"holds 2 checkpoints \(ckpt-1, ckpt-2\); name one"):
        tensorflow.read(tmp_path)


def test_reading_imports_no_tensorflow(forms: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from converters.readers.tensorflow import checkpoint\n"
        "tree = checkpoint.read(Path(sys.argv[1])).tree; tree['rows/kernel'].read()\n"
        "print({'tensorflow', 'torch', 'keras', 'google.protobuf'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, forms / "partitioned"],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(tensorflow.__file__).parents[3],
    )
    assert done.stdout == "set()\n"
