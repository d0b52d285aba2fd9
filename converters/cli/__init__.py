"""The command line: `timmport COMMAND`; every command takes --json.

Exit codes: 0 done, 1 refused (one line on standard error), 2 usage, 3 parity failed or a difference found,
130 interrupted.
"""

from __future__ import annotations

import sys

import typer

from converters.cli.comparing import diff
from converters.cli.converting import convert, demo, inspect
from converters.cli.mappings import check, families
from converters.cli.verifying import record, verify
from converters.errors import ConverterError

__all__ = ["app", "main"]


app = typer.Typer(
    name="timmport",
    help="Bring vision checkpoints from any framework into timm, provably unchanged.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (inspect, convert, verify, diff, record, demo, families, check):
    app.command()(command)


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
