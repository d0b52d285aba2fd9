"""Safetensors files: what the library writes is read bit for bit; what it refuses is refused, and more."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from converters.errors import CheckpointError, DamagedCheckpoint, UnknownFormat
from converters.readers import open_checkpoint
from converters.tensors import DTYPES, from_torch


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    bits = torch.arange(48, dtype=torch.uint8)
    tensors = {name: bits.clone().view(getattr(torch, name)) for name in DTYPES if name not in ("bool", "uint8")}
    tensors |= {
        "bool": bits % 3 == 0,
        "matrix": torch.randn(3, 5),
        "scalar": torch.tensor(3.5),
        "no rows": torch.empty(0, 3),
        "special": torch.tensor([math.nan, -0.0, math.inf]),
        "\x1b[31m\u202e<script>\0é/e\u0301": torch.ones(1),
    }
    path = tmp_path / "model.bin"  # the name says nothing
    save_file(tensors, path, metadata={"format": "pt", "note": "ü"})
    found = open_checkpoint(path)
    assert (found.format, found.integrity) == ("safetensors", "none in format")
    assert found.metadata == {"__metadata__": {"format": "pt", "note": "ü"}}
    assert set(found.tensors) == set(tensors)
    for name, tensor in found.tensors.items():
        assert (tensor.spec.name, tensor.spec.shape) == (name, tuple(tensors[name].shape))
        assert getattr(torch, tensor.spec.dtype) == tensors[name].dtype
        raw = tensor.read()
        assert not raw.readonly
        assert raw == from_torch(tensors[name])


def test_a_shard_alone_is_said_to_be_one(tmp_path: Path) -> None:
    for name, notes in [
        ("model-00002-of-00003.safetensors", ("this is shard 2 of 3; the path of their folder gives them all",)),
        ("model-v2.safetensors", ()),
    ]:
        save_file({"w": torch.ones(2)}, tmp_path / name)
        assert open_checkpoint(tmp_path / name).notes == notes


def test_every_dtype_that_the_library_has_is_known_or_refused_by_name(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2, dtype=torch.float8_e4m3fnuz)}, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: w: is of dtype F8_E4M3FNUZ, which is not converted"
    ):
        open_checkpoint(tmp_path / "model.safetensors")


def entry(shape: Any = (4,), offsets: Any = (0, 16), dtype: Any = "F32", **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def two(first: Any, second: Any) -> str:
    """Two entries under one name, which json.dumps would not write."""
    return f'{{"w":{json.dumps(first)},"w":{json.dumps(second)}}}'


NAN = '{"w":{"dtype":"F32","shape":[NaN],"data_offsets":[0,16]}}'
DEEP = '{"w":' + "[" * 100_000 + "]" * 100_000 + "}"
REFUSED: dict[str, tuple[Any, str]] = {  # header (JSON or its text), words; 16 bytes of data follow
    "overlap": ({"v": entry(), "w": entry()}, "w: overlaps another tensor"),
    "partial overlap": ({"v": entry((3,), (0, 12)), "w": entry((2,), (8, 16))}, "w: overlaps another tensor"),
    "hole before": ({"w": entry((2,), (8, 16))}, "w: leaves a gap before it"),
    "hole between": ({"v": entry((1,), (0, 4)), "w": entry((2,), (8, 16))}, "w: leaves a gap before it"),
    "trailing bytes": ({"w": entry((3,), (0, 12))}, r"takes \d+ bytes, not \d+; is the download complete"),
    "beyond the file": ({"w": entry((5,), (0, 20))}, r"takes \d+ bytes, not \d+"),
    "far beyond the file": ({"w": entry((2**50,), (0, 2**52))}, r"takes \d+ bytes, not \d+"),
    "more bytes than its shape": ({"w": entry((3,))}, r"w: has 16 bytes, but shape \(3,\) of float32 takes 12"),
    "fewer bytes than its shape": ({"w": entry((5,))}, "w: has 16 bytes, but shape"),
    "a product that overflows": ({"w": entry((2**32, 2**32, 4))}, "w: has 16 bytes, but shape"),
    "overflow to the right size": ({"w": entry((2**62 + 1, 4))}, "w: has 16 bytes, but shape"),
    "dimension beyond 63 bits": ({"w": entry((2**64, 0), (0, 0))}, "w: its shape or data_offsets"),
    "negative dimensions": ({"w": entry((-2, -2))}, "w: its shape or data_offsets"),
    "boolean dimension": ({"w": entry((True, 4))}, "w: its shape or data_offsets"),
    "float dimension": ({"w": entry((4.0,))}, "w: its shape or data_offsets"),
    "NaN dimension": (NAN, "w: its shape or data_offsets"),
    "too many dimensions": ({"w": entry((1,) * 65 + (4,))}, "w: its shape or data_offsets"),
    "shape is a number": ({"w": entry(4)}, "w: its shape or data_offsets"),
    "three offsets": ({"w": entry(offsets=(0, 8, 16))}, "w: its shape or data_offsets"),
    "offsets backwards": ({"w": entry(offsets=(16, 0))}, "w: its shape or data_offsets"),
    "negative offsets": ({"w": entry(offsets=(-16, 0))}, "w: its shape or data_offsets"),
    "unknown dtype": ({"w": entry(dtype="F4\x1b")}, r"w: is of dtype F4\\x1b, which is not converted"),
    "dtype is a list": ({"w": entry(dtype=["F32"])}, "w: is of dtype"),
    "unknown field": ({"w": entry(extra=1)}, "w: its header is not dtype, shape and data_offsets"),
    "missing field": ({"w": {"dtype": "F32"}}, "w: its header is not dtype"),
    "entry is a number": ({"w": 1}, "w: its header is not dtype"),
    "two of one name": (two(entry(), entry((2, 2))), "not valid JSON with distinct names"),
    "two of one name, other bytes": (two(entry((2,), (0, 8)), entry((2,), (8, 16))), "not valid JSON with distinct"),
    "two dtypes": ('{"w":{"dtype":"F32","dtype":"I32","shape":[4],"data_offsets":[0,16]}}', "distinct names"),
    "lone surrogate": ('{"\\ud800":{}}', "not valid JSON"),
    "lone surrogate in metadata": ('{"__metadata__":{"a":"\\ud800"}}', "not valid JSON"),
    "metadata of numbers": ({"__metadata__": {"a": 1}, "w": entry()}, "its __metadata__ holds more than strings"),
    "metadata is a list": ({"__metadata__": [], "w": entry()}, "its __metadata__ holds more than strings"),
    "not JSON": ("{nonsense", "not valid JSON"),
    "two objects": ("{}{}", "not valid JSON"),
    "a list of 100,000 lists": (DEEP, "nested too deeply"),
    "a number of a million digits": ('{"w":' + "9" * 1_000_000 + "}", "not valid JSON|its header is not dtype"),
    "no tensors": ({}, r"takes \d+ bytes, not \d+"),
}


def write(path: Path, header: Any, data: bytes = bytes(16)) -> Path:
    text = header if isinstance(header, str) else json.dumps(header)
    path.write_bytes(struct.pack("<Q", len(text.encode())) + text.encode() + data)
    return path


@pytest.mark.parametrize(("header", "words"), REFUSED.values(), ids=REFUSED)
def test_refusals(header: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"^[^\n]*model\.safetensors: [^\n]*({words})[^\n]*$"):
        open_checkpoint(write(tmp_path / "model.safetensors", header))


PREFIXES: dict[str, tuple[bytes, type[CheckpointError], str]] = {
    "header of 2**63 bytes": (struct.pack("<Q", 2**63) + b"{}", UnknownFormat, "no checkpoint|not a checkpoint"),
    "header of 2**55 bytes": (struct.pack("<Q", 2**55) + b"{}", CheckpointError, "its header takes"),
    "header longer than the file": (struct.pack("<Q", 1000) + b"{}", DamagedCheckpoint, "is the download complete"),
    "header of no bytes": (struct.pack("<Q", 0) + b"{}", DamagedCheckpoint, "not valid JSON"),
    "invalid UTF-8": (struct.pack("<Q", 4) + b'{"\xff"', DamagedCheckpoint, "not valid JSON"),
    "leading space": (struct.pack("<Q", 3) + b" {}", UnknownFormat, "not a checkpoint"),
    "length only": (struct.pack("<Q", 2), UnknownFormat, "not a checkpoint|nothing but zeros"),
}


@pytest.mark.parametrize(("data", "error", "words"), PREFIXES.values(), ids=PREFIXES)
def test_bad_lengths(data: bytes, error: type[CheckpointError], words: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(error, match=rf"^[^\n]*model\.safetensors: ?[^\n]*({words})[^\n]*$"):
        open_checkpoint(tmp_path / "model.safetensors")


def test_the_names_are_shown_safely(tmp_path: Path) -> None:
    name = "\x1b[31m\u202e\n" + "x" * 1_000_000
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(write(tmp_path / "model.safetensors", {name: entry((5,))}))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


def test_twins_under_unicode_normalization_stay_apart(tmp_path: Path) -> None:
    header = {"é": entry((2,), (0, 8)), "e\u0301": entry((2,), (8, 16))}
    found = open_checkpoint(write(tmp_path / "model.safetensors", header, struct.pack("<4f", 1, 2, 3, 4)))
    assert {name: struct.unpack("<2f", tensor.read()) for name, tensor in found.tensors.items()} == {
        "é": (1, 2),
        "e\u0301": (3, 4),
    }
