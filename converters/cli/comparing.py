"""The command that compares checkpoints."""

from __future__ import annotations

from typing import Annotated

import typer

from converters.cli.options import Ema, Json, Key, argument, print_json

__all__ = ["diff"]


def diff(
    first: Annotated[str, typer.Argument(metavar="A", help="A checkpoint: file, folder, prefix, or URL.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another, or a timm model (names and shapes only).")],
    key: Key = None,
    key_b: Annotated[str | None, typer.Option("--key-b", metavar="PATH", help="The same of B.")] = None,
    ema: Ema = None,
    arg: Annotated[list[str] | None, typer.Option(metavar="K=V", help="An argument of the timm model.")] = None,
    as_json: Json = False,
) -> None:
    """Compare two checkpoints, or a checkpoint and a timm model: names, shapes, dtypes, values.

    Exit code 0 where they are equal, 3 where they differ. NaN, Inf and dead batch norms are told and decide nothing.
    """
    from converters.differences import diff as compare
    from converters.reports.differences import difference_document, show_difference
    from converters.reports.terminal import progress_bar

    with progress_bar("comparing") as progress:
        args = dict(map(argument, arg or []))
        found = compare(first, second, keys=(key, key_b), ema=ema, args=args, progress=progress)
    if as_json:
        print_json(difference_document(found))
    else:
        show_difference(found)
    if not found.equal:
        raise typer.Exit(3)
