"""Damaged and oversized safetensors files; test_safetensors.py has the malformed headers."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from converters.errors import ConverterError
from converters.readers import open_checkpoint

TENSORS = {"a.weight": torch.arange(4.0), "b": torch.tensor(7), "c": torch.ones(2, 3, dtype=torch.float16)}
SOUND = save(TENSORS, metadata={"format": "pt"})
LENGTH = 8 + int.from_bytes(SOUND[:8], "little")  # of the header and what goes before it


def reads(path: Path) -> dict[str, bytes] | None:
    """The tensors of a damaged file, or None where it is refused; anything else that escapes fails the test."""
    try:
        return {name: bytes(tensor.read()) for name, tensor in open_checkpoint(path).tensors.items()}
    except ConverterError as error:
        assert "\n" not in str(error)
        return None


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(SOUND)
    assert reads(path) == {name: tensor.numpy().tobytes() for name, tensor in TENSORS.items()}
    for end in reversed(range(len(SOUND))):
        os.truncate(path, end)
        assert reads(path) is None, end


def test_a_flipped_bit_never_crashes_nor_moves_data(tmp_path: Path) -> None:
    """The format has no checksum; but one bit of the header cannot give a tensor other bytes and its own name."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(SOUND)
    sound = reads(path)
    assert sound is not None
    with path.open("r+b", buffering=0) as file:
        for bit in range(8 * len(SOUND)):
            os.pwrite(file.fileno(), bytes([SOUND[bit // 8] ^ 1 << bit % 8]), bit // 8)
            found = reads(path)
            if found is not None and bit < 8 * LENGTH:
                assert all(sound[name] == data for name, data in found.items() if name in sound), bit
            os.pwrite(file.fileno(), SOUND[bit // 8 : bit // 8 + 1], bit // 8)


BOMBS: dict[str, Callable[[], bytes]] = {
    "lists in a shape": lambda: b'{"w":{"dtype":"F32","data_offsets":[0,0],"shape":[' + b"[]," * 30_000_000 + b"0]}}",
    "fewer lists": lambda: b'{"w":{"dtype":"F32","data_offsets":[0,0],"shape":[' + b"[]," * 1_900_000 + b"0]}}",
    "lists within lists": lambda: b'{"w":' + b"[" * 3_000_000,
    "one long name": lambda: b'{"' + b"x" * 90_000_000 + b'":1}',
    "names": lambda: b"{" + b",".join(b'"%d":{}' % i for i in range(500_000)) + b"}",
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    here, folder = Path(__file__).parent, tmp_path_factory.mktemp("attacks")
    files = [folder / f"{index}.safetensors" for index in range(len(BOMBS))]
    for file, make in zip(files, BOMBS.values(), strict=True):
        header = make()
        file.write_bytes(struct.pack("<Q", len(header)) + header)
    command = [sys.executable, here / "watched.py", here.parents[1], *files]
    child = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return dict(zip(BOMBS, json.loads(child.stdout).values(), strict=True))


@pytest.mark.parametrize("name", BOMBS)
def test_bombs(name: str, outcomes: dict[str, dict[str, object]]) -> None:
    """Within 2 GiB and 10 seconds each."""
    assert outcomes[name]["broken"] == []
    assert len(str(outcomes[name]["refusal"])) < 1000
