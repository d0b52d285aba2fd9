"""The report as a web page: one file that needs no network, runs no script, and shows what the documents say.

The page allows its one style sheet, by hash, and nothing else. Whatever comes from a file is made printable
and escaped on its way into the template (`report.html.j2`), numbers included.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from converters.errors import OutputError, printable
from converters.names import fold
from converters.reports.charts import depth_chart, heatmap, margin_bars
from converters.reports.dossier import Dossier, Origin, figure, read_dossier

__all__ = ["render_html", "write_html"]

LONGEST = 200  # letters of a name
PREPROCESSING = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")


@dataclass(frozen=True)
class Fold:
    """Tensors that one row of the mapping made in the same way, folded over their numbers and leaves."""

    target: str
    source: str
    ops: str
    line: int | None
    rows: tuple[tuple[str, str], ...]  # target, its sources


@dataclass(frozen=True)
class Setting:
    """One thing about preprocessing, on both sides."""

    name: str
    declared: str | None
    emitted: str | None

    @property
    def differs(self) -> bool:
        return self.declared is not None and self.declared != self.emitted


def write_html(directory: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Write the report on a verified folder. Raises CheckpointError and OutputError."""
    text = render_html(read_dossier(directory))
    try:
        Path(path).write_text(text, "utf-8", newline="\n")
    except OSError as error:
        raise OutputError(f"cannot be written: {(error.strerror or str(error)).lower()}", file=path) from error


def render_html(dossier: Dossier) -> str:
    """The page."""
    found, conversion = dossier.verification, dossier.conversion
    folder = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"figure": figure, "prose": _prose, "value": _value}
    style = (folder / "report.css").read_text("utf-8")
    divergence = found.first_divergence
    return environment.get_template("report.html.j2").render(
        dossier=dossier,
        found=found,
        conversion=conversion,
        style=Markup(style),
        style_hash=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        depth=depth_chart(found.taps, divergence, found.culprit),
        heatmap=heatmap(divergence.channels, divergence.bound) if divergence else None,
        bars=margin_bars(found.mutants.mutants) if found.mutants else (),
        folds=list(folds(conversion.tensors)),
        settings=list(settings(conversion.preprocess, dossier.config.pretrained_cfg)),
    )
