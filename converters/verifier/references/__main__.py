"""The reference worker: the source framework's own model, run in a process of its own.

    EXE references JOB

`JOB` is a folder that holds

    job.json       {"runner", "model" or "config", "outputs": {name: "the runner's name | ops"}, "input": "ops",
                    "source": {"file", "files"}, "trust", "limits": {"seconds", "bytes", "threads"}}
    inputs.npz     one float32 NCHW array for each probe

and receives

    recording.npz  the probes and the model's outputs, as converters/verifier/recording.py reads them
    result.json    what the recording says about itself, or {"error": one line, "kind": exception}

Exit code 0 is a recording, 1 an error. The ops are for whoever reads the recording; `files` lists a checkpoint
that is more than one file. This folder stands alone: on another machine it needs Python 3.7, numpy and the
framework, and nothing of `converters`. It opens no connection, and only the framework's own loader, in its safe
mode, reads the checkpoint.

A runner is a module beside this one, named in `RUNNERS`, with one function:

    build(job, precision) -> run, facts      job["outputs"] is a list of the runner's names
    run(x) -> {name: array}                  x is NCHW and of that precision

`facts` joins the result. An exception is the answer that it cannot be done; its text becomes the error. Never
name a runner as its framework: this folder comes first on the import path and would hide it.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["RUNNERS", "main"]

RUNNERS = {
    "mmdet": "run_mmlab",
    "mmpretrain": "run_mmlab",
    "mmseg": "run_mmlab",
    "keras": "run_keras",
}
PRECISIONS = ("float64", "float32")  # only the last must succeed
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "-1",
    "HF_HUB_OFFLINE": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TF_ENABLE_ONEDNN_OPTS": "0",
}
THREADS = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "TF_NUM_INTRAOP_THREADS",
    "TF_NUM_INTEROP_THREADS",
)
FRAMEWORKS = ("numpy", "torch", "tensorflow", "keras", "h5py", "mmengine", "mmcv", "mmdet", "mmpretrain", "mmseg")


def main(folder: str) -> int:
    try:
        with open(os.path.join(folder, "job.json"), encoding="utf-8") as file:
            job = json.load(file)
        _confine(job.get("limits", {}))
        result = _record(job, folder)
    except (Exception, SystemExit) as error:
        result = {"error": _line(error), "kind": type(error).__name__}
    path = os.path.join(folder, "result.json")
    with open(path + ".part", "w", encoding="utf-8") as file:
        json.dump(result, file)
    os.replace(path + ".part", path)
    return 1 if "error" in result else 0


def _confine(limits: dict[str, Any]) -> None:
    """Pin what changes results and bound what the framework may take, before anything heavy is imported."""
    import resource
    import signal

    os.environ.update(ENVIRONMENT)
    os.environ.update(dict.fromkeys(THREADS, str(limits.get("threads", 1))))
    if limits.get("seconds"):
        signal.alarm(int(limits["seconds"]) + 1)  # ends it even when whoever started it is gone
    if limits.get("bytes"):
        resource.setrlimit(resource.RLIMIT_AS, (limits["bytes"], limits["bytes"]))
    if hasattr(sys, "addaudithook"):
        sys.addaudithook(_refuse_network)


def _refuse_network(event: str, args: Any) -> None:
    if event in ("socket.connect", "socket.getaddrinfo"):
        raise PermissionError("the reference asked for the network; it must find everything on this machine")


def _record(job: dict[str, Any], folder: str) -> dict[str, Any]:
    """Run the model on every probe, in every precision that it can, and write the recording."""
    import numpy as np

    if job["runner"] not in RUNNERS:
        raise ValueError(f"no runner is called {job['runner']!r}; there are {', '.join(RUNNERS)}")
    runner = importlib.import_module(RUNNERS[job["runner"]])
    names = {name: text.partition("|")[0].strip() for name, text in job["outputs"].items()}
    with np.load(os.path.join(folder, "inputs.npz"), allow_pickle=False) as archive:
        probes = {name: archive[name] for name in archive.files}
    arrays = {f"input.{name}": probe for name, probe in probes.items()}
    about: dict[str, Any] = {
        "recording": 1,
        "runner": job["runner"],
        "model": job.get("model") or job["config"],
        "ops": {name: text.partition("|")[2].strip() for name, text in job["outputs"].items() if "|" in text},
        "input": job.get("input", ""),
        "source": {
            "file": os.path.basename(job["source"]["file"]),
            "sha256": _sha256(job["source"].get("files") or [job["source"]["file"]]),
        },
        "notes": [],
    }
    for precision in PRECISIONS:
        try:
            run, facts = runner.build({**job, "outputs": sorted(set(names.values()))}, precision)
            for probe, array in probes.items():
                found = run(array.astype(precision))
                _check(found, names.values(), precision)
                arrays.update({f"{precision}.{probe}.{name}": found[own] for name, own in names.items()})
        except Exception as error:
            if precision == PRECISIONS[-1]:
                raise
            arrays = {name: array for name, array in arrays.items() if not name.startswith(precision)}
            about["notes"].append(f"no {precision}: {_line(error)}")
        else:
            about.update(facts)
    about["framework"] = {name: str(sys.modules[name].__version__) for name in FRAMEWORKS if name in sys.modules}
    arrays["about"] = np.array(json.dumps(about))
    with open(os.path.join(folder, "recording.npz"), "wb") as file:
        np.savez(file, **arrays)
    return about


def _check(found: Mapping[str, Any], names: Iterable[str], precision: str) -> None:
    for name in names:
        if name not in found:
            raise ValueError(f"the model has no output {name!r}; it has {', '.join(sorted(found))}")
        if found[name].dtype != precision:
            raise TypeError(f"its output {name!r} is {found[name].dtype}")


def _sha256(paths: list[str]) -> str:
    """The content's SHA-256; of several files, that of the lines `<sha256>  <name>` in order of names."""
    import hashlib

    digests = {}
    for path in paths:
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            for piece in iter(lambda: file.read(8 << 20), b""):
                digest.update(piece)
        digests[os.path.basename(path)] = digest.hexdigest()
    if len(digests) == 1:
        return next(iter(digests.values()))
    return hashlib.sha256("".join(f"{digests[name]}  {name}\n" for name in sorted(digests)).encode()).hexdigest()


def _line(error: BaseException) -> str:
    """An exception in one line."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"{sys.executable} has no module {error.name!r}"
    return f"{type(error).__name__}: {' '.join(str(error).split()) or 'it says nothing'}"[:500]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
