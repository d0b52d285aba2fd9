"""The verifier: whether an emitted folder computes what the source framework's own model computes.

    probes ---> reference worker ---> recording --,
       `------> the folder, in timm --------------+--> compare ---> Verdict

A recording made elsewhere can stand where the worker does.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from converters.errors import CheckpointError, OutputError, ReferenceFailed, printable
from converters.readers.files import SourceFile
from converters.verifier.block import Block
from converters.verifier.compare import Verdict, compare
from converters.verifier.probes import probes
from converters.verifier.recording import Recording, read_recording
from converters.verifier.subject import Subject, read_subject
from converters.verifier.target import run_target
from converters.verifier.worker import run_reference

__all__ = ["Verdict", "verify"]

MMLAB = ("mmdet", "mmpretrain", "mmseg")  # the runners that take a config file


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
    _check_source(Path(source), subject)
    tell("running the reference")
    if reference is not None and reference.endswith(".npz"):
        recording, block = _recorded(Path(reference), subject)
    else:
        job, block = _job(reference or "auto", subject)
        inputs = probes(subject.input_size)
        recording = run_reference({**job, "trust": trust}, source, inputs, python=python, timeout=timeout)
    if recording.about["source"]["sha256"] != subject.sha256:
        raise ReferenceFailed("ran with another checkpoint than the one that was converted", file=reference or source)
    tell("running the target")
    target = run_target(subject.directory, block.inputs(recording), list(block.outputs))
    tell("comparing")
    comparisons = compare(block.activations(recording), target, block.outputs, recording.labels)
    verdict = Verdict(comparisons, recording.about, subject.about())
    _write(subject.directory / "verification.json", verdict.to_json())
    return verdict


def _check_source(source: Path, subject: Subject) -> None:
    file = SourceFile(source)
    sha256 = file.sha256()
    file.close()
    if sha256 != subject.sha256:
        raise CheckpointError(
            f"is not the file that was converted: its sha256 is {sha256[:12]}..., not {subject.sha256[:12]}...",
            file=source,
            cure="give the original, or convert this one",
        )


def _recorded(path: Path, subject: Subject) -> tuple[Recording, Block]:
    """A recording, and the family's block if it was made by the block's runner; any other speaks timm's terms."""
    recording = read_recording(path)
    if subject.block is not None and subject.block.runner == recording.about.get("runner"):
        return recording, subject.block
    return recording, Block.of(recording)


def _job(reference: str, subject: Subject) -> tuple[dict[str, object], Block]:
    """What the worker is to build, and the block that reads its answers."""
    runner, _, config = reference.partition(":")
    if reference != "auto" and not (runner in MMLAB and config):
        kinds = ["auto", *(f"{name}:CONFIG.py" for name in MMLAB), "RECORDING.npz"]
        raise ReferenceFailed(f"{printable(reference)} is no reference", cure=f"give one of {', '.join(kinds)}")
    if subject.block is None:
        problem = f"the family {printable(subject.family)} names no reference"
        raise ReferenceFailed(problem, file=subject.directory, cure="give a recording (.npz)")
    model = {"config": os.path.abspath(config)} if config else {"model": dict(subject.block.model)}
    return {
        "runner": runner if config else subject.block.runner,
        "outputs": subject.block.wanted,
        **model,
    }, subject.block


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise OutputError(f"cannot be written: {(error.strerror or str(error)).lower()}", file=path) from error
