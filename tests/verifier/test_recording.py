from __future__ import annotations

import io
import json
import os
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from converters.errors import ReferenceFailed
from converters.verifier.recording import read_recording

ABOUT = {"recording": 1, "runner": "keras", "source": {"file": "a.h5", "sha256": "0" * 64}}
PROBE, ANSWER = np.zeros((2, 3, 4, 4), np.float32), np.ones((2, 5), np.float32)
GOOD = {"about": json.dumps(ABOUT), "input.x": PROBE, "float32.x.features.1": ANSWER, "labels.x": np.array([1, 2])}


def test_reads_what_was_recorded(tmp_path):
    answers = {"float64.x.features.1": np.asfortranarray(ANSWER.astype(np.float64)), "float32.x.0": ANSWER}
    np.savez_compressed(tmp_path / "a.npz", **GOOD, **answers)
    recording = read_recording(tmp_path / "a.npz")
    assert recording.about == ABOUT
    np.testing.assert_equal(recording.inputs, {"x": PROBE})
    np.testing.assert_equal(
        recording.outputs,
        {"float64": {"x": {"features.1": ANSWER}}, "float32": {"x": {"features.1": ANSWER, "0": ANSWER}}},
    )
    np.testing.assert_equal(recording.labels, {"x": [1, 2]})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"about": None}, "it has no `about`"),
        ({"about": np.zeros(3)}, "it has no `about`"),
        ({"about": "{"}, "its `about` is not JSON"),
        ({"about": "[" * 100_000}, "its `about` is too long or nested too deeply"),
        ({"about": json.dumps({**ABOUT, "model": "x" * (5 << 20)})}, "its `about` is too long or nested too deeply"),
        ({"about": json.dumps({**ABOUT, "notes": 1})}, "its `about` has notes that are no list"),
        ({"about": "[1]"}, "is not a recording of version 1"),
        ({"about": json.dumps({**ABOUT, "recording": 2})}, "is not a recording of version 1"),
        ({"about": json.dumps({"recording": 1, "source": "a.h5"})}, "does not say which checkpoint it is of"),
        ({"about": json.dumps({**ABOUT, "ops": ["flip 1"]})}, "ops that are no table"),
        ({"about": json.dumps({**ABOUT, "input": "flop"})}, "its ops do not fit: `flop` is no op"),
        ({"about": json.dumps({**ABOUT, "ops": {"features.1": "b c -> c b c"}})}, "its ops do not fit: "),
        ({"about": json.dumps({**ABOUT, "ops": {"features.1": "b c h -> b h c"}})}, "does not take (2, 5)"),
        ({"about": json.dumps({**ABOUT, "taps": [1]})}, "has taps that are no table of modules and numbers"),
        ({"about": json.dumps({**ABOUT, "taps": {"probe": "x", "inputs": {"a": "?"}, "outputs": {}}})}, "no table of"),
        ({"about": json.dumps({**ABOUT, "taps": {"probe": "z", "inputs": {}, "outputs": {}}})}, "z: taps of a probe"),
        ({"about": json.dumps({**ABOUT, "modules": {"a": 1}})}, "has modules that are no tables"),
        ({"input.x": None, "input.y": PROBE, "labels.x": None}, "x: outputs without their probe"),
        ({"float32.x.features.1": None}, "x: a probe without an output"),
        ({"input.y": PROBE}, "y: a probe without an output"),
        ({"input.x": None, "float32.x.features.1": None, "labels.x": None}, "holds no probe"),
        ({"input.x": PROBE.astype(np.float64)}, "input.x: has no place in a recording (float64, 4 axes)"),
        ({"input.x": PROBE[0]}, "input.x: has no place in a recording (float32, 3 axes)"),
        ({"float64.x.y": ANSWER}, "float64.x.y: has no place in a recording (float32, 2 axes)"),
        ({"float32.x.y": ANSWER.astype(">f4")}, "float32.x.y: has no place in a recording (>f4, 2 axes)"),
        ({"float16.x.y": ANSWER.astype(np.float16)}, "float16.x.y: has no place in a recording"),
        ({"weights\x1b[31m": ANSWER}, "weights\\x1b[31m: has no place in a recording"),
        ({"labels.x": np.array([1])}, "labels.x: does not label one probe's samples"),
        ({"labels.y": np.array([1, 2])}, "labels.y: does not label one probe's samples"),
        ({"float32.x.y": np.array([None, 1])}, "float32.x.y: its header claims object (2,)"),
    ],
)  # fmt: skip
def test_a_malformed_recording_is_one_line(tmp_path, changes, words):
    arrays = {name: array for name, array in {**GOOD, **changes}.items() if array is not None}
    np.savez(tmp_path / "a.npz", **arrays)
    refused(tmp_path / "a.npz", words)


