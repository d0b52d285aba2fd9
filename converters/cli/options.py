"""What several commands take, and how they write documents."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

__all__ = [
    "Ema",
    "Interpreter",
    "Json",
    "Key",
    "Memory",
    "Output",
    "Reference",
    "ReferenceArg",
    "Source",
    "Timeout",
    "Trust",
    "argument",
    "print_json",
]

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


def argument(text: str) -> tuple[str, Any]:
    """`pad_type=same` or `depths=[2,2]`: the value is JSON where it reads as JSON, else text."""
    key, equals, value = text.partition("=")
    if not equals:
        raise typer.BadParameter(f"--arg {text} has no value; write K=V")
    try:
        return key, json.loads(value, parse_constant=str)
    except json.JSONDecodeError:
        return key, value


def print_json(document: Any) -> None:
    print(json.dumps(document, indent=2, allow_nan=False))
