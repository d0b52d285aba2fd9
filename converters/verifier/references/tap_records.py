"""The part of a recording that holds taps: what entered and left the model's modules on one probe.

Each is written as soon as it is there, so that no more than one is in memory, and only once if several are alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any
from zipfile import ZipFile

import numpy as np

__all__ = ["record_taps", "save"]

LIMIT = 2 << 30  # bytes


def record_taps(modules: Any, job: Mapping[str, Any], probe: str, x: np.ndarray, archive: ZipFile) -> dict[str, Any]:
    """Run `modules` (see torch_modules.py) on `x` and write tap.0, tap.1, ... Returns what joins `about`:

    taps       {"probe", "inputs": {module: number}, "outputs": {module: number}, "left_out": [module]};
               outputs in the order in which the modules ended, and those that found no room
    modules    what each declares

    `job` is {"inputs": [module], "outputs": [module], "bytes": limit}.
    """
    places: dict[str, dict[str, int]] = {"input": {}, "output": {}}
    known: dict[Any, int] = {}
    left_out: list[str] = []
    room = int(job.get("bytes", LIMIT))

    def keep(kind: str, name: str, array: Any) -> None:
        nonlocal room
        if array.dtype != np.float64:
            return
        array = np.ascontiguousarray(array)
        content = (array.shape, hashlib.sha256(array).digest())
        if content not in known:
            if array.nbytes > room:
                left_out.append(name)
                return
            room -= array.nbytes
            known[content] = len(known)
            save(archive, f"tap.{known[content]}", array)
        places[kind][name] = known[content]

    modules.watch(x, job["inputs"], job["outputs"], keep)
    taps = {"probe": probe, "inputs": places["input"], "outputs": places["output"], "left_out": left_out}
    return {"taps": taps, "modules": modules.describe(job["inputs"])}


def save(archive: ZipFile, name: str, array: np.ndarray) -> None:
    """Add an array as np.savez would."""
    with archive.open(name + ".npy", "w", force_zip64=True) as file:
        np.lib.format.write_array(file, np.asanyarray(array), allow_pickle=False)
