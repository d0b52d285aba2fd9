"""Recordings made apart from a verification: here, or by a copy of the worker on a machine that has the framework.

A worker's folder holds

    references.pyz   the references program, which needs nothing of `converters`
    job.json         what it is to build and to give
    inputs.npz       the probes

and `python references.pyz . CKPT`, run in it with the framework at hand, adds recording.npz. Paths in the job (a
config, a folder, a module) are those of that machine.
"""

from __future__ import annotations

import json
import os
import tempfile
import zipapp
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from converters.errors import OutputError
from converters.verifier.choice import make_job, open_source, parse_reference
from converters.verifier.probes import probes
from converters.verifier.recording import Recording
from converters.verifier.subject import Subject
from converters.verifier.worker import REFERENCES, run_reference, write_inputs

__all__ = ["record", "write_worker"]


def record(
    subject: Subject,
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    reference: str = "auto",
    outputs: Sequence[str] = (),
    args: Mapping[str, Any] | None = None,
    python: str | None = None,
    trust: bool = False,
    timeout: float = 900.0,
    memory: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> Recording:
    """Write what the reference gives for `source` to `out` (`.npz`); the arguments are those of `verify`.

    Raises ConverterError; then there is nothing new at `out`.
    """
    tell = progress or (lambda step: None)
    tell("checking the source")
    checkpoint = open_source(subject, source)
    job = make_job(parse_reference(reference, subject, outputs, args), subject, checkpoint, trust=trust)
    tell("running the reference")
    inputs = probes(subject.input_size, any_size=job.get("any_size", False))
    with _beside(Path(out)) as part:
        recording = run_reference(job, inputs, python=python, timeout=timeout, memory=memory, keep=part)
        part.replace(out)
    return recording


def write_worker(
    subject: Subject,
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    reference: str = "auto",
    outputs: Sequence[str] = (),
    args: Mapping[str, Any] | None = None,
    trust: bool = False,
) -> None:
    """Write a worker's folder, which must not be there yet. Raises ConverterError; then it is not there."""
    checkpoint, folder = open_source(subject, source), Path(folder)
    chosen = parse_reference(reference, subject, outputs, args, elsewhere=True)
    job = make_job(chosen, subject, checkpoint, trust=trust)
    job["source"] |= {"file": checkpoint.path.name, "files": [file.path.name for file in checkpoint.files]}
    if folder.exists():
        raise OutputError("is there already", file=folder, cure="choose another name")
    with _beside(folder) as part:
        part.mkdir()
        zipapp.create_archive(REFERENCES, part / "references.pyz", filter=lambda path: path.suffix == ".py")
        (part / "job.json").write_text(json.dumps(job, indent=1), encoding="utf-8")
        write_inputs(probes(subject.input_size, any_size=job.get("any_size", False)), part)
        part.replace(folder)


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """Where to write what then becomes `path`; it is gone afterwards. Raises OutputError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            yield Path(folder) / path.name
    except OSError as error:
        raise OutputError(f"cannot be written: {(error.strerror or str(error)).lower()}", file=path) from error
