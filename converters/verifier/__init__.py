"""The verifier: whether an emitted folder computes what the source framework's own model computes.

    probes ---> reference worker ---> recording --,
       `------> the folder, in timm --------------+--> compare ---> Verdict
                                                  `--> taps, local, audit: where and why

A recording made elsewhere can stand where the worker does.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from converters.card import note_verification
from converters.errors import OutputError, ReferenceFailed
from converters.verifier.audit import audit
from converters.verifier.choice import make_job, open_source, parse_reference
from converters.verifier.compare import compare
from converters.verifier.local import compare_taps
from converters.verifier.mutants import run_mutants
from converters.verifier.probes import image_probes, probes
from converters.verifier.recording import Recording, read_recording
from converters.verifier.rounding import unrounded, with_errors
from converters.verifier.subject import Subject, read_subject
from converters.verifier.target import blamed, run_target, single_threaded
from converters.verifier.verdict import Verdict
from converters.verifier.worker import Workers, run_reference

__all__ = ["Verdict", "verify"]


def verify(
    directory: str | os.PathLike[str],
    source: str | os.PathLike[str],
    *,
    reference: str | None = None,
    outputs: Sequence[str] = (),
    args: Mapping[str, Any] | None = None,
    python: str | None = None,
    trust: bool = False,
    timeout: float = 900.0,
    memory: int | None = None,
    taps: bool = True,
    mutants: bool = False,
    quick: bool = False,
    images: str | os.PathLike[str] | None = None,
    keep: str | os.PathLike[str] | None = None,
    workers: Workers | None = None,
    progress: Callable[[str], None] | None = None,
) -> Verdict:
    """Compare a folder that `convert` wrote with the reference, on the checkpoint that it was converted from.

    `reference` is None or "auto" for the one that the family's mapping names, the path of a recording (`.npz`), or
    another that choice.py lists, with `outputs` and `args` as it describes them. `python` is the interpreter that
    has the source framework. `trust` lets the framework execute whatever `source` or the reference's file holds.
    The worker is ended after `timeout` seconds and may take `memory` bytes of address space; one of `workers` does it,
    or a new one. Without `taps` the outputs are compared and no module inside; `quick` takes fewer samples, and runs
    nothing in float32 where float64 decides. With `mutants` a verdict that passes is put to the proof (see mutants.py).
    `images` is a folder of the user's own, which become a probe. The recording is copied to `keep`.
    `progress` is told each step.

    The verdict is also written to verification.json in the folder. Models that differ are a verdict, not an
    exception; ConverterError is raised when they could not be compared.
    """
    tell = progress or (lambda step: None)
    tell("checking the source")
    subject = read_subject(Path(directory))
    if subject.changes:
        what = f"was changed on request ({'; '.join(subject.changes)}), and no other model computes its function"
        raise ReferenceFailed(what, file=directory, cure="verify a conversion without the change")
    checkpoint = open_source(subject, source)
    tell("running the reference")
    if reference is not None and reference.endswith(".npz"):
        if images is not None:
            raise ReferenceFailed("is a recording, and images are none of its probes", file=reference)
        if outputs or args:
            raise ReferenceFailed("is a recording, and says itself what its outputs are", file=reference)
        recording = read_recording(reference)
        if keep is not None:
            shutil.copyfile(reference, keep)
    else:
        job = make_job(parse_reference(reference or "auto", subject, outputs, args), subject, checkpoint, trust=trust)
        if not taps:
            del job["taps"]
        if quick:
            job["precisions"] = 1
        inputs = probes(subject.input_size, any_size=job.get("any_size", False), few=quick)
        if images is not None:
            inputs |= image_probes(subject.directory, Path(images))
        limits: dict[str, Any] = {"timeout": timeout, "memory": memory, "workers": workers}
        recording = run_reference(job, inputs, python=python, keep=Path(keep) if keep else None, **limits)
    if recording.about["source"]["sha256"] != subject.sha256:
        raise ReferenceFailed("ran with another checkpoint than the one that was converted", file=reference or source)
    tell("running the target")
    weights, rounding = unrounded(subject, checkpoint)
    names = recording.output_names
    precisions = sorted({"float64", *recording.outputs})
    models: dict[str, Any] = {}
    target = run_target(subject.directory, recording.inputs, names, weights, precisions, models)
    tell("comparing")
    allowed = sum(one["bound"] for one in subject.deviation)
    comparisons = compare(recording.outputs, target, names, recording.labels, allowed=allowed)
    if rounding:
        rounded = run_target(subject.directory, recording.inputs, names, precisions=["float64"])
        comparisons = with_errors(comparisons, target["float64"], rounded["float64"])
    verdict = Verdict(
        comparisons,
        recording.about,
        subject.about(),
        rounding=rounding,
        deviation=subject.deviation,
        **(_look_inside(recording, subject, models["float64"]) if taps else {}),
    )
    if mutants and verdict.passed:
        tell("comparing mutants")
        filled = [name for name, origin in subject.tensors.items() if "fill" in origin]
        known: dict[str, Any] = {"weights": weights, "deviation": subject.deviation, "filled": filled, "models": models}
        proof = run_mutants(subject.directory, recording, **known)
        verdict = replace(verdict, mutants=proof)
    _write(subject.directory / "verification.json", verdict.to_json())
    note_verification(subject.directory, str(verdict).splitlines()[0])
    return verdict


def _look_inside(recording: Recording, subject: Subject, model: Any) -> dict[str, Any]:
    """The verdict's taps, unchecked pairs and audit."""
    with single_threaded(), blamed(subject.directory, "its model cannot run the taps"):
        taps, unchecked = compare_taps(model, recording, subject.modules, subject.deviation)
    findings = audit(model, recording.modules, subject.modules, subject.deviation) if recording.taps else ()
    return {"taps": taps, "unchecked": unchecked, "audit": findings}


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise OutputError(f"cannot be written: {(error.strerror or str(error)).lower()}", file=path) from error
