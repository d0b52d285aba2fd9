"""The command line: `timmport COMMAND`; every command takes --json.

Exit codes: 0 done, 1 refused (one line on standard error), 2 usage, 3 parity failed, 130 interrupted.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from converters.errors import ConverterError

__all__ = ["main"]

app = typer.Typer(
    name="timmport",
    help="Bring vision checkpoints from any framework into timm, provably unchanged.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Source = Annotated[str, typer.Argument(metavar="CKPT", help="A file, folder, TensorFlow prefix, or URL (hf://...).")]
Key = Annotated[str | None, typer.Option(metavar="PATH", help="Where the state dict lies in the file: model.teacher")]
Ema = Annotated[bool | None, typer.Option("--ema/--no-ema", help="Averaged or raw weights, where both are there.")]
Reference = Annotated[
    str,
    typer.Option(
        metavar="KIND:NAME",
        help="auto (the mapping's); mmdet:, mmpretrain: or mmseg:CONFIG.py; keras:APPLICATION or FILE; "
        "torchvision:NAME; transformers:FOLDER; timm:ARCHITECTURE; onnx:FILE; savedmodel:FOLDER; "
        "python:MODULE:FACTORY; RECORDING.npz.",
    ),
]
Output = Annotated[
    list[str] | None,
    typer.Option(
        "--output",
        metavar="OURS=THEIRS",
        help="Which of the reference's outputs is which of timm's, and its layout: "
        "'forward_features=0 | b c h w -> b h w c'.",
    ),
]
ReferenceArg = Annotated[
    list[str] | None, typer.Option(metavar="K=V", help="An argument of the reference's constructor.")
]
Interpreter = Annotated[str | None, typer.Option("--python", metavar="EXE", help="The Python that has the framework.")]
Trust = Annotated[bool, typer.Option("--trust", help="Let the framework run code that the files hold.")]
Timeout = Annotated[float, typer.Option(metavar="SECONDS", help="Then the reference is ended.")]
Memory = Annotated[
    int | None, typer.Option(metavar="MIB", min=1, help="The address space that the reference may take.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]


@app.command()
def inspect(ckpt: Source, key: Key = None, ema: Ema = None, as_json: Json = False) -> None:
    """Say what a checkpoint is: format, wrappers, family, tensors."""
    from converters.conversion import inspect as inspect_checkpoint

    inspection = inspect_checkpoint(ckpt, key=key, ema=ema)
    if as_json:
        from converters.reports.documents import inspection_document

        _print_json(inspection_document(inspection))
    else:
        from converters.reports.terminal import show_inspection

        show_inspection(inspection)


@app.command()
def convert(
    ckpt: Source,
    out: Annotated[Path | None, typer.Option("-o", "--out", metavar="DIR", help="The folder to write.")] = None,
    family: Annotated[str | None, typer.Option(metavar="NAME|FILE", help="A mapping; else it is detected.")] = None,
    to: Annotated[str | None, typer.Option(metavar="MODEL", help="A timm model; else the one that fits.")] = None,
    arg: Annotated[list[str] | None, typer.Option(metavar="K=V", help="An argument of the timm model.")] = None,
    key: Key = None,
    ema: Ema = None,
    img_size: Annotated[int | None, typer.Option(min=1, metavar="N", help="Pixels a side, for config.json.")] = None,
    dtype: Annotated[str, typer.Option(help="source, float32, float16 or bfloat16.")] = "source",
    expect_sha256: Annotated[str | None, typer.Option(metavar="HEX", help="Refuse any other content.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan; read no tensor data.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier conversion.")] = False,
    allow_deviation: Annotated[
        bool, typer.Option("--allow-deviation", help="Accept what timm computes only nearly, as the mapping declares.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write timm-native weights."""
    from converters.conversion import convert as convert_checkpoint
    from converters.reports.terminal import progress_bar, show_conversion

    if out is None and not dry_run:
        raise typer.BadParameter("say where to with -o DIR, or use --dry-run")
    if dtype not in ("source", "float32", "float16", "bfloat16"):
        raise typer.BadParameter(f"--dtype {dtype} is none of source, float32, float16, bfloat16")
    with progress_bar("converting") as progress:
        conversion = convert_checkpoint(
            ckpt,
            out or Path(),
            family=family,
            target=to,
            args=dict(map(_argument, arg or [])),
            key=key,
            ema=ema,
            img_size=img_size,
            dtype=dtype,
            expect_sha256=expect_sha256,
            dry_run=dry_run,
            overwrite=overwrite,
            allow_deviation=allow_deviation,
            progress=progress,
        )
    if as_json:
        from converters.reports.documents import conversion_document

        _print_json(conversion_document(conversion))
    else:
        show_conversion(conversion)


