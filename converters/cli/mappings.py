"""The commands about mapping files."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from converters.cli.options import Interpreter, Json, Timeout, print_json

__all__ = ["check", "families"]


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
        print_json(MappingFile.model_json_schema())
        return
    mappings = [load_mapping(one) for one in ([name] if name else find_mappings())]
    if as_json:
        documents = [family_document(mapping) for mapping in mappings]
        print_json(documents[0] if name else documents)
    elif name:
        show_family(mappings[0])
    else:
        show_families(mappings)


def check(
    mapping: Annotated[list[str], typer.Argument(metavar="MAPPING...", help="Families, or mapping files.")],
    to: Annotated[list[str] | None, typer.Option(metavar="MODEL", help="Only this target; may be repeated.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Run parity on every target, not the smallest.")] = False,
    no_parity: Annotated[bool, typer.Option("--no-parity", help="Lint and close; run no model.")] = False,
    img_size: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Pixels a side, where a model takes any size; else 96."),
    ] = None,
    python: Interpreter = None,
    timeout: Timeout = 900.0,
    as_json: Json = False,
) -> None:
    """Check mapping files: lint, a plan that closes on every target, parity on random weights, mutants.

    Exit code 3 where parity failed or is unproven, else 1 where a mapping is at fault, or a framework is missing.
    """
    from converters.checking import check as check_mapping
    from converters.reports.documents import check_document
    from converters.reports.terminal import show_check, status
    from converters.verifier.worker import Workers

    checks = []
    ways: dict[str, Any] = {"img_size": img_size, "python": python, "timeout": timeout, "everything": everything}
    with Workers() as workers:
        for one in mapping:
            with status() as tell:
                ways |= {"workers": workers, "progress": tell}
                checks.append(check_mapping(one, targets=to or (), parity=not no_parity, **ways))
            if not as_json:
                show_check(checks[-1])
    if as_json:
        print_json([check_document(one) for one in checks])
    if code := max(one.exit_code for one in checks):
        raise typer.Exit(code)
