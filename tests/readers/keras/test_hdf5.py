"""HDF5 files that h5py writes are read as h5py reads them."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from converters.errors import CheckpointError, DamagedCheckpoint
from converters.readers.files import SourceFile
from converters.readers.keras.hdf5 import Hdf5, open_hdf5

FILTERS: dict[str, dict[str, Any]] = {
    "none": {},
    "gzip": {"compression": "gzip"},
    "shuffle": {"compression": "gzip", "shuffle": True},
    "fletcher": {"fletcher32": True},
    "all": {"compression": "gzip", "compression_opts": 9, "shuffle": True, "fletcher32": True},
}
SHAPES = [((7,), (3,)), ((5, 9, 4), (2, 4, 4)), ((100, 300), (33, 100)), ((1, 1), None), ((0, 3), None), ((), None)]
DTYPES = ["float16", "float32", "float64", "int8", "int32", "int64", "uint8", "uint16", "bool"]


def reopen(path: Path) -> Hdf5:
    """The file, after a comparison of everything in it with what h5py reads."""
    hdf5, wanted = open_hdf5(SourceFile(path), path), {}
    with h5py.File(path) as file:
        file.visititems(lambda name, item: wanted.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None)
    assert hdf5.datasets.keys() == wanted.keys()
    for name, value in wanted.items():
        tensor = hdf5.tensor(name, "t")
        assert (tensor.spec.shape, tensor.spec.dtype) == (value.shape, value.dtype.name)
        assert bytes(tensor.read()) == value.tobytes()
    return hdf5


@pytest.mark.parametrize("filters", FILTERS)
def test_datasets(filters: str, tmp_path: Path) -> None:
    rng, path = np.random.default_rng(0), tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        for i, ((shape, chunks), dtype) in enumerate(product(SHAPES, DTYPES)):
            how = FILTERS[filters] | {"chunks": chunks} if chunks else {}
            file.create_dataset(f"{i % 3}/{i}", data=(50 * rng.standard_normal(shape)).astype(dtype), **how)
        file.create_dataset("empty", (0, 3), chunks=(1, 3), maxshape=(None, 3), **FILTERS[filters])
    reopen(path)


@pytest.mark.parametrize("version", ["earliest", "v108", "latest"])
def test_groups_and_attributes_of_every_version(version: str, tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w", libver=version) as file:
        file["layers/conv/vars/0"], file["y"] = np.arange(5.0), np.arange(3)
        attributes = file["layers/conv"].attrs
        attributes["name"], attributes["bytes"], attributes["number"] = "héllo", b"abc", 3
        attributes["many"], attributes["none"] = ["a", "bb", ""], []
        attributes["fixed"] = np.array([b"x", b"yyy"])
    hdf5 = reopen(path)
    assert hdf5.text("layers/conv", "name") == "héllo"
    assert hdf5.text("layers/conv", "bytes") == "abc"
    assert hdf5.texts("layers/conv", "many") == ["a", "bb", ""]
    assert hdf5.texts("layers/conv", "none") == []
    assert hdf5.texts("layers/conv", "fixed") == ["x", "yyy"]
    assert hdf5.texts("layers/conv", "absent") is None
    with pytest.raises(DamagedCheckpoint, match="layers/conv@number"):
        hdf5.texts("layers/conv", "number")


def test_many_groups_and_long_attributes(tmp_path: Path) -> None:
    path, names = tmp_path / "a.h5", [f"layer_{i}" for i in range(3000)]
    with h5py.File(path, "w") as file:
        for name in names:
            file[f"{name}/vars/0"] = np.float32(len(name))
        for i in range(3):
            file.attrs[f"layer_names{i}"] = np.array(names[i * 1000 : i * 1000 + 1000], "S")
        file.attrs["config"] = "x" * 1_000_000
    hdf5 = reopen(path)
    assert hdf5.texts("", "layer_names") == names
    assert len(hdf5.text("", "config") or "") == 1_000_000


def test_a_checksum_counts_only_if_all_is_under_one(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("a", data=np.arange(9.0), chunks=(3,), fletcher32=True)
    assert reopen(path).is_checksummed
    data = bytearray(path.read_bytes())
    data[data.index(np.float64(4).tobytes()) + 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedCheckpoint, match=r"a\.h5: a: a chunk's Fletcher-32 differs"):
        open_hdf5(SourceFile(path), path).tensor("a", "a").read()
    with h5py.File(path, "a") as file:
        file["b"] = np.arange(3.0)
    assert not open_hdf5(SourceFile(path), path).is_checksummed


def test_groups_in_a_fractal_heap_are_refused_with_a_cure(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w", libver="latest") as file:
        for i in range(20):
            file[str(i)] = np.arange(3)
    with pytest.raises(CheckpointError, match=r"newer form of HDF5 .* load and save it again with Keras"):
        open_hdf5(SourceFile(path), path)