def npy(shape: str, data: bytes = b"", version: int = 1) -> bytes:
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H", len(header)) + header + data


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([("input.x.npy", npy("(1099511627776,)"))], "input.x: its header claims float32 (1099511627776,)"),
        ([("input.x.npy", npy("(-2, -3)", bytes(24)))], "is not a recording: "),
        ([("input.x.npy", npy("(2,)", bytes(7)))], "input.x: its header claims float32 (2,)"),
        ([("input.x.npy", npy("(2,)", bytes(8), version=9))], "input.x: is an npy file of version 9.0"),
        ([("input.x.npy", npy("__import__('os')"))], "is not a recording: "),
        ([("input.x.npy", npy("(" * 9000))], "is not a recording: "),
        ([("input.x.npy", b"\x80\x04")], "is not a recording: "),
        ([("input.x.npy", npy("()", bytes(4))), ("input.x", npy("()", bytes(4)))], "input.x: is there twice"),
    ],
)  # fmt: skip
def test_hostile_members(tmp_path, members, words):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        for name, data in members:
            archive.writestr(name, data)
    refused(tmp_path / "a.npz", words)


@pytest.mark.parametrize(
    ("member", "words"),
    [
        (npy("(2,)", bytes(8)), "tap.0: is float32, not float64"),
        (npy("(1099511627776,)"), "tap.0: its header claims float32 (1099511627776,)"),
        (b"\x80\x04", "is not a recording: "),
        (None, "is not a recording: \"There is no item named 'tap.0.npy' in the archive\""),
    ],
)  # fmt: skip
def test_taps_are_checked_when_they_are_asked_for(tmp_path, member, words):
    about = {**ABOUT, "taps": {"probe": "x", "inputs": {}, "outputs": {"a": 0}}, "modules": {"a": {"kind": "ReLU"}}}
    np.savez(tmp_path / "a.npz", **{**GOOD, "about": json.dumps(about)})
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive:
        if member is not None:
            archive.writestr("tap.0.npy", member)
    recording = read_recording(tmp_path / "a.npz")
    (tmp_path / "a.npz").rename(tmp_path / "b.npz")  # it is open already
    assert recording.modules == {"a": {"kind": "ReLU"}} and "taps" not in recording.about
    with pytest.raises(ReferenceFailed) as caught:
        recording.taps.read(recording.taps.outputs["a"])
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_hostile_archives(tmp_path):
    path = tmp_path / "a.npz"
    refused(path, "is not a file")
    os.mkfifo(path)
    refused(path, "is not a file")
    path.unlink()
    path.write_bytes(b"version https://git-lfs")
    refused(path, "is not a recording: File is not a zip file")
    buffer = io.BytesIO()
    np.savez(buffer, **GOOD)
    raw = bytearray(buffer.getvalue())
    raw[raw.index(b"\x93NUMPY") + 200] ^= 1
    path.write_bytes(raw)
    refused(path, "Bad CRC-32")
    path.write_bytes(buffer.getvalue()[:-40])
    refused(path, "is not a recording")


def test_size_is_bounded(tmp_path):
    """An archive that claims more than the limit is refused before a byte of it is unpacked."""
    np.savez_compressed(tmp_path / "a.npz", **GOOD)
    raw = bytearray((tmp_path / "a.npz").read_bytes())
    directory = raw.index(b"PK\x01\x02")
    raw[directory + 24 : directory + 28] = struct.pack("<I", 0xFFFFFFF0)
    second = raw.index(b"PK\x01\x02", directory + 1)
    raw[second + 24 : second + 28] = struct.pack("<I", 0xFFFFFFF0)
    (tmp_path / "a.npz").write_bytes(raw)
    refused(tmp_path / "a.npz", "holds more than 4 GiB")


def refused(path: Path, words: str) -> None:
    with pytest.raises(ReferenceFailed) as caught:
        read_recording(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: ") and words in line and "\n" not in line and "\x1b" not in line, line
