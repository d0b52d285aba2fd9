"""Pickles of numpy arrays: what numpy pickles is read bit for bit, in the layouts of Detectron2 and PaddlePaddle."""

from __future__ import annotations

import io
import pickle
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from converters.errors import CheckpointError, DamagedCheckpoint
from converters.readers import Checkpoint, open_checkpoint

CHANCE = np.random.default_rng(0)


def arrays() -> dict[str, np.ndarray[Any, Any]]:
    big = CHANCE.standard_normal((30, 40, 50), dtype="f4")  # longer than what is kept in memory
    names = ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "c8")
    return {
        **{name: CHANCE.integers(0, 100, 7).astype(name) for name in names},
        "bool": np.array([True, False]),
        "big": big,
        "view": big[3:20, ::2],
        "fortran": np.asfortranarray(big),
        "small fortran": np.asfortranarray(big[:2, :3, 0]),
        "transposed": big.transpose(1, 0, 2),
        "scalar": np.array(3.5),
        "empty": np.empty((0, 3), "f4"),
        "special": np.array([np.nan, -0.0, np.inf], "f4"),
        "every byte": np.arange(256, dtype="u1").repeat(100),
    }


def write(path: Path, value: Any, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(value, protocol))
    return path


def assert_equal(found: Checkpoint, expected: dict[str, np.ndarray[Any, Any]]) -> None:
    assert list(found.tensors) == list(expected)
    for name, tensor in found.tensors.items():
        assert (tensor.spec.name, tensor.spec.shape) == (name, expected[name].shape)
        if tensor.spec.dtype != "bfloat16":
            assert np.dtype(tensor.spec.dtype) == expected[name].dtype
        raw = tensor.read()
        assert not raw.readonly
        assert bytes(raw) == np.ascontiguousarray(expected[name]).tobytes(), name


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_reads_what_numpy_pickles(protocol: int, tmp_path: Path) -> None:
    saved = arrays()
    heuristics = {
        "__author__": "MMDetection",
        "matching_heuristics": True,
        "loss": np.float32(0.5),
        "epoch": np.int64(3),
    }
    path = write(tmp_path / "R-50.pkl", {"model": saved, **heuristics}, protocol)
    found = open_checkpoint(path)
    assert_equal(found, saved)
    assert_equal(found, pickle.loads(path.read_bytes())["model"])
    assert (found.format, found.wrappers, found.integrity) == ("pickle of numpy arrays", ("model",), "none in format")
    assert found.metadata == {**heuristics, "loss": 0.5, "epoch": 3}


def test_names_of_older_numpy(tmp_path: Path) -> None:
    """numpy 1 called its modules numpy.core."""
    data = pickle.dumps({"w": np.arange(6.0).reshape(2, 3)}, 2).replace(b"numpy._core", b"numpy.core")
    (tmp_path / "model.pkl").write_bytes(data)
    assert_equal(open_checkpoint(tmp_path / "model.pkl"), {"w": np.arange(6.0).reshape(2, 3)})


def test_strings_of_python_2(tmp_path: Path) -> None:
    """Python 2 pickled bytes as strings, short (U) and long (T)."""
    for count, code in [(3, b"U\x0c"), (30_000, b"T" + (120_000).to_bytes(4, "little"))]:
        saved = np.arange(count, dtype="f4")
        text = saved.tobytes().decode("latin-1").encode()
        data = pickle.dumps({"blobs": {"w": saved}}, 2).replace(b"numpy._core", b"numpy.core")
        start = data.index(b"X" + len(text).to_bytes(4, "little") + text)
        encode = data.rindex(b"h", 0, start)  # _codecs.encode, from the memo
        end = data.index(b"R", start + len(text)) + 1
        (tmp_path / "model.pkl").write_bytes(data[:encode] + code + saved.tobytes() + data[end:])
        assert pickle.loads((tmp_path / "model.pkl").read_bytes(), encoding="latin1")["blobs"]["w"].tolist() == [*saved]
        assert_equal(open_checkpoint(tmp_path / "model.pkl"), {"w": saved})


class Tensor:
    """Pickled as paddle.save does a tensor that is not in the dict itself: a pair of name and array."""

    def __init__(self, name: str, array: np.ndarray[Any, Any]) -> None:
        self.name, self.array = name, array

    def __reduce__(self) -> Any:
        return tuple, ((self.name, self.array),)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("is_nested", [False, True])
