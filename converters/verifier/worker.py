"""The host's side of the reference worker: start it, wait, and take its recording or its one line of error.

The worker is the folder `references`, run by any interpreter; everything passes through files in a job folder.
A worker that crashes, aborts or hangs takes nothing down with it. `Workers` keeps it for the next job, so that a
framework starts once.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from converters.errors import ReferenceFailed, printable
from converters.verifier.recording import Recording, read_recording
from converters.verifier.references.__main__ import ASIDE, RUNNERS

__all__ = ["REFERENCES", "Workers", "run_reference", "run_task", "write_inputs"]

REFERENCES = Path(__file__).with_name("references")
MOST_KEPT = 2  # workers; a framework takes half a gigabyte
PAUSE = 0.01  # seconds, between looks at whether a kept worker is done


class Workers:
    """Workers that stay for the next job of their framework, until the `with` ends; the last ones used are kept."""

    def __init__(self) -> None:
        self.kept: dict[tuple[Any, ...], _Kept] = {}

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_error: object) -> None:
        while self.kept:
            self.kept.popitem()[1].end()

    def hire(self, executable: str, job: Mapping[str, Any], memory: int | None) -> _Kept:
        """The one that has the framework of the job's runner and this limit of memory, or a new one."""
        module = RUNNERS.get(job["runner"])
        key = executable, module, memory, (job.get("task"), module) in ASIDE
        worker = self.kept.pop(key, None)
        if worker and worker.process.poll() is not None:
            worker.end()
            worker = None
        self.kept[key] = worker = worker or _Kept(executable)
        while len(self.kept) > MOST_KEPT:
            self.kept.pop(next(iter(self.kept))).end()
        return worker


def run_reference(
    job: Mapping[str, Any],
    inputs: Mapping[str, np.ndarray],
    *,
    python: str | None = None,
    timeout: float = 900.0,
    memory: int | None = None,
    keep: Path | None = None,
    workers: Workers | None = None,
) -> Recording:
    """The answers of the source framework's model to `inputs`.

    `job` is described in references/__main__.py. `python` is the interpreter that has the framework, this one by
    default; `timeout` is in seconds, `memory` in bytes of address space; the recording's file is copied to `keep`.
    One of `workers` does it, or a new one. Raises ReferenceFailed.
    """
    with tempfile.TemporaryDirectory(prefix="timmport-") as name:
        folder = Path(name)
        write_inputs(inputs, folder)
        _work(job, folder, python, timeout, memory, workers)
        recording = read_recording(folder / "recording.npz")
        if keep:
            shutil.copyfile(folder / "recording.npz", keep)
        return recording


def write_inputs(inputs: Mapping[str, np.ndarray], folder: Path) -> None:
    """The probes, as the worker reads them."""
    with (folder / "inputs.npz").open("wb") as file:
        np.savez(file, **inputs)  # type: ignore[arg-type]


def run_task(
    job: Mapping[str, Any],
    *,
    python: str | None = None,
    timeout: float = 900.0,
    memory: int | None = None,
    workers: Workers | None = None,
) -> dict[str, Any]:
    """The result of a job without probes: another `task` of references/__main__.py. Raises ReferenceFailed."""
    with tempfile.TemporaryDirectory(prefix="timmport-") as name:
        return _work(job, Path(name), python, timeout, memory, workers)


def _work(
    job: Mapping[str, Any],
    folder: Path,
    python: str | None,
    timeout: float,
    memory: int | None,
    workers: Workers | None,
) -> dict[str, Any]:
    """Have the job done in `folder` and return its result."""
    executable = _executable(python or sys.executable)
    source, limits = job.get("source", {}).get("file"), {"seconds": timeout, "bytes": memory}
    (folder / "job.json").write_text(json.dumps({**job, "limits": limits}), encoding="utf-8")
    if workers:
        worker = workers.hire(executable, job, memory)
        code, log = worker.do(folder, timeout), worker.log
    else:
        code, log = _run([executable, str(REFERENCES), str(folder)], folder, timeout), folder / "log"
    who = f"the {job['runner']} reference"
    cure = f"it may take {memory >> 20} MiB of memory" if memory else None
    if not (folder / "result.json").is_file():
        raise ReferenceFailed(f"{who} {_how_it_ended(code, timeout, log)}", file=source, cure=cure)
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
    process = _start(command, folder, stdin=subprocess.DEVNULL)
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        return None
    finally:
        _end(process)


class _Kept:
    """A worker that takes one job after another."""

    def __init__(self, executable: str) -> None:
        self.home = tempfile.TemporaryDirectory(prefix="timmport-")
        self.log = Path(self.home.name) / "log"
        self.process = _start([executable, str(REFERENCES), "-"], self.log.parent, stdin=subprocess.PIPE)

    def do(self, folder: Path, timeout: float) -> int | None:
        """0 when `folder` has the result, else the exit code, or None when the time ran out: then it has ended."""
        end = time.monotonic() + timeout
        try:
            with contextlib.suppress(BrokenPipeError):  # it has exited; its code tells
                assert self.process.stdin
                self.process.stdin.write(f"{folder}\n".encode())
                self.process.stdin.flush()
            while not (folder / "result.json").is_file():
                if self.process.poll() is not None:
                    return self.process.returncode
                if time.monotonic() > end:
                    _end(self.process)
                    return None
                time.sleep(PAUSE)
        except BaseException:
            _end(self.process)
            raise
        return 0

    def end(self) -> None:
        if self.process.stdin:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
        _end(self.process)
        self.home.cleanup()


def _start(command: list[str], folder: Path, *, stdin: int) -> subprocess.Popen[bytes]:
    with (folder / "log").open("wb") as log:
        how: Any = {"cwd": folder, "env": {**os.environ, "PYTHONHASHSEED": "0"}, "start_new_session": True}
        try:
            return subprocess.Popen(command, stdin=stdin, stdout=log, stderr=log, **how)
        except OSError as error:
            problem = f"does not start: {(error.strerror or str(error)).lower()}"
            raise ReferenceFailed(problem, file=command[0]) from error


def _end(process: subprocess.Popen[bytes]) -> None:
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
