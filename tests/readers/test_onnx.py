"""ONNX models give their initializers back as the onnx package reads them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from converters.errors import CheckpointError, DamagedCheckpoint, UnsafeCheckpoint
from converters.readers import onnx as reader
from converters.readers import open_checkpoint

random = np.random.default_rng(0).standard_normal
KINDS = "FLOAT DOUBLE FLOAT16 BFLOAT16 FLOAT8E4M3FN FLOAT8E5M2 INT8 INT16 INT32 INT64 UINT8 UINT16 UINT32 UINT64 BOOL"


def initializers() -> list[Any]:
    """Every dtype twice: by its bytes, and in the field that it has among the typed ones."""
    made = []
    for kind in KINDS.split():
        code = TensorProto.DataType.Value(kind)
        array = (9 * random((2, 3))).astype(helper.tensor_dtype_to_np_dtype(code))
        made.append(helper.make_tensor(f"raw.{kind}", code, (2, 3), array.tobytes(), raw=True))
        made.append(helper.make_tensor(f"typed.{kind}", code, (2, 3), array.ravel().tolist()))
    made.append(helper.make_tensor("typed.COMPLEX64", TensorProto.COMPLEX64, (2,), [1 + 2j, -3.5j]))
    made.append(numpy_helper.from_array(np.float32(2.5), "scalar"))
    made.append(numpy_helper.from_array(np.zeros((0, 3), "f4"), "empty"))
    return made


def constant(name: str, value: Any) -> Any:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(value))


def model(*tensors: Any, nodes: tuple[Any, ...] = ()) -> Any:
    graph = helper.make_graph(list(nodes), "graph", [], [helper.make_tensor_value_info("y", 1, None)], list(tensors))
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.example", 2)]
    made = helper.make_model(graph, producer_name="pytorch", producer_version="2.4", opset_imports=opsets)
    helper.set_model_props(made, {"task": "classification"})
    return made


def found_in(path: Path) -> dict[str, Any]:
    tensors = open_checkpoint(path).tensors
    return {n: (t.spec.dtype, t.spec.shape, bytes(t.read())) for n, t in tensors.items()}


def expected_of(tensors: list[Any], folder: Path) -> dict[str, Any]:
    arrays = {tensor.name: numpy_helper.to_array(tensor, str(folder)) for tensor in tensors}
    return {name: (array.dtype.name, array.shape, array.tobytes()) for name, array in arrays.items()}


@pytest.mark.parametrize("options", [{}, {"save_as_external_data": True, "location": "m.data", "size_threshold": 0}])
def test_initializers_are_read_bit_for_bit(options: dict[str, Any], tmp_path: Path) -> None:
    tensors = initializers()
    onnx.save(model(*tensors), tmp_path / "m.onnx", **options)
    assert found_in(tmp_path / "m.onnx") == expected_of(tensors, tmp_path)
    names = [file.path.name for file in open_checkpoint(tmp_path / "m.onnx").files]
    assert names == (["m.onnx", "m.data"] if options else ["m.onnx"])


def test_a_model_says_what_it_is(tmp_path: Path) -> None:
    onnx.save(model(*initializers()[:1]), tmp_path / "m.onnx")
    checkpoint = open_checkpoint(tmp_path / "m.onnx")
    assert (checkpoint.format, checkpoint.writer, checkpoint.integrity) == ("ONNX", "pytorch 2.4", "none in format")
    assert checkpoint.metadata["opset"] == {"ai.onnx": 21, "com.example": 2}
    assert checkpoint.metadata["task"] == "classification"
    assert checkpoint.metadata["ir_version"] == onnx.IR_VERSION


def test_constants_in_graphs_and_functions(tmp_path: Path) -> None:
    inner = helper.make_graph(
        [constant("inner", random((2, 2)))], "then", [], [], [numpy_helper.from_array(np.ones(3), "held")]
    )
    choice = helper.make_node(
        "If", ["condition"], ["y"], then_branch=inner, else_branch=helper.make_graph([], "else", [], [])
    )
    others = [constant("shape", np.array([1, 2])), constant("epsilon", np.float32(1e-5))]
    others.append(helper.make_node("Constant", [], ["number"], value_float=1.0))
    made = model(nodes=(constant("outer", random((2, 2)).astype("f4")), choice, *others))
    function = helper.make_function("local", "f", [], ["c"], [constant("c", random(2))], [helper.make_opsetid("", 21)])
    made.functions.append(function)
    onnx.save(made, tmp_path / "m.onnx")
    checkpoint = open_checkpoint(tmp_path / "m.onnx")
    assert {n: t.spec.shape for n, t in checkpoint.tensors.items()} == {
        "outer": (2, 2),
        "inner": (2, 2),
        "held": (3,),
        "f/c": (2,),
    }
    assert checkpoint.set_aside == {"3 Constant nodes": "integers, text and scalars of the graph"}


def test_what_holds_no_numbers_is_a_sentence(tmp_path: Path) -> None:
    made = model(helper.make_tensor("four", TensorProto.INT4, (2,), [1, 2]), numpy_helper.from_array(np.ones(2), "w"))
    values = numpy_helper.from_array(np.ones(1), "few")
    made.graph.sparse_initializer.append(helper.make_sparse_tensor(values, numpy_helper.from_array(np.array([3])), [9]))
    onnx.save(made, tmp_path / "m.onnx")
    metadata = open_checkpoint(tmp_path / "m.onnx").metadata
    assert {name: metadata[name] for name in ("four", "few")} == {
        "four": "left out: it holds int4",
        "few": "left out: it is sparse",
    }


def external(folder: Path, tensor: str = "w", **entries: str) -> Path:
    """A model whose tensor of 24 bytes lies in other files."""
    made = numpy_helper.from_array(np.arange(6, dtype="f4"), tensor)
    made.ClearField("raw_data")
    made.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        made.external_data.add(key=key, value=value)
    (folder / "below").mkdir(parents=True)
    (folder / "m.onnx").write_bytes(model(made).SerializeToString())
    for place in (folder, folder / "below"):
        (place / "data").write_bytes(bytes(range(32)))
    return folder / "m.onnx"


@pytest.mark.parametrize(
    ("entries", "expected"),
    [({}, slice(0, 24)), ({"offset": "8"}, slice(8, 32)), ({"offset": "4", "length": "24"}, slice(4, 28))],
)
def test_external_data_are_found(entries: dict[str, str], expected: slice, tmp_path: Path) -> None:
    for number, location in enumerate(("data", "below/data")):
        path = external(tmp_path / str(number), location=location, **entries)
        assert found_in(path)["w"][2] == bytes(range(32))[expected]


REFUSED: dict[str, tuple[dict[str, str], type, str]] = {
    "above": ({"location": "../secret"}, UnsafeCheckpoint, "w: needs ../secret, which is no file beside it"),
    "below and above": ({"location": "below/../../secret"}, UnsafeCheckpoint, "which is no file beside it"),
    "absolute": ({"location": "/etc/passwd"}, UnsafeCheckpoint, "which is no file beside it"),
    "of Windows": ({"location": "..\\secret"}, UnsafeCheckpoint, "which is no file beside it"),
    "on a drive": ({"location": "C:secret"}, UnsafeCheckpoint, "which is no file beside it"),
    "nowhere": ({}, UnsafeCheckpoint, "which is no file beside it"),
    "a link": ({"location": "link"}, UnsafeCheckpoint, "a link that leaves the folder"),
    "a pipe": ({"location": "pipe"}, CheckpointError, "w: is not a regular file"),
    "missing": ({"location": "absent"}, CheckpointError, "w: needs absent, which is missing"),
    "past the end": ({"location": "data", "offset": "9"}, DamagedCheckpoint, "w: bytes 9 to 33 lie outside its 32"),
    "far away": ({"location": "data", "offset": "9" * 19}, DamagedCheckpoint, "lie outside its 32"),
    "before the start": ({"location": "data", "offset": "-8"}, DamagedCheckpoint, "its offset or length is no number"),
    "a long number": (
        {"location": "data", "offset": "1" * 5000},
        DamagedCheckpoint,
        "its offset or length is no number",
    ),
    "too short": ({"location": "data", "length": "20"}, DamagedCheckpoint, "its 20 bytes are not a float32 tensor"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_external_data_that_cannot_be(name: str, tmp_path: Path) -> None:
    import os

    entries, error, words = REFUSED[name]
    path = external(tmp_path / "m", **entries)
    (tmp_path / "secret").write_bytes(bytes(32))
    (tmp_path / "m" / "link").symlink_to(tmp_path / "secret")
    os.mkfifo(tmp_path / "m" / "pipe")
    with pytest.raises(error) as caught:
        open_checkpoint(path)
    assert words in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "head", [b"", b"\x08", b"\x08\x01", b"\x08\x01\x12\x03abc", b"\x08\x0a\x08\x00", b"\x08\x0a\x0a\x00", b"\x12\x00"]
)
def test_other_files_are_not_accepted(head: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(head)
    assert not reader.accepts(tmp_path / "x.onnx", head)


def test_reading_imports_no_onnx(tmp_path: Path) -> None:
    onnx.save(model(*initializers()), tmp_path / "m.onnx")
    program = (
        "import sys; from converters.readers import open_checkpoint\n"
        "[tensor.read() for tensor in open_checkpoint(sys.argv[1]).tensors.values()]\n"
        "print({'onnx', 'google.protobuf', 'torch'} & set(sys.modules))"
    )
    here = Path(reader.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "m.onnx"], check=True, capture_output=True, cwd=here
    )
    assert done.stdout == b"set()\n"
