"""The host's side of the reference worker: start it, wait, and take its recording or its one line of error.

The worker is the folder `references`, run by any interpreter; everything passes through files in a job folder.
A worker that crashes, aborts or hangs takes nothing down with it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from converters.errors import ReferenceFailed, printable
from converters.verifier.recording import Recording, read_recording

__all__ = ["REFERENCES", "run_reference", "run_task", "write_inputs"]

REFERENCES = Path(__file__).with_name("references")


def run_reference(
    job: Mapping[str, Any],
    inputs: Mapping[str, np.ndarray],
    *,
    python: str | None = None,
    timeout: float = 900.0,
    memory: int | None = None,
    keep: Path | None = None,
) -> Recording:
    """The answers of the source framework's model to `inputs`.

    `job` is described in references/__main__.py. `python` is the interpreter that has the framework, this one by
    default; `timeout` is in seconds, `memory` in bytes of address space; the recording's file is copied to `keep`.
    Raises ReferenceFailed.
    """
    with tempfile.TemporaryDirectory(prefix="timmport-") as name:
        folder = Path(name)
        write_inputs(inputs, folder)
        _work(job, folder, python, timeout, memory)
        recording = read_recording(folder / "recording.npz")
        if keep:
            shutil.copyfile(folder / "recording.npz", keep)
        return recording


def write_inputs(inputs: Mapping[str, np.ndarray], folder: Path) -> None:
    """The probes, as the worker reads them."""
    with (folder / "inputs.npz").open("wb") as file:
        np.savez(file, **inputs)  # type: ignore[arg-type]


def run_task(
    job: Mapping[str, Any], *, python: str | None = None, timeout: float = 900.0, memory: int | None = None
) -> dict[str, Any]:
    """The result of a job without probes: another `task` of references/__main__.py. Raises ReferenceFailed."""
    with tempfile.TemporaryDirectory(prefix="timmport-") as name:
        return _work(job, Path(name), python, timeout, memory)


def _work(
    job: Mapping[str, Any], folder: Path, python: str | None, timeout: float, memory: int | None
) -> dict[str, Any]:
    """Have the job done in `folder` and return its result."""
    executable = _executable(python or sys.executable)
    source, limits = job.get("source", {}).get("file"), {"seconds": timeout, "bytes": memory}
    (folder / "job.json").write_text(json.dumps({**job, "limits": limits}), encoding="utf-8")
    code = _run([executable, str(REFERENCES), str(folder)], folder, timeout)
    who = f"the {job['runner']} reference"
    cure = f"it may take {memory >> 20} MiB of memory" if memory else None
    if not (folder / "result.json").is_file():
        raise ReferenceFailed(f"{who} {_how_it_ended(code, timeout, folder / 'log')}", file=source, cure=cure)
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    if "error" in result:
        if result["kind"] == "ModuleNotFoundError":
            cure = "name an interpreter that has it with --python"
        raise ReferenceFailed(f"{who}: {printable(result['error'], 500)}", file=source, cure=cure)
    return result


def _executable(python: str) -> str:
    found = shutil.which(python)
    if found is None:
        raise ReferenceFailed("is no interpreter", file=python, cure="give --python the path of one")
    return os.path.abspath(found)


def _run(command: list[str], folder: Path, timeout: float) -> int | None:
    """The exit code, or None when the time ran out. Nothing of it lives on, whatever happens here."""
    with (folder / "log").open("wb") as log:
        how: Any = {"cwd": folder, "env": {**os.environ, "PYTHONHASHSEED": "0"}, "start_new_session": True}
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, **how)
        except OSError as error:
            problem = f"does not start: {(error.strerror or str(error)).lower()}"
            raise ReferenceFailed(problem, file=command[0]) from error
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _how_it_ended(code: int | None, timeout: float, log: Path) -> str:
    if code is None or code == -signal.SIGALRM:
        return f"took longer than {timeout:g} s"
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code} and no result"
    lines = log.read_bytes()[-4096:].decode(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
    return f"{how}: {printable(last, 400)}"
