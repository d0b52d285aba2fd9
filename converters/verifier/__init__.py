"""The verifier: whether an emitted folder computes what the source framework's own model computes.

    probes ---> reference worker ---> recording --,
       `------> the folder, in timm --------------+--> compare ---> Verdict

A recording made elsewhere can stand where the worker does.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from converters.errors import CheckpointError, OutputError, ReferenceFailed, printable
from converters.readers import open_checkpoint
from converters.verifier.compare import Verdict, compare
from converters.verifier.probes import probes
from converters.verifier.recording import read_recording
from converters.verifier.subject import Subject, read_subject
from converters.verifier.target import run_target
from converters.verifier.worker import run_reference

__all__ = ["Verdict", "verify"]

WITH_CONFIG = ("mmdet", "mmpretrain", "mmseg")  # the runners that take a config file


def verify(
    directory: str | os.PathLike[str],
    source: str | os.PathLike[str],
    *,
    reference: str | None = None,
    python: str | None = None,
    trust: bool = False,
    timeout: float = 900.0,
    progress: Callable[[str], None] | None = None,
) -> Verdict:
    """Compare a folder that `convert` wrote with the reference, on the checkpoint that it was converted from.

    `reference` is None or "auto" for the one that the family's mapping names, the path of a recording
    (`.npz`), or "mmdet:CONFIG.py" (mmpretrain, mmseg) for the model of a config file, which is executed.
    `python` is the interpreter that has the source framework. `trust` lets the framework unpickle anything
    that `source` holds. The worker is ended after `timeout` seconds. `progress` is told each step.

    The verdict is also written to verification.json in the folder. Models that differ are a verdict, not an
    exception; ConverterError is raised when they could not be compared.
    """
    tell = progress or (lambda step: None)
    tell("checking the source")
    subject = read_subject(Path(directory))
    checkpoint = open_checkpoint(source)
    sha256 = checkpoint.sha256()
    if sha256 != subject.sha256:
        problem = f"is not what was converted: its sha256 is {sha256[:12]}..., not {printable(subject.sha256[:12])}..."
        raise CheckpointError(problem, file=source, cure="give the original, or convert this one")
    tell("running the reference")
    if reference is not None and reference.endswith(".npz"):
        recording = read_recording(reference)
    else:
        files = [os.path.abspath(file.path) for file in checkpoint.files]
        job = {**_job(reference or "auto", subject), "trust": trust}
        job["source"] = {"file": os.path.abspath(source), "files": files}
        recording = run_reference(job, probes(subject.input_size), python=python, timeout=timeout)
    if recording.about["source"]["sha256"] != sha256:
        raise ReferenceFailed("ran with another checkpoint than the one that was converted", file=reference or source)
    tell("running the target")
    outputs = recording.output_names
    target = run_target(subject.directory, recording.inputs, outputs)
    tell("comparing")
    comparisons = compare(recording.outputs, target, outputs, recording.labels)
    verdict = Verdict(comparisons, recording.about, subject.about())
    _write(subject.directory / "verification.json", verdict.to_json())
    return verdict


def _job(reference: str, subject: Subject) -> dict[str, Any]:
    """What the worker is to build and to give."""
    runner, _, config = reference.partition(":")
    if reference != "auto" and not (runner in WITH_CONFIG and config):
        kinds = ["auto", *(f"{name}:CONFIG.py" for name in WITH_CONFIG), "RECORDING.npz"]
        raise ReferenceFailed(f"{printable(reference)} is no reference", cure=f"give one of {', '.join(kinds)}")
    if subject.reference is None:
        problem = f"the family {printable(subject.family)} names no reference"
        raise ReferenceFailed(problem, file=subject.directory, cure="give a recording (.npz)")
    if not config:
        return dict(subject.reference)
    return {**subject.reference, "runner": runner, "model": None, "config": os.path.abspath(config)}


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise OutputError(f"cannot be written: {(error.strerror or str(error)).lower()}", file=path) from error