def test_paddle(protocol: int, is_nested: bool, tmp_path: Path) -> None:
    """A uint16 array is Paddle's bfloat16."""
    saved = {**arrays(), "bf16": np.arange(9000, dtype="u2").reshape(90, 100)}
    if is_nested:
        value: dict[str, Any] = {"state_dict": {name: Tensor(f"linear_{name}", array) for name, array in saved.items()}}
    else:
        value = {**saved, "StructuredToParameterName@@": {name: f"linear_{name}" for name in saved}}
    found = open_checkpoint(write(tmp_path / "model.pdparams", value, protocol))
    assert_equal(found, saved)
    assert (found.specs["bf16"].dtype, found.specs["u4"].dtype) == ("bfloat16", "uint32")
    assert found.writer == (None if is_nested else "PaddlePaddle")


def test_bfloat16_of_ml_dtypes(tmp_path: Path) -> None:
    import ml_dtypes

    saved = np.arange(6).astype(ml_dtypes.bfloat16)
    found = open_checkpoint(write(tmp_path / "model.pkl", {"w": saved}))
    assert (found.specs["w"].dtype, bytes(found.tensors["w"].read())) == ("bfloat16", saved.tobytes())


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "big-endian": (lambda: {"w": np.arange(3, dtype=">f4")}, "w: is big-endian; save it on a little-endian machine"),
    "objects": (lambda: {"w": np.array([1, "a"], dtype=object)}, "w: is an array of Python objects"),
    "structures": (lambda: {"w": np.zeros(2, [("a", "f4")])}, "w: is an array of structures"),
    "text": (lambda: {"w": np.array(["a"])}, "w: is an array of text"),
    "bytes": (lambda: {"w": np.array([b"a"])}, "w: is an array of text"),
    "dates": (lambda: {"w": np.array(["2020-01-01"], "M8[D]")}, "w: is an array of dates"),
    "complex128": (lambda: {"w": np.zeros(2, "c16")}, "w: is of dtype c16, which is not converted"),
    "longdouble": (lambda: {"w": np.zeros(2, "g")}, "w: is of dtype f16, which is not converted"),
    "subclass": (lambda: {"w": np.ma.masked_array([1.0], [True])}, "w: is no tensor but a numpy.ma"),
    "matrix": (lambda: {"w": np.arange(4.0).reshape(2, 2).view(np.matrix)}, "w: is a numpy.matrix, not a plain array"),
    "torch": (
        lambda: {"w": torch.ones(2), "v": np.ones(2)},
        "w: is no tensor but a torch._utils|w: was pickled without",
    ),
    "split": (
        lambda: {"w": np.ones(2), "UnpackBigParamInfor@@": {}},
        "splits its large arrays; save it with paddle.save",
    ),
    "no arrays": (lambda: {"w": [1.0]}, "holds no weights, only w"),
    "a bare array": (lambda: np.ones(2), "holds a bare tensor, not a state dict"),
    "a list": (lambda: [1], "holds a list, not a state dict"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize(("make", "words"), REFUSED.values(), ids=REFUSED)
def test_refusals(make: Callable[[], Any], words: str, protocol: int, tmp_path: Path) -> None:
    value = make()
    if isinstance(value, dict) and isinstance(value.get("w"), np.ndarray):
        value["sound"] = np.ones(1)
    with pytest.raises(CheckpointError, match=rf"^[^\n]*model\.pkl: ({words})[^\n]*$"):
        open_checkpoint(write(tmp_path / "model.pkl", value, protocol))


def test_bytes_after_the_pickle_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.pkl").write_bytes(pickle.dumps({"w": np.ones(2)}) + b".")
    with pytest.raises(DamagedCheckpoint, match=r"model\.pkl: bytes follow its pickle; fetch it again"):
        open_checkpoint(tmp_path / "model.pkl")


@pytest.mark.parametrize("protocol", [2, 4])
def test_data_stays_in_the_file(protocol: int, tmp_path: Path) -> None:
    path = write(tmp_path / "model.pkl", {str(i): np.full(1 << 18, i, "f4") for i in range(8)}, protocol)
    tracemalloc.start()
    try:
        found = open_checkpoint(path)
        opened = tracemalloc.get_traced_memory()[1]
        for tensor in found.tensors.values():
            tensor.read()
        read = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert opened < 1 << 20
    assert read < (3 << 20) + (4 << 20 if protocol == 2 else 0)  # text is decoded


def test_torch_files_are_still_torch_files(tmp_path: Path) -> None:
    stream = io.BytesIO()
    torch.save({"w": torch.ones(2)}, stream, _use_new_zipfile_serialization=False)
    (tmp_path / "model.pkl").write_bytes(stream.getvalue())
    assert open_checkpoint(tmp_path / "model.pkl").format == "PyTorch legacy"
