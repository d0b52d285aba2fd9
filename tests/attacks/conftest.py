"""What attacks share: a child that watches, and all the ways to spoil one byte."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

Outcomes = dict[str, dict[str, Any]]


@pytest.fixture(scope="session")
def watch(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Mapping[str, Callable[[Path], object]]], Outcomes]:
    """What becomes of checkpoints, each written by a function, when a child that watches opens them; see watched.py."""
    here = Path(__file__).parent

    def run(writers: Mapping[str, Callable[[Path], object]]) -> Outcomes:
        folder = tmp_path_factory.mktemp("attacks")
        files = [folder / str(number) for number in range(len(writers))]
        for file, write in zip(files, writers.values(), strict=True):
            write(file)
        command = [sys.executable, here / "watched.py", here.parents[1], *files]
        child = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300, cwd=folder)
        assert sorted(folder.iterdir()) == sorted(files)
        return dict(zip(writers, json.loads(child.stdout).values(), strict=True))

    return run


@pytest.fixture(scope="session")
def spoil() -> Callable[[bytes], Iterator[tuple[int, bytes]]]:
    """Every cut of some bytes, and every flip of a bit: where it is, and what is left."""

    def every(intact: bytes) -> Iterator[tuple[int, bytes]]:
        for at in range(len(intact)):
            yield at, intact[:at]
            for bit in range(8):
                yield at, intact[:at] + bytes([intact[at] ^ 1 << bit]) + intact[at + 1 :]

    return every
