"""Hostile and damaged pickles of numpy arrays, each in a watched child."""

from __future__ import annotations

import _codecs as codecs
import json
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters.errors import ConverterError
from converters.readers import open_checkpoint

ARRAYS = {"w": np.arange(64, dtype="f4"), "v": np.arange(6.0).reshape(2, 3)}
BYTES = {name: array.tobytes() for name, array in ARRAYS.items()}
SOUND = pickle.dumps(ARRAYS, 4)
LONG = pickle.dumps({"w": np.arange(5000, dtype="f4")}, 4)  # its bytes are left in the file


class Payload:
    def __reduce__(self) -> Any:
        return os.system, ("true",)


class Call:
    """An object that is pickled as a call."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.parts = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.parts


RECONSTRUCT, _, STATE = ARRAYS["w"].__reduce__()
FROM_BUFFER = ARRAYS["w"].__reduce_ex__(5)[0]
F4, DATA = np.dtype("f4"), STATE[-1]


def rebuilt(*state: Any, kind: Any = np.ndarray) -> bytes:
    """A pickle whose `w` has this state: version, shape, dtype, whether it is in Fortran's order, data."""
    return pickle.dumps({"w": Call(RECONSTRUCT, kind, (0,), b"b", state=state), "v": ARRAYS["v"]}, 4)


def buffered(*arguments: Any) -> bytes:
    return pickle.dumps({"w": Call(FROM_BUFFER, *arguments), "v": ARRAYS["v"]}, 4)


NONSENSE, OPENS = "w: its pickled array makes no sense; fetch it again", "opens"
LENGTH = struct.pack("<I", 20_000)
CASES: dict[str, tuple[bytes, str]] = {
    "sound": (SOUND, OPENS),
    "sound, built here": (rebuilt(1, (64,), F4, False, DATA), OPENS),
    "sound, from a buffer": (buffered(DATA, F4, (64,), "C"), OPENS),
    "os.system": (pickle.dumps({**ARRAYS, "x": Payload()}), "its pickle names posix.system, which runs code"),
    "eval, as Paddle had it": (pickle.dumps({"w": Call(eval, "1")}), "its pickle names builtins.eval, which runs code"),
    "nested pickle": (
        pickle.dumps({"w": Call(pickle.loads, pickle.dumps(Payload()))}),
        "its pickle names _pickle.loads, which runs code",
    ),
    "objects": (pickle.dumps({"w": np.array([Payload()], dtype=object)}), "its pickle names posix.system"),
    "larger": (rebuilt(1, (65,), F4, False, DATA), NONSENSE),
    "smaller": (rebuilt(1, (63,), F4, False, DATA), NONSENSE),
    "huge": (rebuilt(1, (1 << 62,), F4, False, DATA), NONSENSE),
    "negative": (rebuilt(1, (-8, -8), F4, False, DATA), NONSENSE),
    "a dimension of text": (rebuilt(1, ("64",), F4, False, DATA), NONSENSE),
    "a million dimensions": (rebuilt(1, (1,) * 1_000_000, F4, False, DATA), NONSENSE),
    "no shape": (rebuilt(1, None, F4, False, DATA), NONSENSE),
    "no state": (rebuilt(), NONSENSE),
    "no bytes": (rebuilt(1, (64,), F4, False, None), NONSENSE),
    "a list of bytes": (rebuilt(1, (256,), np.dtype("u1"), False, [0] * 256), NONSENSE),
    "no dtype": (rebuilt(1, (64,), None, False, DATA), NONSENSE),
    "another's dtype": (rebuilt(1, (64,), Call(int), False, DATA), NONSENSE),
    "data of another call": (rebuilt(1, (64,), F4, False, Call(complex, "text", "latin1")), NONSENSE),
    "its own data": (rebuilt(1, (64,), F4, False, Call(RECONSTRUCT, np.ndarray, (0,), b"b")), NONSENSE),
    "a class for an array": (rebuilt(1, (64,), F4, False, DATA, kind=Path), "w: is a pathlib.Path, not a plain array"),
    "buffer too long": (buffered(DATA, F4, (63,), "C"), NONSENSE),
    "axes twice": (buffered(DATA, F4, (8, 8), "K", (0, 0)), NONSENSE),
    "axes beyond": (buffered(DATA, F4, (8, 8), "K", (0, 2)), NONSENSE),
    "axes of text": (buffered(DATA, F4, (8, 8), "K", "ab"), NONSENSE),
    "data beyond the end": (
        LONG.replace(LENGTH, struct.pack("<I", 1 << 31)),
        "its pickle breaks off or makes no sense",
    ),
    "text that is no bytes": (
        rebuilt(1, (20_000,), np.dtype("u1"), False, Call(codecs.encode, "\N{SNOWMAN}" * 10_000, "latin1")),
        "w: its text is not that of bytes",
    ),
    "nested pairs": (b"\x80\x04" + b"\x8c\x01a" * 100_000 + b"N" + b"\x86" * 100_000 + b".", "is nested too deeply"),
    "nested lists": (b"\x80\x04" + b"]" * 100_000 + b"a" * 99_999 + b".", "is nested too deeply"),
    "no end": (b"\x80\x04" + b"]" * 1000, "its pickle breaks off"),
    "nothing": (b"\x80\x04", "its pickle breaks off"),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    here, folder = Path(__file__).parent, tmp_path_factory.mktemp("attacks")
    files = [folder / f"{index}.safetensors" for index in range(len(CASES))]  # their extension is a lie
    for file, (data, _) in zip(files, CASES.values(), strict=True):
        file.write_bytes(data)
    command = [sys.executable, here / "watched.py", here.parents[1], *files]
    child = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (child.returncode, child.stderr) == (0, "")
    return dict(zip(CASES, json.loads(child.stdout).values(), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_attacks(name: str, outcomes: dict[str, Any]) -> None:
    outcome, words = outcomes[name], CASES[name][1]
    assert outcome["broken"] == []
    if words == OPENS:
        assert outcome["tensors"] == {key: data.hex() for key, data in BYTES.items()}
    else:
        assert words in outcome["refusal"]
        assert outcome["refusal"].isprintable()


def reads(path: Path) -> dict[str, bytes] | None:
    """The tensors of a damaged file, or None where it is refused; anything else that escapes fails the test."""
    try:
        return {name: bytes(tensor.read()) for name, tensor in open_checkpoint(path).tensors.items()}
    except ConverterError as error:
        assert "\n" not in str(error)
        return None


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_file_cut_anywhere_is_refused(protocol: int, tmp_path: Path) -> None:
    path, data = tmp_path / "model.pkl", pickle.dumps(ARRAYS, protocol)
    path.write_bytes(data)
    assert reads(path) == BYTES
    for end in reversed(range(len(data))):
        os.truncate(path, end)
        assert reads(path) is None, end


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_flipped_bit_never_crashes(protocol: int, tmp_path: Path) -> None:
    path, data = tmp_path / "model.pkl", pickle.dumps(ARRAYS, protocol)
    path.write_bytes(data)
    with path.open("r+b", buffering=0) as file:
        for bit in range(8 * len(data)):
            os.pwrite(file.fileno(), bytes([data[bit // 8] ^ 1 << bit % 8]), bit // 8)
            reads(path)
            os.pwrite(file.fileno(), data[bit // 8 : bit // 8 + 1], bit // 8)
