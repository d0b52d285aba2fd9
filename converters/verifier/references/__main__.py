"""The reference worker: the source framework's own model, run in a process of its own.

    EXE references JOB [CHECKPOINT]
    EXE references -                    standard input names one JOB a line

`JOB` is a folder that holds

    job.json       {"runner", "model" or "config", "outputs": {name: "the runner's name | ops"}, "input": "ops",
                    "source": {"file", "files", "wrappers", "chosen"}, "trust",
                    "limits": {"seconds", "bytes", "threads"}}
                   and, where the framework's code calls a module again in the place of another, whose weights then
                   do nothing, "mend": {"layers.{i}.ln1": "layers.{i}.ln2"}
                   and, to look inside, "taps": {"inputs": [module], "outputs": [module]}; "precisions": 1 for the
                   best alone
    inputs.npz     one float32 NCHW array for each probe

and receives

    recording.npz  the probes and the model's outputs, as converters/verifier/recording.py reads them
    result.json    what the recording says about itself, or {"error": one line, "kind": exception}

Exit code 0 is a recording, 1 an error. A job with a `task`, one of TASKS, is done by the function of that name and
has no probes and no recording. The ops are for whoever reads the recording; `files` lists a checkpoint
that is more than one file, `wrappers` what lay around its state dict, and `chosen` says that the user asked for it.
Paths of `source` are relative to JOB, unless CHECKPOINT says where it is. This folder stands alone: on another
machine it needs Python 3.7, numpy and the framework, and nothing of `converters`. It opens no connection, and only
the framework's own loader, in its safe mode, reads the checkpoint.

A runner is a module beside this one, named in `RUNNERS`, with one function:

    build(job, precision) -> run, facts      job["outputs"] is a list of the runner's names
    run(x) -> {name: array}                  x is NCHW and of that precision
    run.modules                              if it has any: the model's modules, as in torch_modules.py

and, where a model can be built without a checkpoint,

    construct(job) -> model                  as its constructor leaves it, in float32

`facts` joins the result; its `files`, by their digest, are what holds the weights where it is not the checkpoint.
`trust` lets a runner execute what a file holds; it refuses otherwise. An exception is the answer that it cannot be
done; its text becomes the error. Never name a runner as its framework: this folder comes first on the import path
and would hide it.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import sys
import zipfile
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["ASIDE", "RUNNERS", "main", "serve"]

RUNNERS = {
    "mmdet": "run_mmlab",
    "mmpretrain": "run_mmlab",
    "mmseg": "run_mmlab",
    "keras": "run_keras",
    "torchvision": "run_torchvision",
    "transformers": "run_transformers",
    "timm": "run_timm",
    "onnx": "run_onnx",
    "savedmodel": "run_savedmodel",
    "flax": "run_flax",
    "tensorflow": "run_tensorflow",
    "python": "run_python",
}
TASKS = {"list_tensors": "skeletons", "write_weights": "random_weights"}  # function: its module
ASIDE = {("list_tensors", "run_keras")}  # these load a framework as no other job can use it: Keras to compute nothing
PRECISIONS = ("float64", "float32")  # only the last must succeed
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "-1",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "HF_HUB_OFFLINE": "1",
    "NVIDIA_TF32_OVERRIDE": "0",
    "ONEDNN_DEFAULT_FPMATH_MODE": "STRICT",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TF_DETERMINISTIC_OPS": "1",
    "TF_ENABLE_ONEDNN_OPTS": "0",
}
THREADS = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "TF_NUM_INTRAOP_THREADS",
    "TF_NUM_INTEROP_THREADS",
)
FRAMEWORKS = (
    *("numpy", "torch", "torchvision", "transformers", "safetensors", "timm", "onnxruntime", "tensorflow", "keras"),
    *("flax", "jax", "tf_slim", "h5py", "mmengine", "mmcv", "mmdet", "mmpretrain", "mmseg"),
)


def serve() -> int:
    """Job after job, so that a framework is imported once. Each one's result.json tells that it is done."""
    import gc
    import signal

    jobs, home = os.fdopen(os.dup(0)), os.getcwd()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for line in jobs:
        os.chdir(line.rstrip("\n"))
        main(os.getcwd())
        signal.alarm(0)
        os.chdir(home)
        gc.collect()
    return 0


def main(folder: str, checkpoint: str | None = None) -> int:
    try:
        with open(os.path.join(folder, "job.json"), encoding="utf-8") as file:
            job = json.load(file)
        _confine(job.get("limits", {}))
        if "source" in job:
            job["source"] = _place(job["source"], folder, checkpoint)
        result = _do(job, folder)
    except (Exception, SystemExit) as error:
        result = {"error": _line(error), "kind": type(error).__name__}
    path = os.path.join(folder, "result.json")
    with open(path + ".part", "w", encoding="utf-8") as file:
        json.dump(result, file)
    os.replace(path + ".part", path)
    if "error" in result:
        print(result["error"], file=sys.stderr)
    return 1 if "error" in result else 0


def _do(job: dict[str, Any], folder: str) -> dict[str, Any]:
    """A recording, or what the job's task gives: a function of that name in a module beside this one."""
    if "task" not in job:
        path = os.path.join(folder, "recording.npz")
        try:
            with zipfile.ZipFile(path + ".part", "w") as archive:
                about = _record(job, folder, archive)
            os.replace(path + ".part", path)
        finally:
            if os.path.exists(path + ".part"):
                os.remove(path + ".part")
        return about
    return getattr(importlib.import_module(TASKS[job["task"]]), job["task"])(job, _find_runner)


def _find_runner(name: str) -> Any:
    if name not in RUNNERS:
        raise ValueError(f"no runner is called {name!r}; there are {', '.join(RUNNERS)}")
    return importlib.import_module(RUNNERS[name])