@app.command()
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
            args=dict(map(_argument, reference_arg or [])),
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


@app.command()
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

        args = dict(map(_argument, arg or []))
        subject = plan_subject(source, family=family, target=to, args=args, key=key, ema=ema, img_size=img_size)
    from converters.verifier.record import record as record_reference
    from converters.verifier.record import write_worker

    asked: dict[str, Any] = {"reference": reference, "outputs": output or (), "trust": trust}
    asked["args"] = dict(map(_argument, reference_arg or []))
    if worker:
        write_worker(subject, source, worker, **asked)
        if as_json:
            _print_json({"worker": str(worker)})
        else:
            show_worker(worker, source)
    elif out:
        limits: dict[str, Any] = {"timeout": timeout, "memory": memory and memory << 20}
        with status() as tell:
            recording = record_reference(subject, source, out, python=python, progress=tell, **limits, **asked)
        if as_json:
            _print_json({**recording.about, "path": str(out)})
        else:
            show_recording(recording, out)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Where to.")] = Path("timmport-demo"),
    as_json: Json = False,
) -> None:
    """Convert and verify a small checkpoint that ships with the project."""
    from converters.demo import run_demo
    from converters.reports.documents import demo_document
    from converters.reports.terminal import progress_bar, show_demo

    with progress_bar("converting") as progress:
        result = run_demo(out, progress)
    if as_json:
        _print_json(demo_document(result))
    else:
        show_demo(result)
    if not result.verdict.passed:
        raise typer.Exit(3)


@app.command()
def families(
    name: Annotated[str | None, typer.Argument(help="One family, or a mapping file.")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of mapping files.")] = False,
    as_json: Json = False,
) -> None:
    """List the mappings and their targets."""
    from converters.mapping import MappingFile, find_mappings, load_mapping
    from converters.reports.documents import family_document
    from converters.reports.terminal import show_families, show_family

    if schema:
        _print_json(MappingFile.model_json_schema())
        return
    mappings = [load_mapping(one) for one in ([name] if name else find_mappings())]
    if as_json:
        documents = [family_document(mapping) for mapping in mappings]
        _print_json(documents[0] if name else documents)
    elif name:
        show_family(mappings[0])
    else:
        show_families(mappings)


@app.command()
def check(
    mapping: Annotated[list[str], typer.Argument(metavar="MAPPING...", help="Families, or mapping files.")],
    to: Annotated[list[str] | None, typer.Option(metavar="MODEL", help="Only this target; may be repeated.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Run parity on every target, not the smallest.")] = False,
    no_parity: Annotated[bool, typer.Option("--no-parity", help="Lint and close; run no model.")] = False,
    img_size: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Pixels a side, for models that take any size.")
    ] = None,
    python: Interpreter = None,
    timeout: Timeout = 900.0,
    as_json: Json = False,
) -> None:
    """Check mapping files: lint, a plan that closes on every target, parity on random weights, mutants.

    Exit code 3 where parity failed or is unproven, else 1 where a mapping is at fault.
    """
    from converters.checking import check as check_mapping
    from converters.reports.documents import check_document
    from converters.reports.terminal import show_check, status

    checks = []
    for one in mapping:
        with status() as tell:
            ways: dict[str, Any] = {"img_size": img_size, "python": python, "timeout": timeout, "progress": tell}
            checks.append(check_mapping(one, targets=to or (), everything=everything, parity=not no_parity, **ways))
        if not as_json:
            show_check(checks[-1])
    if as_json:
        _print_json([check_document(one) for one in checks])
    if code := max(one.exit_code for one in checks):
        raise typer.Exit(code)


def main() -> None:
    """The entry point: runs a command and turns what a user can mend into a line and an exit code."""
    try:
        app(standalone_mode=True)
    except ConverterError as error:
        print(f"timmport: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("timmport: interrupted", file=sys.stderr)
        sys.exit(130)


def _argument(text: str) -> tuple[str, Any]:
    """`pad_type=same` or `depths=[2,2]`: the value is JSON where it reads as JSON, else text."""
    key, equals, value = text.partition("=")
    if not equals:
        raise typer.BadParameter(f"--arg {text} has no value; write K=V")
    try:
        return key, json.loads(value, parse_constant=str)
    except json.JSONDecodeError:
        return key, value


def _print_json(document: Any) -> None:
    print(json.dumps(document, indent=2, allow_nan=False))
