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
from converters.folding import fold
from converters.reports.charts import depth_chart, heatmap, margin_bars
from converters.reports.dossier import Dossier, Origin, figure, read_dossier

__all__ = ["Fold", "Setting", "render_html", "write_html"]

LONGEST = 200  # letters of a name
TIMES = "\N{MULTIPLICATION SIGN}"
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
    environment.filters |= {
        "breakable": _breakable,
        "figure": figure,
        "folded": _folded,
        "information": _information,
        "prose": _prose,
        "times": _times,
        "value": _value,
        "versions": _versions,
    }
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
        ran={name: version for name, version in found.target.items() if not name.endswith("sha256")},
        folds=list(_folds(conversion.tensors)),
        left=[*_reasons("dropped", conversion.drops), *_reasons("set aside", conversion.set_aside)],
        notes=[
            *(("caveat", text) for text in conversion.caveats),
            *(("warning", text) for text in found.warnings),
        ],
        settings=list(_settings(conversion.preprocess, dossier.config.pretrained_cfg)),
    )


def _folds(tensors: Mapping[str, Origin]) -> Iterable[Fold]:
    """The tensors, those together that differ only in numbers and leaves."""
    alike: dict[tuple[object, ...], list[tuple[str, Origin]]] = {}
    for name, origin in sorted(tensors.items(), key=lambda item: _natural(item[0])):
        key = (origin.line, origin.ops, origin.fill, _module(name), *map(_module, origin.sources))
        alike.setdefault(key, []).append((name, origin))
    for members in alike.values():
        origin = members[0][1]
        constant = None if origin.fill is None else _filling(origin.fill)
        yield Fold(
            _folded(name for name, _ in members),
            constant or " + ".join(map(_folded, zip(*(origin.sources for _, origin in members), strict=True))),
            origin.ops,
            origin.line,
            tuple((name, constant or _sources(origin)) for name, origin in members),
        )


def _filling(fill: float | str) -> str:
    return f"the formula {fill}" if isinstance(fill, str) else f"the constant {fill:g}"


def _sources(origin: Origin) -> str:
    part, parts = origin.part
    return " + ".join(origin.sources) + (f" ({part + 1} of {parts})" if parts > 1 else "")


def _folded(names: Iterable[str]) -> str:
    """
    >>> _folded(["blocks.0.norm.weight", "blocks.0.norm.bias", "blocks.1.norm.weight", "blocks.1.norm.bias"])
    'blocks.{0..1}.norm.{weight,bias}'
    """
    return ", ".join(text for text, _ in fold(dict.fromkeys(name[: 2 * LONGEST] for name in names)))


def _module(name: str) -> str:
    """A tensor's module with its numbers left out.

    >>> _module("blocks.10.norm1.weight"), _module("block_3_expand/kernel")
    ('blocks.#.norm#', 'block_#_expand')
    """
    return re.sub("[0-9]+", "#", re.split(r"[./](?=[^./]*$)", name)[0])


def _natural(name: str) -> list[tuple[str, int]]:
    """A key that sorts `blocks.2` before `blocks.10`."""
    return [(text, int(number or 0)) for text, number in re.findall("([^0-9]*)([0-9]{0,18})", name)]


def _reasons(how: str, reasons: Mapping[str, str]) -> Iterable[tuple[str, int, str, str]]:
    """Sources that were left out for one reason: their names folded, how many, how, and the reason."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    for reason, alike in names.items():
        yield _folded(alike), len(alike), how, reason


def _settings(declared: Mapping[str, Any], emitted: Mapping[str, Any]) -> Iterable[Setting]:
    """What both sides say of preprocessing, the usual settings first."""
    for name in dict.fromkeys((*PREPROCESSING, *declared)):
        if name in declared or name in emitted:
            yield Setting(name, *(_value(side[name]) if name in side else None for side in (declared, emitted)))


def _information(value: float | None) -> str:
    """
    >>> [_information(value) for value in (2.66e-15, 0.99997, 1.0, None)]
    ['2.7e-15', '0.99997', '1', 'not finite']
    """
    return figure(value) if value is None or abs(value) < 1e-3 else f"{value:.6g}"


def _value(value: Any) -> str:
    """Any JSON value on one line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _times(margin: float | None) -> str:
    """
    >>> [_times(margin) for margin in (0.0213, 312.0, 40960.0, 3.1e8, None)]
    ['0.021×', '310×', '41,000×', '3.1e+08×', 'not finite']
    """
    if margin is None or not abs(margin) < 1e6:
        return figure(margin) + TIMES * (margin is not None)
    return f"{float(f'{margin:.2g}'):,.7g}{TIMES}"


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _breakable(name: str) -> Markup:
    """A name, or several, that may go on in the next line behind a separator."""
    return Markup(re.sub(r"([./,])(?=[A-Za-z{])", r"\1<wbr>", str(escape(printable(name, 2000)))))


def _prose(text: str) -> Markup:
    """A sentence, which may be longer than a name; no figure in it is torn apart at its sign."""
    return Markup(re.sub(r"[0-9.]+e-[0-9]+", r'<span class="whole">\g<0></span>', str(escape(printable(text, 2000)))))


def _shown(value: Any) -> Any:
    """What the template puts out: markup as it is, everything else printable and short, then escaped by Jinja."""
    return value if isinstance(value, Markup) else printable(str(value), LONGEST)