def _place(source: dict[str, Any], folder: str, checkpoint: str | None) -> dict[str, Any]:
    """The job's source with whole paths."""
    path = os.path.abspath(checkpoint or os.path.join(folder, source["file"]))
    files = source.get("files") or [path]
    if len(files) == 1 and not os.path.isdir(path):
        files = [path]
    home = path if os.path.isdir(path) else os.path.dirname(path)
    return {**source, "file": path, "files": [os.path.join(home, file) for file in files]}


def _confine(limits: dict[str, Any]) -> None:
    """Pin what changes results and bound what the framework may take, before anything heavy is imported."""
    os.environ.update(ENVIRONMENT)
    os.environ.update(dict.fromkeys(THREADS, str(limits.get("threads", 1))))
    if limits.get("seconds"):
        import signal

        signal.alarm(int(limits["seconds"]) + 1)  # ends it even when whoever started it is gone
    if limits.get("bytes"):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (limits["bytes"], limits["bytes"]))
    _forbid_network()


@functools.lru_cache  # a hook cannot be taken off, and one is enough
def _forbid_network() -> None:
    if hasattr(sys, "addaudithook"):
        sys.addaudithook(_refuse_network)


def _refuse_network(event: str, args: Any) -> None:
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        raise PermissionError("the reference asked for the network; it must find everything on this machine")


def _record(job: dict[str, Any], folder: str, recording: zipfile.ZipFile) -> dict[str, Any]:
    """Run the model on every probe, in every precision that it can, and write the recording."""
    import numpy as np
    from tap_records import record_taps, save

    runner = _find_runner(job["runner"])
    names = {name: text.partition("|")[0].strip() for name, text in job["outputs"].items()}
    with np.load(os.path.join(folder, "inputs.npz"), allow_pickle=False) as archive:
        probes = {name: archive[name] for name in archive.files}
    arrays = {f"input.{name}": probe for name, probe in probes.items()}
    about: dict[str, Any] = {
        "recording": 1,
        "runner": job["runner"],
        "model": _without_folders(job["config"] if job.get("model") is None else job["model"]),
        "ops": {name: text.partition("|")[2].strip() for name, text in job["outputs"].items() if "|" in text},
        "input": job.get("input", ""),
        "source": {
            "file": os.path.basename(job["source"]["file"]),
            "sha256": _sha256(job["source"]["files"], job["source"]["file"]),
        },
        "notes": [],
    }
    done: list[str] = []
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
            modules = getattr(run, "modules", None)
            if job.get("taps") and modules and precision == PRECISIONS[0]:  # on the first probe alone
                probe, array = next(iter(probes.items()))
                try:
                    about.update(record_taps(modules, job["taps"], probe, array.astype(precision), recording))
                except Exception as error:
                    about["notes"].append(f"no taps: {_line(error)}")
            done.append(precision)
            if len(done) == job.get("precisions"):
                break
    if "files" in about:
        files = about.pop("files")
        about["weights"] = {"files": [os.path.basename(path) for path in files], "sha256": _sha256(files)}
    versions = {name: getattr(sys.modules.get(name), "__version__", None) for name in FRAMEWORKS}
    about["framework"] = {name: str(version) for name, version in versions.items() if version}
    about["environment"] = _environment()
    arrays["about"] = np.array(json.dumps(about))
    for name, array in arrays.items():
        save(recording, name, array)
    return about


def _without_folders(model: Any) -> Any:
    """A model's block whose paths are names, so that a recording tells nothing of where it was made."""
    if isinstance(model, dict):
        return {key: _without_folders(value) for key, value in model.items()}
    return os.path.basename(model) if isinstance(model, str) and os.path.isabs(model) else model


def _environment() -> dict[str, Any]:
    """What else the last digits may depend on."""
    import platform

    found = {name: os.environ.get(name) for name in [*ENVIRONMENT, *THREADS, "PYTHONHASHSEED"]}
    found.update(python=platform.python_version(), system=platform.system(), machine=platform.machine())
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            found["cpu"] = next(
                (line.partition(":")[2].strip() for line in file if line.startswith("model name")), None
            )
    torch: Any = sys.modules.get("torch")
    if torch:
        found["torch.threads"] = torch.get_num_threads()
        found["torch.tf32"] = torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
    return found


def _check(found: Mapping[str, Any], names: Iterable[str], precision: str) -> None:
    for name in names:
        if name not in found:
            raise ValueError(f"the model has no output {name!r}; it has {', '.join(sorted(found))}")
        if found[name].dtype != precision:
            raise TypeError(f"its output {name!r} is {found[name].dtype}")


def _sha256(paths: list[str], folder: str = "") -> str:
    """The content's SHA-256; of several files, that of the lines `<sha256>  <name>` in order of names.

    A name is a path within the checkpoint's folder, if it is one.
    """
    import hashlib

    digests = {}
    for path in paths:
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            for piece in iter(lambda: file.read(8 << 20), b""):
                digest.update(piece)
        inside = os.path.isdir(folder) and not os.path.relpath(path, folder).startswith(os.pardir)
        name = os.path.relpath(path, folder).replace(os.sep, "/") if inside else os.path.basename(path)
        digests[name] = digest.hexdigest()
    if len(digests) == 1:
        return next(iter(digests.values()))
    return hashlib.sha256("".join(f"{digests[name]}  {name}\n" for name in sorted(digests)).encode()).hexdigest()


def _line(error: BaseException) -> str:
    """An exception in one line."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"{sys.executable} has no module {error.name!r}"
    return f"{type(error).__name__}: {' '.join(str(error).split()) or 'it says nothing'}"[:500]


if __name__ == "__main__":
    sys.exit(serve() if sys.argv[1:] == ["-"] else main(*sys.argv[1:]))
