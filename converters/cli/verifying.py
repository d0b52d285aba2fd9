"""The commands that run the source framework."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from converters.cli.options import (
    Ema,
    Interpreter,
    Json,
    Key,
    Memory,
    Output,
    Reference,
    ReferenceArg,
    Source,
    Timeout,
    Trust,
    argument,
    print_json,
)

__all__ = ["record", "verify"]


def verify(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="What `convert` wrote.")],
    source: Annotated[str, typer.Option(metavar="CKPT", help="The checkpoint that it was converted from.")],
    reference: Reference = "auto",
    output: Output = None,
    reference_arg: ReferenceArg = None,
    mutants: Annotated[bool, typer.Option("--mutants", help="Prove that a wrong conversion would be found.")] = False,
    images: Annotated[Path | None, typer.Option(metavar="DIR", help="A folder of images, as one more probe.")] = None,
    python: Interpreter = None,
    trust: Trust = False,
    timeout: Timeout = 900.0,
    memory: Memory = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the report as a web page.")] = None,
    junit: Annotated[Path | None, typer.Option(metavar="FILE", help="Write it as JUnit XML.")] = None,
    repro: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write what repeats it without the source framework.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare a conversion with the source framework's own model; exit code 3 where they differ or it is unproven."""
    from converters.readers.remote import fetch_path
    from converters.reports import write_reports
    from converters.reports.terminal import show_verdict, status
    from converters.verifier import verify as verify_conversion

    if repro and repro.exists():
        raise typer.BadParameter(f"--repro {repro} is there already")
    with status() as tell, TemporaryDirectory(prefix="timmport-") as scratch:
        recording = Path(scratch) / "recording.npz"
        verdict = verify_conversion(
            directory,
            fetch_path(source),
            reference=reference,
            outputs=output or (),
            args=dict(map(argument, reference_arg or [])),
            mutants=mutants,
            images=images,
            python=python,
            trust=trust,
            timeout=timeout,
            memory=memory and memory << 20,
            keep=recording if repro else None,
            progress=tell,
        )
        write_reports(directory, recording, html=html, junit=junit, repro=repro)
    if as_json:
        print(verdict.to_json())
    else:
        show_verdict(verdict)
    if verdict.outcome != "passed":
        raise typer.Exit(3)


def record(
    ckpt: Source,
    out: Annotated[Path | None, typer.Option("-o", "--out", metavar="RECORDING", help="The .npz to write.")] = None,
    worker: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write the program that records on another machine instead.")
    ] = None,
    conversion: Annotated[
        Path | None, typer.Option(metavar="DIR", help="What `convert` wrote of CKPT; else its plan is made anew.")
    ] = None,
    family: Annotated[str | None, typer.Option(metavar="NAME|FILE", help="A mapping; else it is detected.")] = None,
    to: Annotated[str | None, typer.Option(metavar="MODEL", help="A timm model; else the one that fits.")] = None,
    arg: Annotated[list[str] | None, typer.Option(metavar="K=V", help="An argument of the timm model.")] = None,
    key: Key = None,
    ema: Ema = None,
    img_size: Annotated[int | None, typer.Option(metavar="N", help="Pixels a side of the probes.")] = None,
    reference: Reference = "auto",
    output: Output = None,
    reference_arg: ReferenceArg = None,
    python: Interpreter = None,
    trust: Trust = False,
    timeout: Timeout = 900.0,
    memory: Memory = None,
    as_json: Json = False,
) -> None:
    """Write what the source framework's own model gives, for a later `verify --reference RECORDING`."""
    from converters.readers.remote import fetch_path
    from converters.reports.terminal import show_recording, show_worker, status

    if (out is None) == (worker is None):
        raise typer.BadParameter("say where to with either -o RECORDING.npz or --worker DIR")
    source = fetch_path(ckpt)
    if conversion:
        from converters.verifier.subject import read_subject

        subject = read_subject(conversion)
    else:
        from converters.conversion import plan_subject

        args = dict(map(argument, arg or []))
        subject = plan_subject(source, family=family, target=to, args=args, key=key, ema=ema, img_size=img_size)
    from converters.verifier.record import record as record_reference
    from converters.verifier.record import write_worker

    asked: dict[str, Any] = {"reference": reference, "outputs": output or (), "trust": trust}
    asked["args"] = dict(map(argument, reference_arg or []))
    if worker:
        write_worker(subject, source, worker, **asked)
        if as_json:
            print_json({"worker": str(worker)})
        else:
            show_worker(worker, source)
    elif out:
        limits: dict[str, Any] = {"timeout": timeout, "memory": memory and memory << 20}
        with status() as tell:
            recording = record_reference(subject, source, out, python=python, progress=tell, **limits, **asked)
        if as_json:
            print_json({**recording.about, "path": str(out)})
        else:
            show_recording(recording, out)
