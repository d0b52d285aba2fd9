"""The commands that read checkpoints and write folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from converters.cli.options import Ema, Json, Key, Source, argument, channels, class_list, pixels, print_json

__all__ = ["convert", "demo", "inspect"]


def inspect(ckpt: Source, key: Key = None, ema: Ema = None, as_json: Json = False) -> None:
    """Say what a checkpoint is: format, wrappers, family, tensors."""
    from converters.conversion import inspect as inspect_checkpoint

    inspection = inspect_checkpoint(ckpt, key=key, ema=ema)
    if as_json:
        from converters.reports.documents import inspection_document

        print_json(inspection_document(inspection))
    else:
        from converters.reports.terminal import show_inspection

        show_inspection(inspection)


def convert(
    ckpt: Source,
    out: Annotated[Path | None, typer.Option("-o", "--out", metavar="DIR", help="The folder to write.")] = None,
    family: Annotated[str | None, typer.Option(metavar="NAME|FILE", help="A mapping; else it is detected.")] = None,
    to: Annotated[str | None, typer.Option(metavar="MODEL", help="A timm model; else the one that fits.")] = None,
    arg: Annotated[list[str] | None, typer.Option(metavar="K=V", help="An argument of the timm model.")] = None,
    key: Key = None,
    ema: Ema = None,
    img_size: Annotated[
        str | None, typer.Option(metavar="N|HxW", help="Pixels; models that are built for one size are changed to it.")
    ] = None,
    num_classes: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="0 removes the classifier; another number gives a new one.")
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(metavar="A:B|FILE", help="Keep these classes: 1: drops the first; FILE lists one a line, from 0."),
    ] = None,
    in_chans: Annotated[
        str | None, typer.Option(metavar="N|rgba", help="Input channels, as timm adapts them; rgba ignores alpha.")
    ] = None,
    resample: Annotated[str, typer.Option(help="How sizes are changed: timm, bicubic or bilinear.")] = "timm",
    bgr: Annotated[
        bool | None, typer.Option("--bgr/--rgb", help="Which images the source takes; else what the file says.")
    ] = None,
    fold_normalization: Annotated[
        bool, typer.Option("--fold-normalization", help="Put mean and std into the first convolution.")
    ] = False,
    fold_batch_norms: Annotated[
        bool, typer.Option("--fold-batch-norms", help="Put their scales into the convolutions before them.")
    ] = False,
    purpose: Annotated[
        str, typer.Option("--for", help="model; features: names of a features_only model; deployment: branches fused.")
    ] = "model",
    license: Annotated[str | None, typer.Option(metavar="ID", help="For the model card: apache-2.0, ...")] = None,
    dtype: Annotated[str, typer.Option(help="source, float32, float16 or bfloat16.")] = "source",
    expect_sha256: Annotated[str | None, typer.Option(metavar="HEX", help="Refuse any other content.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan; read no tensor data.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier conversion.")] = False,
    allow_deviation: Annotated[
        bool, typer.Option("--allow-deviation", help="Accept what timm computes only nearly, as the mapping declares.")
    ] = False,
    allow_nan: Annotated[
        bool, typer.Option("--allow-nan", help="Accept weights that are NaN or infinite, and variances below zero.")
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
    if purpose not in ("model", "features", "deployment"):
        raise typer.BadParameter(f"--for {purpose} is none of model, features, deployment")
    from converters.changes import Ways

    args = dict(map(argument, arg or []))
    if num_classes is not None:
        args["num_classes"] = num_classes
    if in_chans is not None:
        args["in_chans"] = channels(in_chans)
    kept = class_list(classes) if classes else None
    alpha = in_chans == "rgba"
    ways = Ways(resample, kept, alpha, fold_normalization, fold_batch_norms, bgr)
    with progress_bar("converting") as progress:
        conversion = convert_checkpoint(
            ckpt,
            out or Path(),
            family=family,
            target=to,
            args=args,
            key=key,
            ema=ema,
            img_size=pixels(img_size) if img_size else None,
            ways=ways,
            purpose=purpose,
            license=license,
            dtype=dtype,
            expect_sha256=expect_sha256,
            dry_run=dry_run,
            overwrite=overwrite,
            allow_deviation=allow_deviation,
            allow_nan=allow_nan,
            progress=progress,
        )
    if as_json:
        from converters.reports.documents import conversion_document

        print_json(conversion_document(conversion))
    else:
        show_conversion(conversion)


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
        print_json(demo_document(result))
    else:
        show_demo(result)
    if not result.verdict.passed:
        raise typer.Exit(3)
