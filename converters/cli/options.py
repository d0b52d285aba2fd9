"""What several commands take, and how they write documents."""

from __future__ import annotations

import json
import re
from pathlib import Path
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
    "channels",
    "class_list",
    "pixels",
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
        "flax:, tensorflow: or python:MODULE:FACTORY; RECORDING.npz.",
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


def pixels(text: str) -> int | list[int]:
    """`224`, or height and width: `224x320`."""
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise typer.BadParameter(f"--img-size {text} is no size; write 224 or 224x320")
    return int(text) if len(sides) == 1 else list(map(int, sides))


def channels(text: str) -> int:
    """`1`, or `rgba` for 4."""
    if text != "rgba" and not (text.isdecimal() and int(text)):
        raise typer.BadParameter(f"--in-chans {text} is no number of channels; write 1, 4 or rgba")
    return 4 if text == "rgba" else int(text)


def class_list(text: str) -> slice | tuple[int, ...]:
    """`1:`, or a file of class numbers, one a line."""
    if found := re.fullmatch("([0-9]*):([0-9]*)", text):
        return slice(*(int(end) if end else None for end in found.groups()))
    try:
        return tuple(int(line.split()[0]) for line in Path(text).read_text("utf-8").splitlines() if line.strip())
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"--classes {text}: {error}; write 1: or name a file with a number a line") from error


def print_json(document: Any) -> None:
    print(json.dumps(document, indent=2, allow_nan=False))
