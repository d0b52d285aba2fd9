"""The report for build servers: JUnit XML, a suite for each folder and a case for each thing that can fail.

    NAME.verdict    the outcome; it fails whenever the verification did not pass, whatever else there is
    NAME.outputs    an output on a probe
    NAME.weights    the rounding of weights in a narrower dtype
    NAME.modules    a pair of modules; it fails only where the verification did, for modules alone decide nothing
    NAME.mutants    a deliberate fault, which fails when the verification does not see it

There are no times: the documents have none, so that runs agree.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from xml.etree import ElementTree

from converters.errors import OutputError, printable
from converters.reports.dossier import Dossier, Tap, figure, read_dossier

__all__ = ["render_junit", "write_junit"]

Case = tuple[str, str, str | None]  # group, name, why it failed


def write_junit(directories: Iterable[str | os.PathLike[str]], path: str | os.PathLike[str]) -> None:
    """Write the report on verified folders. Raises CheckpointError and OutputError."""
    text = render_junit(map(read_dossier, directories))
    try:
        Path(path).write_text(text, "utf-8", newline="\n")
    except OSError as error:
        raise OutputError(f"cannot be written: {(error.strerror or str(error)).lower()}", file=path) from error


def render_junit(dossiers: Iterable[Dossier]) -> str:
    """The XML. Control characters, which XML cannot hold, stand as escapes."""
    root = ElementTree.Element("testsuites", name="timmport")
    for dossier in dossiers:
        root.append(_suite(dossier))
    for key in ("tests", "failures", "errors"):
        root.set(key, str(sum(int(suite.get(key, 0)) for suite in root)))
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, "unicode") + "\n"


def _suite(dossier: Dossier) -> ElementTree.Element:
    cases, name = list(_cases(dossier)), printable(dossier.name)
    failures = sum(reason is not None for _, _, reason in cases)
    counts = {"tests": len(cases), "failures": failures, "errors": 0, "skipped": 0}
    suite = ElementTree.Element("testsuite", {"name": name, **{key: str(count) for key, count in counts.items()}})
    for group, case, reason in cases:
        element = ElementTree.SubElement(suite, "testcase", classname=f"{name}.{group}", name=printable(case))
        if reason is not None:
            ElementTree.SubElement(element, "failure", message=printable(reason, 1000), type=group)
    if warnings := [*dossier.conversion.caveats, *dossier.verification.warnings]:
        ElementTree.SubElement(suite, "system-out").text = "\n".join(printable(line, 1000) for line in warnings)
    return suite


def _cases(dossier: Dossier) -> Iterator[Case]:
    found = dossier.verification
    yield "verdict", "verdict", None if found.outcome == "passed" else f"{found.outcome}: {found.summary}"
    for one in found.comparisons:
        name = f"{one.output} on {one.probe} in {one.precision}"
        yield "outputs", name, None if one.passed else one.reason or "it differs"
    if rounding := found.rounding:
        wrong = f"{len(rounding.wrong)} are not the source's, rounded; the first is {' '.join(rounding.wrong[:1])}"
        name = f"{rounding.tensors} tensors rounded to {rounding.dtype}"
        yield "weights", name, None if rounding.passed else wrong
    modules: dict[str, list[Tap]] = {}
    for tap in found.taps:
        modules.setdefault(tap.target, []).append(tap)
    for target, taps in modules.items():
        faults = filter(None, map(_fault, taps)) if found.outcome == "failed" else ()
        yield "modules", target, next(iter(faults), None)
    for number, mutant in enumerate(found.mutants.mutants if found.mutants else (), 1):
        name = " ".join(filter(None, (f"{number}: {mutant.kind}", mutant.tensor, mutant.detail)))
        yield "mutants", name, None if mutant.detected else f"not found: its error is {figure(mutant.error)}"


def _fault(tap: Tap) -> str | None:
    """Why a pair of modules fails on its probe."""
    if tap.local_passed is False:
        where = f"{tap.probe}, on the reference's own input"
        return f"{where}: error {figure(tap.local_error)} where {figure(tap.local_bound)} is allowed"
    if not tap.passed:
        return f"{tap.probe}: error {figure(tap.error)} where {figure(tap.bound)} is allowed"
    return None
